"""Think up pictures: what stands where on which background, and captions that say so. Writes WORK/scenes/*.npz.

A scene is a row of numbers that `compose.py` paints: three things of THING columns, then the background's BACK
columns. What a caption leaves open (place, size, tilt, mirroring, shade, a pale tint of the background) differs from
scene to scene.
"""

from __future__ import annotations

import json
import math
import random
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from bpe import words_of
from captions import plural
from common import arguments, need, save_arrays, words

THINGS, THING, BACK = 3, 8, 10  # thing: picture, x, y, size, angle, mirrored, hue turn, shade
PLAIN, FADING, STRIPES, DOTS, CHECKS = range(5)  # back: kind, colour, second colour, angle, frequency, phase
COLUMNS = THINGS * THING + BACK
VARIANTS = 3  # captions of a scene
STYLED, ARTICLE, ON_WHITE_SAID = 0.86, 0.75, 0.15
DARK = ("black", "dark blue", "dark green", "dark red", "brown", "purple", "blue", "red")  # nothing for line art
OF = {
    "3d": "3d render of",
    "flat": "flat icon of",
    "line art": "line drawing of",
    "noto": "cartoon of",
    "twemoji": "sticker of",
}
NUMBERS = {2: ["two", "two", "2"], 3: ["three", "three", "3"]}
SIDES = ["left", "right", "top", "bottom"]


class Book:
    """Concepts, styles and pictures to draw scenes from; with `everything`, the held-out pairs too."""

    def __init__(self, facts: dict, extent: np.ndarray, hue: np.ndarray, weights: dict[str, float], everything: bool):
        held = set() if everything else {(concept, style) for concept, style in facts["held_out"]}
        self.concepts = facts["concepts"]
        self.extent, self.hue = extent.tolist(), hue.tolist()
        self.styles = facts["styles"]
        self.style_weights = [weights.get(style, 1.0) for style in self.styles]
        self.choices, self.cumulative = {}, {}
        for style in self.styles:
            rows = [(k, c["pictures"][style]) for k, c in enumerate(self.concepts) if style in c["pictures"]]
            self.choices[style] = [(k, picture) for k, picture in rows if (k, style) not in held]
            heights = [3.0 if self.concepts[k]["everyday"] else 1.0 for k, _ in self.choices[style]]
            self.cumulative[style] = np.cumsum(heights).tolist()
        table = words()
        self.colours, self.colour_words = table["colours"], table["colour_words"]
        self.turns, self.sizes, self.style_words = table["recolour"], table["sizes"], table["styles"]
        self.colour_names = list(self.colours)
        self.colouring = re.compile(r"\b(?:light |dark )?(?:" + "|".join([*self.colours, "grey"]) + r") (?=\w)")

    def style(self, rng: random.Random) -> str:
        """A style, by weight."""
        return rng.choices(self.styles, self.style_weights)[0]

    def thing(self, style: str, rng: random.Random) -> tuple[int, int]:
        """A concept and its picture in this style, everyday ones more often."""
        return rng.choices(self.choices[style], cum_weights=self.cumulative[style])[0]

    def colour(self, name: str, rng: random.Random) -> list[float]:
        """An (r, g, b) that goes by this name."""
        hue, saturation, value = (rng.uniform(*span) for span in self.colours[name])
        return rgb(hue % 1.0, saturation, value)

    def say_colour(self, name: str, rng: random.Random) -> str:
        """One of the words for this colour."""
        return rng.choice(self.colour_words.get(name, [name]))


def rgb(hue: float, saturation: float, value: float) -> list[float]:
    return [value - value * saturation * max(0.0, min(k, 4 - k, 1.0)) for k in ((n + hue * 6) % 6 for n in (5, 3, 1))]


