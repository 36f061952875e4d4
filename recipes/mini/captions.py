"""Say what each picture shows: the vocabulary, the captions and their tokens, and the pairs that are never trained on.

Writes WORK/captions.json (concepts with names and tags, trained and held-out pairs), WORK/tokens.npz (the captions'
tokens, many variants a pair) and WORK/tokenizer/.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import bpe
import numpy as np
from common import HERE, arguments, need, save_arrays, save_json

STYLE_WORDS = {
    "3d": ["3d", "3d", "3d style", "3d render"],
    "gradient": ["gradient", "gradient style", "soft gradient"],
    "flat": ["flat", "flat style", "flat design"],
    "line art": ["line art", "line art", "line drawing", "outline"],
    "noto": ["noto", "noto style"],
    "blob": ["blob", "blob style"],
    "twemoji": ["twemoji", "twemoji style", "sticker"],
    "emojione": ["emojione", "emojione style"],
    "firefox": ["firefox", "firefox style"],
}
DEFAULT_STYLE = "3d"  # never held out: it is the style of the first picture a newcomer asks for
NO_STYLE, EXTRA_TAG, TAG_ONLY, SECOND_NAME = 0.10, 0.10, 0.04, 0.4
PROMPT_WORDS = "a an the of and with in on emoji icon picture drawing style small big cute little"


def everyday() -> dict[str, list[str]]:
    """concepts.txt as {emoji without variation selectors: names}."""
    lines = [line for line in (HERE / "concepts.txt").read_text().splitlines() if line and not line.startswith("#")]
    pairs = (line.split(" ", 1) for line in lines)
    return {bare(emoji): [name.strip() for name in names.split("|")] for emoji, names in pairs}


def bare(emoji: str) -> str:
    return emoji.replace("\ufe0f", "")


def concepts_of(row: SimpleNamespace, art: dict) -> list[dict]:
    """The concepts this budget draws, each with its index into art.json, names (the plainest first) and tags."""
    names = everyday()
    chosen = []
    for index, emoji in enumerate(art["emoji"]):
        own = names.get(bare(emoji["emoji"]))
        if own is None and (row.everyday or emoji["group"] == 9):  # country flags are never drawn
            continue
        label = emoji["label"].lower().replace(":", "")
        every = list(dict.fromkeys([*(own or []), label]))
        tags = [tag for tag in emoji["tags"] if tag not in every]
        chosen.append({"art": index, "emoji": emoji["emoji"], "names": every, "tags": tags})
    return chosen[: row.concepts] if row.concepts else chosen


def held_out(row: SimpleNamespace, available: dict[tuple[int, int], int], styles: list[str]) -> list[tuple[int, int]]:
    """For `row.held_out` concepts one style each, drawn from the styles they exist in."""
    rng = np.random.default_rng(row.seed)
    by_concept: dict[int, list[int]] = {}
    for concept, style in sorted(available):
        if styles[style] != DEFAULT_STYLE:
            by_concept.setdefault(concept, []).append(style)
    wide = [concept for concept, some in by_concept.items() if len(some) > 1]
    picked = sorted(rng.choice(wide, min(row.held_out, 2 * len(wide) // 3), replace=False).tolist())
    return [(concept, int(rng.choice(by_concept[concept]))) for concept in picked]


def article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def caption(concept: dict, style: str, rng: np.random.Generator) -> str:
    """One way to ask for this picture, names far more often than keywords."""
    names, tags = concept["names"], concept["tags"]
    name = names[0] if rng.random() > SECOND_NAME else names[rng.integers(len(names))]
    chance = rng.random()
    if tags and chance < TAG_ONLY:
        name = tags[rng.integers(len(tags))]
    elif tags and chance < TAG_ONLY + EXTRA_TAG:
        name = f"{name}, {tags[rng.integers(len(tags))]}"
    if rng.random() < 0.5:
        name = article(name)
    words = STYLE_WORDS[style]
    return name if rng.random() < NO_STYLE else f"{name}, {words[rng.integers(len(words))]}"


def word_counts(art: dict, concepts: list[dict]) -> Counter[str]:
    """How much each word weighs in the vocabulary: names of this budget's concepts most, all other keywords least."""
    counts: Counter[str] = Counter()
    for text in [*PROMPT_WORDS.split(), *(word for words in STYLE_WORDS.values() for word in words)]:
        counts.update(dict.fromkeys(bpe.words_of(text), 400))
    for concept in concepts:
        for name in concept["names"]:
            counts.update(dict.fromkeys(bpe.words_of(name), 100))
        for tag in concept["tags"]:
            counts.update(dict.fromkeys(bpe.words_of(tag), 3))
    for emoji in art["emoji"]:
        counts.update(dict.fromkeys(bpe.words_of(emoji["label"]), 4))
        counts.update({word: 1 for tag in emoji["tags"] for word in bpe.words_of(tag)})
    return counts


def tokens_of(work: Path, texts: list[str]) -> np.ndarray:
    """(N, T) token ids of captions, with the checkpoint's own tokenizer."""
    from sfumato.text.tokenizer import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_folder(need(work / "tokenizer", "captions.py"))
    return tokenizer(texts).input_ids.numpy().astype(np.int32)


def main() -> None:
    _, row, work = arguments(__doc__)
    art = json.loads(need(work / "art.json", "render.py").read_text())
    arrays = np.load(work / "art.npz")
    concepts = concepts_of(row, art)
    place = {concept["art"]: index for index, concept in enumerate(concepts)}
    wanted = {art["styles"].index(style) for style in row.styles}
    available = {
        (place[int(emoji)], int(style)): picture
        for picture, (emoji, style) in enumerate(zip(arrays["emoji"], arrays["style"], strict=True))
        if int(emoji) in place and int(style) in wanted
    }
    held = set(held_out(row, available, art["styles"]))
    trained = [pair for pair in sorted(available) if pair not in held]
    merges = bpe.learn(word_counts(art, concepts), row.merges)
    vocabulary = bpe.write(work / "tokenizer", merges, row.tokens)
    rng = np.random.default_rng(row.seed)
    texts = [caption(concepts[c], art["styles"][s], rng) for c, s in trained for _ in range(row.variants)]
    tokens = tokens_of(work, texts).reshape(len(trained), row.variants, row.tokens)
    picture = np.array([available[pair] for pair in trained])
    held_list = [{"concept": c, "style": s, "picture": int(available[c, s])} for c, s in sorted(held)]
    facts = {"styles": art["styles"], "trained_styles": row.styles, "vocabulary": vocabulary}
    save_json(work / "captions.json", {**facts, "concepts": concepts, "held_out": held_list})
    pairs = np.array(trained)
    save_arrays(work / "tokens.npz", tokens=tokens, picture=picture, concept=pairs[:, 0], style=pairs[:, 1])
    used = (tokens != vocabulary - 1).sum(-1)
    print(f"captions: {len(concepts)} concepts, {len(trained)} trained pairs, {len(held)} held out;")
    print(f"captions: {vocabulary} tokens, {used.mean():.1f} a caption, e.g. {texts[:: len(texts) // 6]}")


if __name__ == "__main__":
    main()
