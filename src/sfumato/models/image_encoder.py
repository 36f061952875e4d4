"""CLIP's image encoder, a vision transformer (arXiv 2103.00020 and 2010.11929), and its preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sfumato.checkpoints.weights import Rule
from sfumato.configs import CLIPVisionConfig, ImageNormalizerConfig
from sfumato.images import to_pixels
from sfumato.models.base import Model
from sfumato.models.text_encoder import CLIPEncoder
from sfumato.outputs import Output

__all__ = ["CLIPVisionModelOutput", "CLIPVisionModelWithProjection", "StableUnCLIPImageNormalizer", "clip_pixels"]

# Mean and standard deviation of the colors in CLIP's training data.
MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(image: Any, size: int) -> Tensor:
    """Convert images to the encoder's input: (B, 3, size, size) float32, normalized like CLIP's training data.

    image: a PIL image, array, tensor, or a list of these, as in `to_pixels`. The shorter side is resized to `size`
    (bicubic), then the center is cropped. Raises `UsageError` for anything else.
    """
    if isinstance(image, (list, tuple)) and image:
        return torch.cat([clip_pixels(one, size) for one in image])
    if isinstance(image, Image.Image):
        short = min(image.size)
        width, height = (int(size * side / short) for side in image.size)
        fitted = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        fitted = fitted.crop((left, top, left + size, top + size))
        pixels = torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    else:
        whole = (to_pixels(image, 1).float() + 1) / 2
        return clip_pixels(
            [Image.fromarray((one.permute(1, 2, 0) * 255).round().byte().numpy()) for one in whole], size
        )
    mean, spread = (torch.tensor(values)[:, None, None] for values in (MEAN, SPREAD))
    return (pixels - mean) / spread


@dataclass(frozen=True, eq=False)
class CLIPVisionModelOutput(Output):
    """The encoded image.

    image_embeds (B, P): the class token, normalized and projected to the space shared with text. last_hidden_state
    (B, S, C): all tokens, not normalized. hidden_states: the embeddings and the output of every layer, if requested.
    """

    image_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class _Embeddings(nn.Module):
    """Embeddings of the class token and the image's patches, plus their positions."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(config.tokens, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, S, C)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class _Transformer(nn.Module):
    """Embeddings, layers, and layer norms before and after."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelled as in checkpoints
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CLIPVisionModelWithProjection(Model):
    """CLIP's image encoder with the projection to the space shared with text."""

    config_class = CLIPVisionConfig
    role = "image_encoder"
    weights_name = "model"
    key_rules = (
        Rule(r"^(embeddings|encoder|pre_layrnorm|post_layernorm)\.", r"vision_model.\1."),
        Rule(r"\.position_ids$", ""),
        Rule(r"^(text_model\..*|text_projection\.weight|logit_scale)$", ""),  # from whole CLIP models
    )
    config: CLIPVisionConfig
    remedy = "check the image that was given"

    def __init__(self, config: CLIPVisionConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        self.vision_model = _Transformer(self.config)
        self.visual_projection = nn.Linear(self.config.hidden_size, self.config.projection_dim, bias=False)

    def forward(
        self, pixel_values: Tensor, *, output_hidden_states: bool = False, return_dict: bool = True
    ) -> CLIPVisionModelOutput | tuple[Any, ...]:
        """Encode images (B, 3, S, S) from `clip_pixels`.

        Returns a `CLIPVisionModelOutput`, or its values in a tuple with `return_dict=False`.
        """
        model = self.vision_model
        states = [model.pre_layrnorm(model.embeddings(pixel_values))]
        for layer in model.encoder.layers:
            states.append(layer(states[-1], None))
            if not output_hidden_states:
                del states[0]
        embeds = self.visual_projection(model.post_layernorm(states[-1][:, 0]))
        every = tuple(states) if output_hidden_states else None
        if return_dict:
            return CLIPVisionModelOutput(embeds, states[-1], every)
        return (embeds, states[-1]) if every is None else (embeds, states[-1], every)

    def _config_json(self) -> dict[str, Any]:
        told = {"architectures": [type(self).__name__], "model_type": "clip_vision_model", "dtype": str(self.dtype)[6:]}
        return self.config.to_dict() | told


class StableUnCLIPImageNormalizer(Model):
    """Mean and standard deviation (1, D) of image embeddings, to normalize them before noise is added."""

    config_class = ImageNormalizerConfig
    role = "image_normalizer"
    weights_name = "diffusion_pytorch_model"
    config: ImageNormalizerConfig

    def __init__(self, config: ImageNormalizerConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        self.mean = nn.Parameter(torch.zeros(1, self.config.embedding_dim))
        self.std = nn.Parameter(torch.ones(1, self.config.embedding_dim))

    def scale(self, embeds: Tensor) -> Tensor:
        """Normalize embeddings (B, D)."""
        return (embeds - self.mean.to(embeds)) / self.std.to(embeds)

    def unscale(self, embeds: Tensor) -> Tensor:
        """The inverse of `scale`."""
        return embeds * self.std.to(embeds) + self.mean.to(embeds)
