"""From prompts to the embeddings the U-Net reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sfumato.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sfumato.models.text_encoder import CLIPTextModel
    from sfumato.text.tokenizer import CLIPTokenizer

__all__ = ["PromptEmbeds", "encode_prompts"]


@dataclass(frozen=True)
class PromptEmbeds:
    """Embeddings (B, S, C), and for each prompt the words that did not fit into the model's length."""

    embeds: Tensor
    lost: tuple[str, ...]


@torch.no_grad()
def encode_prompts(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    prompts: Sequence[str],
    *,
    clip_skip: int | None = None,
) -> PromptEmbeds:
    """Encode prompts with CLIP.

    `clip_skip=1` takes the result of the layer before the last, and so on, normalized like the last one would be.
    Raises `UsageError` for a skip the encoder has no layer for, `CheckpointError` where tokenizer and encoder do not
    fit.
    """
    tokens = tokenizer(prompts)
    ids = tokens.input_ids.to(text_encoder.device)
    config = text_encoder.config
    if len(tokenizer) > config.vocab_size or ids.shape[1] > config.max_position_embeddings:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens and length {ids.shape[1]}, the text encoder "
            f"{config.vocab_size} and {config.max_position_embeddings}; they are not of one checkpoint"
        )
    if clip_skip is None:
        return PromptEmbeds(text_encoder(ids).last_hidden_state, tokens.lost)
    if not 0 <= clip_skip < config.num_hidden_layers:
        raise UsageError(f"clip_skip must be from 0 to {config.num_hidden_layers - 1}, not {clip_skip}")
    states = text_encoder(ids, output_hidden_states=True).hidden_states
    return PromptEmbeds(text_encoder.text_model.final_layer_norm(states[-1 - clip_skip]), tokens.lost)
