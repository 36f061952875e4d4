"""Measure the trained relatives: WORK/relatives.json and sheets of each, WORK/sheets/. Needs `judge` and the scenes.

Few steps, the sketch and the whole model draw the same prompts from the same noise. Edges and holes come from the
judge's scenes, which no relative has seen.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from bank import Bank
from common import Log, arguments, save_json, set_up_torch
from control import build_control, controlled, edges_of
from diffusion import Schedule, decode, sample
from evaluate import GUIDANCE, STEPS, Examiner, paint, ranks, share
from inpaint import build_inpaint, hidden, masks
from lcm import Course, draw
from lora import add_lora
from models import read_unet
from sheets import psnr, sheet, to_pixels
from state import averaged
from torch import Tensor, nn
from train import Pair, prompts, trained_pair
from train_vae import scene_rows

SHOWN = 16  # pictures of a row of a sheet
NEAR = 1  # pixels that an edge may be off
LEAPS = (4, 2, 1)


class Extended:
    """A U-Net that reads something more, with the face that `sample` expects."""

    def __init__(self, unet: nn.Module, control: nn.Module | None, more: Tensor):
        self.unet, self.control, self.more = unet, control, more
        self.config = SimpleNamespace(in_channels=unet.config.out_channels, sample_size=unet.config.sample_size)

    def __call__(self, x: Tensor, t: Tensor, words: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        """The prediction for latents of the pictures once, or twice."""
        more = self.more.repeat(len(x) // len(self.more), 1, 1, 1)
        if self.control is not None:
            return (controlled(self.unet, self.control, x, t, words, more),)
        return (read_unet(self.unet, torch.cat([x, more], 1), t, words),)


class Scenes:
    """Scenes of the judge: pictures, tokens of their first caption and rows."""

    def __init__(self, bank: Bank, work: Path, count: int):
        rows, tokens, found = (torch.from_numpy(some[:count]).to(bank.device) for some in scene_rows(work, judge=True))
        self.rows, self.tokens, self.found = rows, tokens[:, 0].long(), found.long()
        self.pictures = torch.cat([bank.sprites.paint(part) for part in rows.split(64)])

    def __len__(self) -> int:
        return len(self.rows)


def spread_out(mask: Tensor, reach: int) -> Tensor:
    """A mask (B, 1, H, W) of 0 and 1, wider by `reach` on all sides."""
    return F.max_pool2d(mask, 2 * reach + 1, 1, reach)


def alike(made: Tensor, wanted: Tensor) -> dict[str, float]:
    """Precision, recall and F1 of lines (B, 1, H, W), each picture's mean; lines may be NEAR pixels off."""
    made, wanted = made.float(), wanted.float()
    right = (made * spread_out(wanted, NEAR)).flatten(1).sum(1) / made.flatten(1).sum(1).clamp_min(1)
    found = (wanted * spread_out(made, NEAR)).flatten(1).sum(1) / wanted.flatten(1).sum(1).clamp_min(1)
    f1 = 2 * right * found / (right + found).clamp_min(1e-6)
    named = {"precision": right, "recall": found, "f1": f1}
    return {name: round(float(some.mean()), 4) for name, some in named.items()}


def rows_of(work: Path, name: str, *rows: Tensor) -> None:
    """A sheet with SHOWN pictures of each row below those of the row before."""
    sheet(work / "sheets" / f"{name}.png", np.concatenate([to_pixels(row[:SHOWN]) for row in rows]), SHOWN)


