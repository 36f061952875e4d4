"""The tokenizer's own promises: what fits, what is lost, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sfumato
from sfumato.errors import CheckpointError, ConfigError, UsageError
from support.checkpoints import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return sfumato.CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_what_fits_is_not_lost(tokenizer):
    batch = tokenizer.fitted(["a cat", ""])
    assert batch.lost == ("", "")
    assert batch.input_ids.shape == (2, 20)
    assert batch.input_ids[1].tolist() == [598] + [599] * 19
    assert batch.attention_mask.sum(1).tolist() == [2 + len(tokenizer.tokenize("a cat")), 2]


def test_the_words_that_were_lost(tokenizer):
    words = "the cat of the red heart " * 4 + "LAST Words, ärgerlich!"
    lost = tokenizer.fitted(words).lost[0]
    assert lost.endswith("LAST Words, ärgerlich!")
    assert words.endswith(lost)
    kept = words[: -len(lost)]
    assert len(tokenizer.tokenize(kept)) == 18  # twenty places, less start and end


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8", max_codepoint=0x7E, min_codepoint=0x20), max_size=120))
def test_kept_and_lost_make_up_the_text(tokenizer, text):
    """What was kept gives the ids that were used; nothing is both seen and reported as lost."""
    batch = tokenizer.fitted(text)
    lost = batch.lost[0]
    everything = tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    assert batch.input_ids[0, 1:19].tolist()[: len(everything)] == everything[:18]
    assert (lost == "") == (len(everything) <= 18)
    if lost:
        assert text.rstrip().endswith(lost)
        rest = tokenizer._tokenizer.encode(lost, add_special_tokens=False).ids
        assert len(rest) <= len(everything) - 18 + 1


def test_a_list_of_one_pads_like_a_text(tokenizer):
    assert tokenizer.fitted(["a cat"]).input_ids.equal(tokenizer.fitted("a cat").input_ids)
    assert len(tokenizer("a cat").input_ids) == 2 + len(tokenizer.tokenize("a cat"))


def test_a_batch_is_a_mapping_that_moves(tokenizer):
    batch = tokenizer(["a cat"], return_tensors="pt")
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["input_ids"] is batch.input_ids
    assert batch.to("cpu").input_ids.equal(batch.input_ids)


def test_what_a_tokenizer_is_not_asked(tokenizer):
    with pytest.raises(UsageError, match="padding=True"):
        tokenizer(["a cat", "the red heart"], return_tensors="pt")
    with pytest.raises(UsageError, match="return_tensors must be"):
        tokenizer("a cat", return_tensors="tf")
    with pytest.raises(UsageError, match=r"no argument .paddings. .did you mean 'padding'"):
        tokenizer("a cat", paddings=True)
    with pytest.raises(AttributeError, match=r"add_tokens .adds words to a tokenizer. is not in Sfumato"):
        tokenizer.add_tokens(["<cat>"])
    assert not hasattr(tokenizer, "add_tokens")


def test_an_unlimited_length_means_clips(tmp_path):
    folder = write_tokenizer(tmp_path / "t", length=int(1e30))
    assert sfumato.CLIPTokenizer.from_pretrained(folder).model_max_length == 77


def test_files_survive_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    again = sfumato.CLIPTokenizer.from_pretrained(tmp_path / "saved")
    assert again.fitted("the cat!").input_ids.equal(tokenizer.fitted("the cat!").input_ids)
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


@pytest.mark.parametrize("kept", [0, 1, 10, -1])
def test_merges_that_were_cut_are_seen(tmp_path, kept):
    """Cut at a line, it is a whole file of fewer merges: words would fall into letters, and another picture come out."""
    folder = write_tokenizer(tmp_path / "t")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "merges.txt").write_text("".join(lines[:kept]), encoding="utf-8")
    with pytest.raises(CheckpointError, match="are the result of no merge, so it is incomplete") as caught:
        sfumato.CLIPTokenizer.from_pretrained(folder)
    assert str(folder / "merges.txt") in str(caught.value)


@pytest.mark.parametrize("number", [-1, 2**19, 2**32, 2**64, None, "5", 1.5, True, [1], 0])
def test_a_number_of_a_token_that_it_cannot_have(tmp_path, number):
    folder = write_tokenizer(tmp_path / "t")
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8")) | {"unused1": number}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    with pytest.raises(CheckpointError, match="does not give each token a unique id"):
        sfumato.CLIPTokenizer.from_pretrained(folder)


def test_the_largest_number_counts_and_not_how_many_there_are(tmp_path, checkpoints):
    folder = tmp_path / "c"
    shutil.copytree(checkpoints(), folder)
    vocab = json.loads((folder / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocab | {"unused1": 9999}), encoding="utf-8")
    assert sfumato.CLIPTokenizer.from_pretrained(folder / "tokenizer").largest_id == 9999
    with pytest.raises(CheckpointError, match="up to 9999, but the text encoder has only 600; they belong to diff"):
        sfumato.DiffusionPipeline.from_pretrained(folder)


SETTINGS = [
    {"model_max_length": "16"}, {"model_max_length": -5}, {"model_max_length": True}, {"model_max_length": [16]},
    {"pad_token": 5}, {"pad_token": {"content": None}}, {"pad_token": {"content": ["x"]}}, {"bos_token": {"content": "x", "lstrip": "yes"}},
    {"added_tokens_decoder": []}, {"added_tokens_decoder": {"1": 5}}, {"added_tokens_decoder": {"1": {"id": 5}}},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_setting_of_the_wrong_type_is_named(tmp_path, settings):
    folder = write_tokenizer(tmp_path / "t")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink()  # which goes before
    with pytest.raises(ConfigError, match=next(iter(settings))) as caught:
        sfumato.CLIPTokenizer.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def in_one_file(folder, **changes):
    """The same tokenizer as `tokenizer.json`."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = [line for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    model = {"type": "BPE", "vocab": vocab, "merges": merges} | changes.pop("model", {})
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model} | changes), encoding="utf-8")
    return folder


