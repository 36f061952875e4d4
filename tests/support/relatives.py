"""Tiny random checkpoints of the relatives that read an image beside the latents, or in the place of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.checkpoints import DDIM, EULER, PNDM, TEXT, TEXT_2, UNET, VAE, XL, XL_VAE, randomize, write_tokenizer
from support.families import LATENT_UPSCALER

SD2 = UNET | {"attention_head_dim": [2, 4, 8, 8], "use_linear_projection": True}
VISION = {
    "hidden_size": 32, "intermediate_size": 40, "projection_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 7, "hidden_act": "gelu",
}  # fmt: skip
VAE_4 = VAE | {
    "block_out_channels": [8, 8, 16], "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3, "scaling_factor": 0.08333,
}  # fmt: skip
X4 = SD2 | {
    "in_channels": 7, "block_out_channels": [16, 32], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 8, "num_class_embeds": 1000,
    "only_cross_attention": [True, False],
}  # fmt: skip
BIT = {
    "model_type": "bit", "layer_type": "bottleneck", "global_padding": "same", "embedding_dynamic_padding": True,
    "depths": [1, 2, 2], "hidden_sizes": [16, 24, 40, 48], "embedding_size": 16, "num_groups": 4,
    "out_features": ["stage1", "stage2", "stage3"],
}  # fmt: skip
DPT = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 37, "image_size": 64,
    "patch_size": 16, "fusion_hidden_size": 16, "backbone_out_indices": [0, 1, 2, 3],
    "neck_hidden_sizes": [16, 16, 24, 32],
}  # fmt: skip
HYBRID = DPT | {
    "is_hybrid": True, "backbone_config": BIT, "neck_hidden_sizes": [16, 24, 32, 32],
    "reassemble_factors": [1, 1, 1, 0.5], "backbone_featmap_shape": [1, 40, 4, 4],
}  # fmt: skip
NOISE = {"_class_name": "DDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
# The class, and configs of its parts; True for what a tokenizer is.
RELATIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "edit": ("StableDiffusionInstructPix2PixPipeline", {"unet": UNET | {"in_channels": 8}, "scheduler": EULER | {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "linspace"}, "safety_checker": None, "feature_extractor": None}),
    "edit-xl": ("StableDiffusionXLInstructPix2PixPipeline", {"unet": XL | {"in_channels": 8}, "vae": XL_VAE, "scheduler": EULER, "text_encoder_2": TEXT_2, "tokenizer_2": "!"}),
    "depth": ("StableDiffusionDepth2ImgPipeline", {"unet": SD2 | {"in_channels": 5}, "depth_estimator": None, "feature_extractor": None}),
    "by-depth": ("StableDiffusionDepth2ImgPipeline", {"unet": SD2 | {"in_channels": 5}, "depth_estimator": HYBRID, "feature_extractor": "dpt"}),
    "x4": ("StableDiffusionUpscalePipeline", {"unet": X4, "vae": VAE_4, "scheduler": DDIM | V, "low_res_scheduler": NOISE}),
    "x2": ("StableDiffusionLatentUpscalePipeline", {"unet": LATENT_UPSCALER | {"time_cond_proj_dim": 128 + TEXT["hidden_size"]}, "scheduler": EULER | {"timestep_spacing": "linspace", "interpolation_type": "linear", "prediction_type": "sample"}}),
    "variations": ("StableDiffusionImageVariationPipeline", {"image_encoder": VISION, "text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": "clip"}),
    "likeness": ("StableUnCLIPImg2ImgPipeline", {"image_encoder": VISION, "unet": SD2 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 48}, "scheduler": DDIM | V, "image_normalizer": {"embedding_dim": 24}, "image_noising_scheduler": {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}, "feature_extractor": "clip"}),
}  # fmt: skip
USUAL: dict[str, Any] = {
    "vae": VAE,
    "text_encoder": TEXT,
    "tokenizer": "<|endoftext|>",
    "unet": UNET,
    "scheduler": PNDM,
}


def write_relative(folder: Path, name: str) -> Path:
    """A whole checkpoint, written by the reference libraries."""
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    networks = {
        "vae": diffusers.AutoencoderKL, "unet": diffusers.UNet2DConditionModel, "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection, "image_normalizer": StableUnCLIPImageNormalizer,
        "image_encoder": transformers.CLIPVisionModelWithProjection, "depth_estimator": transformers.DPTForDepthEstimation,
    }  # fmt: skip
    kind, own = RELATIVES[name]
    parts: dict[str, Any] = {}
    for seed, (part, config) in enumerate((USUAL | own).items()):
        if config is None:
            if part not in USUAL:
                parts[part] = None
        elif part in networks:
            cls = networks[part]
            made = cls(cls.config_class(**config)) if cls.__module__.startswith("transformers") else cls(**config)
            parts[part] = randomize(made, seed)
        elif part.endswith("scheduler"):
            config = dict(config)
            parts[part] = getattr(diffusers, config.pop("_class_name")).from_config(config)
        elif part.startswith("tokenizer"):
            where = write_tokenizer(folder.with_name(f"{folder.name}-{part}"), pad=config)
            parts[part] = transformers.CLIPTokenizer.from_pretrained(where)
        elif config == "dpt":
            size = {"height": DPT["image_size"], "width": DPT["image_size"]}
            parts[part] = transformers.DPTImageProcessor(size=size, resample=2)
        else:
            size = VISION["image_size"]
            parts[part] = transformers.CLIPImageProcessor(
                crop_size={"height": size, "width": size}, size={"shortest_edge": size}
            )
    if "image_normalizer" in parts:
        parts["image_normalizer"].std.data.abs_().add_(0.5)
    getattr(diffusers, kind)(**parts).save_pretrained(folder)
    return folder
