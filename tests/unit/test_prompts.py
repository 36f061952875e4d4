"""Prompts on their way to embeddings: chunks, weights, lengths, both branches and both encoders."""

from __future__ import annotations

import pytest
import torch

import sfumato
from sfumato import GenerateRequest
from sfumato.errors import UsageError
from sfumato.request import Noise
from sfumato.text.chunks import chunked
from sfumato.text.grammars import BREAK
from sfumato.text.prompt import encode_prompts
from support.checkpoints import write_tokenizer

# The random tokenizer reads 18 tokens between start and end.
ROOM = 18


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return sfumato.CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def encode(ours):
    parts = ours("sd15").parts
    reader = parts.readers[0]
    return lambda *prompts, **how: encode_prompts(reader.tokenizer, reader.encoder, prompts, **how)


def rows(tokenizer, spans, syntax="a1111"):
    chunks = chunked(tokenizer, spans, syntax)
    assert chunks.ids.shape == chunks.weights.shape
    return [row[1:].tolist() for row in chunks.ids], chunks.weights


def test_chunks_by_hand(tokenizer):
    word, comma, end = tokenizer.ids("a")[0], tokenizer.ids(",")[0], tokenizer.eos_token_id
    assert tokenizer.ids("a " * 3) == [word] * 3
    for count, chunks in ((0, 1), (ROOM, 1), (ROOM + 1, 2), (2 * ROOM, 2), (2 * ROOM + 1, 3)):
        ids, _ = rows(tokenizer, [("a " * count, 1.0)])
        assert len(ids) == chunks
        assert sum(row.count(word) for row in ids) == count
    ids, _ = rows(tokenizer, [("a", 1.0), BREAK, ("a", 2.0)])
    assert [row[:2] for row in ids] == [[word, end]] * 2
    # The phrase after the last comma goes on in the next chunk, whole.
    ids, weights = rows(tokenizer, [("a " * 9 + ",", 1.0), ("a " * 12, 1.5)])
    assert ids[0][:11] == [word] * 9 + [comma, end]
    assert ids[1][:13] == [word] * 12 + [end]
    assert weights[1, 1:14].tolist() == [1.5] * 12 + [1.0]
    assert weights[0].tolist() == [1.0] * 20
    # A comma that comes when the chunk is full begins the next one.
    ids, _ = rows(tokenizer, [("a " * ROOM + ", a", 1.0)])
    assert ids[1][:3] == [comma, word, end]


def test_chunks_of_comfyui(tokenizer):
    word = tokenizer.ids("a")[0]
    ids, _ = rows(tokenizer, [("a " * 15, 1.0), ("a " * 5, 1.2)], "comfyui")
    assert [row.count(word) for row in ids] == [15, 5]  # few are not cut
    ids, _ = rows(tokenizer, [("a " * 15, 1.0), ("a " * 9, 1.2)], "comfyui")
    assert [row.count(word) for row in ids] == [18, 6]


@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_without_syntax_the_numbers_are_the_same(encode, syntax):
    plain, read = encode("a cat, a red heart"), encode("a cat, a red heart", syntax=syntax)
    assert torch.equal(plain.embeds, read.embeds)
    assert torch.equal(encode("").embeds, encode("", syntax=syntax).embeds)
    assert torch.equal(encode("(a cat)").embeds, encode(r"\(a cat\)", syntax=syntax).embeds)
    assert not torch.allclose(encode("(a cat)").embeds, encode("(a cat)", syntax=syntax).embeds)


def test_emphasis_by_hand(encode, tokenizer):
    ids = tokenizer.ids("a "), tokenizer.ids("cat")
    states = encode("a cat").embeds.double()
    weights = torch.ones(1, 20, 1).double()
    weights[0, 1 + len(ids[0]) : 1 + len(ids[0]) + len(ids[1])] = 1.5
    weighted = states * weights
    wanted = weighted * (states.mean() / weighted.mean())
    assert torch.allclose(encode("a (cat:1.5)", syntax="a1111").embeds.double(), wanted, atol=1e-6)
    empty = encode("").embeds.double()
    assert torch.allclose(
        encode("a (cat:1.5)", syntax="comfyui").embeds.double(), empty + weights * (states - empty), atol=1e-6
    )


