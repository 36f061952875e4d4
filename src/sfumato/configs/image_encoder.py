"""`config.json` of image encoders."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.configs.config import Config, one_of
from sfumato.configs.text_encoder import CLIPTextConfig
from sfumato.values import Within

__all__ = ["CLIPVisionConfig", "ImageNormalizerConfig"]


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig(Config):
    """`image_encoder/config.json` of a `CLIPVisionModelWithProjection`; defaults are those of transformers."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    where = "image_encoder/config.json"
    bounds = {
        "num_hidden_layers": Within(1, 256), "layer_norm_eps": Within(0, 1), "num_channels": Within(1, 16),
        "image_size": Within(1, 4096),
    }  # fmt: skip
    without_effect = CLIPTextConfig.without_effect

    def _check(self) -> None:
        one_of(self.where, "hidden_act", self.hidden_act, ("quick_gelu", "gelu"))
        self._check_divisible(("hidden_size", "num_attention_heads"), ("image_size", "patch_size"))

    @property
    def tokens(self) -> int:
        """Number of tokens for an image: the class token and one for each patch."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, kw_only=True)
class ImageNormalizerConfig(Config):
    """`image_normalizer/config.json` of a `StableUnCLIPImageNormalizer`."""

    embedding_dim: int = 768
    where = "image_normalizer/config.json"
