"""`config.json` of depth estimators, and of what prepares their images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sfumato.configs.config import Config, one_of, parse
from sfumato.configs.text_encoder import CLIPTextConfig
from sfumato.errors import ConfigError
from sfumato.values import Within

__all__ = ["BitConfig", "DPTConfig", "DPTImageProcessorConfig", "eighths"]


@dataclass(frozen=True, kw_only=True)
class BitConfig(Config):
    """The `backbone_config` of a hybrid `DPTConfig`: a residual network with bottlenecks (BiT)."""

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 9)
    num_groups: int = 32
    layer_type: str = "bottleneck"
    global_padding: str = "same"
    embedding_dynamic_padding: bool = True
    hidden_act: str = "relu"
    output_stride: int = 32
    width_factor: float = 1.0
    where = "depth_estimator/config.json: backbone_config"
    bounds = {"depths": Within(1, 256), "num_groups": Within(1, 1024)}
    without_effect = CLIPTextConfig.without_effect

    def _check(self) -> None:
        only = {"layer_type": "bottleneck", "embedding_dynamic_padding": True, "hidden_act": "relu"}
        for key, value in (only | {"output_stride": 32, "width_factor": 1}).items():
            one_of(self.where, key, getattr(self, key), (value,))
        one_of(self.where, "global_padding", self.global_padding.lower(), ("same",))
        one_of(self.where, "number of depths", len(self.depths), (3,))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels that each stage gives."""
        return tuple(eighths(width) for width in self.hidden_sizes[: len(self.depths)])


