"""The three networks of sfumato-mini, built from the same `config.json` keys that the finished folder carries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sfumato.models import AutoencoderKL, CLIPTextModel, UNet2DConditionModel

SCALING_FACTOR = 0.18215  # as in Stable Diffusion 1; the latents' own scale is folded into the VAE (train_vae.py)


def vae_config(row: SimpleNamespace) -> dict[str, Any]:
    """`vae/config.json`."""
    levels = len(row.vae_channels)
    return {
        "act_fn": "silu",
        "block_out_channels": row.vae_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3,
        "latent_channels": row.latent_channels,
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "out_channels": 3,
        "sample_size": row.size,
        "scaling_factor": SCALING_FACTOR,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_config(row: SimpleNamespace, vocabulary: int) -> dict[str, Any]:
    """`text_encoder/config.json`; the last two tokens of the vocabulary are start and end."""
    return {
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "hidden_act": "quick_gelu",
        "hidden_size": row.text_width,
        "intermediate_size": 4 * row.text_width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": row.tokens,
        "num_attention_heads": row.text_width // 64,
        "num_hidden_layers": row.text_layers,
        "pad_token_id": vocabulary - 1,
        "projection_dim": row.text_width,
        "vocab_size": vocabulary,
    }


def unet_config(row: SimpleNamespace) -> dict[str, Any]:
    """`unet/config.json`: cross-attention at every level, heads of 32."""
    levels = len(row.unet_channels)
    return {
        "act_fn": "silu",
        "attention_head_dim": [width // 32 for width in row.unet_channels],  # upstream's name; it counts heads
        "block_out_channels": row.unet_channels,
        "center_input_sample": False,
        "cross_attention_dim": row.text_width,
        "down_block_types": ["CrossAttnDownBlock2D"] * levels,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": row.latent_channels,
        "layers_per_block": 1,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 16,
        "out_channels": row.latent_channels,
        "sample_size": row.size // 2 ** (len(row.vae_channels) - 1),
        "up_block_types": ["CrossAttnUpBlock2D"] * levels,
    }


def build_vae(row: SimpleNamespace) -> AutoencoderKL:
    return AutoencoderKL(**vae_config(row))


def build_text(row: SimpleNamespace, vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(**text_config(row, vocabulary))


def build_unet(row: SimpleNamespace) -> UNet2DConditionModel:
    return UNet2DConditionModel(**unet_config(row))


def read_text(model: CLIPTextModel, tokens: Any) -> Any:
    """(B, T) token ids -> (B, T, width)."""
    return model(tokens)[0]


def read_unet(model: UNet2DConditionModel, x: Any, t: Any, words: Any) -> Any:
    """(B, C, h, w), (B,), (B, T, width) -> (B, C, h, w)."""
    return model(x, t, words, return_dict=False)[0]
