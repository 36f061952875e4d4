"""Tiny random checkpoints of every shape the library claims to read, written by us or by the reference libraries."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

START, END = "<|startoftext|>", "<|endoftext|>"

TEXT = {
    "vocab_size": 600,
    "hidden_size": 24,
    "intermediate_size": 40,
    "projection_dim": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 20,
    "hidden_act": "quick_gelu",
    "bos_token_id": 598,
    "eos_token_id": 599,
    "pad_token_id": 599,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 16, 32, 32],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
# The U-Net of Stable Diffusion 1.5, as it is.
FULL_SIZE_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
PNDM = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
DDIM = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Shape:
    """The configurations of one kind of checkpoint."""

    text: dict[str, Any] = field(default_factory=lambda: TEXT)
    unet: dict[str, Any] = field(default_factory=lambda: UNET)
    vae: dict[str, Any] = field(default_factory=lambda: VAE)
    scheduler: dict[str, Any] = field(default_factory=lambda: PNDM)
    pad: str = END


SHAPES = {
    # Stable Diffusion 1.5: quick_gelu, four levels, one number of heads.
    "sd15": Shape(),
    # Stable Diffusion 2.1: gelu, linear projections, heads per block, velocity, attention in float32 where asked.
    "sd21": Shape(
        text=TEXT | {"hidden_act": "gelu", "pad_token_id": 0},
        unet=UNET | {"layers_per_block": 2, "attention_head_dim": [2, 4, 8, 8], "use_linear_projection": True, "upcast_attention": True},
        scheduler=DDIM | {"prediction_type": "v_prediction"},
        pad="!",
    ),
    # Nothing is a power of two, and pictures are not square.
    "odd": Shape(
        unet=UNET
        | {
            "sample_size": [6, 10],  # 6 → 3 → 2 and 10 → 5 → 3: a level is halved from an odd size
            "block_out_channels": [12, 24, 36],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 1,
            "attention_head_dim": [1, 2, 3],
            "norm_num_groups": 6,
            "only_cross_attention": [False, True, False],
        },
        vae=VAE | {"block_out_channels": [8, 8, 12], "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3, "scaling_factor": 0.5},
        scheduler=DDIM | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    ),
}  # fmt: skip


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values, norms and biases too, so that a mix-up of any two shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.state_dict().items()):
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_(noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def write_tokenizer(folder: Path, *, length: int = 20, pad: str = END) -> Path:
    """A working CLIP tokenizer of 600 tokens: every byte, and a few dozen merges."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [
        "cat</w>",
        "photo</w>",
        "of</w>",
        "the</w>",
        "astronaut</w>",
        "horse</w>",
        "red</w>",
        "heart</w>",
        "ing</w>",
        "pho",
    ]
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = list(word.removesuffix("</w>"))
        if word.endswith("</w>"):
            parts[-1] += "</w>"
        while len(parts) > 1:
            merges += [] if (parts[0], parts[1]) in merges else [(parts[0], parts[1])]
            parts = [parts[0] + parts[1], *parts[2:]]
    tokens = [*letters, *[letter + "</w>" for letter in letters], *[a + b for a, b in merges]]
    tokens = list(dict.fromkeys(tokens))
    tokens += [f"unused{i}" for i in range(598 - len(tokens))] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    # As in Stable Diffusion 2.1, the older of the two files is the one that knows how to pad.
    names: dict[str, Any] = {"bos_token": START, "eos_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(names | {"pad_token": pad}))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    return folder


def write_ours(folder: Path, shape: Shape | str = "sd15", seed: int = 0, **options: Any) -> Path:
    """A whole checkpoint, written by Sfumato's own classes."""
    import sfumato

    shape = SHAPES[shape] if isinstance(shape, str) else shape
    vae_class = sfumato.AutoencoderTiny if "num_encoder_blocks" in shape.vae else sfumato.AutoencoderKL
    scheduler = dict(shape.scheduler)
    pipe = sfumato.StableDiffusionPipeline(
        text_encoder=randomize(sfumato.CLIPTextModel(**shape.text), seed),
        unet=randomize(sfumato.UNet2DConditionModel(**shape.unet), seed + 1),
        vae=randomize(vae_class(**shape.vae), seed + 2),
        tokenizer=sfumato.CLIPTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer", pad=shape.pad)),
        scheduler=getattr(sfumato, scheduler.pop("_class_name")).from_config(scheduler),
    )
    pipe.save_pretrained(folder, **options)
    return folder


def reference_pipeline(shape: Shape | str = "sd15", seed: int = 0, *, tokenizer: Path) -> Any:
    """A whole pipeline of the reference libraries."""
    import diffusers
    import transformers

    shape = SHAPES[shape] if isinstance(shape, str) else shape
    scheduler = dict(shape.scheduler)
    vae_class = diffusers.AutoencoderTiny if "num_encoder_blocks" in shape.vae else diffusers.AutoencoderKL
    return diffusers.StableDiffusionPipeline(
        text_encoder=randomize(transformers.CLIPTextModel(transformers.CLIPTextConfig(**shape.text)), seed),
        unet=randomize(diffusers.UNet2DConditionModel(**shape.unet), seed + 1),
        vae=randomize(vae_class(**shape.vae), seed + 2),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer),
        scheduler=getattr(diffusers, scheduler.pop("_class_name")).from_config(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_reference(folder: Path, shape: Shape | str = "sd15", seed: int = 0, **options: Any) -> Path:
    """A whole checkpoint, written by the reference libraries."""
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    tokenizer = write_tokenizer(folder.with_name(folder.name + "-tokenizer"), pad=shape.pad)
    pipe = reference_pipeline(shape, seed, tokenizer=tokenizer)
    pipe.save_pretrained(folder, **options)
    return folder
