"""Model families as data: the parts of each one and their settings.

A `Family` is one row. Its configs are the published ones, as far as they differ from the config classes' defaults, and
are also used to recognize a checkpoint (`find`). No other code knows a family by name: whatever generates images asks
the row.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["AESTHETIC_SCORES", "EMBEDDED", "FAMILIES", "Encoder", "Family", "distilled", "find"]

Config = dict[str, Any]

# The default aesthetic scores of the prompt and the negative prompt, in families that use them.
AESTHETIC_SCORES = (6.0, 2.5)
# How many numbers a U-Net embeds, by the last of its family's `sizes`.
EMBEDDED = {"target_size": 6, "aesthetic_score": 5}


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A text encoder, and how a family uses it.

    role        its folder; its tokenizer's is the same with "tokenizer"
    config      of a `CLIPTextModel`; OpenCLIP's H is published without its last layer
    layer       the layer whose output is used, -1 for the last
    normalized  whether the final layer norm is applied to it
    projected   whether the pooled prompt is also used, with a projection
    pooled      whether its pooled output is used, the row at the end of the text
    pad         the padding token
    naming      the naming scheme of its weights in single files: "clip" or "open_clip"
    """

    title: str
    role: str = "text_encoder"
    config: Config
    layer: int = -1
    normalized: bool = True
    projected: bool = False
    pooled: bool = False
    pad: str = "<|endoftext|>"
    naming: str = "clip"


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of checkpoint.

    name, title     for the command line, and for people
    pipeline        the class in diffusers that generates images with it
    encoders        text encoders; their outputs are concatenated
    unet, vae       configs; the VAE's scale, mean and std belong to the U-Net, never to a separate VAE file
    scheduler       config of the default scheduler, with its `_class_name`
    steps, guidance good default settings
    sizes           what is embedded in addition to the pooled prompt, in this order
    absent_negative what replaces a missing negative prompt: an "empty" text, or "zeros"; an empty one is encoded
    shortens        whether image-to-image shortens the schedule by its strength, instead of starting inside it
    clip_skip       whose layers it skips: those of "both" prompts or, as in diffusers, only of the "prompt"
    extra           what the U-Net's input channels contain after the latents
    labels          the meaning of its class labels
    more            additional parts of its pipeline: names in the index, and their configs
    named           a regular expression for file names and titles, in lower case, with hyphens for whatever is neither
                    letter nor digit; its group, if any, is the number of steps
    markers         tensors in its files in addition to the weights
    """

    name: str
    title: str
    pipeline: str
    encoders: tuple[Encoder, ...]
    unet: Config
    vae: Config
    scheduler: Config
    steps: int = 50
    guidance: float = 7.5
    sizes: tuple[str, ...] = ()
    absent_negative: str = "empty"
    shortens: bool = False
    clip_skip: str = "both"
    extra: tuple[str, ...] = ()
    labels: str | None = None
    more: Config = field(default_factory=dict)
    named: str | None = None
    markers: tuple[str, ...] = ()

    @property
    def prediction_type(self) -> str:
        """The prediction type of the U-Net."""
        return self.scheduler.get("prediction_type", "epsilon")


# The config keys that follow from the shapes of a U-Net's weights.
SHAPED = (
    "block_out_channels", "down_block_types", "up_block_types", "mid_block_type", "layers_per_block",
    "transformer_layers_per_block", "reverse_transformer_layers_per_block", "projection_class_embeddings_input_dim",
)  # fmt: skip


def find(
    unet: Config, *, encoders: int | None = None, naming: str | None = None, prediction_type: str | None = None
) -> list[Family]:
    """Return the families that a U-Net may belong to, the likeliest first; empty if there is none.

    unet: its config. If known: the number of text encoders, the naming scheme of the first, and the prediction type. A
    pruned U-Net that is not a published one belongs to the family that it was pruned from.
    """
    found = [row for row in FAMILIES.values() if _kind(row.unet) == _kind(unet)]
    # If the prompt width is unknown, the text encoder's naming scheme decides.
    first = [row for row in found if row.encoders and row.encoders[0].naming == naming]
    found = [row for row in found if _context(row.unet) == _context(unet)] or first or found
    found = [row for row in found if encoders in (None, len(row.encoders))] or found
    exact = [row for row in found if all(_flat(row.unet.get(key)) == _flat(unet.get(key)) for key in SHAPED)]
    found = exact or sorted(found, key=lambda row: bool(row.markers or row.named))
    return [row for row in found if prediction_type in (None, row.prediction_type)] or found


def distilled(row: Family) -> Family:
    """Return a family's variant distilled for few steps, whose U-Net reads the guidance scale (arXiv 2310.04378)."""
    plain = row.pipeline == "StableDiffusionPipeline"
    return replace(
        row,
        name=f"{row.name}-lcm",
        title=f"{row.title}, distilled for few steps (LCM)",
        pipeline="LatentConsistencyModelPipeline" if plain else row.pipeline,
        unet=row.unet | {"time_cond_proj_dim": 256},
        scheduler=_BETAS | {"_class_name": "LCMScheduler"},
        steps=4,
        guidance=8.5,
        shortens=plain,
    )


