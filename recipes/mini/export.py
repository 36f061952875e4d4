"""Write the finished checkpoint: a Stable Diffusion folder in fp16 with its NOTICE, model card and list of words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from captions import STYLE_WORDS
from common import HERE, RecipeError, arguments, load, need, save_json
from diffusion import BETAS, STEPS
from fetch import packages
from models import text_config, unet_config, vae_config
from safetensors.torch import save_file
from state import averaged

LIMIT = 25_000_000  # bytes of the whole folder
UPSTREAM = "0.30.0"  # the version of the reference library whose keys the configs follow
SUGGESTED = {"steps": 20, "guidance_scale": 3.0}  # chosen by eye; more guidance only adds contrast
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


def write_model(folder: Path, row: SimpleNamespace, work: Path, facts: dict) -> None:
    """Networks, tokenizer, scheduler and index."""
    pair = averaged(need(work / "train.pt", "train.py"))
    write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", pair, "unet.")
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
    styles = {style: sorted(set(STYLE_WORDS[style])) for style in facts["trained_styles"]}
    names = {concept["emoji"]: concept["names"] for concept in facts["concepts"]}
    save_json(folder / "words.json", {"concepts": names, "styles": styles})


def write_papers(folder: Path, work: Path, facts: dict) -> None:
    """NOTICE (the art, its licences and authors) and README.md (the model card with the measured numbers)."""
    lines = [f"* {name} {p['version']}: {p['use']}. {p['license']}. {p['authors']}." for name, p in packages().items()]
    notice = (HERE / "NOTICE.in").read_text().replace("@ART@", "\n".join(lines))
    (folder / "NOTICE").write_text(notice)
    numbers: dict[str, Any] = {}
    if (work / "evaluation.json").exists():
        numbers = json.loads((work / "evaluation.json").read_text())
    rows = [f"| {key.replace('_', ' ')} | {value} |" for key, value in numbers.items() if not isinstance(value, dict)]
    for key in ("judge_on_art", "trained_pairs", "held_out_pairs"):
        if key in numbers:
            part = numbers[key]
            text = f"{part['pictures']} pictures: top-1 {part['top1']:.1%}, top-5 {part['top5']:.1%}"
            rows.append(f"| {key.replace('_', ' ')} | {text} |")
    table = "\n".join(["| measured | |", "|---|---|", *rows]) if rows else "Not evaluated."
    concepts = ", ".join(concept["names"][0] for concept in facts["concepts"])
    card = (HERE / "CARD.in").read_text().replace("@NUMBERS@", table).replace("@CONCEPTS@", concepts)
    (folder / "README.md").write_text(card.replace("@STYLES@", ", ".join(facts["trained_styles"])))


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
    size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    if size > LIMIT:
        raise RecipeError(f"the folder has {size / 1e6:.2f} MB, more than {LIMIT / 1e6:.0f}; make a network smaller.")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    print(f"export: {target}, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
