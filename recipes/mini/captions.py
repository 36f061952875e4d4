"""Choose what is drawn and make its tokenizer: concepts, their names and art, and the pairs that are never trained on.

Writes WORK/captions.json (concepts with names and pictures, held-out pairs), WORK/sprites.npz (extent and main hue of
every picture) and WORK/tokenizer/.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import bpe
import numpy as np
from common import HERE, arguments, need, save_arrays, save_json, words
from render import unpacked

from sfumato.checkpoints.builtin import FOLDER

DEFAULT_STYLE = "3d"  # never held out: it is the style of the first picture a newcomer asks for
GRAMMAR = """a an the of and with in on at to one two three 1 2 3 background striped stripes dotted dots polka checkered
left right above below under next beside top bottom corner picture drawing icon emoji style upside down tilted
nothing"""
IRREGULAR = {
    "mouse": "mice", "leaf": "leaves", "knife": "knives", "foot": "feet", "tooth": "teeth", "wolf": "wolves",
    "man": "men", "woman": "women", "child": "children", "person": "people", "fish": "fish", "deer": "deer",
    "sheep": "sheep", "goose": "geese", "loaf": "loaves", "potato": "potatoes", "tomato": "tomatoes", "ox": "oxen",
    "bison": "bison", "scarf": "scarves", "elf": "elves", "octopus": "octopuses", "cactus": "cactuses",
}  # fmt: skip


def everyday() -> dict[str, list[str]]:
    """concepts.txt as {emoji without variation selectors: names}."""
    lines = [line for line in (HERE / "concepts.txt").read_text().splitlines() if line and not line.startswith("#")]
    pairs = (line.split(" ", 1) for line in lines)
    return {bare(emoji): [name.strip() for name in names.split("|")] for emoji, names in pairs}


def bare(emoji: str) -> str:
    return emoji.replace("\ufe0f", "")


def plain(label: str) -> str:
    return re.sub(r"\s+", " ", label.lower().replace("’", "'").replace(":", "").replace("“", "").replace("”", ""))


def plural(name: str) -> str | None:
    """'slice of pizza' -> 'slices of pizza'; None for names that are plural already."""
    head, *rest = re.split(r"(?= (?:of|with|in|on|and|without|to) )", name, maxsplit=1)
    *before, noun = head.split(" ")
    if noun in IRREGULAR:
        made = IRREGULAR[noun]
    elif noun.endswith("s") and not noun.endswith(("ss", "us", "is")):
        return None
    elif noun.endswith(("s", "x", "ch", "sh", "z")):
        made = noun + "es"
    elif noun.endswith("y") and noun[-2:-1] not in "aeiou":
        made = noun[:-1] + "ies"
    else:
        made = noun + "s"
    return " ".join([*before, made]) + "".join(rest)


def concepts_of(row: SimpleNamespace, art: dict, pictures: dict[int, dict[str, int]]) -> list[dict]:
    """The concepts this budget draws: emoji, names (the plainest first), picture of each style, whether everyday."""
    names, chosen, taken = everyday(), [], set()
    for index, emoji in enumerate(art["emoji"]):
        own = names.get(bare(emoji["emoji"]))
        if index not in pictures or (own is None and row.everyday):
            continue
        every = [name for name in dict.fromkeys([*(own or []), plain(emoji["label"])]) if name not in taken]
        if not every:
            continue
        taken.update(every)
        facts = {"art": index, "emoji": emoji["emoji"], "names": every, "everyday": own is not None}
        chosen.append({**facts, "pictures": pictures[index]})
    return chosen[: row.concepts] if row.concepts else chosen


def held_out(row: SimpleNamespace, concepts: list[dict]) -> list[tuple[int, str]]:
    """For `row.held_out` concepts one style each, drawn from the styles they exist in."""
    rng = np.random.default_rng(row.seed)
    wide = [
        (index, styles)
        for index, concept in enumerate(concepts)
        if len(styles := [s for s in concept["pictures"] if s != DEFAULT_STYLE]) > 1
    ]
    picked = rng.choice(len(wide), min(row.held_out, 2 * len(wide) // 3), replace=False)
    return [(wide[k][0], str(rng.choice(wide[k][1]))) for k in sorted(picked.tolist())]


def word_counts(art: dict, concepts: list[dict]) -> Counter[str]:
    """How much each word weighs in the vocabulary: the grammar's and concepts' names most, other keywords least."""
    counts: Counter[str] = Counter()
    table = words()
    lists = [*table["styles"].values(), *table["sizes"].values(), *table["colour_words"].values()]
    for text in [*GRAMMAR.split(), *table["colours"], *(word for some in lists for word in some)]:
        counts.update(dict.fromkeys(bpe.words_of(text), 400))
    for concept in concepts:
        for name in concept["names"]:
            counts.update(dict.fromkeys(bpe.words_of(name), 100))
            counts.update(dict.fromkeys(bpe.words_of(plural(name) or ""), 60))
    for emoji in art["emoji"]:
        counts.update(dict.fromkeys(bpe.words_of(plain(emoji["label"])), 4))
        counts.update({word: 1 for tag in emoji["tags"] for word in bpe.words_of(tag)})
    return counts


def tokens_of(work: Path, texts: list[str]) -> np.ndarray:
    """(N, T) token ids of captions, with the checkpoint's own tokenizer."""
    from sfumato.text.tokenizer import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_folder(need(work / "tokenizer", "captions.py"))
    return tokenizer.fitted(texts).input_ids.numpy().astype(np.int32)