def _kind(unet: Config) -> tuple[Any, ...]:
    """Return what distinguishes U-Nets regardless of their widths."""
    return (
        unet.get("in_channels", 4),
        unet.get("addition_embed_type"),
        unet.get("class_embed_type"),
        unet.get("num_class_embeds") is not None,
        any(kind.startswith("K") for kind in unet.get("down_block_types", ())),
    )


def _context(unet: Config) -> Any:
    return _flat(unet.get("cross_attention_dim", 1280))


def _flat(value: Any) -> Any:
    return tuple(map(_flat, value)) if isinstance(value, (list, tuple)) else value


# Text encoders


def _encoder(title: str, width: int, layers: int, projection: int, act: str, **fields: Any) -> Encoder:
    config = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    config |= {"num_hidden_layers": layers, "projection_dim": projection, "hidden_act": act}
    return Encoder(title=title, config=config | {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}, **fields)


_OPEN = {"act": "gelu", "pad": "!", "naming": "open_clip"}
_L = _encoder("CLIP-L", 768, 12, 768, "quick_gelu")
_H = _encoder("OpenCLIP H", 1024, 23, 512, **_OPEN)
_INNER = {"layer": -2, "normalized": False}
_G = _encoder("OpenCLIP bigG", 1280, 32, 1280, role="text_encoder_2", projected=True, **_INNER, **_OPEN)

# Schedulers

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_STABLE = _BETAS | {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
_PNDM = _STABLE | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
_DDIM = _STABLE | {"_class_name": "DDIMScheduler"}
_EULER = _STABLE | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
_TRAILING = _EULER | {"timestep_spacing": "trailing"}
_ANCESTRAL = _STABLE | {"_class_name": "EulerAncestralDiscreteScheduler"}
_V = {"prediction_type": "v_prediction"}
_EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0}


def _levels(pattern: str, *widths: int, k: str = "") -> dict[str, Any]:
    """Return a U-Net's down blocks, x with and - without cross-attention; the up blocks are mirrored."""
    kinds = [f"{k}{'CrossAttn' if letter == 'x' else ''}{{}}Block2D" for letter in pattern]
    return {
        "block_out_channels": widths,
        "down_block_types": tuple(kind.format("Down") for kind in kinds),
        "up_block_types": tuple(kind.format("Up") for kind in reversed(kinds)),
        "mid_block_type": None if k else "UNetMidBlock2DCrossAttn",
        "layers_per_block": 2,
        "transformer_layers_per_block": 1,
    }


def _vae(*widths: int, size: int, scale: float) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 2,
        "sample_size": size,
        "scaling_factor": scale,
    }


# Stable Diffusion 1.x

_CROSS = _levels("xxx-", 320, 640, 1280, 1280)
_VAE = _vae(128, 256, 512, 512, size=512, scale=0.18215)
_SD1 = Family(
    name="sd15",
    title="Stable Diffusion 1.x",
    pipeline="StableDiffusionPipeline",
    encoders=(_L,),
    unet=_CROSS | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    vae=_VAE,
    scheduler=_PNDM,
)
_TINY = _levels("xxx", 320, 640, 1280) | {"layers_per_block": 1, "mid_block_type": None}

# Stable Diffusion 2.x

