"""Write the finished checkpoint: a Stable Diffusion folder in fp16 with its NOTICE, model card and list of words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from captions import GRAMMAR
from common import HERE, RecipeError, arguments, load, need, save_json, words
from diffusion import BETAS, STEPS
from fetch import packages
from models import text_config, unet_config, vae_config
from safetensors.torch import save_file
from state import averaged

LIMIT = 35_000_000  # bytes of the whole folder
CALM = 8  # a power of two: nothing is rounded
UPSTREAM = "0.30.0"  # the version of the reference library whose keys the configs follow
SUGGESTED = {"steps": 20, "guidance_scale": 3.0}  # chosen by eye; more guidance only adds contrast
SMALL = ("tiny-vae", "evening.safetensors", "few-step.safetensors", "sketch.safetensors")  # ship with the model
LARGE = ("edges", "inpaint")  # ship in a package of their own
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": UPSTREAM,
    "algorithm_type": "dpmsolver++",
    "beta_end": BETAS[1],
    "beta_schedule": "scaled_linear",
    "beta_start": BETAS[0],
    "lower_order_final": True,
    "num_train_timesteps": STEPS,
    "prediction_type": "v_prediction",
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": UPSTREAM,
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_weights(path: Path, state: dict[str, torch.Tensor], prefix: str = "") -> None:
    """The tensors whose names start with `prefix`, in fp16; a value that fp16 cannot hold is an error."""
    chosen = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    tensors = {name: value.half().contiguous() for name, value in chosen.items()}
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise RecipeError(f"{path.name}: {broken[0]} does not fit in fp16.")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # it writes files for their owner alone


def loud_layers(names: Iterable[str]) -> set[str]:
    """The layers of a U-Net, among all its layers' names, whose sum enters its last normalization."""
    ends = [name.split(".") for name in names if name.startswith("up_blocks.")]
    level = max(int(parts[1]) for parts in ends)
    last = f"up_blocks.{level}."
    number = max(int(parts[3]) for parts in ends if int(parts[1]) == level and parts[2] == "resnets")
    return {
        f"{last}resnets.{number}.conv2",
        f"{last}resnets.{number}.conv_shortcut",
        f"{last}attentions.{number}.proj_out",
    }


def calmed(unet: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same U-Net with what enters its last normalization CALM times smaller, which undoes it.

    It had grown to 300, whose square fp16 does not hold; Core ML's normalization squares.
    """
    loud = loud_layers(unet)
    return {name: value / CALM if name.rsplit(".", 1)[0] in loud else value for name, value in unet.items()}


def write_model(folder: Path, row: SimpleNamespace, work: Path, facts: dict) -> None:
    """Networks, tokenizer, scheduler and index."""
    pair = averaged(need(work / "train.pt", "train.py"))
    unet = {name.removeprefix("unet."): value for name, value in pair.items() if name.startswith("unet.")}
    write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", calmed(unet))
    write_weights(folder / "text_encoder" / "model.safetensors", pair, "text.")
    vae = load(need(work / "vae_final.pt", "encode.py"))["model"]
    write_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", vae)
    names = {"_diffusers_version": UPSTREAM}
    save_json(folder / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", **names, **unet_config(row)})
    save_json(folder / "vae" / "config.json", {"_class_name": "AutoencoderKL", **names, **vae_config(row)})
    clip = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": "float16"}
    save_json(folder / "text_encoder" / "config.json", {**clip, **text_config(row, facts["vocabulary"])})
    shutil.copytree(work / "tokenizer", folder / "tokenizer")
    save_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    save_json(folder / "model_index.json", INDEX)


def write_words(folder: Path, facts: dict) -> None:
    """words.json: what the model can draw, so that a caller can say when a prompt has no known word."""
    styles = {some[0]: sorted(set(some)) for style in facts["styles"] if (some := words()["styles"][style])}
    names = {concept["emoji"]: concept["names"] for concept in facts["concepts"]}
    table = words()
    said = [
        *table["colours"],
        *(word for key in ("colour_words", "sizes") for some in table[key].values() for word in some),
    ]
    said += ["one", "two", "three", *GRAMMAR.split()]
    save_json(folder / "words.json", {"concepts": names, "styles": styles, "said": sorted(set(said))})


def write_papers(folder: Path, work: Path, facts: dict) -> None:
    """NOTICE (the art, its licences and authors) and README.md (the model card with the measured numbers)."""
    lines = [f"* {name} {p['version']}: {p['use']}. {p['license']}. {p['authors']}." for name, p in packages().items()]
    notice = (HERE / "NOTICE.in").read_text().replace("@ART@", "\n".join(lines))
    (folder / "NOTICE").write_text(notice)
    numbers: dict[str, Any] = {}
    if (work / "evaluation.json").exists():
        numbers = json.loads((work / "evaluation.json").read_text())
    rows = [f"| {key.replace('_', ' ')} | {value} |" for key, value in numbers.items() if not isinstance(value, dict)]
    for key, part in numbers.items():
        if isinstance(part, dict):
            shares = [
                f"{name.replace('_', ' ')} {value:.0%}" for name, value in part.items() if isinstance(value, float)
            ]
            rows.append(f"| {key.replace('_', ' ')} | {part['pictures']} pictures: {', '.join(shares)} |")
    table = "\n".join(["| measured | |", "|---|---|", *rows]) if rows else "Not evaluated."
    concepts = ", ".join(concept["names"][0] for concept in facts["concepts"])
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    table_of = words()
    replaced = {
        "NUMBERS": table,
        "CONCEPTS": concepts,
        "COLOURS": ", ".join(table_of["colours"]),
        "STYLES": ", ".join(table_of["styles"][style][0] for style in facts["styles"]),
        "SIZE": f"{size / 1e6:.0f}",
    }
    card = (HERE / "CARD.in").read_text()
    for name, text in replaced.items():
        card = card.replace(f"@{name}@", text)
    (folder / "README.md").write_text(card)


def write_relative(target: Path, made: Path) -> None:
    """Copy what a relative's step has made, if it ran: a file or a folder."""
    if made.is_dir():
        shutil.copytree(made, target)
    elif made.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, target)


def main() -> None:
    args, row, work = arguments(__doc__, {"--output": {"default": "", "help": "default: WORK/sfumato-mini"}})
    facts = json.loads(need(work / "captions.json", "captions.py").read_text())
    target = Path(args.output or work / "sfumato-mini").resolve()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_model(partial, row, work, facts)
    write_words(partial, facts)
    save_json(partial / "sfumato.json", SUGGESTED)
    write_papers(partial, work, facts)
    for name in SMALL:
        write_relative(partial / "relatives" / name, work / "relatives" / name)
    size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    if size > LIMIT:
        raise RecipeError(f"the folder has {size / 1e6:.2f} MB, more than {LIMIT / 1e6:.0f}; make a network smaller.")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    larger = target.with_name("sfumato-relatives")
    shutil.rmtree(larger, ignore_errors=True)
    for name in LARGE:
        write_relative(larger / name, work / "relatives" / name)
    print(f"export: {target}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
