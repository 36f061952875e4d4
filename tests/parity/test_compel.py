"""Prompts in compel's grammar: what it parses and what it computes, against the library itself."""

from __future__ import annotations

import pytest
import torch

from sfumato.text.compel import compel
from sfumato.text.prompt import encode_prompts

PROMPTS = [
    "a photo of a horse",
    "a photo+ of a horse--",
    "a (small horse)1.3, in a field",
    "(small horse)++ a-b cat-",
    'a "small horse"1.2 in the field',
    "a (horse in a (small field)0.5)1.2",
    "(horse)0.8 (photo)0.8, cat",
    "a (horse)0.4 and a (cat)0 of a photo",
    r"a \(small\) horse",
    "(a horse).attend(1.4) in a field.attend(--)",
    '("a horse", "a cat in a field").blend(1, 0.5)',
    '("a horse+", "a cat").blend(0.7, -0.2, no_normalize)',
    '("a horse", "a (cat)1.3", "a field").blend()',
    '("a horse", "a cat").and()',
    '("a horse", "a (cat)0.5").and(1, 0.5)',
    "",
]  # fmt: skip


@pytest.fixture(scope="module")
def both(checkpoints):
    """Our text encoder and theirs in float64, with their tokenizers."""
    library = pytest.importorskip("compel")
    import transformers

    import sfumato

    pipe = sfumato.DiffusionPipeline.from_pretrained(checkpoints())
    tokenizer = transformers.CLIPTokenizer.from_pretrained(checkpoints() / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(checkpoints() / "text_encoder").double().eval()
    theirs = library.Compel(tokenizer=tokenizer, text_encoder=encoder, dtype_for_device_getter=lambda _: torch.float64)
    return pipe.tokenizer, pipe.text_encoder.double(), theirs


@pytest.mark.parametrize("prompt", PROMPTS)
def test_embeddings_are_compels(both, prompt):
    tokenizer, encoder, theirs = both
    mine = encode_prompts(tokenizer, encoder, [prompt], syntax="compel")
    with torch.no_grad():
        other = theirs(prompt)
    assert mine.notes == ()
    assert mine.embeds.shape == other.shape
    assert (mine.embeds - other).abs().max() < 1e-6 * max(1.0, other.abs().max().item())


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("a+ b", (("a", 1.1), (" b", 1.0))),
        ("a- b--", (("a", 0.9), (" ", 0.9), ("b", 0.81))),
        ("(a (b)2)0.5", (("a ", 0.5), ("b", 1.0))),
        ("a-b +c", (("a-b +c", 1.0),)),
        (r"\(a\)", (("(a)", 1.0),)),
    ],
)
def test_spans(prompt, spans):
    read = compel(prompt)
    merged = [one for one in read.spans if one[0].strip()]
    assert [text.strip() for text, _ in merged] == [text.strip() for text, _ in spans if text.strip()]
    assert [weight for _, weight in merged] == pytest.approx([weight for text, weight in spans if text.strip()])


@pytest.mark.parametrize(
    ("prompt", "note"),
    [
        ("a (horse", "an unclosed bracket"),
        ("a cat.swap(dog)", ".swap(dog) in the prompt is ignored"),
        ("a cat withLora(style, 0.5)", "withLora(style, 0.5) in the prompt is ignored"),
        ('("a", "b").blend(1)', "(1) does not give 2 weights for 2 prompts"),
    ],
)
def test_what_is_not_done_is_said(prompt, note):
    (said,) = compel(prompt).notes
    assert said.startswith(note)


def test_by_hand(both):
    """adapters.md, section 5b: a word of weight w >= 1 lies w times as far from the empty prompt."""
    tokenizer, encoder, _ = both
    states = encode_prompts(tokenizer, encoder, ["a horse"]).embeds
    empty = encode_prompts(tokenizer, encoder, [""]).embeds
    strong = encode_prompts(tokenizer, encoder, ["a horse++"], syntax="compel").embeds
    place = slice(2, 1 + len(tokenizer.ids("a horse")))
    assert torch.allclose(strong[:, place], empty[:, place] + 1.21 * (states[:, place] - empty[:, place]), atol=1e-9)
    assert torch.equal(strong[:, :2], states[:, :2])
    assert torch.allclose(
        encode_prompts(tokenizer, encoder, ["horse"], syntax="compel").embeds,
        encode_prompts(tokenizer, encoder, ["horse"]).embeds,
    )


def test_a_long_prompt_is_read_to_its_end(both):
    tokenizer, encoder, _ = both
    room = tokenizer.model_max_length
    embeds = encode_prompts(tokenizer, encoder, ["horse " * 40 + "(cat)0.5"], syntax="compel").embeds
    assert embeds.shape[1] % room == 0
    assert embeds.shape[1] > room
    assert torch.isfinite(embeds).all()
