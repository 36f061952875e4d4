"""The tokenizer's own promises: what fits, what is lost, what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sfumato
from sfumato.errors import CheckpointError
from support.checkpoints import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return sfumato.CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_what_fits_is_not_lost(tokenizer):
    batch = tokenizer(["a cat", ""])
    assert batch.lost == ("", "")
    assert batch.input_ids.shape == (2, 20)
    assert batch.input_ids[1].tolist() == [598] + [599] * 19
    assert batch.attention_mask.sum(1).tolist() == [2 + len(tokenizer.tokenize("a cat")), 2]


def test_the_words_that_were_lost(tokenizer):
    words = "the cat of the red heart " * 4 + "LAST Words, ärgerlich!"
    lost = tokenizer(words).lost[0]
    assert lost.endswith("LAST Words, ärgerlich!")
    assert words.endswith(lost)
    kept = words[: -len(lost)]
    assert len(tokenizer.tokenize(kept)) == 18  # twenty places, less start and end


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8", max_codepoint=0x7E, min_codepoint=0x20), max_size=120))
def test_kept_and_lost_make_up_the_text(tokenizer, text):
    """What was kept gives the ids that were used; nothing is both seen and reported as lost."""
    batch = tokenizer(text)
    lost = batch.lost[0]
    everything = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    assert batch.input_ids[0, 1:19].tolist()[: len(everything)] == everything[:18]
    assert (lost == "") == (len(everything) <= 18)
    if lost:
        assert text.rstrip().endswith(lost)
        rest = tokenizer._tokenizer.encode(lost, add_special_tokens=False).ids
        assert len(rest) <= len(everything) - 18 + 1


def test_a_list_of_one_pads_like_a_text(tokenizer):
    assert tokenizer(["a cat"]).input_ids.equal(tokenizer("a cat").input_ids)
    assert tokenizer("a cat", padding=True).input_ids.shape[1] == 2 + len(tokenizer.tokenize("a cat"))


def test_an_unlimited_length_means_clips(tmp_path):
    folder = write_tokenizer(tmp_path / "t", length=int(1e30))
    assert sfumato.CLIPTokenizer.from_pretrained(folder).model_max_length == 77


def test_files_survive_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    again = sfumato.CLIPTokenizer.from_pretrained(tmp_path / "saved")
    assert again("the cat!").input_ids.equal(tokenizer("the cat!").input_ids)
    assert again.pad_token_id == tokenizer.pad_token_id


def breaking(folder, name, content):
    path = folder / name
    path.unlink() if content is None else path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("vocab.json", None, "neither vocab.json"),
        ("merges.txt", None, "neither vocab.json"),
        ("vocab.json", "{", "vocab.json cannot be read"),
        ("vocab.json", "[]", "JSON object"),
        ("merges.txt", "one two three\n", "merges.txt does not fit"),
        ("merges.txt", "zzzz yyyy\n", "merges.txt does not fit"),
        ("tokenizer_config.json", "nonsense", "tokenizer_config.json cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, says):
    folder = write_tokenizer(tmp_path / "t")
    breaking(folder, name, content)
    with pytest.raises(CheckpointError, match=says) as caught:
        sfumato.CLIPTokenizer.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_a_broken_tokenizer_json_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer file"):
        sfumato.CLIPTokenizer.from_pretrained(tmp_path)


def test_a_vocabulary_that_is_not_clips(tmp_path):
    folder = write_tokenizer(tmp_path / "t")
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    values = {(token.replace("startoftext", "s")): i for token, i in vocab.items()}
    (folder / "vocab.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError):
        sfumato.CLIPTokenizer.from_pretrained(folder)
