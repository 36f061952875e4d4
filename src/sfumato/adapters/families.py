"""Detecting which model family an adapter was trained for, from its shapes, key names and metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sfumato.adapters.files import Stored

__all__ = ["made_for", "name_of_checkpoint", "prompt_width"]

# Names of layers that only diffusion transformers have.
TRANSFORMERS = ("double_blocks", "single_blocks", "joint_blocks", "single_transformer_blocks", "lora_transformer")


def prompt_width(tensors: Mapping[str, Tensor]) -> int | None:
    """Return how many values per token the file's U-Net reads; None if the file does not show it."""
    for key, tensor in tensors.items():
        flat = key.replace(".", "_")
        if key == "unet:6:down":  # in files that number layers: the first cross-attention
            return tensor.shape[1]
        known = key.endswith(("down.weight", "lora_A.weight", "lora_A.default.weight", "hada_w1_b", ".diff"))
        if known and ("attn2_to_k" in flat or "attn2_processor_to_k" in flat) and len(tensor.shape) >= 2:
            return tensor.shape[1]
    return None


def name_of_checkpoint(width: int) -> str:
    """Return the name of the family whose U-Net reads this many values per token."""
    for family in FAMILIES.values():
        if family.unet.get("cross_attention_dim") == width:
            return family.title.partition(",")[0]
    return f"one whose U-Net reads {width} values per token"


def made_for(stored: Stored) -> str:
    """Return the family that a file is made for; "" if unknown."""
    width = prompt_width(stored.tensors)
    if width is not None:
        return name_of_checkpoint(width)
    if any(word in key for key in stored.tensors for word in TRANSFORMERS):
        return "a diffusion transformer, which is not supported here"
    return (stored.metadata.get("modelspec.architecture") or stored.metadata.get("ss_base_model_version") or "")[:80]
