"""`config.json` of text encoders."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.configs.config import Config, one_of
from sfumato.values import Within

__all__ = ["CLIPTextConfig"]


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(Config):
    """`text_encoder/config.json` of a `CLIPTextModel`; defaults are those of transformers, not of one model."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 1
    where = "text_encoder/config.json"
    bounds = {"num_hidden_layers": Within(1, 256), "layer_norm_eps": Within(0, 1)} | dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"), Within(0, 2**20)
    )
    without_effect = frozenset(
        ("architectures", "attention_dropout", "dropout", "dtype", "gradient_checkpointing", "initializer_factor",
         "initializer_range", "model_type", "torch_dtype", "transformers_version", "use_cache")
    )  # fmt: skip

    def _check(self) -> None:
        one_of(self.where, "hidden_act", self.hidden_act, ("quick_gelu", "gelu"))
        self._check_divisible(("hidden_size", "num_attention_heads"))
