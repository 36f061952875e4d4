"""The compute of the networks, layer by layer, from their configs alone: no weights, no torch.

Each layer has a number of parameters, of operations (a multiplication and an addition are two), and of values held in
memory while it runs: its inputs, its outputs, and what the surrounding layers still need. All of this is per row of a
batch: one image, or one of the two guidance branches.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from sfumato.configs import AutoencoderTinyConfig, ControlNetUnionConfig

if TYPE_CHECKING:
    from sfumato.configs import AutoencoderKLConfig, ControlNetConfig, UNet2DConditionConfig

__all__ = ["Attention", "Layer", "Walk", "control_layers", "decoder_layers", "encoder_layers", "unet_layers"]

# GEGLU holds its projection (8 widths), the gate's GELU (4) and their product (4) at the same time.
GEGLU_WIDTHS = 16


@dataclass(frozen=True)
class Attention:
    """The shape of an attention layer: heads, queries and keys."""

    heads: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Layer:
    """A "conv", "linear", "attention", "norm" or "embedding". `live` and `largest` count elements, not bytes."""

    kind: str
    parameters: int = 0
    operations: int = 0
    live: int = 0
    largest: int = 0
    attention: Attention | None = None

    @property
    def is_large(self) -> bool:
        """Whether its weights may be stored in 8 bits: those of all but norms and what only reads the timestep."""
        return self.kind in ("conv", "linear") and self.operations > 2 * self.parameters

    @property
    def head_width(self) -> int:
        """Of an attention: the numbers of a query in one head."""
        return 0 if self.attention is None else self.largest // (self.attention.heads * self.attention.queries)


@dataclass
class Walk:
    """Collects layers. `held` counts elements that stay in memory during later layers (skip connections)."""

    layers: list[Layer] = field(default_factory=list)
    held: int = 0

    def add(self, kind: str, parameters: int, operations: int = 0, live: int = 0, largest: int = 0) -> None:
        """Add a layer."""
        self.layers.append(Layer(kind, parameters, operations, self.held + live, largest))

    def norm(self, channels: int, live: int) -> None:
        """Add a normalization."""
        self.add("norm", 2 * channels, 0, live)

    def conv(
        self,
        channels: int,
        out: int,
        pixels: int,
        *,
        kernel: int = 3,
        beside: int = 0,
        read: int = 0,
        bias: bool = True,
    ) -> None:
        """Add a convolution with `pixels` output pixels, and as many input pixels unless `read` is given."""
        size, result = channels * (read or pixels), out * pixels
        weights = kernel * kernel * channels * out
        parameters = weights + (out if bias else 0)
        self.add("conv", parameters, 2 * weights * pixels, beside + size + result, max(size, result))

    def linear(
        self, channels: int, out: int, rows: int, *, beside: int = 0, bias: bool = True, kind: str = "linear"
    ) -> None:
        """Add a linear layer."""
        parameters = channels * out + (out if bias else 0)
        live = beside + (channels + out) * rows
        self.add(kind, parameters, 2 * channels * out * rows, live, max(channels, out) * rows)

    def attend(self, channels: int, shape: Attention, *, beside: int) -> None:
        """Add attention. Queries, keys, values and the result are counted as live; scores are counted separately."""
        operations = 4 * channels * shape.queries * shape.keys
        live = beside + 2 * channels * (shape.queries + shape.keys)
        self.layers.append(Layer("attention", 0, operations, self.held + live, channels * shape.queries, shape))

    def resnet(
        self, channels: int, out: int, pixels: int, *, time: int | None, beside: int = 0, twice: int = 1
    ) -> None:
        """Add a residual block; `twice` = 2 if the time embedding gives scale and shift."""
        size, result = channels * pixels, out * pixels
        self.norm(channels, beside + 3 * size)
        self.conv(channels, out, pixels, beside=beside + size)
        if time is not None:
            self.linear(time, twice * out, 1)
        self.norm(out, beside + size + 3 * result)
        self.conv(out, out, pixels, beside=beside + size)
        if channels != out:
            self.conv(channels, out, pixels, kernel=1, beside=beside + result)

    def transformer(
        self,
        channels: int,
        pixels: int,
        context: int,
        tokens: int,
        *,
        heads: int,
        layers: int,
        only_cross: bool,
        linear: bool,
    ) -> None:
        """Add the layers of a transformer."""
        size = channels * pixels
        project = "linear" if linear else "conv"
        self.norm(channels, 3 * size)
        self.linear(channels, channels, pixels, beside=size, kind=project)
        for _ in range(layers):
            for cross in (only_cross, True):
                width, keys = (context, tokens) if cross else (channels, pixels)
                self.norm(channels, 3 * size)
                self.linear(channels, channels, pixels, beside=3 * size, bias=False)
                self.linear(width, channels, keys, beside=4 * size, bias=False)
                self.linear(width, channels, keys, beside=5 * size, bias=False)
                self.attend(channels, Attention(heads, pixels, keys), beside=3 * size)
                self.linear(channels, channels, pixels, beside=2 * size)
            self.norm(channels, 3 * size)
            self.linear(channels, 8 * channels, pixels, beside=2 * size)
            self.linear(4 * channels, channels, pixels, beside=(GEGLU_WIDTHS - 4) * size + 2 * size)
        self.linear(channels, channels, pixels, beside=size, kind=project)

    def upsample(self, channels: int, pixels: int, larger: int) -> None:
        """Add the layers of an upsampler."""
        self.conv(channels, channels, larger, beside=channels * pixels)


def unet_layers(config: UNet2DConditionConfig, height: int, width: int, tokens: int) -> list[Layer]:
    """Return the layers of a U-Net for latents of height × width and a prompt of `tokens` embeddings."""
    return (_KUNet if config.is_k else _UNet)(config, height, width, tokens).layers


def control_layers(config: ControlNetConfig, height: int, width: int, tokens: int) -> tuple[list[Layer], int]:
    """Return the layers of a ControlNet for latents of height × width, and the number of residual elements."""
    walk = _ControlNet(config, height, width, tokens)
    return walk.layers, walk.added


class _UNet(Walk):
    """The layers of a U-Net. `skips` are (channels, level) of the skip connections in memory."""

    def __init__(self, config: UNet2DConditionConfig, height: int, width: int, tokens: int) -> None:
        super().__init__()
        self.config, self.tokens = config, tokens
        self.pixels = [height * width]
        for _ in config.block_out_channels[1:]:
            height, width = (height + 1) // 2, (width + 1) // 2
            self.pixels.append(height * width)
        self.time = config.time_channels
        self.skips: list[tuple[int, int]] = []
        first = config.block_out_channels[0]
        _time_embedding(self, config, first, self.time)
        self.conv(config.in_channels, first, self.pixels[0], kernel=config.conv_in_kernel)
        if not config.is_k:
            self.keep(first, 0)
        self.down()
        if config.mid_block_type is not None:
            last = len(self.pixels) - 1
            channels = config.block_out_channels[-1]
            if config.mid_block_type == "UNetMidBlock2DCrossAttn":
                self.block(last, channels, depth=config.depths("middle", last)[0], only_cross=False)
            self.block(last, channels)
        self.out()

    def out(self) -> None:
        config, first = self.config, self.config.block_out_channels[0]
        self.up()
        if config.norm_num_groups is not None:
            self.norm(first, 3 * first * self.pixels[0])
        self.conv(first, config.out_channels, self.pixels[0], kernel=config.conv_out_kernel)

    def hold(self) -> None:
        self.held = sum(channels * self.pixels[level] for channels, level in self.skips)

    def keep(self, channels: int, level: int) -> None:
        self.skips.append((channels, level))
        self.hold()

    def block(
        self, level: int, channels: int, *, depth: int | None = None, only_cross: bool = False, beside: int = 0
    ) -> None:
        """Add a residual block and, if there is a depth, as many transformer blocks after it."""
        config, out, pixels = self.config, self.config.block_out_channels[level], self.pixels[level]
        time = 2 * self.time if config.class_embeddings_concat else self.time
        twice = 2 if config.resnet_time_scale_shift == "scale_shift" else 1
        self.resnet(channels, out, pixels, time=time, beside=beside, twice=twice)
        if depth is not None:
            self.transformer(
                out,
                pixels,
                config.per_block("cross_attention_dim")[level],
                self.tokens,
                heads=config.heads[level],
                layers=depth,
                only_cross=only_cross,
                linear=config.use_linear_projection,
            )

    def down(self) -> None:
        config, widths = self.config, self.config.block_out_channels
        only_cross = config.per_block("only_cross_attention")
        for i, kind in enumerate(config.down_block_types):
            for j, depth in enumerate(_depths(config, "down", i, kind)):
                channels = widths[max(i - 1, 0)] if j == 0 else widths[i]
                self.block(i, channels, depth=depth, only_cross=only_cross[i])
                self.keep(widths[i], i)
            if i < len(widths) - 1:
                self.conv(widths[i], widths[i], self.pixels[i + 1], read=self.pixels[i])
                self.keep(widths[i], i + 1)

    def up(self) -> None:
        config, widths = self.config, self.config.block_out_channels
        only_cross = config.per_block("only_cross_attention")
        channels = widths[-1]
        for kind, i in zip(config.up_block_types, range(len(widths) - 1, -1, -1), strict=True):
            for depth in _depths(config, "up", i, kind):
                skip, _ = self.skips.pop()
                self.hold()
                # The previous result stays in memory next to its concatenation with the skip connection.
                beside = channels * self.pixels[i]
                self.block(i, channels + skip, depth=depth, only_cross=only_cross[i], beside=beside)
                channels = widths[i]
            if i > 0:
                self.upsample(channels, self.pixels[i], self.pixels[i - 1])


class _ControlNet(_UNet):
    """The layers of a ControlNet, up to the middle block. Encoding the image, once per run, counts as free."""

    def __init__(self, config: ControlNetConfig, height: int, width: int, tokens: int) -> None:
        self.added = 0
        super().__init__(config.unet, height, width, tokens)
        pixels, widths = config.factor**2 * height * width, config.conditioning_embedding_out_channels
        for channels, out in pairwise((config.conditioning_channels, widths[0])):
            self.conv(channels, out, pixels)
        for channels, out in pairwise(widths):
            self.conv(channels, channels, pixels)
            self.conv(channels, out, pixels // 4, read=pixels)
            pixels //= 4
        self.conv(widths[-1], config.block_out_channels[0], pixels)
        once = 2 * len(widths)
        self.layers[-once:] = [replace(layer, operations=0) for layer in self.layers[-once:]]
        if isinstance(config, ControlNetUnionConfig):
            self.union(config)

    def union(self, config: ControlNetUnionConfig) -> None:
        """Add the embedding of control image kinds, which runs once."""
        width, waves = config.num_trans_channel, config.num_control_type * (config.addition_time_embed_dim or 0)
        self.add("norm", (config.num_control_type + 4 * config.num_trans_layer) * width)
        sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * config.num_trans_layer
        for channels, out in (*sizes, (width, config.num_proj_channel), (waves, self.time), (self.time, self.time)):
            self.linear(channels, out, 1)

    def out(self) -> None:
        for channels, level in (*self.skips, (self.config.block_out_channels[-1], len(self.pixels) - 1)):
            self.conv(channels, channels, self.pixels[level], kernel=1)
            self.added += channels * self.pixels[level]
        self.held = 0


class _KUNet(_UNet):
    """The layers of a U-Net with k-diffusion's blocks (models/k_blocks.py)."""

    def ada_norm(self, channels: int, live: int) -> None:
        self.linear(self.time, 2 * channels, 1)
        self.add("norm", 0, 0, live)

    def level(self, way: str, level: int, *, crossed: bool) -> None:
        pixels, deepest = self.pixels[level], level == len(self.pixels) - 1
        for channels, between, out in self.config.k_widths(way, level):
            self.ada_norm(channels, 3 * channels * pixels)
            self.conv(channels, between, pixels, beside=channels * pixels)
            self.ada_norm(between, (channels + 3 * between) * pixels)
            self.conv(between, out, pixels, beside=channels * pixels)
            if channels != out:
                self.conv(channels, out, pixels, kernel=1, beside=out * pixels, bias=False)
            for across in ([False] if deepest else []) + [True] if crossed else []:
                self.attention(level, out, across=across)

    def attention(self, level: int, channels: int, *, across: bool) -> None:
        config, pixels = self.config, self.pixels[level]
        size, context = channels * pixels, config.per_block("cross_attention_dim")[level]
        width, keys = (context, self.tokens) if across else (channels, pixels)
        self.ada_norm(channels, 3 * size)
        if across:
            self.norm(context, 2 * context * self.tokens)
        self.linear(channels, channels, pixels, beside=2 * size)
        for beside in (3 * size, 4 * size):
            self.linear(width, channels, keys, beside=beside)
        heads = max(1, channels // config.heads[level])
        self.attend(channels, Attention(heads, pixels, keys), beside=2 * size)
        self.linear(channels, channels, pixels, beside=size)

    def resize(self, channels: int, small: int, large: int) -> None:
        """Add a depthwise 4 × 4 filter over a padded copy."""
        self.add("conv", 0, 32 * channels * small, channels * (2 * large + small), channels * large)

    def down(self) -> None:
        widths = self.config.block_out_channels
        for i, (kind, width) in enumerate(zip(self.config.down_block_types, widths, strict=True)):
            self.level("down", i, crossed="CrossAttn" in kind)
            if i < len(widths) - 1:
                self.keep(width, i)
                self.resize(width, self.pixels[i + 1], self.pixels[i])

    def up(self) -> None:
        widths = self.config.block_out_channels
        for kind, i in zip(self.config.up_block_types, range(len(widths) - 1, -1, -1), strict=True):
            if i < len(widths) - 1:
                self.skips.pop()
                self.hold()
            self.level("up", i, crossed="CrossAttn" in kind)
            if i > 0:
                self.resize(widths[i - 1], self.pixels[i], self.pixels[i - 1])


def _depths(config: UNet2DConditionConfig, way: str, level: int, kind: str) -> tuple[int | None, ...]:
    """Return the transformer depth after each residual block of a level; None if the level has no attention."""
    depths = config.depths(way, level)
    return depths if "CrossAttn" in kind else (None,) * len(depths)


def _time_embedding(walk: Walk, config: UNet2DConditionConfig, channels: int, time: int) -> None:
    if config.time_embedding_type == "fourier":
        walk.add("embedding", time // 2)
        channels = time
    walk.linear(channels, time, 1)
    walk.linear(time, time, 1)
    if config.time_cond_proj_dim:
        walk.linear(config.time_cond_proj_dim, channels, 1, bias=False)
    if config.addition_embed_type is not None:
        walk.linear(config.projection_class_embeddings_input_dim or 0, time, 1)
        walk.linear(time, time, 1)
    given = config.projection_class_embeddings_input_dim or 0
    match config.class_embed_type:
        case "timestep" | "projection":
            walk.linear(channels if config.class_embed_type == "timestep" else given, time, 1)
            walk.linear(time, time, 1)
        case "simple_projection":
            walk.linear(given, time, 1)
        case None if config.num_class_embeds is not None:
            walk.add("embedding", config.num_class_embeds * time)


def decoder_layers(config: AutoencoderKLConfig | AutoencoderTinyConfig, height: int, width: int) -> list[Layer]:
    """Return the decoder's layers for latents of height × width."""
    walk, pixels = Walk(), height * width
    if isinstance(config, AutoencoderTinyConfig):
        _tiny_decoder(walk, config, pixels)
        return walk.layers
    widths, latent = config.block_out_channels[::-1], config.latent_channels
    if config.use_post_quant_conv:
        walk.conv(latent, latent, pixels, kernel=1)
    walk.conv(latent, widths[0], pixels)
    _middle(walk, config, widths[0], pixels)
    for i, out in enumerate(widths):
        for channels, wide in pairwise([widths[max(i - 1, 0)]] + [out] * (config.layers_per_block + 1)):
            walk.resnet(channels, wide, pixels, time=None)
        if i < len(widths) - 1:
            walk.upsample(out, pixels, 4 * pixels)
            pixels *= 4
    walk.norm(widths[-1], 3 * widths[-1] * pixels)
    walk.conv(widths[-1], config.out_channels, pixels)
    return walk.layers


def encoder_layers(config: AutoencoderKLConfig | AutoencoderTinyConfig, height: int, width: int) -> list[Layer]:
    """Return the encoder's layers for images of height × width pixels."""
    walk, pixels = Walk(), height * width
    if isinstance(config, AutoencoderTinyConfig):
        _tiny_encoder(walk, config, pixels)
        return walk.layers
    widths, latent = config.block_out_channels, config.latent_channels
    walk.conv(config.in_channels, widths[0], pixels)
    for i, out in enumerate(widths):
        for channels, wide in pairwise([widths[max(i - 1, 0)]] + [out] * config.layers_per_block):
            walk.resnet(channels, wide, pixels, time=None)
        if i < len(widths) - 1:
            walk.conv(out, out, pixels // 4, read=pixels, beside=out * pixels)  # reads a padded copy
            pixels //= 4
    _middle(walk, config, widths[-1], pixels)
    walk.norm(widths[-1], 3 * widths[-1] * pixels)
    walk.conv(widths[-1], 2 * latent, pixels)
    if config.use_quant_conv:
        walk.conv(2 * latent, 2 * latent, pixels, kernel=1)
    return walk.layers


def _middle(walk: Walk, config: AutoencoderKLConfig, channels: int, pixels: int) -> None:
    size = channels * pixels
    walk.resnet(channels, channels, pixels, time=None)
    if config.mid_block_add_attention:
        walk.norm(channels, 3 * size)
        for beside in (size, 2 * size, 3 * size):
            walk.linear(channels, channels, pixels, beside=beside)
        walk.attend(channels, Attention(1, pixels, pixels), beside=2 * size)
        walk.linear(channels, channels, pixels, beside=size)
    walk.resnet(channels, channels, pixels, time=None)


def _tiny_blocks(walk: Walk, channels: int, count: int, pixels: int) -> None:
    for _ in range(3 * count):
        walk.conv(channels, channels, pixels, beside=2 * channels * pixels)


def _tiny_decoder(walk: Walk, config: AutoencoderTinyConfig, pixels: int) -> None:
    widths, factor = config.decoder_block_out_channels, config.upsampling_scaling_factor
    walk.conv(config.latent_channels, widths[0], pixels)
    last = len(widths) - 1
    for i, (count, channels) in enumerate(zip(config.num_decoder_blocks, widths, strict=True)):
        _tiny_blocks(walk, channels, count, pixels)
        if i < last:
            pixels *= factor**2
        walk.conv(channels, channels if i < last else config.out_channels, pixels, bias=i == last)


def _tiny_encoder(walk: Walk, config: AutoencoderTinyConfig, pixels: int) -> None:
    widths = config.encoder_block_out_channels
    for i, (count, channels) in enumerate(zip(config.num_encoder_blocks, widths, strict=True)):
        if i == 0:
            walk.conv(config.in_channels, channels, pixels)
        else:
            pixels, before = pixels // 4, pixels
            walk.conv(channels, channels, pixels, read=before, bias=False)
        _tiny_blocks(walk, channels, count, pixels)
    walk.conv(widths[-1], config.latent_channels, pixels)
