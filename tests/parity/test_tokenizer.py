"""Token ids against the reference's tokenizer, on any text."""

from __future__ import annotations

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import sfumato
from support.assets import ASSETS
from support.checkpoints import write_tokenizer

TEXTS = [
    "",
    " ",
    "a photo of an astronaut riding a horse on mars",
    "  many   spaces\tand\nlines  ",
    "MiXeD CaSe ÀÉÎÕÜ ß ẞ ſ İ ı",
    "emoji 🐱🏽‍🚀 👩‍👩‍👧‍👦 🇩🇪 ❤️",
    "naïve café, Ångström; jalapeño – “quotes” …",
    "日本語 中文 한국어 ไทย हिन्दी العربية עברית",
    "it's we'll they've I'm don't he'd we're 'tis",
    "1234567890 3.14 1e10 ½ ² Ⅷ ٣",
    "e\u0301 versus é, \ufb01ligature, \u212b",
    "<|startoftext|>inside<|endoftext|> and after",
    "<|endoftext|>",
    "<|EndOfText|>",
    "zero\u200bwidth\u00a0space\u2003em\u3000ideographic",
    "control \x00 \x07 \x1b \x7f \x85",
    "!!!???... ((nested)) [a:b:0.5] {x|y} a_b a-b #tag @me $5 50%",
    "astronaut " * 500,
    "🦄" * 120,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a small tokenizer, of one that pads with another token, and of CLIP's own where it is present."""
    root = tmp_path_factory.mktemp("tokenizers")
    found = {"small": write_tokenizer(root / "small"), "padded": write_tokenizer(root / "padded", pad="!")}
    if (ASSETS / "clip_bpe").is_dir():
        real = write_tokenizer(root / "clip", length=77)
        for name in ("vocab.json", "merges.txt"):
            (real / name).write_bytes((ASSETS / "clip_bpe" / name).read_bytes())
        found["clip"] = real
    return found


@pytest.fixture(scope="module")
def pairs(folders):
    """Our tokenizer and theirs over each folder."""
    return {
        name: (sfumato.CLIPTokenizer.from_pretrained(path), transformers.CLIPTokenizer.from_pretrained(path))
        for name, path in folders.items()
    }


def same(pair, text) -> None:
    ours, theirs = pair
    how = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    for a, b in ((ours(text, **how), theirs(text, **how)), (ours.fitted(text), theirs(text, **how))):
        assert a.input_ids.tolist() == b.input_ids.tolist()
        assert a.attention_mask.tolist() == b.attention_mask.tolist()


@pytest.mark.parametrize("which", ["small", "padded", "clip"])
def test_ids_of_awkward_texts(pairs, which):
    if which not in pairs:
        pytest.skip("CLIP's vocabulary is not on this machine")
    for text in TEXTS:
        same(pairs[which], text)
    same(pairs[which], TEXTS)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_ids_of_any_text(pairs, text):
    for pair in pairs.values():
        same(pair, text)


def test_lengths_and_padding(pairs):
    ours, theirs = pairs["small"]
    texts = ["a cat", "the red heart of the astronaut"]
    for length in (4, 7, 20):
        a = ours.fitted(texts, length)
        b = theirs(texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        assert a.input_ids.tolist() == b.input_ids.tolist()
    long = "astronaut " * 40
    a = ours([long, "cat"], padding=True, return_tensors="pt")
    b = theirs([long, "cat"], padding=True, return_tensors="pt")
    assert a.input_ids.tolist() == b.input_ids.tolist()
    assert a.lost == ("", "")


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"padding": "longest"},
        {"padding": True, "return_tensors": "np"},
        {"max_length": 5, "truncation": True},
        {"add_special_tokens": False},
        {"return_attention_mask": False},
        {"padding": "max_length", "max_length": 9},
    ],
)
def test_a_call_has_the_ecosystem_s_defaults(pairs, how):
    """Lists, nothing padded and nothing cut, unless it is asked for: `len(tokenizer(text)["input_ids"])` counts."""
    ours, theirs = pairs["small"]
    for text in ("a cat", "", ["a cat", "the red heart of the astronaut"]):
        a, b = ours(text, **how), theirs(text, **how)
        assert list(a) == list(b)
        for key in b:
            assert type(a[key]) is type(b[key])
            assert list(map(list, a[key])) == list(map(list, b[key])) if isinstance(text, list) else True
        assert str(a["input_ids"]) == str(b["input_ids"])