class Thing:
    """One drawn thing: what it is, how it looks, and what a caption may say of it."""

    def __init__(self, book: Book, style: str, rng: random.Random, same: Thing | None = None):
        self.concept, self.picture = book.thing(style, rng) if same is None else (same.concept, same.picture)
        self.names = book.concepts[self.concept]["names"]
        self.half = book.extent[self.picture]
        self.size, self.x, self.y = 0.9, 0.5, 0.5
        self.angle = rng.gauss(0, 0.09)
        self.mirrored = rng.random() < 0.5
        self.shade = rng.uniform(0.9, 1.06)
        self.turn, self.colour, self.said_size, self.pose = 0.0, "", "", ""
        if same is not None:
            self.turn, self.colour = same.turn, same.colour
            return
        hue = book.hue[self.picture]
        if rng.random() < 0.22 and hue == hue:
            self.colour = rng.choice(list(book.turns))
            self.turn = (book.turns[self.colour] - hue + rng.uniform(-0.015, 0.015)) % 1.0
        if rng.random() < 0.04:
            self.pose, self.angle = "upside down", math.pi + rng.gauss(0, 0.1)

    def fit(self, size: float, x: float, y: float) -> None:
        """Place it, nudged inside the picture if it fits there."""
        self.size = size
        reach = [max(self.half) * size if abs(self.angle) > 0.5 else half * size for half in self.half]
        reach = [half + 0.02 for half in reach]
        self.x, self.y = (min(max(place, r), 1 - r) if r < 0.5 else 0.5 for place, r in zip((x, y), reach, strict=True))

    def row(self) -> list[float]:
        """Its columns."""
        return [self.picture, self.x, self.y, self.size, self.angle, self.mirrored, self.turn, self.shade]

    def name(self, book: Book, rng: random.Random) -> str:
        """Its name with colour and size, without an article; the plainest name most often."""
        name = self.names[0] if rng.random() > 0.35 else rng.choice(self.names)
        if self.colour:
            name = f"{book.say_colour(self.colour, rng)} {book.colouring.sub('', name)}"
        return f"{rng.choice(book.sizes[self.said_size])} {name}" if self.said_size else name

    def phrase(self, book: Book, rng: random.Random) -> str:
        """Its name with an article, most of the time, and its pose."""
        name = self.name(book, rng)
        if rng.random() < ARTICLE and plural(name) is not None:
            name = f"{article(name)} {name}"
        return f"{name} {self.pose}" if self.pose else name


def article(name: str) -> str:
    return "an" if re.match(r"[aeio]|un[^i]|um|hour|x-", name) else "a"


def alone(book: Book, style: str, rng: random.Random) -> tuple[list[Thing], list[str]]:
    """One thing, anywhere it has room."""
    thing = Thing(book, style, rng)
    place, chance = "", rng.random()
    if chance < 0.1:
        thing.said_size, size = "small", rng.uniform(0.26, 0.4)
    elif chance < 0.16:
        thing.said_size, size = "big", rng.uniform(0.98, 1.08)
    elif chance < 0.24:
        place, size = rng.choice(SIDES), rng.uniform(0.36, 0.52)
    else:
        size = rng.triangular(0.6, 1.0, 0.92)
    x, y = (0.5 + rng.uniform(-1, 1) * max(0.0, 0.5 - half * size) * 0.85 for half in thing.half)
    x = {"left": 0.05, "right": 0.95}.get(place, x)
    y = {"top": 0.05, "bottom": 0.95}.get(place, y)
    thing.fit(size, x, y)
    texts = []
    for _ in range(VARIANTS):
        text = thing.phrase(book, rng)
        if rng.random() < 0.03:
            text = f"one {thing.name(book, rng)}"
        texts.append(f"{text} {'on' if place in ('left', 'right') else 'at'} the {place}" if place else text)
    return [thing], texts


def several(book: Book, style: str, rng: random.Random) -> tuple[list[Thing], list[str]]:
    """Two or three of a kind."""
    first = Thing(book, style, rng)
    if plural(first.names[0]) is None or first.pose:
        return alone(book, style, rng)
    number = 2 if rng.random() < 0.5 else 3
    things = [first, *(Thing(book, style, rng, first) for _ in range(number - 1))]
    layout = rng.random()
    if number == 2:
        size = rng.uniform(0.4, 0.52)
        lean = rng.uniform(-0.12, 0.12) if layout < 0.8 else rng.choice([-0.22, 0.22])
        spots = [(0.27, 0.5 - lean), (0.73, 0.5 + lean)]
    elif layout < 0.4:
        size, lean = rng.uniform(0.3, 0.36), rng.uniform(-0.2, 0.2)
        spots = [(0.18, 0.5 - lean), (0.5, 0.5), (0.82, 0.5 + lean)]
    else:
        size, up = rng.uniform(0.36, 0.46), rng.choice([-1, 1])
        spots = [(0.26, 0.5 + 0.22 * up), (0.74, 0.5 + 0.22 * up), (0.5, 0.5 - 0.23 * up)]
    for thing, (x, y) in zip(things, spots, strict=True):
        thing.fit(size * rng.uniform(0.93, 1.05), x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.04, 0.04))
    texts = []
    for _ in range(VARIANTS):
        name = next((made for _ in range(3) if (made := plural(first.name(book, rng)))), None)
        texts.append(f"{rng.choice(NUMBERS[number])} {name or plural(first.names[0])}")
    return things, texts


