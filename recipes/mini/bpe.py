"""A byte-pair vocabulary in CLIP's file format, learned from the captions' words."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

from common import atomic, save_json

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def byte_letters() -> dict[int, str]:
    """A printable letter for each byte, in CLIP's order: printable Latin-1 is itself, the rest from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def words_of(text: str) -> list[str]:
    """The lower-case words of a caption, as CLIP's own pattern cuts them."""
    return re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|[0-9]|[^\s\w]+|_+", text.lower())


def learn(counts: Counter[str], merges: int) -> list[tuple[str, str]]:
    """The `merges` commonest pairs, greedily, over words weighted by `counts`; ties break alphabetically."""
    letters = byte_letters()
    spelled = {word: [letters[byte] for byte in word.encode()] for word in sorted(counts)}
    words = {word: [*parts[:-1], parts[-1] + WORD_END] for word, parts in spelled.items()}
    pairs: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[str]] = {}
    for word, parts in words.items():
        for pair in itertools.pairwise(parts):
            pairs[pair] += counts[word]
            where.setdefault(pair, set()).add(word)
    learned = []
    while len(learned) < merges and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] <= 0:
            break
        learned.append(best)
        for word in sorted(where[best]):
            parts = words[word]
            for pair in itertools.pairwise(parts):
                pairs[pair] -= counts[word]
            words[word] = joined(parts, best)
            for pair in zip(words[word], words[word][1:], strict=False):
                pairs[pair] += counts[word]
                where.setdefault(pair, set()).add(word)
        pairs.pop(best, None)
    return learned


def joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """`parts` with every occurrence of `pair` made one."""
    made: list[str] = []
    for part in parts:
        if made and (made[-1], part) == pair:
            made[-1] += part
        else:
            made.append(part)
    return made


def write(folder: Path, merges: list[tuple[str, str]], length: int) -> int:
    """Write the four tokenizer files of a checkpoint; returns the size of the vocabulary."""
    letters = [*byte_letters().values()]
    entries = [*letters, *(letter + WORD_END for letter in letters)]
    entries += [*dict.fromkeys(a + b for a, b in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "vocab.json") as partial:
        partial.write_text(json.dumps({entry: index for index, entry in enumerate(entries)}, ensure_ascii=False))
    with atomic(folder / "merges.txt") as partial:
        partial.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    save_json(folder / "special_tokens_map.json", special)
    facts = {"do_lower_case": True, "errors": "replace", "model_max_length": length, "tokenizer_class": "CLIPTokenizer"}
    save_json(folder / "tokenizer_config.json", {**special, **facts, "add_prefix_space": False})
    return len(entries)
