"""Depth estimation: DPT, a dense prediction transformer (arXiv 2103.13413), as Stable Diffusion 2 depth ships it.

The hybrid form begins with a residual network (BiT, arXiv 1912.11370), the plain one with patches.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.checkpoints.weights import Rule
from sfumato.configs import DPTConfig
from sfumato.configs.depth import BitConfig, eighths
from sfumato.models.attention import Attending
from sfumato.models.base import Model

__all__ = ["DPTForDepthEstimation"]


def _evenly_padded(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad with zeros to ceil(side / stride) outputs along each side; if the number is odd, one more at the end."""
    more = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in reversed(x.shape[2:]))
    return F.pad(x, [side for each in more for side in (each // 2, each - each // 2)])


class _Conv2d(nn.Conv2d):
    """A convolution by filters of mean 0 and variance 1 (weight standardization, arXiv 1903.10520)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # torch's name
        """(B, C, H, W) -> (B, C', H / stride, W / stride), rounded up."""
        weight = self.weight.float()
        spread, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = ((weight - mean) * (spread + 1e-8).rsqrt()).to(input.dtype)
        return self._conv_forward(_evenly_padded(input, self.kernel_size[0], self.stride[0]), weight, None)


class _Bottleneck(nn.Module):
    """Three convolutions, of which the middle one is narrow, and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int, groups: int, *, first: bool) -> None:
        super().__init__()
        middle = eighths(width / 4)
        self.downsample = None
        if first:
            shortcut = {"conv": _Conv2d(channels, width, 1, stride), "norm": nn.GroupNorm(groups, width)}
            self.downsample = nn.ModuleDict(shortcut)
        self.conv1, self.norm1 = _Conv2d(channels, middle, 1), nn.GroupNorm(groups, middle)
        self.conv2, self.norm2 = _Conv2d(middle, middle, 3, stride), nn.GroupNorm(groups, middle)
        self.conv3, self.norm3 = _Conv2d(middle, width, 1), nn.GroupNorm(groups, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample["norm"](self.downsample["conv"](x))
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(self.norm3(self.conv3(x)) + shortcut)


class _Backbone(nn.Module):
    """A residual network, whose stages halve the image to a quarter, an eighth and a sixteenth."""

    def __init__(self, config: BitConfig) -> None:
        super().__init__()
        width, groups = config.embedding_size, config.num_groups
        embedder = {"convolution": _Conv2d(config.num_channels, width, 7, 2), "norm": nn.GroupNorm(groups, width)}
        stages = []
        for i, ((before, after), depth) in enumerate(
            zip(pairwise((width, *config.widths)), config.depths, strict=True)
        ):
            blocks = [_Bottleneck(before, after, 1 if i == 0 else 2, groups, first=True)]
            blocks += [_Bottleneck(after, after, 1, groups, first=False) for _ in range(depth - 1)]
            stages.append(nn.ModuleDict({"layers": nn.Sequential(*blocks)}))
        encoder = nn.ModuleDict({"stages": nn.ModuleList(stages)})
        self.bit = nn.ModuleDict({"embedder": nn.ModuleDict(embedder), "encoder": encoder})

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> what each stage gives."""
        embedder: Any = self.bit["embedder"]
        x = F.relu(embedder["norm"](embedder["convolution"](pixels)))
        given = [F.max_pool2d(_evenly_padded(x, 3, 2), 3, 2)]
        stages: Any = self.bit["encoder"]["stages"]  # pyright: ignore[reportIndexIssue]
        for stage in stages:
            given.append(stage["layers"](given[-1]))
        return given[1:]


class _Embeddings(nn.Module):
    """Tokens of an image's patches or of a residual network's pixels, with a class token, plus their positions."""

    def __init__(self, config: DPTConfig) -> None:
        super().__init__()
        width, self.side = config.hidden_size, config.image_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.side**2 + 1, width))
        patch, backbone = config.patch_size, config.backbone
        if backbone is None:
            patches = nn.Conv2d(config.num_channels, width, patch, stride=patch)
            self.patch_embeddings = nn.ModuleDict({"projection": patches})
        else:
            self.backbone, self.projection = _Backbone(backbone), nn.Conv2d(backbone.widths[-1], width, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, 3, S, S) -> tokens (B, T, C), and what the first stages of a residual network give."""
        stages = self.backbone(pixels) if hasattr(self, "backbone") else []
        patches = self.projection(stages[-1]) if stages else self.patch_embeddings["projection"](pixels)
        tokens = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        return tokens + self.position_embeddings, stages[:-1]


class _Attention(Attending):
    def __init__(self, config: DPTConfig) -> None:
        super().__init__(config.num_attention_heads)
        width = config.hidden_size
        self.query, self.key, self.value = (nn.Linear(width, width, bias=config.qkv_bias) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q, k, v = (one(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for one in (self.query, self.key, self.value))
        return self.attention(q, k, v, None).transpose(1, 2).flatten(2)


def _dense(channels: int, out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(channels, out)})


class _Layer(nn.Module):
    """Attention and two linear layers, each with a layer norm before and a residual connection."""

    def __init__(self, config: DPTConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = nn.ModuleDict({"attention": _Attention(config), "output": _dense(width, width)})
        self.intermediate, self.output = _dense(width, inner), _dense(inner, width)
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        attention: Any = self.attention
        x = x + attention["output"]["dense"](attention["attention"](self.layernorm_before(x)))
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


class _Transformer(nn.Module):
    def __init__(self, config: DPTConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))})
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # in files, and never used
        self.taken = config.backbone_out_indices[2 if config.is_hybrid else 0 :]

    def forward(self, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(B, 3, S, S) -> what stages of the residual network and some of the layers give."""
        x, stages = self.embeddings(pixels)
        layers, taken = self.encoder["layer"], []
        for i, layer in enumerate(layers):  # pyright: ignore[reportArgumentType]
            x = layer(x)
            taken += [x] if i in self.taken else []
        return stages, taken


class _Reassembled(nn.Module):
    """Tokens to an image of features, enlarged or reduced."""

    def __init__(self, width: int, channels: int, factor: float) -> None:
        super().__init__()
        self.projection = nn.Conv2d(width, channels, 1)
        self.resize: nn.Module = nn.Identity()
        if factor > 1:
            self.resize = nn.ConvTranspose2d(channels, channels, int(factor), stride=int(factor))
        elif factor < 1:
            self.resize = nn.Conv2d(channels, channels, 3, stride=int(1 / factor), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h × factor, w × factor)."""
        return self.resize(self.projection(x))


class _Residual(nn.Module):
    def __init__(self, channels: int, *, bias: bool) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.convolution2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        return x + self.convolution2(F.relu(self.convolution1(F.relu(x))))


class _Fusion(nn.Module):
    """Adds finer features to coarser ones, and enlarges the sum twice."""

    def __init__(self, channels: int, *, bias: bool) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, channels, 1)
        self.residual_layer1, self.residual_layer2 = (_Residual(channels, bias=bias) for _ in range(2))

    def forward(self, x: Tensor, finer: Tensor | None) -> Tensor:
        """(B, C, h, w), and features of about that size -> (B, C, 2h, 2w)."""
        if finer is not None:
            if finer.shape != x.shape:
                finer = F.interpolate(finer, size=x.shape[2:], mode="bilinear", align_corners=False)
            x = x + self.residual_layer1(finer)
        x = F.interpolate(self.residual_layer2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.projection(x)


class _Neck(nn.Module):
    """Features of all depths, put together from coarse to fine."""

    def __init__(self, config: DPTConfig) -> None:
        super().__init__()
        width, self.skipped = config.hidden_size, 2 if config.is_hybrid else 0
        shapes = list(zip(config.neck_hidden_sizes, config.reassemble_factors, strict=True))
        nothing = [nn.Identity()] * self.skipped
        layers = [*nothing, *(_Reassembled(width, *shape) for shape in shapes[self.skipped :])]
        projects = [nn.Sequential(nn.Linear(2 * width, width), nn.GELU()) for _ in shapes[self.skipped :]]
        self.reassemble_stage = nn.ModuleDict(
            {"layers": nn.ModuleList(layers), "readout_projects": nn.ModuleList([*nothing, *projects])}
        )
        fused, bias = config.fusion_hidden_size, config.use_bias_in_fusion_residual is not False
        sizes = config.neck_hidden_sizes
        self.convs = nn.ModuleList(nn.Conv2d(size, fused, 3, padding=1, bias=False) for size in sizes)
        self.fusion_stage = nn.ModuleDict({"layers": nn.ModuleList(_Fusion(fused, bias=bias) for _ in sizes)})

    def forward(self, stages: list[Tensor], tokens: list[Tensor], side: int) -> Tensor:
        """What stages (B, C, h, w) and layers (B, T, C) give -> (B, C', H, W)."""
        stage: Any = self.reassemble_stage
        features = list(stages)
        for i, one in enumerate(tokens, self.skipped):
            told = torch.cat([one[:, 1:], one[:, :1].expand(-1, one.shape[1] - 1, -1)], dim=2)
            image = stage["readout_projects"][i](told).transpose(1, 2).unflatten(2, (side, side))
            features.append(stage["layers"][i](image))
        features = [layer(one) for layer, one in zip(self.convs, features, strict=True)]
        layers: Any = self.fusion_stage["layers"]
        x = layers[0](features[-1], None)
        for layer, one in zip(list(layers)[1:], features[-2::-1], strict=True):
            x = layer(x, one)
        return x


class DPTForDepthEstimation(Model):
    """Estimates the depth of what images show: larger where it is nearer, in no particular scale."""

    config_class = DPTConfig
    role = "depth_estimator"
    weights_name = "model"
    key_rules = (Rule(r"^dpt\.pooler\..*$", ""),)
    config: DPTConfig
    remedy = "check the image that was given, or pass a depth map"

    def __init__(self, config: DPTConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        fused = self.config.fusion_hidden_size
        self.dpt, self.neck = _Transformer(self.config), _Neck(self.config)
        layers = [nn.Conv2d(fused, fused // 2, 3, padding=1)]
        layers += [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)]
        layers += [nn.Conv2d(fused // 2, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1), nn.ReLU()]
        self.head = nn.ModuleDict({"head": nn.Sequential(*layers)})

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images (B, 3, S, S) from a `DPTImageProcessor` -> depth maps (B, H, W)."""
        x = self.neck(*self.dpt(pixel_values), self.dpt.embeddings.side)
        return self.head["head"](x).squeeze(1)

    def _config_json(self) -> dict[str, Any]:
        told = {"architectures": [type(self).__name__], "model_type": "dpt", "dtype": str(self.dtype)[6:]}
        return self.config.to_dict() | told
