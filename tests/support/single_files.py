"""Tiny random checkpoints of every layout in one file, with a folder of the same beside, written by the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sfumato.checkpoints.write_file import write_single_file
from sfumato.families import FAMILIES, Family
from support.checkpoints import DDIM, PNDM, REFINER, TEXT, TEXT_2, UNET, VAE, XL, randomize, write_tokenizer

EULER = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}  # fmt: skip
# The reference splits what is fused by the width of the projection, which only real models have in common.
TEXT_H = TEXT | {"hidden_act": "gelu", "pad_token_id": 0, "eos_token_id": 599}


@dataclass(frozen=True)
class Tiny:
    """A family in small: its row with the configs below, and the names that go with them."""

    family: str
    pipeline: str
    unet: dict[str, Any]
    texts: tuple[dict[str, Any], ...]
    scheduler: dict[str, Any]

    @property
    def row(self) -> Family:
        """The family's row with the small configs."""
        row = FAMILIES[self.family]
        encoders = tuple(replace(one, config=config) for one, config in zip(row.encoders, self.texts, strict=True))
        return replace(row, unet=self.unet, vae=VAE, encoders=encoders, scheduler=self.scheduler)


TINY = {
    "sd15": Tiny("sd15", "StableDiffusionPipeline", UNET, (TEXT,), PNDM),
    "sd21": Tiny(
        "sd21",
        "StableDiffusionPipeline",
        UNET | {"attention_head_dim": [2, 4, 8, 8], "use_linear_projection": True},
        (TEXT_H,),
        DDIM | {"prediction_type": "v_prediction"},
    ),
    "sdxl": Tiny("sdxl", "StableDiffusionXLPipeline", XL, (TEXT, TEXT_2), EULER),
    "sdxl-refiner": Tiny("sdxl-refiner", "StableDiffusionXLImg2ImgPipeline", REFINER, (TEXT_2,), EULER),
    "sd15-inpainting": Tiny("sd15-inpainting", "StableDiffusionInpaintPipeline", UNET | {"in_channels": 9}, (TEXT,), DDIM),
}  # fmt: skip


def parts_of(tiny: Tiny, seed: int = 0) -> dict[str, Any]:
    """Our models of a small family, by the folders they stand in, with random weights."""
    import sfumato

    parts: dict[str, Any] = {
        "unet": randomize(sfumato.UNet2DConditionModel(**tiny.unet), seed),
        "vae": randomize(sfumato.AutoencoderKL(**VAE), seed + 1),
    }
    for number, (encoder, config) in enumerate(zip(FAMILIES[tiny.family].encoders, tiny.texts, strict=True)):
        kind = sfumato.CLIPTextModelWithProjection if encoder.projected else sfumato.CLIPTextModel
        parts[encoder.role] = randomize(kind(**config), seed + 2 + number)
    return parts


def write_tiny_folder(folder: Path, tiny: Tiny, parts: dict[str, Any]) -> Path:
    """The same as a folder that the reference reads: parts, tokenizers, scheduler, index."""
    import diffusers
    import transformers

    index: dict[str, Any] = {"_class_name": tiny.pipeline, "_diffusers_version": "0.42.1"}
    for role, model in parts.items():
        model.save_pretrained(folder / role)
        index[role] = ["transformers" if role.startswith("text") else "diffusers", type(model).__name__]
    for encoder in FAMILIES[tiny.family].encoders:
        role = encoder.role.replace("text_encoder", "tokenizer")
        write_tokenizer(folder / role, pad=encoder.pad)
        index[role] = ["transformers", "CLIPTokenizer"]
    values = dict(tiny.scheduler)
    getattr(diffusers, values.pop("_class_name")).from_config(values).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", tiny.scheduler["_class_name"]]
    if FAMILIES[tiny.family].sizes:
        for role in ("text_encoder", "tokenizer", "image_encoder", "feature_extractor"):
            index.setdefault(role, [None, None])
        refiner = "aesthetic_score" in FAMILIES[tiny.family].sizes
        index |= {"requires_aesthetics_score": refiner, "force_zeros_for_empty_prompt": not refiner}
        if tiny.pipeline == "StableDiffusionXLPipeline":
            del index["requires_aesthetics_score"]
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
        index["image_encoder"] = [None, None]
    import json

    (folder / "model_index.json").write_text(json.dumps(index))
    assert transformers.__version__
    return folder


def write_tiny(root: Path, name: str) -> tuple[dict[str, Any], Path, Path]:
    """Models of a row of `TINY`, their file in the original layout, and their folder."""
    tiny = TINY[name]
    parts = parts_of(tiny)
    write_single_file(root / "tiny.safetensors", tiny.row, parts, tiny.scheduler)
    return parts, root / "tiny.safetensors", write_tiny_folder(root / "folder", tiny, parts)


def same_state(ours: torch.nn.Module, theirs: dict[str, torch.Tensor]) -> bool:
    """Whether a model of ours has exactly these weights; the reference leaves the prefix of some text encoders out."""
    mine = ours.state_dict()
    theirs = {key: value for key, value in theirs.items() if not key.endswith("position_ids")}
    if not any(key in mine for key in theirs):
        theirs = {f"text_model.{key}": value for key, value in theirs.items()}
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in mine.items())


# Small, but with CLIP's vocabulary and heads of 64, so that everything is told from the file.
_SMALL_TEXT = {"vocab_size": 49408, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "projection_dim": 64, "max_position_embeddings": 77}  # fmt: skip
_SMALL_TEXT_2 = _SMALL_TEXT | {"hidden_size": 128, "num_attention_heads": 2, "projection_dim": 128}
_SMALL_VAE = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1}  # fmt: skip


def small(family: str, **unet: Any) -> Family:
    """A family's row in small, which is still told from its file alone."""
    row, count = FAMILIES[family], len(FAMILIES[family].unet["block_out_channels"])
    widths = (64,) * count
    texts = [_SMALL_TEXT_2 if one.projected else _SMALL_TEXT for one in row.encoders]
    encoders = tuple(replace(one, config=one.config | text) for one, text in zip(row.encoders, texts, strict=True))
    values = row.unet | {"block_out_channels": widths, "sample_size": 8} | unet
    values["cross_attention_dim"] = sum(text["hidden_size"] for text in texts)
    if row.sizes:
        values["projection_class_embeddings_input_dim"] = 128 + 256 * (5 if "aesthetic_score" in row.sizes else 6)
    if not isinstance(values["attention_head_dim"], int):
        values["attention_head_dim"] = (1,) * count
    return replace(row, unet=values, vae=row.vae | _SMALL_VAE, encoders=encoders)


def write_small(path: Path, family: str, *, alone: bool = False, **unet: Any) -> Path:
    """Random weights of a family in small, in one file that says how large its pictures are; alone: those of a U-Net."""
    import sfumato
    from sfumato.checkpoints.write_file import write_single_file

    row = small(family, **unet)
    parts: dict[str, Any] = {"unet": randomize(sfumato.UNet2DConditionModel(**row.unet), 0)}
    parts["vae"] = randomize(sfumato.AutoencoderKL(**row.vae), 1)
    for number, one in enumerate(row.encoders):
        kind = sfumato.CLIPTextModelWithProjection if one.projected else sfumato.CLIPTextModel
        parts[one.role] = randomize(kind(**one.config), 2 + number)
    write_single_file(path, row, {role: model.half() for role, model in parts.items()}, row.scheduler)
    if alone:
        from safetensors.torch import save_file

        state = {name: value.contiguous() for name, value in parts["unet"].state_dict().items()}
        save_file(state, path, {"modelspec.resolution": "64x64"})
    return path