HOSTILE = [
    # Once a panic of the library, past every handler of errors.
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
    # Once all of the memory.
    {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 12}},
    {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}},
    {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}},
]  # fmt: skip


@pytest.mark.parametrize("changes", HOSTILE)
def test_of_tokenizer_json_only_words_are_read(tokenizer, tmp_path, changes):
    hostile = sfumato.CLIPTokenizer.from_pretrained(in_one_file(write_tokenizer(tmp_path / "t"), **changes))
    text = "the cat " + "a" * 40
    assert hostile.fitted(text).input_ids.equal(tokenizer.fitted(text).input_ids)


@pytest.mark.parametrize(
    "changes",
    [{"model": {"type": "WordPiece"}}, {"model": {"vocab": [1]}}, {"model": {"merges": "a b"}}, {"model": {"merges": [5]}},
     {"model": {"merges": [["a"]]}}, {"model": {"merges": []}}, {"added_tokens": 5}, {"added_tokens": [5]}, {"added_tokens": [{"id": 1}]}],
)  # fmt: skip
def test_a_tokenizer_json_of_another_kind(tmp_path, changes):
    with pytest.raises((CheckpointError, ConfigError), match=r"tokenizer\.json"):
        sfumato.CLIPTokenizer.from_pretrained(in_one_file(write_tokenizer(tmp_path / "t"), **changes))


@pytest.mark.parametrize("text", [5, None, [], ["a", 5], {"a": 1}])
def test_what_is_no_text(tokenizer, text):
    with pytest.raises(UsageError, match="the tokenizer takes a text or a list of texts, not"):
        tokenizer.fitted(text)


def test_a_text_that_is_not_unicode(tokenizer):
    with pytest.raises(UsageError, match="bytes that are not valid UTF-8"):
        tokenizer.fitted("\ud800")


def test_a_broken_tokenizer_json_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a byte-pair tokenizer"):
        sfumato.CLIPTokenizer.from_pretrained(tmp_path)


def test_a_vocabulary_that_is_not_clips(tmp_path):
    folder = write_tokenizer(tmp_path / "t")
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    values = {(token.replace("startoftext", "s")): i for token, i in vocab.items()}
    (folder / "vocab.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError):
        sfumato.CLIPTokenizer.from_pretrained(folder)
