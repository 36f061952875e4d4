"""Configurations of the families beyond Stable Diffusion 1.x and 2.x: tiny ones to compute with, real ones to count."""

from __future__ import annotations

from typing import Any

from support.checkpoints import XL

SHALLOW = XL | {"layers_per_block": 1, "mid_block_type": None}
LATENT_UPSCALER: dict[str, Any] = {
    "sample_size": 16,
    "act_fn": "gelu",
    "attention_head_dim": 8,
    "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["KDownBlock2D"] + ["KCrossAttnDownBlock2D"] * 3,
    "up_block_types": ["KCrossAttnUpBlock2D"] * 3 + ["KUpBlock2D"],
    "mid_block_type": None,
    "in_channels": 8,
    "out_channels": 5,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "cross_attention_dim": 24,
    "layers_per_block": 3,
    "norm_num_groups": None,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_type": "fourier",
    "time_cond_proj_dim": 40,
    "timestep_post_act": "gelu",
}

_XL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "upcast_attention": None,
}
_SD1 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_SD2 = _SD1 | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
# U-Nets and text encoders as their authors published them.
REAL_UNETS: dict[str, dict[str, Any]] = {
    "SD 1.5": _SD1,
    "SD 2.1": _SD2 | {"sample_size": 96, "upcast_attention": True},
    "SD inpainting": _SD1 | {"in_channels": 9},
    "depth": _SD2 | {"in_channels": 5},
    "InstructPix2Pix": _SD1 | {"in_channels": 8},
    "unCLIP h": _SD2 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
    "LCM": _SD1 | {"time_cond_proj_dim": 256},
    "x4 upscaler": (
        {
            "sample_size": 128,
            "in_channels": 7,
            "block_out_channels": [256, 512, 512, 1024],
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
            "attention_head_dim": 8,
            "cross_attention_dim": 1024,
            "only_cross_attention": [True, True, True, False],
            "num_class_embeds": 1000,
            "use_linear_projection": True,
        }
    ),
    "x2 latent upscaler": (
        LATENT_UPSCALER
        | {
            "attention_head_dim": 64,
            "block_out_channels": [384, 384, 768, 768],
            "cross_attention_dim": 768,
            "layers_per_block": 4,
            "time_cond_proj_dim": 896,
        }
    ),
    "SDXL base": _XL,
    "SDXL inpainting": _XL | {"in_channels": 9},
    "SDXL refiner": (
        _XL
        | {
            "block_out_channels": [384, 768, 1536, 1536],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": 4,
            "attention_head_dim": [6, 12, 24, 24],
            "cross_attention_dim": 1280,
            "projection_class_embeddings_input_dim": 2560,
        }
    ),
    "SSD-1B": (
        _XL
        | {
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        }
    ),
    "Segmind Vega": _XL | {"transformer_layers_per_block": [1, 1, 2], "mid_block_type": "UNetMidBlock2D"},
    "KOALA 700M": (_XL | {"transformer_layers_per_block": [1, 2, 5], "layers_per_block": 1, "mid_block_type": None}),
    "KOALA 1B": _XL | {"transformer_layers_per_block": [1, 2, 6], "layers_per_block": 1},
    "small-sd": _SD1 | {"layers_per_block": 1},
    "BK-SDM tiny": (
        _SD1
        | {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3,
            "layers_per_block": 1,
            "mid_block_type": None,
        }
    ),
}
_CLIP = {"max_position_embeddings": 77}
REAL_ENCODERS: dict[str, dict[str, Any]] = {
    "CLIP-L": _CLIP | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768},
    "OpenCLIP H": _CLIP | {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23, "hidden_act": "gelu", "projection_dim": 512},
    "OpenCLIP bigG": _CLIP | {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "hidden_act": "gelu", "projection_dim": 1280},
}  # fmt: skip
PLAYGROUND_VAE = {
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
    "scaling_factor": 0.5,
}