def pair(book: Book, style: str, rng: random.Random) -> tuple[list[Thing], list[str]]:
    """Two things and how they stand to each other."""
    one, other = Thing(book, style, rng), Thing(book, style, rng)
    kind = rng.choice(["beside", "beside", "left", "left", "above", "above", "on"])
    sizes = [rng.uniform(0.42, 0.54) for _ in range(2)]
    if kind != "on" and rng.random() < 0.2:
        for k, (thing, word) in enumerate(zip(rng.sample([one, other], 2), ("big", "small"), strict=True)):
            thing.said_size = word
            sizes[0 if thing is one else 1] = rng.uniform(0.56, 0.64) if k == 0 else rng.uniform(0.26, 0.33)
    slack = rng.uniform(-0.12, 0.12)
    if kind == "above":
        spots = [(0.5 + slack, 0.26), (0.5 - slack, 0.75)]
    elif kind == "on":
        sizes[0] *= 0.92
        low = 0.96 - other.half[1] * sizes[1]
        spots = [
            (0.5 + slack / 3, low - 0.8 * other.half[1] * sizes[1] - one.half[1] * sizes[0]),
            (0.5 + slack / 2, low),
        ]
        one.pose = other.pose = ""
        one.angle = other.angle = rng.gauss(0, 0.03)
    else:
        spots = [(0.26, 0.5 + slack), (0.74, 0.5 - slack)]
    for thing, size, (x, y) in zip((one, other), sizes, spots, strict=True):
        thing.fit(size, x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.02, 0.02))
    texts = [relation(kind, one.phrase(book, rng), other.phrase(book, rng), rng) for _ in range(VARIANTS)]
    # What is painted last lies on top: the thing that stands on the other.
    return [other, one], texts


def relation(kind: str, one: str, other: str, rng: random.Random) -> str:
    """`one` is on the left, above, or on top."""
    if kind == "on":
        return f"{one} {rng.choice(['on', 'on', 'on top of'])} {other}"
    if kind == "above":
        chance = rng.random()
        if chance < 0.6:
            return f"{one} {rng.choice(['above', 'above', 'over'])} {other}"
        return f"{other} {rng.choice(['below', 'under'])} {one}"
    if kind == "left":
        if rng.random() < 0.5:
            return f"{one} {rng.choice(['left of', 'to the left of'])} {other}"
        return f"{other} {rng.choice(['right of', 'to the right of'])} {one}"
    if rng.random() < 0.5:
        one, other = other, one
    return f"{one} {rng.choice(['and', 'and', 'and', 'next to', 'beside', 'with'])} {other}"


def crowd(book: Book, style: str, rng: random.Random) -> tuple[list[Thing], list[str]]:
    """Three different things, named from left to right, or two of a kind and another."""
    if rng.random() < 0.35:
        things, _ = several(book, style, rng)
        while len(things) < 2:
            things, _ = several(book, style, rng)
        twin, third = things[0], Thing(book, style, rng)
        spots = (
            [(0.26, 0.27), (0.74, 0.27), (0.5, 0.74)]
            if rng.random() < 0.5
            else [(0.26, 0.73), (0.74, 0.73), (0.5, 0.26)]
        )
        things = [*things[:2], third]
        texts = []
        for _ in range(VARIANTS):
            name = plural(twin.names[0])
            if twin.colour:
                name = f"{book.say_colour(twin.colour, rng)} {plural(book.colouring.sub('', twin.names[0]))}"
            halves = [f"two {name}", third.phrase(book, rng)]
            texts.append(" and ".join(halves if rng.random() < 0.7 else halves[::-1]))
    else:
        things = [Thing(book, style, rng) for _ in range(3)]
        lean = rng.uniform(-0.2, 0.2)
        spots = [(0.18, 0.5 - lean), (0.5, 0.5), (0.82, 0.5 + lean)]
        if rng.random() < 0.4:
            spots = [(0.25, 0.5 + 0.22), (0.5, 0.5 - 0.23), (0.75, 0.5 + 0.22)]
        texts = []
        for _ in range(VARIANTS):
            a, b, c = (thing.phrase(book, rng) for thing in things)
            texts.append(f"{a}, {b} and {c}")
    room = 0.42 if spots[0][0] > 0.2 else 0.34
    for thing, (x, y) in zip(things, spots, strict=True):
        thing.fit(room * rng.uniform(0.88, 1.06), x, y)
    return things, texts


