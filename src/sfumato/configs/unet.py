"""`config.json` of U-Nets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfumato.configs.checks import ACTIVATIONS, MOST_BLOCKS, MOST_LAYERS, check_count, check_divisible
from sfumato.configs.config import Config, one_of
from sfumato.errors import ConfigError
from sfumato.values import Within

__all__ = ["K_GROUP", "UNet2DConditionConfig"]

K_GROUP = 32  # channels per group of k-diffusion's normalization layers


@dataclass(frozen=True, kw_only=True)
class UNet2DConditionConfig(Config):
    """`unet/config.json` of a `UNet2DConditionModel`.

    For historical reasons, `attention_head_dim` is the *number* of heads of each block.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int | None = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    class_embeddings_concat: bool = False
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    mid_block_only_cross_attention: bool | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    time_embedding_type: str = "positional"
    timestep_post_act: str | None = None
    # These are only validated: other values stand for layers that no Stable Diffusion model has.
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    addition_embed_type_num_heads: int = 64
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_act_fn: str | None = None
    attention_type: str = "default"
    cross_attention_norm: str | None = None
    renamed = {"timestep_act_2": "timestep_post_act"}
    where = "unet/config.json"
    bounds = {
        "freq_shift": Within(0, 1000), "downsample_padding": Within(0, 8), "mid_block_scale_factor": Within(1e-6, 1e6),
        "dropout": Within(0, 1), "norm_eps": Within(0, 1), "layers_per_block": Within(1, 64),
        "transformer_layers_per_block": Within(0, 64), "reverse_transformer_layers_per_block": Within(0, 64),
    }  # fmt: skip

    def _check(self) -> None:
        where = self.where
        self._check_blocks(where)
        one_of(where, "act_fn", self.act_fn, ACTIVATIONS)
        one_of(where, "timestep_post_act", self.timestep_post_act, (*ACTIVATIONS, None))
        one_of(where, "time_embedding_type", self.time_embedding_type, ("positional", "fourier"))
        one_of(where, "addition_embed_type", self.addition_embed_type, (None, "text_time"))
        one_of(where, "resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift"))
        kinds = (None, "timestep", "identity", "projection", "simple_projection")
        one_of(where, "class_embed_type", self.class_embed_type, kinds)
        for key, only in _ONLY_VALUE.items():
            one_of(where, key, getattr(self, key), (only,))
        for key in ("class_embed_type", "addition_embed_type"):
            projects = getattr(self, key) in ("projection", "simple_projection", "text_time")
            if projects and not self.projection_class_embeddings_input_dim:
                raise ConfigError(f"{where}: {key} needs projection_class_embeddings_input_dim")
        if self.addition_embed_type is not None and not self.addition_time_embed_dim:
            raise ConfigError(f"{where}: addition_embed_type needs addition_time_embed_dim")
        if any(value < 1 for value in self.heads):
            raise ConfigError(f"{where}: attention_head_dim (the number of heads) must be at least 1")

    def _check_blocks(self, where: str) -> None:
        blocks = len(self.block_out_channels)
        check_count(where, "block_out_channels", blocks, MOST_BLOCKS)
        for way in ("Down", "Up"):
            kinds = (f"{way}Block2D", f"CrossAttn{way}Block2D", f"K{way}Block2D", f"KCrossAttn{way}Block2D")
            for kind in getattr(self, f"{way.lower()}_block_types"):
                one_of(where, f"{way.lower()}_block_types", kind, kinds[2:] if self.is_k else kinds[:2])
        middles = (None,) if self.is_k else ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
        one_of(where, "mid_block_type", self.mid_block_type, middles)
        for key in ("down_block_types", "up_block_types", *_PER_BLOCK):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != blocks:
                raise ConfigError(
                    f"{where}: {key} has {len(value)} entries, but block_out_channels has {blocks}; they must agree"
                )
        for key in ("conv_in_kernel", "conv_out_kernel"):
            one_of(where, key, getattr(self, key), (1, 3, 5, 7))
        self._check_depths(where)
        if self.norm_num_groups is None and not self.is_k:
            raise ConfigError(f"{where}: norm_num_groups is optional only if all blocks are k-diffusion blocks")
        if self.is_k and any(width % K_GROUP for width in self.block_out_channels):
            raise ConfigError(f"{where}: block_out_channels must be multiples of {K_GROUP} in k-diffusion blocks")
        self._check_sizes(where)

    def _check_sizes(self, where: str) -> None:
        """Check that widths are divisible into groups and heads, and that the number of layers is plausible."""
        widths, blocks = self.block_out_channels, len(self.block_out_channels)
        if 2 * self.freq_shift >= widths[0]:
            raise ConfigError(f"{where}: freq_shift must be below half of block_out_channels[0] = {widths[0]}")
        if self.norm_num_groups is not None:
            check_divisible(where, widths, "norm_num_groups", (self.norm_num_groups,) * blocks)
        name = "attention_head_dim (the number of heads)"
        for kinds in (self.down_block_types, self.up_block_types[::-1]):
            crossed = ["CrossAttn" in kind for kind in kinds]
            wide = [width if cross else heads for width, heads, cross in zip(widths, self.heads, crossed, strict=True)]
            check_divisible(where, tuple(wide), name, self.heads)
        if self.mid_block_type == "UNetMidBlock2DCrossAttn":
            check_divisible(where, widths[-1:], name, self.heads[-1:])
        depths = [self.depths(way, level) for way in ("down", "up") for level in range(blocks)]
        check_count(where, "layers_per_block", sum(len(own) + sum(own) for own in depths), MOST_LAYERS)

    def _check_depths(self, where: str) -> None:
        """Check that transformer depths match the number of layers; up blocks have one more, so need their own."""
        key = "transformer_layers_per_block"
        nested = any(isinstance(value, tuple) for value in self.per_block(key))
        if nested and self.reverse_transformer_layers_per_block is None:
            raise ConfigError(f"{where}: {key} differs between layers, so it needs reverse_{key} for the way up")
        for way in ("down", "up"):
            for level, layers in enumerate(self.per_block("layers_per_block")):
                if len(self.depths(way, level)) != layers + (way == "up"):
                    name = key if way == "down" else f"reverse_{key}"
                    raise ConfigError(f"{where}: {name} does not have one entry for each layer of a block")

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the checkpoint's native latents; 64 each if not specified."""
        size = self.sample_size or 64
        height, width = (size, size) if isinstance(size, int) else size[:2]
        return height, width

    @property
    def is_k(self) -> bool:
        """Whether all blocks are k-diffusion's, as in the latent upscaler; no model mixes both kinds."""
        return any(kind.startswith("K") for kind in (*self.down_block_types, *self.up_block_types))

    @property
    def reads_guidance(self) -> bool:
        """Whether the model is guidance-distilled and takes the guidance scale as an input (arXiv 2310.04378)."""
        return self.time_cond_proj_dim is not None and not self.is_k

    @property
    def time_channels(self) -> int:
        """Channels of the time embedding."""
        return self.time_embedding_dim or self.block_out_channels[0] * (
            2 if self.time_embedding_type == "fourier" else 4
        )

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each down block; for k-diffusion's blocks, channels per head."""
        counts = self.num_attention_heads if self.num_attention_heads is not None else self.attention_head_dim
        return _per_block(counts, len(self.block_out_channels))

    def k_widths(self, way: str, level: int) -> list[tuple[int, int, int]]:
        """Return input, middle and output channels of each k-diffusion block in a level; `way` is "down" or "up".

        In the up path, the first block also takes the skip connection, and the last one outputs the width of the level
        above.
        """
        widths, kinds = self.block_out_channels, self.up_block_types[::-1]
        width, above = widths[level], widths[max(level - 1, 0)]
        deepest = level == len(widths) - 1
        found = [(width, width, width)] * self.per_block("layers_per_block")[level]
        if way == "down":
            return [(above, width, width), *found[1:]]
        found[0] = (width if deepest else 2 * width, width, width)
        return [*found[:-1], (found[-1][0], width if "CrossAttn" in kinds[level] else above, above)]

    def depths(self, way: str, level: int) -> tuple[int, ...]:
        """Return the transformer depth after each residual block of a level; `way` is "down", "middle" or "up"."""
        given = self.per_block("transformer_layers_per_block")
        if way == "up" and self.reverse_transformer_layers_per_block is not None:
            given = self.reverse_transformer_layers_per_block[::-1]
        if way == "middle":
            return _per_block(given[level], 1)[:1]
        kind = (self.up_block_types[::-1] if way == "up" else self.down_block_types)[level]
        depth = given[level] if "CrossAttn" in kind else 1  # blocks without attention ignore it
        return _per_block(depth, self.per_block("layers_per_block")[level] + (way == "up"))

    def per_block(self, key: str) -> tuple[Any, ...]:
        """Return a key's values, one per down block, whether the config has one value or several."""
        return _per_block(getattr(self, key), len(self.block_out_channels))


def _per_block(value: Any, blocks: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple) else (value,) * blocks


_PER_BLOCK = (
    "only_cross_attention",
    "layers_per_block",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
)
_ONLY_VALUE: dict[str, Any] = {
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_act_fn": None,
    "attention_type": "default",
    "cross_attention_norm": None,
}
