"""From prompts to the embeddings that the U-Net reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sfumato.errors import CheckpointError, UsageError
from sfumato.text.chunks import chunked, from_empty, with_mean
from sfumato.text.compel import compel
from sfumato.text.embeddings import NewWords, pieces
from sfumato.text.grammars import BREAK, a1111, comfyui, subprompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sfumato.models.text_encoder import CLIPTextModel
    from sfumato.text.embeddings import Embedding
    from sfumato.text.grammars import Read
    from sfumato.text.tokenizer import CLIPTokenizer

__all__ = ["PromptEmbeds", "alike", "encode_prompts", "plain_words"]

# More chunks than anybody writes, unless prompts of many chunks have a large common multiple.
MOST_CHUNKS = 60
GRAMMARS = {"a1111": a1111, "comfyui": comfyui, "compel": compel}
# In compel's arithmetic, a word of this weight has no effect, but its tangent is finite.
LEAST = 1e-5


@dataclass(frozen=True)
class PromptEmbeds:
    """Prompt embeddings (B, S, C), and for each prompt the text that was truncated.

    pooled: projected prompts (B, P), if the encoder has a projection. notes: what in the prompts is not supported.
    """

    embeds: Tensor
    lost: tuple[str, ...]
    pooled: Tensor | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Encoder:
    """A text encoder, the choice of its output, and its textual inversions."""

    model: CLIPTextModel
    layer: int
    normalized: bool
    clip_skip: int | None
    new: NewWords

    def __call__(self, ids: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Encode ids (B, S) to states (B, S, C), and pooled prompts (B, P) if the encoder has a projection.

        keep: (B, S), 0 for tokens to mask out.
        """
        inner = self.clip_skip is not None or (self.layer, self.normalized) != (-1, True)
        more = {} if self.new.vectors is None else {"more": self.new.vectors}
        more |= {} if keep is None else {"attention_mask": keep.to(self.model.device)}
        output = self.model(ids.to(self.model.device), output_hidden_states=inner, **more)
        states = output.last_hidden_state
        if inner:
            states = output.hidden_states[self.layer - (self.clip_skip or 0)]
            states = self.model.text_model.final_layer_norm(states) if self.normalized else states
        return states, output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output


def plain_words(prompt: str, syntax: str, embeddings: Sequence[Embedding] = ()) -> str:
    """Return a prompt's plain text: without weights, `<lora:…>` tags and embedding names."""
    read = [
        GRAMMARS[syntax](one).spans if syntax != "plain" else ((one, 1.0),) for one, _ in subprompts(prompt, syntax)
    ]
    text = " ".join("".join(" " if span == BREAK else span[0] for span in spans) for spans in read)
    names = {name.lower(): (0,) for one in embeddings for name in one.names}
    return " ".join(piece for _, piece, known in pieces(text, names) if not known)


@torch.no_grad()
def encode_prompts(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    prompts: Sequence[str],
    *,
    layer: int = -1,
    normalized: bool = True,
    clip_skip: int | None = None,
    syntax: str = "plain",
    embeddings: Sequence[Embedding] = (),
) -> PromptEmbeds:
    """Encode prompts with CLIP.

    layer: the layer whose output is used, -1 for the last. normalized: whether the final layer norm is applied to it.
    clip_skip: 1 uses the layer before that, and so on. syntax: "plain", or a grammar that allows weights and prompts of
    any length. In that case, prompts are repeated to a common number of chunks, which does not change the result of
    attention. embeddings: textual inversions; only vectors of the encoder's width are used. Raises `UsageError` if
    clip_skip exceeds the number of layers, and `CheckpointError` if tokenizer and encoder do not match.
    """
    config, length = text_encoder.config, tokenizer.model_max_length
    new = NewWords.of(embeddings, config.hidden_size, config.vocab_size)
    if tokenizer.largest_id >= config.vocab_size or length > config.max_position_embeddings:
        raise CheckpointError(
            f"the tokenizer has tokens up to {tokenizer.largest_id} and length {length}, the text encoder "
            f"{config.vocab_size} tokens and {config.max_position_embeddings}; they belong to different checkpoints"
        )
    most = config.num_hidden_layers + layer
    if clip_skip is not None and not 0 <= clip_skip <= most:
        raise UsageError(f"clip_skip must be from 0 to {most}, not {clip_skip}")
    encoder = _Encoder(text_encoder, layer, normalized, clip_skip, new)
    read = [GRAMMARS[syntax](prompt) for prompt in prompts] if syntax != "plain" else []
    notes = tuple(note for one in read for note in one.notes)
    if all(one.plain and len(tokenizer.ids(one.spans[0][0], new.ids)) <= length - 2 for one in read):
        tokens = tokenizer.fitted([one.spans[0][0] for one in read] or prompts, words=new.ids)
        states, pooled = encoder(tokens.input_ids)
        return PromptEmbeds(states, tokens.lost, pooled, notes)
    every = [_read(tokenizer, encoder, one, syntax) for one in read]
    states = torch.cat(alike([states for states, _ in every], length))
    pooled = [pooled for _, pooled in every if pooled is not None]
    return PromptEmbeds(states, (), torch.cat(pooled) if pooled else None, notes)


