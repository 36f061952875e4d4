"""IP-Adapter: image tokens next to the prompt's, with their own keys and values (arXiv 2308.06721)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import CheckpointError
from sfumato.models.attention import Attending, AttentionUser, SelfOrCrossAttention

if TYPE_CHECKING:
    from sfumato.models.image_encoder import CLIPVisionModelWithProjection
    from sfumato.models.unet import UNet2DConditionModel

__all__ = ["FullProjection", "IPAdapter", "ImageProjection", "ImageTokens", "PerceiverAttention", "Resampler"]

HEAD = 64  # channels per attention head of the resampler


class ImageProjection(nn.Module):
    """Projects an image embedding to a few tokens."""

    def __init__(self, channels: int, tokens: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.proj = nn.Linear(channels, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, embeds: Tensor) -> Tensor:
        """(B, C) -> (B, T, C')."""
        return self.norm(self.proj(embeds).unflatten(1, (-1, self.width)))


class PerceiverAttention(Attending):
    """Cross-attention from queries to an image's tokens and the queries themselves."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(inner // HEAD)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, queries: Tensor) -> Tensor:
        """Tokens (B, S, C) and queries (B, T, C) -> (B, T, C)."""
        queries = self.norm2(queries)
        k, v = self.to_kv(torch.cat([self.norm1(x), queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (one.unflatten(2, (self.heads, -1)).transpose(1, 2) for one in (self.to_q(queries), k, v))
        return self.to_out(self.attention(q, k, v, None).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """Reduces an image's tokens to a few, with learned queries (Flamingo's perceiver, arXiv 2204.14198)."""

    def __init__(self, shapes: Mapping[str, Tensor]) -> None:
        super().__init__()
        _, count, width = shapes["latents"].shape
        layers = 1 + max(int(found[1]) for key in shapes if (found := re.match(r"layers\.(\d+)\.", key)))
        inner, wide = shapes["layers.0.0.to_q.weight"].shape[0], shapes["layers.0.1.1.weight"].shape[0]
        self.latents = nn.Parameter(torch.empty(1, count, width))
        self.proj_in = nn.Linear(shapes["proj_in.weight"].shape[1], width)
        self.proj_out = nn.Linear(width, shapes["proj_out.weight"].shape[0])
        self.norm_out = nn.LayerNorm(shapes["proj_out.weight"].shape[0])
        self.layers = nn.ModuleList()
        for _ in range(layers):
            forward = [nn.LayerNorm(width), nn.Linear(width, wide, bias=False), nn.GELU()]
            forward.append(nn.Linear(wide, width, bias=False))
            self.layers.append(nn.ModuleList([PerceiverAttention(width, inner), nn.Sequential(*forward)]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, T, C')."""
        queries, x = self.latents.expand(x.shape[0], -1, -1), self.proj_in(x)
        for attend, forward in (tuple(layer.children()) for layer in self.layers):
            queries = queries + attend(x, queries)
            queries = queries + forward(queries)
        return self.norm_out(self.proj_out(queries))


class FullProjection(nn.Module):
    """All tokens of an image, each to one of the prompt's (full-face adapters)."""

    def __init__(self, shapes: Mapping[str, Tensor]) -> None:
        super().__init__()
        inner, channels = shapes["proj.0.weight"].shape
        width = shapes["proj.2.weight"].shape[0]
        layers = [nn.Linear(channels, inner), nn.GELU(), nn.Linear(inner, width), nn.LayerNorm(width)]
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C')."""
        return self.proj(x)