class Background:
    """What is behind the things, and what a caption may say of it."""

    def __init__(self, book: Book, style: str, named: bool, rng: random.Random):
        self.kind, self.name, self.second = PLAIN, "white", ""
        self.colours = [[1.0] * 3, [1.0] * 3]
        self.angle, self.frequency, self.phase = rng.uniform(0, 2 * math.pi), rng.uniform(3, 7), rng.random()
        if named:
            self._named(book, style, rng)
        elif rng.random() < 0.4:  # left open: white, or a breath of colour
            self.name = ""
            self.kind = FADING if rng.random() < 0.45 else PLAIN
            self.colours = [rgb(rng.random(), rng.uniform(0.03, 0.2), rng.uniform(0.94, 1)) for _ in range(2)]
        self.paint = [self.kind, *self.colours[0], *self.colours[1], self.angle, self.frequency, self.phase]

    def _named(self, book: Book, style: str, rng: random.Random) -> None:
        names = [n for n in book.colour_names if n != "white" and not (style == "line art" and n in DARK)]
        self.name, self.second = rng.sample(names, 2)
        self.kind = rng.choices([PLAIN, FADING, STRIPES, DOTS, CHECKS], [6, 2, 1, 1, 1])[0]
        colour = book.colour(self.name, rng)
        self.colours = [colour, book.colour(self.second, rng)]
        if self.kind in (STRIPES, DOTS, CHECKS):
            if rng.random() < 0.6:
                self.second = "white"
                self.colours[1] = [1.0] * 3
            self.frequency = rng.uniform(3, 6)
        if self.kind == FADING:  # from left to right or from top to bottom, as it is said
            self.angle = rng.choice([0.0, math.pi / 2]) + rng.uniform(-0.3, 0.3)

    def say(self, book: Book, text: str, rng: random.Random) -> str:
        """The caption with the background in it."""
        if not self.name:
            return text
        colour, second = book.say_colour(self.name, rng), book.say_colour(self.second, rng) if self.second else ""
        if self.kind == FADING:
            return f"{text} on a {colour} to {second} background"
        if self.kind in (STRIPES, DOTS, CHECKS):
            word = {STRIPES: "striped", DOTS: rng.choice(["dotted", "polka dot"]), CHECKS: "checkered"}[self.kind]
            both = colour if rng.random() < 0.4 else f"{colour} and {second}"
            return (
                f"{text} on a {word} {both} background"
                if rng.random() < 0.5
                else f"{text} on a {both} {word} background"
            )
        if self.name == "white" and rng.random() > ON_WHITE_SAID:
            return text
        ways = ["on a {} background", "on a {} background", "on {}", "with a {} background"]
        return f"{text}, {colour} background" if rng.random() < 0.2 else f"{text} {rng.choice(ways).format(colour)}"


def with_style(book: Book, text: str, style: str, rng: random.Random) -> str:
    chance = rng.random()
    if chance > STYLED:
        return text
    if chance < 0.1 and style in OF:
        return f"{OF[style]} {text}"
    return f"{text}, {rng.choice(book.style_words[style])}"


def scene(book: Book, rng: random.Random) -> tuple[list[float], list[str], list[int]]:
    """Numbers, captions, and what a judge should find: three concepts (-1: none), the plain colour and the style."""
    style = book.style(rng)
    kind = rng.choices([alone, several, pair, crowd, None], [60, 13, 19, 6, 2])[0]
    things, texts = kind(book, style, rng) if kind else ([], ["nothing"] * VARIANTS)
    behind = Background(book, style, kind is None or rng.random() < 0.4, rng)
    texts = [behind.say(book, text, rng) for text in texts]
    if kind is None:
        texts = [re.sub(r"^nothing,? ?(on |with )?", "", text) or "nothing" for text in texts]
    texts = [with_style(book, text, style, rng) for text in texts]
    row = [value for thing in things for value in thing.row()]
    row += [-1.0] * (THINGS * THING - len(row)) + behind.paint
    colour = book.colour_names.index(behind.name) if behind.name and behind.kind == PLAIN else -1
    found = [thing.concept for thing in things]
    return row, texts, [*found, *[-1] * (THINGS - len(found)), colour, book.styles.index(style)]