@dataclass(frozen=True, kw_only=True)
class DPTConfig(Config):
    """`depth_estimator/config.json` of a `DPTForDepthEstimation`; defaults are those of transformers."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 384
    patch_size: int = 16
    num_channels: int = 3
    is_hybrid: bool = False
    qkv_bias: bool = True
    backbone_out_indices: tuple[int, ...] = (2, 5, 8, 11)
    readout_type: str = "project"
    reassemble_factors: tuple[float, ...] = (4, 2, 1, 0.5)
    neck_hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    fusion_hidden_size: int = 256
    head_in_index: int = -1
    use_batch_norm_in_fusion_residual: bool = False
    use_bias_in_fusion_residual: bool | None = None
    add_projection: bool = False
    backbone_config: Any = field(default=None, hash=False)
    where = "depth_estimator/config.json"
    bounds = {
        "num_hidden_layers": Within(1, 256), "layer_norm_eps": Within(0, 1), "num_channels": Within(1, 16),
        "image_size": Within(1, 4096), "backbone_out_indices": Within(0, 255), "head_in_index": Within(-16, 16),
    }  # fmt: skip
    without_effect = CLIPTextConfig.without_effect | {
        "attention_probs_dropout_prob", "auxiliary_loss_weight", "backbone", "backbone_featmap_shape",
        "backbone_kwargs", "hidden_dropout_prob", "neck_ignore_stages", "pooler_act", "pooler_output_size",
        "semantic_classifier_dropout", "semantic_loss_ignore_index", "use_auxiliary_head", "use_pretrained_backbone",
        "use_timm_backbone",
    }  # fmt: skip

    def _check(self) -> None:
        only = {"hidden_act": "gelu", "readout_type": "project", "head_in_index": -1, "add_projection": False}
        for key, value in (only | {"use_batch_norm_in_fusion_residual": False}).items():
            one_of(self.where, key, getattr(self, key), (value,))
        if self.backbone_config is not None and not (self.is_hybrid and isinstance(self.backbone_config, Mapping)):
            raise ConfigError(f"{self.where}: a backbone_config is only supported with is_hybrid = true")
        self._check_divisible(("hidden_size", "num_attention_heads"), ("image_size", "patch_size"))
        lists = (self.backbone_out_indices, self.reassemble_factors, self.neck_hidden_sizes)
        if [len(one) for one in lists] != [4, 4, 4] or max(self.backbone_out_indices) >= self.num_hidden_layers:
            raise ConfigError(
                f"{self.where}: backbone_out_indices, reassemble_factors and neck_hidden_sizes must have four entries, "
                f"and the indices must be below num_hidden_layers = {self.num_hidden_layers}"
            )

    @property
    def backbone(self) -> BitConfig | None:
        """The residual network before the transformer; None if there is none."""
        return parse(BitConfig, self.backbone_config or {})[0] if self.is_hybrid else None

    @property
    def parameters(self) -> int:
        """Number of the estimator's parameters."""
        width, inner, fused = self.hidden_size, self.intermediate_size, self.fusion_hidden_size
        bias = 3 * width * self.qkv_bias
        total = self.num_hidden_layers * (4 * width**2 + bias + 2 * width * inner + inner + 6 * width)
        total += ((self.image_size // self.patch_size) ** 2 + 1) * width + width + 2 * width
        entry = self.num_channels * self.patch_size**2 if self.backbone is None else self.backbone.widths[-1]
        total += (entry + 1) * width
        skipped = 0 if self.backbone is None else 2
        for channels, factor in list(zip(self.neck_hidden_sizes, self.reassemble_factors, strict=True))[skipped:]:
            kernel = 9 if factor < 1 else int(factor) ** 2
            total += (width + 1) * channels + (0 if factor == 1 else kernel * channels**2 + channels)
            total += 2 * width**2 + width
        total += sum(9 * channels * fused for channels in self.neck_hidden_sizes)
        total += 4 * (
            (fused + 1) * fused + 4 * (9 * fused**2 + fused * (self.use_bias_in_fusion_residual is not False))
        )
        total += (9 * fused + 1) * (fused // 2) + (9 * (fused // 2) + 1) * 32 + 33
        return total + (0 if self.backbone is None else _backbone_parameters(self.backbone))


def _backbone_parameters(config: BitConfig) -> int:
    total = (49 * config.num_channels + 2) * config.embedding_size
    for (before, width), depth in zip(pairwise((config.embedding_size, *config.widths)), config.depths, strict=True):
        middle = eighths(width / 4)
        total += (before + 2) * width  # the shortcut of the first block
        for channels in (before, *[width] * (depth - 1)):
            total += (channels + 9 * middle + width + 4) * middle + 2 * width
    return total


def eighths(channels: float) -> int:
    """Round to a multiple of 8, at least 8, and not by more than a tenth down."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


@dataclass(frozen=True, kw_only=True)
class DPTImageProcessorConfig(Config):
    """`feature_extractor/preprocessor_config.json` of a checkpoint with a depth estimator."""

    size: Any = field(default=384, hash=False)
    resample: int = 3
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    do_resize: bool = True
    do_normalize: bool = True
    keep_aspect_ratio: bool = False
    where = "feature_extractor/preprocessor_config.json"
    bounds = {"resample": Within(0, 5)}
    without_effect = CLIPTextConfig.without_effect | {
        "crop_size", "data_format", "device", "disable_grouping", "do_center_crop", "do_convert_rgb", "do_pad",
        "do_reduce_labels", "do_rescale", "ensure_multiple_of", "feature_extractor_type", "image_processor_type",
        "input_data_format", "pad_size", "patch_size", "rescale_factor", "return_tensors", "size_divisor",
    }  # fmt: skip

    def _check(self) -> None:
        for key in ("do_resize", "do_normalize"):
            one_of(self.where, key, getattr(self, key), (True,))
        one_of(self.where, "keep_aspect_ratio", self.keep_aspect_ratio, (False,))
        sides = set(self.size.values()) if isinstance(self.size, Mapping) else {self.size}
        if len(sides) != 1 or not all(isinstance(side, int) and 0 < side <= 4096 for side in sides):
            raise ConfigError(f"{self.where}: size must be one number of pixels up to 4096, not {self.size}")

    @property
    def side(self) -> int:
        """Width and height of what is prepared."""
        return next(iter(self.size.values())) if isinstance(self.size, Mapping) else self.size
