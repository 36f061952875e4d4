"""The vocabulary in the package is CLIP's own."""

from __future__ import annotations

import json

import pytest
import transformers

import sfumato
from sfumato.text.vocabulary import clip_tokenizer
from support.assets import asset

TEXTS = ["a photo of an astronaut riding a horse", "Ünïcödé, 日本 🙂!", "", "x" * 300, "it's 2025"]


def test_it_is_the_published_one(tmp_path):
    folder = asset("clip_bpe")
    clip_tokenizer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text("utf-8")) == json.loads((folder / "vocab.json").read_text("utf-8"))  # fmt: skip
    merges = [(path / "merges.txt").read_text("utf-8").splitlines()[1:] for path in (tmp_path, folder)]
    assert merges[0] == [line for line in merges[1] if line]


@pytest.mark.parametrize(("pad", "number"), [("<|endoftext|>", 49407), ("!", 0)])
def test_the_reference_reads_the_same_tokens(pad, number, tmp_path):
    ours = clip_tokenizer(pad)
    assert len(ours) == 49408
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (49406, 49407, number)
    ours.save_pretrained(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    mine = ours(TEXTS, padding="max_length", max_length=77, truncation=True).input_ids
    other = theirs(TEXTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert mine == other.tolist()
    again = sfumato.CLIPTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS, padding="max_length", max_length=77, truncation=True).input_ids == mine
    assert clip_tokenizer(pad) is ours
