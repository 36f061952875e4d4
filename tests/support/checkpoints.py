"""Tiny random checkpoints of every shape the library claims to read, written by us or by the reference libraries."""

from __future__ import annotations

import importlib.util
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
# Of another width, so that a mix-up of the two shows.
TEXT_2 = TEXT | {"hidden_size": 40, "num_attention_heads": 5, "hidden_act": "gelu", "projection_dim": 40, "num_hidden_layers": 4}  # fmt: skip
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
XL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": TEXT["hidden_size"] + TEXT_2["hidden_size"],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": TEXT_2["projection_dim"] + 6 * 8,
}
REFINER = XL | {
    "cross_attention_dim": TEXT_2["hidden_size"],
    "transformer_layers_per_block": 2,
    "projection_class_embeddings_input_dim": TEXT_2["projection_dim"] + 5 * 8,
}
PRUNED = XL | {
    "transformer_layers_per_block": [1, [2, 1]],
    "reverse_transformer_layers_per_block": [[1, 2, 3], 1],
    "mid_block_type": "UNetMidBlock2D",
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


EULER = DDIM | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}


@dataclass(frozen=True)
class Shape:
    """The configurations of one kind of checkpoint; text_2 and pad_2 of the second text encoder, None for none."""

    text: dict[str, Any] | None = field(default_factory=lambda: TEXT)
    text_2: dict[str, Any] | None = None
    unet: dict[str, Any] = field(default_factory=lambda: UNET)
    vae: dict[str, Any] = field(default_factory=lambda: VAE)
    scheduler: dict[str, Any] = field(default_factory=lambda: PNDM)
    pad: str = END
    words: int = 600
    pad_2: str = "!"
    pipeline: str = "StableDiffusionPipeline"
    flags: dict[str, Any] = field(default_factory=lambda: {"requires_safety_checker": False})


XL_VAE = VAE | {"scaling_factor": 0.13025}
XL_FLAGS = {"force_zeros_for_empty_prompt": True}
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
        scheduler=EULER,
    ),
}  # fmt: skip
XL_SHAPES = {
    # Stable Diffusion XL: two text encoders, the second one projected; pooled prompts and sizes beside time.
    "sdxl": Shape(text_2=TEXT_2, unet=XL, vae=XL_VAE, scheduler=EULER, pipeline="StableDiffusionXLPipeline", flags=XL_FLAGS),
    # Its refiner: the second text encoder alone, and an aesthetic score.
    "refiner": Shape(
        text=None,
        text_2=TEXT_2,
        unet=REFINER,
        vae=XL_VAE,
        scheduler=EULER,
        pipeline="StableDiffusionXLImg2ImgPipeline",
        flags={"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
    ),
    # A distilled relative: trailing timesteps, ancestral noise.
    "turbo": Shape(
        text_2=TEXT_2,
        unet=XL,
        vae=XL_VAE,
        scheduler=EULER | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
        pipeline="StableDiffusionXLPipeline",
        flags=XL_FLAGS,
    ),
    # A pruned one, whose scheduler reaches pure noise and predicts velocity, and whose latents have a mean.
    "pruned": Shape(
        text_2=TEXT_2,
        unet=PRUNED,
        vae=XL_VAE | {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2], "scaling_factor": 0.5},
        scheduler=EULER | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        pipeline="StableDiffusionXLPipeline",
        flags=XL_FLAGS,
    ),
}  # fmt: skip

# Distilled for few steps, and for guidance, which the U-Net reads (latent consistency).
LCM = Shape(
    unet=UNET | {"time_cond_proj_dim": 16},
    scheduler=DDIM | {"_class_name": "LCMScheduler", "set_alpha_to_one": True},
    pipeline="LatentConsistencyModelPipeline",
)
# Those that read a mask and what stays of an image.
MASKED = {
    "inpaint": Shape(unet=UNET | {"in_channels": 9}, scheduler=DDIM, pipeline="StableDiffusionInpaintPipeline"),
    "inpaint21": Shape(
        text=TEXT | {"hidden_act": "gelu", "pad_token_id": 0},
        unet=UNET | {"in_channels": 9, "attention_head_dim": [2, 4, 8, 8], "use_linear_projection": True},
        pad="!",
        pipeline="StableDiffusionInpaintPipeline",
    ),
    "inpaint-xl": Shape(
        text_2=TEXT_2,
        unet=XL | {"in_channels": 9},
        vae=XL_VAE,
        scheduler=EULER,
        pipeline="StableDiffusionXLInpaintPipeline",
        flags=XL_FLAGS | {"requires_aesthetics_score": False},
    ),
}
EVERY = SHAPES | XL_SHAPES | {"lcm": LCM} | MASKED