def extent(picture: np.ndarray) -> tuple[float, float]:
    """Half width and half height of what is opaque, around the centre, as shares of the side."""
    opaque = picture[..., 3] > 24
    if not opaque.any():
        return 0.0, 0.0
    side = picture.shape[0]
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    reach = [max(side / 2 - some[0], some[-1] + 1 - side / 2) / side for some in (columns, rows)]
    return reach[0], reach[1]


def main_hue(picture: np.ndarray) -> float:
    """The hue in turns that most of the picture has, or nan where there is none to turn."""
    from PIL import Image

    opaque = picture[..., 3] > 128
    hsv = np.asarray(Image.fromarray(picture[..., :3]).convert("HSV"), np.float32)[opaque] / 255
    vivid = hsv[(hsv[:, 1] > 0.3) & (hsv[:, 2] > 0.25)]
    if len(vivid) < 0.4 * len(hsv) or not len(hsv):
        return float("nan")
    histogram, _ = np.histogram(vivid[:, 0], 40, (0, 1), weights=vivid[:, 1])
    smooth = sum(np.roll(histogram, k) for k in (-1, 0, 1))
    peak = (int(np.argmax(smooth)) + 0.5) / 40
    away = np.abs((vivid[:, 0] - peak + 0.5) % 1 - 0.5)
    return peak if (away < 0.09).mean() > 0.75 else float("nan")


def pictures_of(work: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Every picture as (H, W, 4) uint8, the styles' and the emoji's indices."""
    from concurrent.futures import ThreadPoolExecutor

    arrays = np.load(need(work / "art.npz", "render.py"))
    art, ends = arrays["art"].tobytes(), arrays["ends"].tolist()
    starts = [0, *ends[:-1]]
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda span: unpacked(art[span[0] : span[1]]), zip(starts, ends, strict=True)))
    return made, arrays["style"], arrays["emoji"]


def tokenizer(row: SimpleNamespace, work: Path, art: dict, concepts: list[dict]) -> int:
    """Write WORK/tokenizer, learned or the package's own; returns the number of its tokens."""
    if not row.shipped_words:
        return bpe.write(work / "tokenizer", bpe.learn(word_counts(art, concepts), row.merges), row.tokens)
    shutil.copytree(FOLDER / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
    return len(json.loads((work / "tokenizer" / "vocab.json").read_text()))


def main() -> None:
    _, row, work = arguments(__doc__)
    art = json.loads(need(work / "art.json", "render.py").read_text())
    images, style, emoji = pictures_of(work)
    pictures: dict[int, dict[str, int]] = {}
    for index, (concept, number) in enumerate(zip(emoji.tolist(), style.tolist(), strict=True)):
        pictures.setdefault(concept, {})[art["styles"][number]] = index
    concepts = concepts_of(row, art, pictures)
    held = held_out(row, concepts)
    vocabulary = tokenizer(row, work, art, concepts)
    facts = {"styles": art["styles"], "vocabulary": vocabulary, "held_out": held, "concepts": concepts}
    save_json(work / "captions.json", facts)
    hues = np.array([main_hue(image) for image in images], np.float32)
    save_arrays(work / "sprites.npz", extent=np.array([extent(image) for image in images], np.float32), hue=hues)
    print(f"captions: {len(concepts)} concepts, {len(images)} pictures, {len(held)} pairs held out;")
    print(f"captions: {vocabulary} tokens; {np.isfinite(hues).mean():.0%} of the pictures can take another colour")


if __name__ == "__main__":
    main()