class IPAdapter(AttentionUser):
    """A plain, plus or full-face IP-Adapter: the projection to image tokens, and key and value matrices for layers."""

    def __init__(self, tensors: Mapping[str, Tensor], where: object) -> None:
        """Build from a file's tensors by name. Raises `CheckpointError` if they are something else."""
        super().__init__()
        self.where = where
        own = {key.removeprefix("image_proj."): one for key, one in tensors.items() if key.startswith("image_proj.")}
        self.whole = "latents" in own or "proj.3.weight" in own
        if not self.whole and {"proj.weight", "norm.weight"} - own.keys():
            raise CheckpointError(
                f"{where} is not a plain, plus or full-face IP-Adapter; FaceID, which needs a face recognizer, is not "
                "supported"
            )
        if self.whole:
            self.image_proj: nn.Module = (Resampler if "latents" in own else FullProjection)(own)
        else:
            width, (out, channels) = own["norm.weight"].shape[0], own["proj.weight"].shape
            self.image_proj = ImageProjection(channels, out // width, width)
        self.image_proj.load_state_dict(own)
        names = (re.match(r"ip_adapter\.(\d+)\.to_k_ip\.weight$", key) for key in tensors)
        self.places = sorted(int(found[1]) for found in names if found)
        for place in self.places:
            for name in ("to_k_ip", "to_v_ip"):
                self.register_buffer(f"{name}_{place}", tensors[f"ip_adapter.{place}.{name}.weight"])

    @property
    def reads(self) -> int:
        """The width of its input: of the image embedding or, for plus adapters, of each token."""
        return next(layer for layer in self.image_proj.modules() if isinstance(layer, nn.Linear)).in_features

    def check_reads(self, encoder: CLIPVisionModelWithProjection | None) -> None:
        """Raise `CheckpointError` unless the adapter was trained with such an image encoder."""
        if encoder is None:
            return
        gives = encoder.config.hidden_size if self.whole else encoder.config.projection_dim
        if gives != self.reads:
            raise CheckpointError(
                f"{self.where} needs {self.reads} values per image, but this image encoder gives {gives}; use the "
                "encoder that the adapter was trained with"
            )

    @staticmethod
    def seen(encoder: CLIPVisionModelWithProjection, pixels: Tensor, *, whole: bool) -> tuple[Tensor, Tensor]:
        """Encode no image, and images (N, 3, S, S): as embeddings or, if `whole`, as the second-last hidden states.

        As in training, no image is an all-zero image for hidden states, and all-zero embeddings otherwise.
        """
        pixels = pixels.to(encoder.device, encoder.dtype)
        if whole:
            both = torch.cat([torch.zeros_like(pixels), pixels])
            nothing, something = encoder(both, output_hidden_states=True, return_dict=False)[2][-2].chunk(2)
            return nothing, something
        embeds = encoder(pixels, return_dict=False)[0]
        return torch.zeros_like(embeds), embeds

    def tokens(self, nothing: Tensor, something: Tensor) -> tuple[Tensor, Tensor]:
        """Project the outputs of `seen`, or a caller's own, to tokens (N, T, C)."""
        like = next(self.parameters())
        tokens = self.image_proj(torch.cat([nothing, something]).to(like)).split([len(nothing), len(something)])
        return tokens[0], tokens[1]

    def matrices(self, unet: UNet2DConditionModel) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Return the key and value matrices for each layer of a U-Net that attends to the prompt.

        Raises `CheckpointError` if they do not fit.
        """
        blocks = (unet.down_blocks, unet.up_blocks, unet.mid_block or nn.Module())
        layers = [m for block in blocks for m in block.modules() if isinstance(m, SelfOrCrossAttention)][1::2]
        pairs = [tuple(getattr(self, f"{name}_{place}") for name in ("to_k_ip", "to_v_ip")) for place in self.places]
        width = unet.config.block_out_channels[0]
        fits = len(layers) == len(pairs) and all(
            len(k) == layer.to_q.out_features for layer, (k, _) in zip(layers, pairs, strict=True)
        )
        if not fits:
            raise CheckpointError(
                f"{self.where} is for another family: it has weights for {len(pairs)} layers, but this U-Net has "
                f"{len(layers)}, with a first width of {width}"
            )
        return dict(zip(layers, pairs, strict=True))  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """An IP-Adapter's input to the layers that attend to the prompt.

    tokens: (1 or B, T, C), for a context of B prompts. matrices: keys and values by layer. scale: of all layers, or by
    layer. mask: None, or (H, W) in [0, 1], where the image prompt applies.
    """

    tokens: Tensor
    matrices: Mapping[nn.Module, tuple[Tensor, Tensor]]
    scale: float | Mapping[nn.Module, float] = 1.0
    mask: Tensor | None = None
    _read: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def added(self, layer: SelfOrCrossAttention, q: Tensor) -> Tensor | None:
        """Attend from q (B, heads, L, d) to the image tokens, times scale and mask; None for other layers."""
        scale = self.scale.get(layer, 0.0) if isinstance(self.scale, Mapping) else self.scale
        if layer not in self.matrices or scale == 0:
            return None
        if layer not in self._read:
            k, v = (F.linear(self.tokens, matrix.to(self.tokens)) for matrix in self.matrices[layer])
            heads = (layer.heads, -1)
            self._read[layer] = k.unflatten(2, heads).transpose(1, 2), v.unflatten(2, heads).transpose(1, 2)
        k, v = self._read[layer]
        out = scale * layer.attention(q, k.to(q.dtype), v.to(q.dtype), None)
        return out if self.mask is None else out * _shrunk(self.mask, q.shape[2])[:, None].to(out)


def _shrunk(mask: Tensor, queries: int) -> Tensor:
    """Resize a mask to a layer's queries (L,), which are the pixels of an image of the same aspect ratio."""
    height = int((queries * mask.shape[0] / mask.shape[1]) ** 0.5)
    height += queries % max(1, height) != 0
    small = F.interpolate(mask[None, None].float(), size=(height, queries // height), mode="bicubic").flatten()
    return F.pad(small, (0, max(0, queries - small.numel())))[:queries]
