"""Measure the finished model: WORK/evaluation.json and WORK/evaluation.png. The numbers go into the model card."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import judge
import numpy as np
import torch
from captions import plural, tokens_of
from common import Log, arguments, load, need, save_json, set_up_torch, words
from compose import Sprites
from diffusion import decode, sample
from models import build_vae
from scenes import article, book_of
from sheets import sheet, to_pixels
from state import averaged
from torch import Tensor, nn
from train import Pair, build_pair, prompts
from train_vae import alone_on_white, held_out_psnr, held_pictures

Networks = tuple[nn.Module, Pair]
Draw = Callable[[Tensor, int], Tensor]
AT_ONCE = 16  # pictures
STEPS, GUIDANCE = 20, 3.0
SEEDS_OF = ["a red apple, 3d", "a smiling cat, flat style", "a rocket, line art", "a house, cartoon"]


def networks(row: SimpleNamespace, work: Path) -> Networks:
    """The folded VAE and the averaged text encoder and U-Net."""
    vae, pair = build_vae(row).eval(), build_pair(row, work).eval()
    vae.load_state_dict(load(need(work / "vae_final.pt", "encode.py"))["model"])
    pair.load_state_dict(averaged(need(work / "train.pt", "train.py")))
    return vae, pair


@torch.no_grad()
def paint(texts: list[str], work: Path, both: Networks, seed: int, draw: Draw | None = None) -> Tensor:
    """Pictures (B, 3, H, W) for prompts; `draw` makes latents of tokens and a seed where the usual way is not meant."""
    vae, pair = both
    device = next(pair.parameters()).device
    tokens, empty = (torch.from_numpy(tokens_of(work, some)).long().to(device) for some in (texts, [""]))
    usual = partial(sample, pair.unet, pair.text, steps=STEPS, guidance=GUIDANCE)
    draw = draw or (lambda part, seed: usual(part, empty, seed))
    parts = [decode(vae, draw(part, seed + index)) for index, part in enumerate(tokens.split(AT_ONCE))]
    return torch.cat(parts).cpu()


def shares(places: Tensor) -> dict[str, float]:
    """Top-1 and top-5 shares of a judge's ranking."""
    return {"pictures": len(places), "top1": share(places < 1), "top5": share(places < 5)}


def share(right: Tensor) -> float:
    return round(float(right.float().mean()), 4)


def ranks(scores: Tensor, concepts: Tensor) -> Tensor:
    """The place of the right concept among all, 0 the best."""
    return (scores > scores.gather(1, concepts[:, None])).sum(1)


