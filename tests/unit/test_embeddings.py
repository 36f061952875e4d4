"""New words: every form of file, where they stand in a prompt, and what they are to the text encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sfumato.adapters.embeddings import read_embeddings
from sfumato.adapters.files import Stored, read_stored
from sfumato.errors import CheckpointError, UsageError
from sfumato.text.chunks import chunked
from sfumato.text.embeddings import Embedding, NewWords, pieces
from sfumato.text.prompt import encode_prompts
from support.checkpoints import TEXT

WIDTH = TEXT["hidden_size"]


def words_of(path, name=None, *, pickled=False):
    return {one.names: {width: tuple(v.shape) for width, v in one.vectors.items()} for one in read_embeddings(read_stored(path, pickled=pickled), name)}  # fmt: skip


FORMS = {
    "learned_embeds of one vector": ({"<cat-toy>": torch.ones(24)}, ("<cat-toy>", "toy"), {24: (1, 24)}),
    "several vectors": ({"<cat-toy>": torch.ones(3, 24)}, ("<cat-toy>", "toy"), {24: (3, 24)}),
    "A1111 safetensors": ({"emb_params": torch.ones(2, 24)}, ("toy",), {24: (2, 24)}),
    "SDXL": ({"clip_l": torch.ones(2, 24), "clip_g": torch.ones(2, 40)}, ("toy",), {24: (2, 24), 40: (2, 40)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_safetensors(form, tmp_path):
    tensors, names, shapes = FORMS[form]
    save_file(tensors, tmp_path / "toy.safetensors")
    assert words_of(tmp_path / "toy.safetensors") == {names: shapes}
    assert words_of(tmp_path / "toy.safetensors", "other") == {("other",): shapes}


def test_every_form_of_pickles_only_when_asked(tmp_path):
    vectors = torch.ones(2, 24)
    automatic = {
        "string_to_token": {"*": 265},
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)}),
        "name": "inner",
        "step": 7,
    }
    for number, content in enumerate(
        ({"<a>": vectors}, automatic, automatic | {"string_to_param": {"*": vectors}}, [{"x": vectors}])
    ):
        path = tmp_path / f"word{number}.pt"
        torch.save(content, path)
        with pytest.raises(CheckpointError, match="can run code"):
            read_stored(path)
        ((names, shapes),) = words_of(path, pickled=True).items()
        assert f"word{number}" in names
        assert shapes == {24: (2, 24)}


def test_files_that_are_no_embeddings(tmp_path):
    for tensors in (
        {"x": torch.ones(2, 2, 2)},
        {"<a>": torch.full((24,), float("nan"))},
        {"emb_params": torch.ones(80, 24)},
    ):
        with pytest.raises(CheckpointError, match=r"embedding|NaN"):
            read_embeddings(Stored(tensors, path=Path("a.safetensors")))
    with pytest.raises(UsageError, match="does not name its embedding"):
        read_embeddings(Stored({"emb_params": torch.ones(24)}))
    with pytest.raises(UsageError, match="2 embeddings"):
        read_embeddings(Stored({"<a>": torch.ones(24), "<b>": torch.ones(24)}), "c")


def test_names_stand_for_ids_wherever_they_are_whole_words():
    ids = {"cat": (600,), "cat-toy": (601, 602), "<s1>": (603,), "été": (604,)}

    def found(text):
        return [list(own) if own else piece for _, piece, own in pieces(text, ids) if own or piece]

    assert found("a cat-toy, CAT and concatenate") == ["a ", [601, 602], ", ", [600], " and concatenate"]
    assert found("embedding:cat <cat> <s1>s embedding:cat.pt") == [[600], " ", [600], " ", [603], "s ", [600]]
    assert found("(été:1.2)") == ["(", [604], ":1.2)"]
    assert found("") == []


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab <>-:,", max_size=20),
    names=st.lists(st.text(alphabet="ab-<>", min_size=1, max_size=4), max_size=3),
)
def test_nothing_of_a_text_is_lost(text, names):
    ids = {name: (600 + number,) for number, name in enumerate(dict.fromkeys(names))}
    parts = list(pieces(text, ids))
    assert "".join(piece for _, piece, _ in parts) == text
    for begin, piece, own in parts:
        assert text[begin : begin + len(piece)] == piece
        assert not own or any(name in piece.lower() for name in ids)


def test_vectors_of_the_vocabulary_change_nothing(ours):
    """A new word with the vector of a known one is that word."""
    pipe = ours()
    token = pipe.tokenizer("horse").input_ids[1]
    vector = pipe.text_encoder.text_model.embeddings.token_embedding.weight.detach()[token : token + 1]
    new = Embedding(("<new>",), {WIDTH: vector})
    plain = encode_prompts(pipe.tokenizer, pipe.text_encoder, ["a horse, red", "the cat"])
    found = encode_prompts(pipe.tokenizer, pipe.text_encoder, ["a <new>, red", "the cat"], embeddings=[new])
    if pipe.tokenizer.tokenize("horse") == pipe.tokenizer.tokenize("horse")[:1]:
        assert torch.equal(plain.embeds, found.embeds)
    other = Embedding(("<new>",), {WIDTH + 1: torch.ones(1, WIDTH + 1)})  # of another width: not a word here
    assert NewWords.of([other], WIDTH, 600).ids == {}


def test_a_new_word_is_never_cut_in_two(ours):
    pipe = ours()
    room = pipe.tokenizer.model_max_length - 2
    ids = {"new": tuple(range(600, 604))}
    tokens = pipe.tokenizer.fitted(["a " * (room - 2) + "new horse"], words=ids)
    assert tokens.lost == ("new horse",)
    assert int(tokens.input_ids.max()) < 600
    tokens = pipe.tokenizer.fitted(["a " * (room - 4) + "new horse"], words=ids)
    assert tokens.lost == ("horse",)
    assert tokens.input_ids[0, -5:-1].tolist() == [600, 601, 602, 603]


@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_new_words_in_prompts_with_weights(ours, syntax):
    pipe = ours()
    known = pipe.text_encoder.text_model.embeddings.token_embedding.weight.detach()
    token = pipe.tokenizer.ids("e")[0]
    new = Embedding(("<new>",), {WIDTH: known[token : token + 1]})

    def states(prompt, **more):
        return encode_prompts(pipe.tokenizer, pipe.text_encoder, [prompt], **more).embeds

    for plain in ("a <new>, a", "a embedding:<new>, a"):
        assert torch.equal(states(plain, embeddings=[new], syntax=syntax), states("a <new>, a", embeddings=[new]))
    # A new word with the vector of a known one is that word, under a weight and beyond the first chunk too.
    for prompt in ("a ({0}:1.3), a", "({0}:1.2) " + "a " * 100 + "({0})"):
        said, known_word = (states(prompt.format(one), embeddings=[new], syntax=syntax) for one in ("<new>", "e"))
        assert torch.equal(said, known_word)


@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
def test_a_new_word_begins_a_chunk_where_it_does_not_fit(ours, syntax):
    tokenizer = ours().tokenizer
    room = tokenizer.model_max_length - 2
    own = tuple(range(600, 600 + min(9, room)))  # so many vectors that ComfyUI would cut other words
    chunks = chunked(tokenizer, [("a " * (room - 2) + "new a", 1.2)], syntax, {"new": own})
    assert chunks.ids.shape[0] == 2
    assert int(chunks.ids[0].max()) < 600
    assert tuple(chunks.ids[1, 1 : len(own) + 1].tolist()) == own


def test_loading_and_forgetting(ours, tmp_path):
    pipe = ours()
    call = {"prompt": "a photo of toy", "num_inference_steps": 1, "output_type": "latent"}

    def draw():
        return pipe(generator=torch.Generator().manual_seed(0), **call).images

    plain = draw()
    save_file({"emb_params": torch.randn(2, WIDTH)}, tmp_path / "toy.safetensors")
    pipe.load_textual_inversion(tmp_path / "toy.safetensors")
    assert not torch.equal(draw(), plain)
    with pytest.raises(UsageError, match=r"no embedding 'tow' \(did you mean 'toy'"):
        pipe.unload_textual_inversion("tow")
    pipe.unload_textual_inversion("toy")
    assert torch.equal(draw(), plain)
    with pytest.raises(CheckpointError, match=f"768 values per vector, but the text encoder here needs {WIDTH}"):
        pipe.load_textual_inversion(torch.ones(768), token="x")