class Tokens:
    """Captions to ids by way of words, each of which the checkpoint's tokenizer sees once."""

    def __init__(self, work: Path, length: int):
        from sfumato.text.tokenizer import CLIPTokenizer

        self.length, self.known = length, dict[str, list[int]]()
        self.tokenizer = CLIPTokenizer.from_folder(need(work / "tokenizer", "captions.py"))
        self.start, self.end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id

    def word(self, word: str) -> list[int]:
        """Ids of one word."""
        if word not in self.known:
            whole = self.tokenizer.fitted([word]).input_ids[0].tolist()
            self.known[word] = [token for token in whole if token not in (self.start, self.end)]
        return self.known[word]

    def __call__(self, text: str) -> list[int] | None:
        """Ids (T,), or None for a caption that is too long."""
        ids = [self.start, *(token for word in words_of(text) for token in self.word(word))]
        return None if len(ids) >= self.length else ids + [self.end] * (self.length - len(ids))


def book_of(row: SimpleNamespace, work: Path, everything: bool = False) -> Book:
    facts = json.loads(need(work / "captions.json", "captions.py").read_text())
    sprites = np.load(need(work / "sprites.npz", "captions.py"))
    return Book(facts, sprites["extent"], sprites["hue"], row.style_weights, everything)


class Writer:
    """Writes parts of scenes. What it knows is made once and shared by the processes that are forked from it."""

    def __init__(self, row: SimpleNamespace, work: Path):
        self.row, self.folder = row, work / "scenes"
        self.books = {everything: book_of(row, work, everything) for everything in (False, True)}
        self.tokens = Tokens(work, row.tokens)

    def many(self, seed: int, count: int, everything: bool = False) -> dict[str, np.ndarray]:
        """`count` scenes of this seed: numbers (N, COLUMNS), tokens (N, VARIANTS, T) and what is to be found (N, 5)."""
        rng, length = random.Random(seed), self.row.tokens
        rows = np.empty((count, COLUMNS), np.float32)
        ids = np.empty((count, VARIANTS, length), np.int16)
        found = np.empty((count, THINGS + 2), np.int16)
        made = 0
        while made < count:
            numbers, texts, labels = scene(self.books[everything], rng)
            spelled = [some for text in texts if (some := self.tokens(text)) is not None]
            if not spelled:
                continue
            rows[made], found[made] = numbers, labels
            for k in range(VARIANTS):
                ids[made, k] = spelled[k % len(spelled)]
            made += 1
        return {"rows": rows, "tokens": ids, "found": found}

    def __call__(self, part: int) -> None:
        """One file; every part is a seed of its own. The judge's parts hold the held-out pairs too."""
        path = self.folder / f"{part:03d}.npz"
        if not path.exists():
            arrays = self.many(1000 * self.row.seed + part, self.row.scene_part, everything=is_judges(part))
            save_arrays(path, compress=False, **arrays)


def is_judges(part: int) -> bool:
    """Every eighth part is for the judge alone."""
    return part % 8 == 0


def run(row: SimpleNamespace, work: Path, processes: int) -> None:
    """All parts, in so many processes."""
    (work / "scenes").mkdir(exist_ok=True)
    writer = Writer(row, work)
    writer.many(0, min(2000, row.scene_part))  # most words are known before the processes part
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(writer, range(row.scene_parts)))


def main() -> None:
    args, row, work = arguments(
        __doc__, {"--processes": {"type": int, "default": 2}, "--show": {"type": int, "default": 0}}
    )
    if args.show:
        book, rng = book_of(row, work), random.Random(row.seed)
        for _ in range(args.show):
            print(*scene(book, rng)[1], sep=" | ")
        return
    run(row, work, args.processes)
    print(f"scenes: {row.scene_parts} parts of {row.scene_part} in {work / 'scenes'}")


if __name__ == "__main__":
    main()
