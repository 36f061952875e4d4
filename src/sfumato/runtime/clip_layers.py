"""The compute of CLIP's text and image encoders, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.runtime.layers import Attention, Walk

if TYPE_CHECKING:
    from sfumato.configs import CLIPTextConfig, CLIPVisionConfig
    from sfumato.runtime.layers import Layer

__all__ = ["text_layers", "vision_layers"]


def text_layers(config: CLIPTextConfig, tokens: int, *, projected: bool = False) -> list[Layer]:
    """Return the layers of a text encoder for one prompt, with or without the projection."""
    walk, width = Walk(), config.hidden_size
    size = width * tokens
    walk.add("embedding", (config.vocab_size + config.max_position_embeddings) * width, 0, 3 * size, size)
    _clip_layers(walk, config, tokens)
    walk.norm(width, 3 * size)
    if projected:
        walk.linear(width, config.projection_dim, 1, bias=False)
    return walk.layers


def vision_layers(config: CLIPVisionConfig) -> list[Layer]:
    """Return the layers of an image encoder for one image, with the projection."""
    walk, width, tokens = Walk(), config.hidden_size, config.tokens
    walk.add("embedding", (tokens + 1) * width, 0, 3 * width * tokens, width * tokens)
    walk.linear(config.num_channels * config.patch_size**2, width, tokens, bias=False)
    walk.norm(width, 3 * width * tokens)
    _clip_layers(walk, config, tokens)
    walk.norm(width, width)
    walk.linear(width, config.projection_dim, 1, bias=False)
    return walk.layers


def _clip_layers(walk: Walk, config: CLIPTextConfig | CLIPVisionConfig, tokens: int) -> None:
    width, wide = config.hidden_size, config.intermediate_size
    size = width * tokens
    for _ in range(config.num_hidden_layers):
        walk.norm(width, 3 * size)
        for beside in (size, 2 * size, 3 * size):
            walk.linear(width, width, tokens, beside=beside)
        walk.attend(width, Attention(config.num_attention_heads, tokens, tokens), beside=2 * size)
        walk.linear(width, width, tokens, beside=size)
        walk.norm(width, 3 * size)
        walk.linear(width, wide, tokens, beside=2 * size)
        walk.linear(wide, width, tokens, beside=2 * size + wide * tokens)