# Narrow and shallow, but with CLIP's own vocabulary and length, and heads as wide as they really are: 64 in the text
# encoder, 40 and 80 in the U-Net. Token ids and the mask are then what float16 and palettes must be kept away from.
REAL = Shape(
    text=TEXT
    | {
        "vocab_size": 49408,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    },
    unet=UNET
    | {
        "block_out_channels": [80, 160],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "cross_attention_dim": 64,
        "attention_head_dim": 2,
    },
    words=49408,
)


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


def recipe() -> Any:
    """The module of recipes/random_checkpoint.py."""
    path = Path(__file__).parents[2] / "recipes" / "random_checkpoint.py"
    spec = importlib.util.spec_from_file_location("random_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_ours(folder: Path, shape: Shape | str = "sd15", seed: int = 0, **options: Any) -> Path:
    """A whole checkpoint, written by Sfumato's own classes."""
    import sfumato

    shape = EVERY[shape] if isinstance(shape, str) else shape
    parts = _networks(shape, seed, sfumato, lambda cls, config: cls(**config))
    for name, pad in _tokenizers(shape).items():
        if shape.words == TEXT["vocab_size"]:
            write_tokenizer(folder / name, pad=pad)
        else:
            recipe().pair_tokenizer(folder / name, shape.words)
        parts[name] = sfumato.CLIPTokenizer.from_pretrained(folder / name)
    getattr(sfumato, shape.pipeline)(**parts, **shape.flags).save_pretrained(folder, **options)
    return folder


def reference_pipeline(shape: Shape | str = "sd15", seed: int = 0, *, tokenizer: Path) -> Any:
    """A whole pipeline of the reference libraries; tokenizer: where its tokenizers are, or come to be."""
    import diffusers
    import transformers

    shape = EVERY[shape] if isinstance(shape, str) else shape
    parts = _networks(shape, seed, diffusers, lambda cls, config: cls(cls.config_class(**config)))
    for name, pad in _tokenizers(shape).items():
        folder = write_tokenizer(tokenizer.with_name(tokenizer.name + name.removeprefix("tokenizer")), pad=pad)
        parts[name] = transformers.CLIPTokenizer.from_pretrained(folder)
    absent = ("text_encoder", "tokenizer") if shape.text_2 else ("safety_checker", "feature_extractor")
    return getattr(diffusers, shape.pipeline)(**dict.fromkeys(absent) | parts, **shape.flags)


def _tokenizers(shape: Shape) -> dict[str, str]:
    """What each tokenizer pads with."""
    pads = {"tokenizer": shape.text and shape.pad, "tokenizer_2": shape.text_2 and shape.pad_2}
    return {name: pad for name, pad in pads.items() if pad}


def _networks(shape: Shape, seed: int, library: Any, encoder: Any) -> dict[str, Any]:
    """Random networks and the scheduler, of either library; `encoder` makes a text encoder of a class and a config."""
    import transformers

    texts = library if hasattr(library, "CLIPTextModel") else transformers
    vae_class = library.AutoencoderTiny if "num_encoder_blocks" in shape.vae else library.AutoencoderKL
    scheduler = dict(shape.scheduler)
    parts = {
        "unet": randomize(library.UNet2DConditionModel(**shape.unet), seed + 1),
        "vae": randomize(vae_class(**shape.vae), seed + 2),
        "scheduler": getattr(library, scheduler.pop("_class_name")).from_config(scheduler),
    }
    if shape.text is not None:
        parts["text_encoder"] = randomize(encoder(texts.CLIPTextModel, shape.text), seed)
    if shape.text_2 is not None:
        parts["text_encoder_2"] = randomize(encoder(texts.CLIPTextModelWithProjection, shape.text_2), seed + 3)
    return parts


def write_reference(folder: Path, shape: Shape | str = "sd15", seed: int = 0, **options: Any) -> Path:
    """A whole checkpoint, written by the reference libraries."""
    pipe = reference_pipeline(shape, seed, tokenizer=folder.with_name(folder.name + "-tokenizer"))
    pipe.save_pretrained(folder, **options)
    return folder