class Examiner:
    """Asks the painter for things and the judge for what it sees."""

    def __init__(self, row: SimpleNamespace, work: Path, both: Networks):
        self.row, self.work, self.both, self.draw = row, work, both, None
        self.book = book_of(row, work, everything=True)
        self.judge = judge.load_judge(work, next(both[1].parameters()).device)
        self.styles = [words()["styles"][style][0] for style in self.book.styles]
        self.everyday = [k for k, concept in enumerate(self.book.concepts) if concept["everyday"]]

    def name(self, concept: int) -> str:
        """Its plainest name."""
        return self.book.concepts[concept]["names"][0]

    def a(self, concept: int) -> str:
        """Its name with an article, where one fits."""
        name = self.name(concept)
        return name if plural(name) is None else f"{article(name)} {name}"

    def seen(self, texts: list[str], seed: int) -> tuple[Tensor, ...]:
        """The judge's tables for pictures of these prompts."""
        return judge.verdicts(self.judge, paint(texts, self.work, self.both, seed, self.draw))

    def pairs(self, pairs: list[tuple[int, str]], seed: int) -> dict:
        """'<name>, <style>' for pairs of concept and style: is it that thing, and in that style?"""
        numbers = [self.book.styles.index(style) for _, style in pairs]
        texts = [f"{self.a(c)}, {self.styles[s]}" for (c, _), s in zip(pairs, numbers, strict=True)]
        concepts, _, _, style = self.seen(texts, seed)
        places = ranks(concepts, torch.tensor([c for c, _ in pairs]))
        worst = [texts[k] for k in places.argsort(descending=True)[:20].tolist()]
        named = style[:, : len(self.styles)].argmax(1)  # a sketch is no style that a prompt names
        return {**shares(places), "style": share(named == torch.tensor(numbers)), "worst": worst}

    def scenes(self, count: int, rng: np.random.Generator) -> dict:
        """Two things side by side, numbers of a thing, colours of the background, each in a style that has them."""
        texts, wanted = [], []
        for _ in range(count):
            one, other = rng.choice(self.everyday, 2, replace=False).tolist()
            texts.append(f"{self.a(one)} left of {self.a(other)}, {self.styles[0]}")
            wanted.append((one, other))
        drawn = paint(texts, self.work, self.both, 300)
        concepts, (ones, others) = judge.verdicts(self.judge, drawn)[0], torch.tensor(wanted).T
        both = share((torch.stack([ranks(concepts, ones), ranks(concepts, others)]) < 5).all(0))
        with torch.no_grad():
            drawn, ones, others = (some.to(next(self.judge.parameters()).device) for some in (drawn, ones, others))
            left = share(self.judge.where(drawn, ones)[:, 0] < self.judge.where(drawn, others)[:, 0])
        countable = [k for k in self.everyday if plural(self.name(k))]
        chosen, numbers = rng.choice(countable, count).tolist(), (torch.arange(count) % 3 + 1)
        said = ["", "one", "two", "three"]
        texts = [
            (self.a(k) if n == 1 else f"{said[n]} {plural(self.name(k))}") + f", {self.styles[0]}"
            for k, n in zip(chosen, numbers.tolist(), strict=True)
        ]
        number = share(self.seen(texts, 400)[1].argmax(1) == numbers)
        colours = torch.from_numpy(rng.integers(0, len(self.book.colour_names), count))
        chosen = rng.choice(self.everyday, count).tolist()
        texts = [
            f"{self.a(k)} on a {self.book.colour_names[c]} background, {self.styles[0]}"
            for k, c in zip(chosen, colours.tolist(), strict=True)
        ]
        colour = share(self.seen(texts, 500)[2].argmax(1) == colours)
        found = {"both_of_two_found": both, "left_of_right": left, "number_right": number, "background_right": colour}
        return {"pictures": 3 * count, **found}

    def art(self, count: int, sprites: Sprites, rng: np.random.Generator) -> dict:
        """What the judge makes of the drawn originals: the most that painted pictures can reach."""
        drawn = [(p, k) for k, concept in enumerate(self.book.concepts) for p in concept["pictures"].values()]
        chosen = [drawn[k] for k in rng.permutation(len(drawn))[:count]]
        pictures = sprites.paint(alone_on_white(np.array([p for p, _ in chosen])).to(sprites.device))
        return shares(ranks(judge.verdicts(self.judge, pictures)[0], torch.tensor([k for _, k in chosen])))


def spread(pictures: Tensor) -> float:
    """Mean distance of any two of the pictures: root mean square of their difference, in 0 to 255."""
    flat = pictures.clamp(-1, 1).flatten(1) * 127.5
    return float(torch.pdist(flat).mean() / flat.shape[1] ** 0.5)


def main() -> None:
    args, row, work = arguments(__doc__, {"--sheet-only": {"action": "store_true"}})
    log, device = Log(work / "evaluate.log"), set_up_torch(row.seed, row.threads)
    both = tuple(part.to(device) for part in networks(row, work))
    start = time.perf_counter()
    made = paint(prompts(row), work, both, 3)
    log(f"evaluate: {len(made)} pictures in {time.perf_counter() - start:.1f} s")
    sheet(work / "evaluation.png", to_pixels(made), 8)
    if args.sheet_only:
        return
    examiner, rng, sprites = Examiner(row, work, both), np.random.default_rng(2), Sprites.of(work, device)
    facts = json.loads((work / "captions.json").read_text())
    held = [(concept, style) for concept, style in facts["held_out"]]
    trained = [(k, s) for k, c in enumerate(facts["concepts"]) for s in c["pictures"] if (k, s) not in set(held)]
    chosen = [trained[k] for k in rng.permutation(len(trained))[: row.judged_pairs]]
    art = alone_on_white(np.flatnonzero(held_pictures(work)))
    numbers: dict = {"budget": row.name, "concepts": len(facts["concepts"])}
    numbers["vae_held_out_psnr"] = round(held_out_psnr(both[0], sprites, art[:: max(1, len(art) // 192)]), 2)
    numbers["judge_on_art"] = examiner.art(300, sprites, rng)
    log(f"evaluate: {numbers}")
    numbers["trained_pairs"] = examiner.pairs(chosen, 100)
    log(f"evaluate: trained {numbers['trained_pairs']}")
    numbers["held_out_pairs"] = examiner.pairs(held[: row.judged_held_out], 200)
    log(f"evaluate: held out {numbers['held_out_pairs']}")
    numbers["scenes"] = examiner.scenes(row.judged_scenes // 3, rng)
    log(f"evaluate: scenes {numbers['scenes']}")
    spreads = [spread(paint([text] * 16, work, both, 600)) for text in SEEDS_OF]
    numbers["spread_of_16_seeds"] = round(float(np.mean(spreads)), 1)
    save_json(work / "evaluation.json", numbers)
    log(f"evaluate: spread {spreads}")


if __name__ == "__main__":
    main()