def _read(tokenizer: CLIPTokenizer, encoder: _Encoder, read: Read, syntax: str) -> tuple[Tensor, Tensor | None]:
    """Encode one prompt, or mix or concatenate several: (1, N · S, C), and pooled (1, P)."""
    if not read.parts:
        return _weighted(tokenizer, encoder, read.spans, syntax)
    every = [_weighted(tokenizer, encoder, one.spans, syntax) for one, _ in read.parts]
    weights = torch.tensor([weight for _, weight in read.parts], dtype=torch.float64)
    nothing = encoder(tokenizer.fitted([""]).input_ids)[0]

    def filled(states: Tensor, size: int) -> Tensor:
        return torch.cat([states, *[nothing] * ((size - states.shape[1]) // nothing.shape[1])], dim=1)

    if read.how == "and":
        parts = [one if w == 1 else (empty := filled(one[:, :0], one.shape[1])) + w * (one - empty)
                 for (one, _), w in zip(every, weights.tolist(), strict=True)]  # fmt: skip
        return torch.cat(parts, dim=1), every[0][1]
    weights = weights / weights.sum() if read.how == "blend" else weights
    longest = max(one.shape[1] for one, _ in every)
    mixed = [filled(one, longest) * w for (one, _), w in zip(every, weights.tolist(), strict=True)]
    pooled = [one * w for (_, one), w in zip(every, weights.tolist(), strict=True) if one is not None]
    return torch.stack(mixed).sum(0), torch.stack(pooled).sum(0) if pooled else None


def _weighted(
    tokenizer: CLIPTokenizer, encoder: _Encoder, spans: Sequence[tuple[str, float]], syntax: str
) -> tuple[Tensor, Tensor | None]:
    """Encode one prompt: its chunks' states, concatenated (1, N · S, C), and the first one's pooled output (1, P)."""
    if syntax == "compel":
        return _as_compel(tokenizer, encoder, spans)
    chunks = chunked(tokenizer, spans, syntax, encoder.new.ids)
    states, pooled = encoder(chunks.ids)
    weights = chunks.weights.to(states.device)
    if bool((weights != 1).any()):
        wide = states.double() if states.dtype == torch.float64 else states.float()
        if syntax == "comfyui":
            wide = from_empty(wide, weights, lambda: encoder(tokenizer.fitted([""]).input_ids)[0].to(wide.dtype))
        else:
            wide = with_mean(wide, weights)
        states = wide.to(states.dtype)
    return states.flatten(0, 1)[None], None if pooled is None else pooled[:1]


def _as_compel(
    tokenizer: CLIPTokenizer, encoder: _Encoder, spans: Sequence[tuple[str, float]]
) -> tuple[Tensor, Tensor | None]:
    """Encode a prompt with compel's arithmetic: (1, N · S, C), and pooled (1, P).

    Each token becomes empty + w (state - empty). For each span with w < 1, the prompt is also encoded with that span
    masked out, and mixed in with the weight tan((1 - w) pi/2); the weights are normalized to a sum of 1.
    """
    numbers = [(text, float(place)) for place, (text, _) in enumerate(spans, start=2)]
    chunks = chunked(tokenizer, numbers, "compel", encoder.new.ids)  # to know each token's span; 1 means none
    table = torch.tensor([1.0, 1.0, *(weight for _, weight in spans)], dtype=torch.float64)
    weights, places = table[chunks.weights.long()], chunks.weights.long()
    whole, pooled = encoder(chunks.ids)
    wide = torch.float64 if whole.dtype == torch.float64 else torch.float32
    nothing = encoder(tokenizer.fitted([""]).input_ids)[0].to(wide)

    def weighted(states: Tensor) -> Tensor:
        factors = weights.to(states.device, wide)[:, :, None]
        return torch.where(factors == 1, states.to(wide), nothing + factors * (states.to(wide) - nothing))

    mixed, shares = [weighted(whole)], [1.0]
    for place, (_, weight) in enumerate(spans, start=2):
        if weight < 1 and bool((places == place).any()):
            mixed.append(weighted(encoder(chunks.ids, (places != place).long())[0]))
            shares.append(math.tan((1 - max(weight, LEAST)) * math.pi / 2))
    total = torch.stack([one * (share / sum(shares)) for one, share in zip(mixed, shares, strict=True)]).sum(0)
    return total.to(whole.dtype).flatten(0, 1)[None], None if pooled is None else pooled[:1]


def alike(states: Sequence[Tensor], length: int) -> list[Tensor]:
    """Repeat states (B, N · length, C) of different N until all have the same length.

    Attention over repeated keys is the same as over the keys once, so that prompts do not depend on each other.
    """
    whole = math.lcm(*(one.shape[1] // length for one in states)) * length
    if whole > MOST_CHUNKS * length:
        raise UsageError(
            f"prompts of {', '.join(str(one.shape[1] // length) for one in states)} chunks are too different in length "
            "to be generated together; generate them one by one, or make them shorter"
        )
    return [one.repeat(1, whole // one.shape[1], 1) for one in states]
