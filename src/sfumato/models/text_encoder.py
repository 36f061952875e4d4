"""CLIP's text encoder ("Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.checkpoints.weights import Rule
from sfumato.configs import CLIPTextConfig, CLIPVisionConfig
from sfumato.models.attention import Attending
from sfumato.models.base import Model
from sfumato.models.recomputed import Recomputed
from sfumato.outputs import Output

__all__ = [
    "CLIPMLP",
    "CLIPAttention",
    "CLIPEmbeddings",
    "CLIPEncoder",
    "CLIPLayer",
    "CLIPTextModel",
    "CLIPTextModelOutput",
    "CLIPTextModelWithProjection",
    "CLIPTextOutput",
    "CLIPTextTransformer",
]


@dataclass(frozen=True, eq=False)
class CLIPTextOutput(Output):
    """The encoded prompt.

    last_hidden_state (B, S, C): normalized. pooler_output (B, C): its row at the end-of-text token. hidden_states: the
    embeddings and the output of every layer, not normalized, if requested.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, eq=False)
class CLIPTextModelOutput(Output):
    """The encoded prompt with a projection: text_embeds (B, P) is the projected pooled output."""

    text_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class CLIPAttention(Attending):
    """Multi-head self-attention with CLIP's parameter names: `q_proj`, `k_proj`, `v_proj`, `out_proj`."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(heads)
        self.k_proj = nn.Linear(channels, channels)  # transformers' order, as optimizer states go by position
        self.v_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map x (B, S, C) and a mask added to the scores to (B, S, C)."""
        q, k, v = (
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self.attention(q, k, v, mask).transpose(1, 2).flatten(2))


class CLIPMLP(nn.Module):
    """Two linear layers with GELU in between, or CLIP's sigmoid approximation of it."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class CLIPLayer(Recomputed):
    """Attention and MLP, each with a layer norm before and a residual connection."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Module):
    """The sum of token and position embeddings."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor, more: Tensor | None = None) -> Tensor:
        """(B, S) -> (B, S, C). more: vectors (K, C) of ids beyond the vocabulary."""
        positions = self.position_embedding.weight[: ids.shape[1]]
        if more is None:
            return self.token_embedding(ids) + positions
        words = self.token_embedding.num_embeddings
        known = self.token_embedding(ids.where(ids < words, 0))
        own = F.embedding((ids - words).clamp(min=0), more.to(known.device, known.dtype))
        return torch.where((ids < words)[..., None], known, own) + positions


class CLIPEncoder(nn.Module):
    """A stack of layers."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers and the final layer norm."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CLIPTextModel(Model):
    """CLIP's text encoder, OpenAI's (quick_gelu) or OpenCLIP's (gelu)."""

    config_class = CLIPTextConfig
    role = "text_encoder"
    weights_name = "model"
    key_rules = (
        Rule(r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),  # newer checkpoints omit the prefix
        Rule(r"\.position_ids$", ""),  # older ones store the numbers 0 to 76
    )
    config: CLIPTextConfig

    def __init__(self, config: CLIPTextConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        self.text_model = CLIPTextTransformer(self.config)
        self.apply(self._draw)

    @torch.no_grad()
    def _draw(self, module: nn.Module) -> None:
        """Initialize weights like CLIP's authors (`initialize_parameters`), number for number as in transformers."""
        width = self.config.hidden_size**-0.5
        inner = width * (2 * self.config.num_hidden_layers) ** -0.5
        drawn: list[tuple[Tensor, float]] = []
        if isinstance(module, (nn.Linear, nn.Embedding)):
            drawn = [(module.weight, 0.02)]
            if isinstance(module, nn.Linear):
                module.bias.zero_()
        elif isinstance(module, CLIPEmbeddings):
            drawn = [(layer.weight, 0.02) for layer in (module.token_embedding, module.position_embedding)]
        elif isinstance(module, CLIPAttention):
            drawn = [(layer.weight, inner) for layer in (module.q_proj, module.k_proj, module.v_proj)]
            drawn.append((module.out_proj.weight, width))
        elif isinstance(module, CLIPMLP):
            drawn = [(module.fc1.weight, (2 * self.config.hidden_size) ** -0.5), (module.fc2.weight, inner)]
        for weight, std in drawn:
            weight.normal_(std=std)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        more: Tensor | None = None,
    ) -> CLIPTextOutput | tuple[Any, ...]:
        """Encode token ids.

        input_ids: (B, S), with S up to `max_position_embeddings`. attention_mask: (B, S), 1 for tokens to keep. more:
        vectors (K, C) of ids beyond the vocabulary. Returns a `CLIPTextOutput`, or its values in a tuple with
        `return_dict=False`.
        """
        last, pooled, hidden = self._encode(input_ids, attention_mask, output_hidden_states, more)
        if return_dict:
            return CLIPTextOutput(last, pooled, hidden)
        return (last, pooled) if hidden is None else (last, pooled, hidden)

    def _encode(
        self, input_ids: Tensor, attention_mask: Tensor | None, every: bool, more: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
        """Return the normalized last state, its row at each text's end and, if `every`, the states of all layers."""
        x = self.text_model.embeddings(input_ids, more)
        mask = self._mask(x, attention_mask)
        states = [x]
        for layer in self.text_model.encoder.layers:
            states.append(layer(states[-1], mask))
            if not every:
                del states[0]
        last = self.text_model.final_layer_norm(states[-1])
        rows = torch.arange(last.shape[0], device=last.device)
        pooled = last[rows, self._end_of_text(input_ids)]
        return last, pooled, tuple(states) if every else None

    @staticmethod
    def _mask(x: Tensor, keep: Tensor | None) -> Tensor:
        """Return the causal mask plus padding. It is finite, so that no row becomes NaN."""
        length, lowest = x.shape[1], torch.finfo(x.dtype).min
        mask = torch.full((1, 1, length, length), lowest, dtype=x.dtype, device=x.device).triu(1)
        if keep is not None:
            mask = mask.masked_fill(keep[:, None, None, :] == 0, lowest)
        return mask

    def _end_of_text(self, ids: Tensor) -> Tensor:
        eos = self.config.eos_token_id
        ids = ids.where(ids < self.config.vocab_size, 0)  # ignore ids beyond the vocabulary, which are larger
        # Configs from before the token ids were corrected have 2; there, end-of-text is the largest id.
        return ids.argmax(dim=-1) if eos in (None, 2) else (ids == eos).int().argmax(dim=-1)

    def _config_json(self) -> dict[str, Any]:
        names = {"architectures": [type(self).__name__], "model_type": "clip_text_model", "dtype": str(self.dtype)[6:]}
        return {key: value for key, value in self.config.to_dict().items() if key != "torch_dtype"} | names


class CLIPTextModelWithProjection(CLIPTextModel):
    """CLIP's text encoder with the projection to the embedding space shared with images."""

    role = "text_encoder_2"

    def __init__(self, config: CLIPTextConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        self.text_projection = nn.Linear(self.config.hidden_size, self.config.projection_dim, bias=False)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        more: Tensor | None = None,
    ) -> CLIPTextModelOutput | tuple[Any, ...]:
        """Encode like `CLIPTextModel`, to a `CLIPTextModelOutput`, or a tuple with `return_dict=False`."""
        last, pooled, hidden = self._encode(input_ids, attention_mask, output_hidden_states, more)
        embeds = self.text_projection(pooled)
        if return_dict:
            return CLIPTextModelOutput(embeds, last, hidden)
        return (embeds, last) if hidden is None else (embeds, last, hidden)