class Tests:
    """What is measured of each relative."""

    def __init__(self, row: SimpleNamespace, work: Path, log: Log):
        self.row, self.work, self.log, self.device = row, work, log, set_up_torch(row.seed, row.threads)
        self.pair, self.bank = trained_pair(row, work, self.device).eval(), Bank(row, work, self.device)
        self.schedule, self.empty = Schedule(self.device), self.bank.empty
        self.both: tuple[nn.Module, Pair] = (self.bank.vae, self.pair)
        self.examiner = Examiner(row, work, self.both)
        book, rng = self.examiner.book, np.random.default_rng(4)
        every = [(k, style) for k, concept in enumerate(book.concepts) for style in concept["pictures"]]
        self.pairs = [every[k] for k in rng.permutation(len(every))[: row.judged_pairs]]
        self.texts = [f"{self.examiner.a(k)}, {self.examiner.styles[book.styles.index(s)]}" for k, s in self.pairs]
        self.scenes = Scenes(self.bank, work, row.judged_scenes)

    def with_lora(self, file: str, rank: int) -> nn.Module:
        """The U-Net with a trained LoRA."""
        unet = copy.deepcopy(self.pair.unet)
        lora = add_lora(unet, rank)
        lora.load_state_dict(averaged(self.work / file))
        return unet.requires_grad_(False)

    def judged(self, pictures: Tensor) -> tuple[dict[str, Any], Tensor]:
        """Top-1 and top-5 shares of the pictures of `self.texts`, and the judge's styles."""
        concepts, _, _, style = evaluate.judge.verdicts(self.examiner.judge, pictures)
        return evaluate.shares(ranks(concepts, torch.tensor([k for k, _ in self.pairs]))), style.argmax(1)

    def drawn(self, texts: list[str], unet: nn.Module, leaps: int = 0) -> Tensor:
        """Pictures of prompts by a U-Net, the usual way or in so many leaps."""
        course = Course(self.schedule, self.empty, unet, unet, self.pair.text)

        def latents(tokens: Tensor, seed: int) -> Tensor:
            if leaps:
                return draw(course, unet, tokens, leaps, seed)
            return sample(unet, self.pair.text, tokens, self.empty, seed, steps=STEPS, guidance=GUIDANCE)

        return paint(texts, self.work, self.both, 100, latents)

    def few_steps(self) -> dict[str, Any]:
        """The judge's shares for the whole model and for few steps, of the same prompts."""
        unet, shown = self.with_lora("lcm.pt", self.row.lora_rank), prompts(self.row)
        whole = self.drawn(self.texts, self.pair.unet)
        told, rows = {"whole": self.judged(whole)[0]}, [self.drawn(shown, self.pair.unet)]
        for leaps in LEAPS:
            told[f"steps_{leaps}"] = self.judged(self.drawn(self.texts, unet, leaps))[0]
            rows.append(self.drawn(shown, unet, leaps))
        rows_of(self.work, "few-steps", *rows)
        return told

    def sketch(self) -> dict[str, Any]:
        """How many pictures the judge takes for sketches, with the LoRA and without, and for what they show."""
        unet, shown = self.with_lora("sketch.pt", self.row.style_rank), prompts(self.row)
        last, told = len(self.examiner.styles), {}
        for name, some in (("with", unet), ("without", self.pair.unet)):
            right, style = self.judged(self.drawn(self.texts, some))
            told[name] = {**right, "sketches": share(style == last)}
        rows_of(self.work, "sketch", self.drawn(shown, self.pair.unet), self.drawn(shown, unet))
        return told

    def extended(self, tokens: Tensor, unet: nn.Module, more: Tensor, control: nn.Module | None = None) -> Tensor:
        """Pictures drawn to edges, or into holes."""
        made, how = [], {"steps": STEPS, "guidance": GUIDANCE}
        for number, (words, some) in enumerate(zip(tokens.split(64), more.split(64), strict=True)):
            painter = Extended(unet, control, some)
            latents = sample(painter, self.pair.text, words, self.empty, 700 + number, **how)
            made.append(decode(self.bank.vae, latents))
        return torch.cat(made)

    def edges(self) -> dict[str, Any]:
        """How the edges of pictures drawn with them agree; the same without them, and of a copy by the VAE."""
        control = build_control(self.pair).to(self.device).eval()
        control.load_state_dict(averaged(self.work / "control.pt"))
        scenes, lines = self.scenes, edges_of(self.scenes.pictures)
        hint, none = lines.float().expand(-1, 3, -1, -1), self.empty.expand_as(scenes.tokens)
        some = (lines.flatten(1).sum(1) > 40).nonzero()[:, 0]
        captions = {"own_caption": scenes.tokens, "no_caption": none, "other_caption": scenes.tokens.roll(1, 0)}
        drawn = {name: self.extended(some, self.pair.unet, hint, control) for name, some in captions.items()}
        drawn["without_edges"] = self.extended(scenes.tokens, self.pair.unet, hint, build_control(self.pair).to(hint))
        drawn["copy_by_the_vae"] = torch.cat(
            [decode(self.bank.vae, self.bank.latents(part)) for part in scenes.pictures.split(64)]
        )
        rows_of(self.work, "edges", scenes.pictures, hint * 2 - 1, *drawn.values())
        told = {name: alike(edges_of(made)[some], lines[some]) for name, made in drawn.items()}
        return {"pictures": len(some), **told}

    def inpaint(self) -> dict[str, Any]:
        """Steps across the hole's border, with those that were there; what is made of the rest; things in holes."""
        unet = build_inpaint(self.row, self.work).unet.to(self.device).eval()
        unet.load_state_dict(averaged(self.work / "inpaint.pt"))
        mask = masks(len(self.scenes), self.row.size, torch.Generator(self.device).manual_seed(8))
        part = (mask.flatten(1).mean(1) < 0.9).nonzero()[:, 0]
        mask, pictures = mask[part], self.scenes.pictures[part]
        made, pasted = self.filled(unet, pictures, mask, self.scenes.tokens[part], "inpaint")
        rest = torch.where(mask > 0.5, pictures, made)
        told = {"border": seam(pasted, mask), "border_before": seam(pictures, mask), "pictures": len(part)}
        told["rest_before_pasting_psnr"] = round(float(psnr(rest, pictures).mean()), 2)
        return told | self.things_in_holes(unet)

    def filled(
        self, unet: nn.Module, pictures: Tensor, mask: Tensor, tokens: Tensor, name: str
    ) -> tuple[Tensor, Tensor]:
        """Pictures painted anew and pasted into their holes, with a sheet."""
        parts = zip(pictures.split(64), mask.split(64), strict=True)
        made = self.extended(tokens, unet, torch.cat([hidden(self.bank, *some) for some in parts]))
        pasted = torch.where(mask > 0.5, made, pictures)
        rows_of(self.work, name, pictures, pictures * (mask < 0.5), made, pasted)
        return made, pasted

    def things_in_holes(self, unet: nn.Module) -> dict[str, Any]:
        """Whether the judge finds the thing that the caption names where it was cut out of its picture."""
        scenes = self.scenes
        alone = ((scenes.found[:, 0] >= 0) & (scenes.found[:, 1] < 0)).nonzero()[:, 0]
        pictures, wanted = scenes.pictures[alone], scenes.found[alone, 0].cpu()
        x, y, size = (scenes.rows[alone, k].view(-1, 1, 1) for k in (1, 2, 3))
        place = (torch.arange(self.row.size, device=self.device) + 0.5) / self.row.size
        inside = ((place - x).abs() < size / 2) & ((place[:, None] - y).abs() < size / 2)
        mask = inside.float()[:, None]
        _, pasted = self.filled(unet, pictures, mask, scenes.tokens[alone], "inpaint-things")
        seen = {"things": pasted, "things_before": pictures, "things_cut_out": pictures * (mask < 0.5)}
        scores = {name: evaluate.judge.verdicts(self.examiner.judge, some)[0] for name, some in seen.items()}
        return {name: evaluate.shares(ranks(some, wanted)) for name, some in scores.items()}


def seam(pictures: Tensor, mask: Tensor) -> float:
    """The mean step between two pixels that lie on both sides of the mask's border, in 0 to 255."""
    steps, count = torch.zeros((), device=mask.device), torch.zeros((), device=mask.device)
    for dim in (2, 3):
        border = mask.diff(dim=dim).abs()
        steps += (pictures.clamp(-1, 1).diff(dim=dim).abs() * border).sum() * 127.5 / 3
        count += border.sum()
    return round(float(steps / count), 2)


@torch.no_grad()
def run(row: SimpleNamespace, work: Path, log: Log) -> None:
    """Measure each relative that is there."""
    evaluate.AT_ONCE = 64
    tests, numbers = Tests(row, work, log), {}
    files = {"few_steps": "lcm.pt", "sketch": "sketch.pt", "edges": "control.pt", "inpaint": "inpaint.pt"}
    for name, file in files.items():
        if (work / file).exists():
            numbers[name] = getattr(tests, name)()
            log(f"evaluate-relatives: {name} {numbers[name]}")
            save_json(work / "relatives.json", numbers)


def main() -> None:
    _, row, work = arguments(__doc__)
    run(row, work, Log(work / "evaluate_relatives.log"))


if __name__ == "__main__":
    main()
