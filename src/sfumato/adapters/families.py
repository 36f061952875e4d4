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
    """Numbers a token that the U-Net reads which this file is made for; None where it does not say."""
    for key, tensor in tensors.items():
        flat = key.replace(".", "_")
        if key == "unet:6:down":  # of files that number their layers, the first attention to the prompt
            return tensor.shape[1]
        known = key.endswith(("down.weight", "lora_A.weight", "lora_A.default.weight", "hada_w1_b", ".diff"))
        if known and ("attn2_to_k" in flat or "attn2_processor_to_k" in flat) and len(tensor.shape) >= 2:
            return tensor.shape[1]
    return None


def name_of_checkpoint(width: int) -> str:
    """The family whose U-Net reads prompts of so many values per token."""
    for family in FAMILIES.values():
        if family.unet.get("cross_attention_dim") == width:
            return family.title.partition(",")[0]
    return f"one whose U-Net reads {width} values per token"


def made_for(stored: Stored) -> str:
    """The family that a file is made for, as far as it can be told; "" if not at all."""
    width = prompt_width(stored.tensors)
    if width is not None:
        return name_of_checkpoint(width)
    if any(word in key for key in stored.tensors for word in TRANSFORMERS):
        return "a diffusion transformer, which is not supported here"
    return (stored.metadata.get("modelspec.architecture") or stored.metadata.get("ss_base_model_version") or "")[:80]
