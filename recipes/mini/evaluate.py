"""Measure the finished model: WORK/evaluation.json and WORK/evaluation.png. The numbers go into the model card."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import judge
import numpy as np
import torch
from captions import STYLE_WORDS, tokens_of
from common import HERE, Log, arguments, load, need, save_json, set_up_torch
from diffusion import decode, sample
from models import build_text, build_unet, build_vae
from sheets import psnr, sheet, to_pixels, to_tensor
from state import averaged
from torch import Tensor, nn
from train import Pair
from train_vae import split

Networks = tuple[nn.Module, Pair]


def networks(row: SimpleNamespace, work: Path) -> Networks:
    """The folded VAE and the averaged text encoder and U-Net."""
    vocabulary = json.loads(need(work / "captions.json", "captions.py").read_text())["vocabulary"]
    vae, pair = build_vae(row).eval(), Pair(build_text(row, vocabulary), build_unet(row)).eval()
    vae.load_state_dict(load(need(work / "vae_final.pt", "encode.py"))["model"])
    pair.load_state_dict(averaged(need(work / "train.pt", "train.py")))
    return vae, pair


def paint(prompts: list[str], work: Path, both: Networks, seed: int) -> Tensor:
    """Pictures (B, 3, H, W) for prompts."""
    vae, pair = both
    device = next(pair.parameters()).device
    tokens, empty = (torch.from_numpy(tokens_of(work, texts)).long().to(device) for texts in (prompts, [""]))
    parts = [
        decode(vae, sample(pair.unet, pair.text, part, empty, seed + index, steps=20))
        for index, part in enumerate(tokens.split(32))
    ]
    return torch.cat(parts)


@torch.no_grad()
def vae_psnr(vae: nn.Module, work: Path, count: int) -> float:
    """Mean PSNR over art of emoji that the VAE never saw."""
    images, _, held = split(work)
    values = []
    for start in range(0, len(held[:count]), 32):
        x = to_tensor(images[held[:count][start : start + 32]]).to(next(vae.parameters()).device)
        values.append(psnr(vae.decode(vae.encode(x).latent_dist.mean).sample, x).cpu())
    return float(torch.cat(values).mean())


def shares(places: Tensor) -> dict[str, float]:
    """Top-1 and top-5 shares of a judge's ranking."""
    return {"top1": round(float((places < 1).float().mean()), 4), "top5": round(float((places < 5).float().mean()), 4)}


def judged(pairs: list[tuple[int, int]], facts: dict, work: Path, both: Networks, seed: int) -> dict:
    """Paint '<name>, <style>' for (concept, style) pairs and let the judge name the pictures, style by style."""
    styles, concepts = facts["styles"], facts["concepts"]
    prompts = [f"{concepts[c]['names'][0]}, {STYLE_WORDS[styles[s]][0]}" for c, s in pairs]
    emoji = torch.tensor([concepts[c]["art"] for c, _ in pairs])
    places = judge.ranks(work, paint(prompts, work, both, seed), emoji)
    by_style = {}
    for style in sorted({s for _, s in pairs}):
        rows = torch.tensor([s == style for _, s in pairs])
        by_style[styles[style]] = {"pictures": int(rows.sum()), **shares(places[rows])}
    order = places.argsort(descending=True)[:20].tolist()
    return {"pictures": len(pairs), **shares(places), "styles": by_style, "worst": [prompts[k] for k in order]}


def real_art(facts: dict, work: Path, data: dict) -> dict:
    """What the judge makes of the drawn originals: the most that painted pictures can reach."""
    rows = np.random.default_rng(0).choice(len(data["picture"]), min(400, len(data["picture"])), replace=False)
    images = to_tensor(np.load(work / "art.npz")["images"][data["picture"][rows]])
    emoji = torch.tensor([facts["concepts"][c]["art"] for c in data["concept"][rows]])
    return {"pictures": len(rows), **shares(judge.ranks(work, images, emoji))}


def main() -> None:
    args, row, work = arguments(__doc__, {"--sheet-only": {"action": "store_true"}})
    log, device = Log(work / "evaluate.log"), set_up_torch(row.seed, row.threads)
    vae, pair = networks(row, work)
    both = (vae.to(device), pair.to(device))
    prompts = (HERE / "prompts.txt").read_text().splitlines()[: 2 * row.sheet_prompts]
    start = time.perf_counter()
    made = paint(prompts, work, both, 3)
    log(f"evaluate: {len(prompts)} pictures in {time.perf_counter() - start:.1f} s")
    sheet(work / "evaluation.png", to_pixels(made), 8, zoom=2 if row.size <= 64 else 1)
    if args.sheet_only:
        return
    facts = json.loads((work / "captions.json").read_text())
    data = dict(np.load(work / "tokens.npz"))
    trained = list(zip(data["concept"].tolist(), data["style"].tolist(), strict=True))
    chosen = np.random.default_rng(2).permutation(len(trained))[: row.judged_pairs]
    held = [(pair["concept"], pair["style"]) for pair in facts["held_out"]][: row.judged_held_out]
    numbers = {
        "budget": row.name,
        "samples": load(work / "train.pt")["step"] * row.batch,
        "concepts": len(facts["concepts"]),
        "vae_held_out_psnr": round(vae_psnr(vae, work, 10_000), 2),
        "judge_on_art": real_art(facts, work, data),
        "trained_pairs": judged([trained[k] for k in chosen], facts, work, both, 100),
        "held_out_pairs": judged(held, facts, work, both, 200),
    }
    save_json(work / "evaluation.json", numbers)
    log(f"evaluate: {json.dumps({k: v for k, v in numbers.items() if not isinstance(v, dict)})}")
    for part in ("judge_on_art", "trained_pairs", "held_out_pairs"):
        log(f"evaluate: {part} top-1 {numbers[part]['top1']:.1%}, top-5 {numbers[part]['top5']:.1%}")


if __name__ == "__main__":
    main()
