"""Random ControlNets of small checkpoints, with nothing left at zero, and pictures that control."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from support.checkpoints import EVERY, randomize

# A picture becomes half as large on its way to the small checkpoints' latents.
HINT = (8, 16)
KEYS = ("layers_per_block", "block_out_channels", "down_block_types", "cross_attention_dim", "attention_head_dim", "norm_num_groups", "use_linear_projection", "upcast_attention", "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim", "transformer_layers_per_block", "only_cross_attention")  # fmt: skip


def control_config(shape: str = "sd15", **more: Any) -> dict[str, Any]:
    """The config of a ControlNet for a small checkpoint."""
    unet = EVERY[shape].unet
    return {key: unet[key] for key in KEYS if key in unet} | {"conditioning_embedding_out_channels": HINT} | more


def control_net(library: Any, shape: str = "sd15", seed: int = 0, **more: Any) -> Any:
    """A random one, of either library."""
    return randomize(library.ControlNetModel(**control_config(shape, **more)), seed + 10)


def control_picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def union_net(library: Any, shape: str = "sdxl", seed: int = 0, **more: Any) -> Any:
    """A random ControlNet Union, of either library."""
    config = control_config(shape)
    width = config["block_out_channels"][0]
    config |= {"num_trans_channel": width, "num_proj_channel": width, "num_trans_layer": 2, "num_trans_head": 2}
    return randomize(library.ControlNetUnionModel(**config | more), seed + 30)


def t2i_adapter(library: Any, shape: str = "sd15", seed: int = 0, **more: Any) -> Any:
    """A random T2I-Adapter for a small checkpoint, of either library."""
    own = {"adapter_type": "full_adapter", "channels": [16, 16, 32, 32]}
    if shape == "sdxl":
        own = {"adapter_type": "full_adapter_xl", "channels": [16, 32], "downscale_factor": 4}
    return randomize(library.T2IAdapter(**{"downscale_factor": 2} | own | more), seed + 20)