def test_back_to_text(pairs):
    for ours, theirs in pairs.values():
        for text in TEXTS:
            ids = theirs(text)["input_ids"]
            for skip in (False, True):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        ids = theirs(["a cat", "the dog"], padding=True, return_tensors="pt").input_ids
        assert ours.batch_decode(ids) == theirs.batch_decode(ids)
        assert ours.decode(ids[0]) == theirs.decode(ids[0])
        assert ours.encode("a cat") == theirs.encode("a cat")
        assert ours.tokenize("a cat") == theirs.tokenize("a cat")
        assert ours.convert_tokens_to_ids(["a</w>", "no such"]) == theirs.convert_tokens_to_ids(["a</w>", "no such"])
        assert ours.convert_ids_to_tokens([5, 6]) == theirs.convert_ids_to_tokens([5, 6])
        assert (ours.vocab_size, len(ours), ours.get_vocab()) == (theirs.vocab_size, len(theirs), theirs.get_vocab())
        assert (ours.pad_token, ours.all_special_ids) == (theirs.pad_token, theirs.all_special_ids)
        assert ours.special_tokens_map == theirs.special_tokens_map


def test_ids_from_tokenizer_json(folders, pairs, tmp_path):
    """A folder with tokenizer.json only, as newer checkpoints have it."""
    for name in folders:
        theirs = pairs[name][1]
        theirs.save_pretrained(tmp_path / name)
        for file in ("vocab.json", "merges.txt"):
            (tmp_path / name / file).unlink(missing_ok=True)
        assert (tmp_path / name / "tokenizer.json").is_file()
        pair = sfumato.CLIPTokenizer.from_pretrained(tmp_path / name), theirs
        for text in TEXTS:
            same(pair, text)


def test_the_reference_reads_what_we_write(pairs, tmp_path):
    for name, (ours, theirs) in pairs.items():
        ours.save_pretrained(tmp_path / name)
        again = transformers.CLIPTokenizer.from_pretrained(tmp_path / name)
        assert again.model_max_length == theirs.model_max_length
        for text in TEXTS:
            assert again(text, truncation=True).input_ids == theirs(text, truncation=True).input_ids


def test_special_tokens_agree(pairs):
    for ours, theirs in pairs.values():
        assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
        assert ours.pad_token_id == theirs.pad_token_id
        assert len(ours) == len(theirs)


def flagged(content: str, **flags: bool) -> dict[str, object]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False} | flags


START, END = (flagged(f"<|{word}oftext|>", normalized=True) for word in ("start", "end"))
SPECIALS = {
    "Stable Diffusion 1.5": ({"pad_token": END["content"]}, {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END["content"]}),
    "Stable Diffusion 2.1": ({"pad_token": END["content"]}, {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": "!"}),
    "only one file pads": ({"pad_token": None}, {"pad_token": "!"}),
    "the older file wins": ({"pad_token": "!"}, {"pad_token": END["content"]}),
    "an object with its type": ({"pad_token": flagged("!", rstrip=True) | {"__type": "AddedToken"}}, {"pad_token": None}),
    "unknown flagged, end not": ({}, {"unk_token": END}),
    "a list of added tokens": ({"pad_token": "!", "added_tokens_decoder": {"598": START, "599": END, "0": flagged("!", special=True)}}, {}),
    "a list, and two opinions": ({"pad_token": END["content"], "added_tokens_decoder": {"598": START, "599": END}}, {"pad_token": "!"}),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECIALS)
def test_special_tokens_in_every_spelling(case, tmp_path):
    """Which file names the padding, and with which flags, decides the ids of "!" and of special tokens in a text."""
    folder = write_tokenizer(tmp_path / "tokenizer")
    for name, changes in zip(("tokenizer_config.json", "special_tokens_map.json"), SPECIALS[case], strict=True):
        values = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        (folder / name).write_text(json.dumps(kept))
    pair = sfumato.CLIPTokenizer.from_pretrained(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    for text in ("a <|EndOfText|> b<|StartOfText|>c", "x <|endoftext|> !y", "hi ! there! !!a!b", "!  !"):
        same(pair, text)
    assert pair[0].pad_token_id == pair[1].pad_token_id