_SD2 = replace(
    _SD1,
    name="sd21",
    title="Stable Diffusion 2.x, 768 pixels",
    encoders=(_H,),
    unet=_CROSS
    | {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}
    | {"use_linear_projection": True, "upcast_attention": True},
    vae=_VAE | {"sample_size": 768},
    scheduler=_DDIM | _V,
)
_SD2_BASE = replace(
    _SD2,
    name="sd21-base",
    title="Stable Diffusion 2.x, 512 pixels",
    unet={key: value for key, value in _SD2.unet.items() if key != "upcast_attention"} | {"sample_size": 64},
    vae=_VAE,
    scheduler=_PNDM,
)
_UNCLIP = replace(
    _SD2,
    name="unclip-h",
    title="Stable Diffusion 2.1 unCLIP, ViT-H",
    pipeline="StableUnCLIPImg2ImgPipeline",
    unet=_SD2.unet | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
    scheduler=_PNDM | _V,
    steps=20,
    guidance=10.0,
    labels="image embedding",
    more={
        "image_noising_scheduler": {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"},
        "image_encoder": {"projection_dim": 1024},
    },
)

# Upscalers

_X4 = Family(
    name="x4-upscaler",
    title="Stable Diffusion x4 upscaler",
    pipeline="StableDiffusionUpscalePipeline",
    encoders=(_H,),
    unet=_levels("-xxx", 256, 512, 512, 1024)
    | {"sample_size": 128, "in_channels": 7, "attention_head_dim": 8, "cross_attention_dim": 1024}
    | {"only_cross_attention": (True, True, True, False), "num_class_embeds": 1000, "use_linear_projection": True},
    vae=_vae(128, 256, 512, size=256, scale=0.08333),
    scheduler=_DDIM | _V | {"beta_start": 0.0001, "beta_end": 0.02},
    steps=75,
    guidance=9.0,
    extra=("low-resolution image",),
    labels="noise level",
    more={
        "low_res_scheduler": {"_class_name": "DDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02}
        | {"beta_schedule": "scaled_linear", "clip_sample": True},
        "max_noise_level": 350,
    },
)
_X2 = Family(
    name="x2-upscaler",
    title="Stable Diffusion x2 latent upscaler",
    pipeline="StableDiffusionLatentUpscalePipeline",
    encoders=(replace(_L, normalized=False, pooled=True),),
    unet=_levels("-xxx", 384, 384, 768, 768, k="K")
    | {"sample_size": 64, "in_channels": 8, "out_channels": 5, "attention_head_dim": 64, "cross_attention_dim": 768}
    | {"conv_in_kernel": 1, "conv_out_kernel": 1, "norm_num_groups": None, "act_fn": "gelu", "layers_per_block": 4}
    | {"time_embedding_type": "fourier", "time_cond_proj_dim": 896, "timestep_post_act": "gelu"}
    | {"resnet_time_scale_shift": "scale_shift"},
    vae=_VAE,
    scheduler=_BETAS
    | {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear", "prediction_type": "sample"},
    steps=75,
    guidance=9.0,
    extra=("enlarged image latents",),
)

# Stable Diffusion XL

_XL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    encoders=(replace(_L, **_INNER), _G),
    unet=_levels("-xx", 320, 640, 1280)
    | {
        "sample_size": 128,
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
    }
    | {"transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    | {"projection_class_embeddings_input_dim": 2816},
    vae=_VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
    scheduler=_EULER,
    guidance=5.0,
    sizes=("original_size", "crops_coords_top_left", "target_size"),
    absent_negative="zeros",
    clip_skip="prompt",
)
_REFINER = replace(
    _XL,
    name="sdxl-refiner",
    title="Stable Diffusion XL refiner",
    pipeline="StableDiffusionXLImg2ImgPipeline",
    encoders=(_G,),
    unet=_XL.unet
    | _levels("-xx-", 384, 768, 1536, 1536)
    | {"transformer_layers_per_block": 4, "attention_head_dim": (6, 12, 24, 24), "cross_attention_dim": 1280}
    | {"projection_class_embeddings_input_dim": 2560},
    sizes=("original_size", "crops_coords_top_left", "aesthetic_score"),
    absent_negative="empty",
)
_COSXL = replace(
    _XL,
    name="cosxl",
    title="CosXL",
    scheduler=_EDM | _V | {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "sigma_schedule": "exponential"},
    markers=("edm_vpred.sigma_max",),
)


_FEW = {"steps": 1, "guidance": 0.0}


def _inpainting(row: Family, name: str, **changes: Any) -> Family:
    changes = {"title": f"{row.title} inpainting", "unet": row.unet | {"in_channels": 9}} | changes
    pipeline = row.pipeline.replace("Pipeline", "InpaintPipeline")
    return replace(row, name=name, pipeline=pipeline, extra=("mask", "masked image latents"), **changes)


def _edited(row: Family, name: str, title: str, **changes: Any) -> Family:
    changes = {"unet": row.unet | {"in_channels": 8}, "extra": ("image latents",), "steps": 100} | changes
    pipeline = row.pipeline.replace("Pipeline", "InstructPix2PixPipeline")
    return replace(row, name=name, title=title, pipeline=pipeline, **changes)


def _pruned(row: Family, name: str, title: str, **unet: Any) -> Family:
    return replace(row, name=name, title=title, unet=row.unet | unet)


_LIGHTNING = replace(
    replace(_XL, **_FEW | {"steps": 4}, scheduler=_DDIM | {"timestep_spacing": "trailing"}),
    name="sdxl-lightning",
    title="SDXL-Lightning",
    named=r"\bsdxl-lightning(?:-(\d)step)?",
)
_KOALA = _pruned(_XL, "koala-1b", "KOALA 1B", transformer_layers_per_block=(1, 2, 6), layers_per_block=1)

# More common families come before their relatives: if two fit equally well, the first is chosen.
_ROWS = (
    _SD1,
    _pruned(_SD1, "small-sd", "small Stable Diffusion 1.x", layers_per_block=1),
    _pruned(_SD1, "tiny-sd", "tiny Stable Diffusion 1.x", **_TINY),
    _inpainting(_SD1, "sd15-inpainting", scheduler=_DDIM),
    _edited(_SD1, "pix2pix", "InstructPix2Pix", scheduler=_ANCESTRAL),
    replace(
        _SD1,
        name="variations",
        title="Stable Diffusion image variations",
        pipeline="StableDiffusionImageVariationPipeline",
        encoders=(),
        more={"image_encoder": {"projection_dim": 768}},
    ),
    _SD2_BASE,
    _SD2,
    replace(_SD2_BASE, **_FEW, name="sd-turbo", title="SD-Turbo", scheduler=_TRAILING, named=r"\bsd-?turbo\b"),
    _inpainting(_SD2_BASE, "sd21-inpainting", title="Stable Diffusion 2.x inpainting"),
    replace(
        _SD2_BASE,
        name="depth",
        title="Stable Diffusion 2.x depth-to-image",
        pipeline="StableDiffusionDepth2ImgPipeline",
        unet=_SD2_BASE.unet | {"in_channels": 5},
        extra=("depth",),
    ),
    _UNCLIP,
    replace(
        _UNCLIP,
        name="unclip-l",
        title="Stable Diffusion 2.1 unCLIP, ViT-L",
        unet=_UNCLIP.unet | {"projection_class_embeddings_input_dim": 1536},
        more=_UNCLIP.more | {"image_encoder": {"projection_dim": 768}},
    ),
    _X4,
    _X2,
    _XL,
    replace(
        _XL,
        **_FEW,
        name="sdxl-turbo",
        title="SDXL-Turbo",
        unet=_XL.unet | {"sample_size": 64},
        scheduler=_ANCESTRAL | {"timestep_spacing": "trailing"},
        named=r"\bsd-?xl-turbo\b",
    ),
    replace(_LIGHTNING, scheduler=_TRAILING),
    replace(_LIGHTNING, name="hyper-sdxl", title="Hyper-SDXL", named=r"\bhyper-sd-?xl(?:-(\d)-?steps?)?"),
    replace(
        _XL,
        name="playground",
        title="Playground v2.5",
        vae=_XL.vae
        | {"scaling_factor": 0.5, "latents_mean": (-1.6574, 1.886, -1.383, 2.5155)}
        | {"latents_std": (8.4927, 5.9022, 6.5498, 5.2299)},
        scheduler=_EDM | {"_class_name": "EDMDPMSolverMultistepScheduler"},
        guidance=3.0,
        markers=("edm_mean", "edm_std"),
    ),
    _COSXL,
    _pruned(
        _XL,
        "ssd-1b",
        "SSD-1B",
        transformer_layers_per_block=(1, (2, 2), (4, 4)),
        reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
        mid_block_type="UNetMidBlock2D",
    ),
    _pruned(_XL, "vega", "Segmind Vega", transformer_layers_per_block=(1, 1, 2), mid_block_type="UNetMidBlock2D"),
    _pruned(_KOALA, "koala-700m", "KOALA 700M", transformer_layers_per_block=(1, 2, 5), mid_block_type=None),
    _KOALA,
    _inpainting(_XL, "sdxl-inpainting", vae=_XL.vae | {"sample_size": 512, "force_upcast": False}),
    _edited(_XL, "sdxl-pix2pix", "InstructPix2Pix XL"),
    _edited(_COSXL, "cosxl-edit", "CosXL Edit", extra=("scaled image latents",)),
    _REFINER,
)
FAMILIES: dict[str, Family] = {row.name: row for row in _ROWS}
