"""`config.json` of ControlNets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from sfumato.configs.checks import MOST_LAYERS, check_count
from sfumato.configs.config import Config, one_of
from sfumato.configs.unet import UNet2DConditionConfig
from sfumato.errors import ConfigError

__all__ = ["ControlNetConfig", "ControlNetUnionConfig"]


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(Config):
    """`config.json` of a `ControlNetModel`: its encoder, a copy of the U-Net's, and its image embedding."""

    in_channels: int = 4
    conditioning_channels: int = 3
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_num_groups: int | None = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    global_pool_conditions: bool = False
    where = "controlnet/config.json"
    bounds = UNet2DConditionConfig.bounds
    without_effect = frozenset(("addition_embed_type_num_heads", "sample_size"))
    defaulted = frozenset(("conditioning_embedding_out_channels",))

    def _check(self) -> None:
        order = self.controlnet_conditioning_channel_order
        one_of(self.where, "controlnet_conditioning_channel_order", order, ("rgb", "bgr"))
        try:
            _ = self.unet  # validates itself
        except ConfigError as error:
            raise ConfigError(str(error).replace(UNet2DConditionConfig.where, self.where, 1)) from error

    @cached_property
    def unet(self) -> UNet2DConditionConfig:
        """The config of the U-Net whose encoder this is a copy of."""
        shared = {one.name for one in dataclasses.fields(UNet2DConditionConfig)} - {"extra"}
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name in shared}
        return UNet2DConditionConfig(
            **values, up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(self.down_block_types))
        )

    @property
    def factor(self) -> int:
        """Control image pixels per latent pixel, along each side."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class ControlNetUnionConfig(ControlNetConfig):
    """`config.json` of a `ControlNetUnionModel`: also the number of kinds of control images, and how they are embedded.

    The number of heads (`num_trans_head`) has no effect, because each token attends only to itself.
    """

    conditioning_embedding_out_channels: tuple[int, ...] = (48, 96, 192, 384)
    num_control_type: int = 6
    num_trans_channel: int = 320
    num_trans_head: int = 8
    num_trans_layer: int = 1
    num_proj_channel: int = 320

    def _check(self) -> None:
        super()._check()
        check_count(self.where, "num_control_type", self.num_control_type, MOST_LAYERS)
        check_count(self.where, "num_trans_layer", self.num_trans_layer, MOST_LAYERS)
        for key in ("num_trans_channel", "num_proj_channel"):
            one_of(self.where, key, getattr(self, key), (self.block_out_channels[0],))