def test_long_prompts_are_read_to_the_end(encode):
    first, second = "a cat " * 9, "red heart"
    found = encode(first + second, syntax="a1111")
    assert found.lost == ()
    assert found.embeds.shape[1] == 40
    assert torch.allclose(found.embeds[:, :20], encode(first).embeds, atol=1e-6)
    assert torch.allclose(found.embeds[:, 20:], encode(second).embeds, atol=1e-6)
    assert encode(first + second).lost != ("",)
    # What stands beside it does not change a prompt; shorter ones are repeated.
    both = encode(first + second, second, syntax="a1111").embeds
    assert torch.equal(both[:1], found.embeds)
    assert torch.allclose(both[1:, :20], both[1:, 20:])


def test_prompts_that_cannot_be_as_long(encode):
    with pytest.raises(UsageError, match="generate them one by one"):
        encode(*("a cat " * (9 * count) for count in (5, 7, 8)), syntax="a1111")


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_pictures_of_long_and_weighted_prompts(ours, shape):
    pipe = ours(shape)
    request = GenerateRequest(
        prompt="a (cat:1.3), " * 12, negative_prompt="red", prompt_syntax="a1111", steps=1, seed=0, scheduler="euler"
    )
    result = pipe.generate(request)
    assert result.notes == ()
    assert result.recipes[0]["request"]["prompt_syntax"] == "a1111"
    plain = pipe.generate(request.replace(prompt_syntax="plain"))
    assert any("ignored: " in note for note in plain.notes)
    assert result.images[0].tobytes() != plain.images[0].tobytes()
    said = pipe.generate(request.replace(prompt="(a [cat <lora:x:1>"))
    assert len(said.notes) == 2


def test_pooled_prompts_are_of_the_first_chunk(ours):
    parts = ours("sdxl").parts
    reader = parts.readers[1]
    one, long = (
        encode_prompts(reader.tokenizer, reader.encoder, [text], syntax="a1111")
        for text in ("a cat", "a cat BREAK red")
    )
    assert torch.allclose(one.pooled, long.pooled, atol=1e-6)


def test_layers_of_the_negative_prompt(ours):
    pipe = ours("sdxl")
    request = GenerateRequest(prompt="a cat", negative_prompt="red", steps=1, seed=0, clip_skip=1)
    plain, both = (pipe.generate(one).images[0].tobytes() for one in (request, request.replace(negative_clip_skip=1)))
    assert plain != both
    assert plain == pipe.generate(request.replace(negative_clip_skip=0)).images[0].tobytes()


def test_noise_and_spacing_of_others(ours, tmp_path):
    pipe = ours("sd15")
    request = GenerateRequest(prompt="a cat", steps=3, seed=5, scheduler="euler_a", rng="cuda", spacing="karras")
    first = pipe.generate(request)
    assert first.images[0].tobytes() == pipe.generate(request).images[0].tobytes()
    assert GenerateRequest.from_dict(first.recipes[0]["request"]).spacing == "karras"
    changes = [
        {"rng": "torch"}, {"spacing": "uniform"}, {"noise": Noise(variation_seed=1, variation_strength=0.2)},
        {"noise": Noise(step_seed=31337)},
    ]  # fmt: skip
    pictures = {pipe.generate(request.replace(**change)).images[0].tobytes() for change in changes}
    assert len(pictures | {first.images[0].tobytes()}) == 5
    first.images[0].save(tmp_path / "a.png")
    start = request.replace(image=str(tmp_path / "a.png"), strength=0.7)
    sampled, mean = (pipe.generate(start.replace(noise=Noise(posterior=one))) for one in ("sample", "mean"))
    assert sampled.images[0].tobytes() != mean.images[0].tobytes()
    with pytest.raises(UsageError, match="chooses its steps itself"):
        pipe.generate(request.replace(scheduler="ddim"))


def test_a_prompt_that_changes_on_its_way(ours):
    pipe = ours("sd15")
    request = GenerateRequest(prompt="a [cat:red heart:1]", prompt_syntax="a1111", steps=3, seed=0, scheduler="euler")
    steps = list(pipe.stream(request))
    first, other = (list(pipe.stream(request.replace(prompt=text))) for text in ("a cat", "a red heart"))
    assert torch.equal(steps[0].latents, first[0].latents)
    assert not torch.equal(steps[1].latents, first[1].latents)
    assert not torch.equal(steps[1].latents, other[1].latents)
    late = list(pipe.stream(request.replace(prompt="a [cat:red heart:0]")))
    assert all(torch.equal(one.latents, two.latents) for one, two in zip(late, other, strict=True))
    # Literally, where no grammar is asked for.
    plain = pipe.generate(request.replace(prompt_syntax="plain"))
    assert plain.images[0].tobytes() != pipe.generate(request).images[0].tobytes()
