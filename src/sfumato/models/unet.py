"""The conditional U-Net that predicts noise (Latent Diffusion, arXiv 2112.10752)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sfumato.configs import K_GROUP, UNet2DConditionConfig
from sfumato.errors import UsageError
from sfumato.models.attention import Context
from sfumato.models.base import Model
from sfumato.models.blocks import (
    Downsample2D,
    GroupNorm,
    Moment,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    activation,
    sinusoidal_embedding,
)
from sfumato.models.freeu import FreeUSwitch, reweighted
from sfumato.models.k_blocks import FourierProjection, KAttention, KLevel
from sfumato.models.transformer import BasicTransformerBlock, Transformer2DModel
from sfumato.outputs import Output

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["DownBlock", "MidBlock", "UNet2DConditionModel", "UNet2DConditionOutput", "UNetEncoder", "UpBlock"]


@dataclass(frozen=True, eq=False)
class UNet2DConditionOutput(Output):
    """The U-Net's prediction: noise, velocity or clean latents, depending on the scheduler's prediction type."""

    sample: Tensor


@dataclass(frozen=True)
class _Level:
    """One resolution of the U-Net, with the parameters of its residual blocks and transformers."""

    config: UNet2DConditionConfig
    index: int
    time_channels: int

    def resnet(self, in_channels: int, out_channels: int, output_scale: float = 1.0) -> ResnetBlock2D:
        config = self.config
        return ResnetBlock2D(
            in_channels,
            out_channels,
            time_channels=self.time_channels,
            groups=config.norm_num_groups or K_GROUP,
            eps=config.norm_eps,
            act_fn=config.act_fn,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
            output_scale=output_scale,
            dropout=config.dropout,
        )

    def transformer(self, channels: int, depth: int, *, only_cross_attention: bool) -> Transformer2DModel:
        config = self.config
        return Transformer2DModel(
            channels,
            config.heads[self.index],
            config.per_block("cross_attention_dim")[self.index],
            layers=depth,
            groups=config.norm_num_groups or K_GROUP,
            use_linear_projection=config.use_linear_projection,
            only_cross_attention=only_cross_attention,
            upcast=config.upcast_attention,
            dropout=0.0,
        )


def _apply(
    resnet: nn.Module, attentions: nn.ModuleList | None, i: int, x: Tensor, time: Moment, context: Context
) -> Tensor:
    x = resnet(x, time)
    return x if attentions is None else attentions[i](x, context)


def _joined(x: Tensor, skip: Tensor, context: Context) -> Tensor:
    return torch.cat([x, skip if skip.shape[0] == x.shape[0] else context.widen(skip)], dim=1)


def _plus(x: Tensor, residual: Tensor, context: Context) -> Tensor:
    """Add a residual to x, repeating the one with the smaller batch."""
    if residual.shape[0] > x.shape[0]:
        x = context.widen(x)
    return x + (residual if residual.shape[0] >= x.shape[0] else context.widen(residual))


def _layers(
    level: _Level, way: str, widths: Sequence[int], channels: int, *, attention: bool
) -> tuple[nn.ModuleList | None, nn.ModuleList]:
    """Build a level's transformers, or None, and residual blocks, alternating as in diffusers."""
    only_cross = level.config.per_block("only_cross_attention")[level.index]
    attentions, resnets = nn.ModuleList(), nn.ModuleList()
    for width, depth in zip(widths, level.config.depths(way, level.index), strict=True):
        resnets.append(level.resnet(width, channels))
        if attention:
            attentions.append(level.transformer(channels, depth, only_cross_attention=only_cross))
    return attentions if attention else None, resnets


class DownBlock(nn.Module):
    """`DownBlock2D` or, with attention, `CrossAttnDownBlock2D`."""

    def __init__(self, level: _Level, in_channels: int, channels: int, *, attention: bool, downsample: bool) -> None:
        super().__init__()
        config, index = level.config, level.index
        layers = config.per_block("layers_per_block")[index]
        widths = [in_channels] + [channels] * (layers - 1)
        self.attentions, self.resnets = _layers(level, "down", widths, channels, attention=attention)
        self.downsamplers = None
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample2D(channels, config.downsample_padding)])

    def forward(
        self, x: Tensor, time: Moment, context: Context, residual: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """(B, C, H, W) -> the output, and all intermediate results for the skip connections.

        residual: added to the last result, before downsampling or, in a block without attention, after it.
        """
        results: list[Tensor] = []
        for i, resnet in enumerate(self.resnets):
            x = _apply(resnet, self.attentions, i, x, time, context)
            results.append(x)
        if residual is not None and self.attentions is not None:
            x = results[-1] = _plus(x, residual, context)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            results.append(x)
        if residual is not None and self.attentions is None:
            x = results[-1] = _plus(x, residual, context)
        return x, results


class MidBlock(nn.Module):
    """`UNetMidBlock2DCrossAttn` or, without attention, `UNetMidBlock2D` with a single residual block."""

    def __init__(self, level: _Level, channels: int, *, attention: bool) -> None:
        super().__init__()
        scale = level.config.mid_block_scale_factor
        first = level.resnet(channels, channels, scale)
        self.attentions = None
        if attention:
            (depth,) = level.config.depths("middle", level.index)
            self.attentions = nn.ModuleList([level.transformer(channels, depth, only_cross_attention=False)])
        last = [level.resnet(channels, channels, scale)] if attention else []
        self.resnets = nn.ModuleList([first, *last])

    def forward(self, x: Tensor, time: Moment, context: Context) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        x = _apply(self.resnets[0], self.attentions, 0, x, time, context)
        return x if self.attentions is None else self.resnets[1](x, time)


class UpBlock(nn.Module):
    """`UpBlock2D` or, with attention, `CrossAttnUpBlock2D`."""

    def __init__(
        self, level: _Level, in_channels: int, channels: int, skips: list[int], *, attention: bool, upsample: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * (len(skips) - 1)
        joined = [width + skip for width, skip in zip(widths, skips, strict=True)]
        self.attentions, self.resnets = _layers(level, "up", joined, channels, attention=attention)
        self.upsamplers = nn.ModuleList([Upsample2D(channels)]) if upsample else None

    def forward(
        self,
        x: Tensor,
        time: Moment,
        context: Context,
        skips: list[Tensor],
        freeu: tuple[float, float] | None = None,
    ) -> Tensor:
        """Map x (B, C, H, W) to (B, C', 2H, 2W); pop its skip connections from the end of the list."""
        for i, resnet in enumerate(self.resnets):
            skip = skips.pop()
            if freeu is not None:
                x, skip = reweighted(x, skip, freeu)
            x = _apply(resnet, self.attentions, i, _joined(x, skip, context), time, context)
        if self.upsamplers is None:
            return x
        # The next skip connection has the size from before downsampling, so that odd sizes are restored exactly.
        height, width = skips[-1].shape[2:]
        return self.upsamplers[0](x, (height, width))


class UNetEncoder(Model):
    """What U-Nets and ControlNets have in common: the input, the time embedding, and the encoder."""

    @property
    def unet_config(self) -> UNet2DConditionConfig:
        """The config of the U-Net that this is, or is part of."""
        return self.config

    def _build_input(self) -> None:
        config = self.unet_config
        widths, time_channels = config.block_out_channels, config.time_channels
        pad = (config.conv_in_kernel - 1) // 2
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], config.conv_in_kernel, padding=pad)
        embedded, self.time_proj = widths[0], None
        if config.time_embedding_type == "fourier":
            embedded = time_channels
            self.time_proj = FourierProjection(time_channels // 2, flip_sin_to_cos=config.flip_sin_to_cos)
        self.time_embedding = TimestepEmbedding(
            embedded, time_channels, config.act_fn, config.time_cond_proj_dim, config.timestep_post_act
        )
        self.class_embedding = _class_embedding(config, embedded, time_channels)
        self.add_embedding = None
        if config.addition_embed_type is not None:
            self.add_embedding = TimestepEmbedding(_projected(config), time_channels, "silu")

    def _levels(self) -> list[_Level]:
        config = self.unet_config
        block_time = 2 * config.time_channels if config.class_embeddings_concat else config.time_channels
        return [_Level(config, i, block_time) for i in range(len(config.block_out_channels))]

    def _build_down(self, levels: list[_Level]) -> list[int]:
        """Build the encoder; return the channels of all skip connections in order."""
        config, widths = self.unet_config, self.unet_config.block_out_channels
        last, layers, skips = len(widths) - 1, config.per_block("layers_per_block"), [widths[0]]
        for i, (kind, level) in enumerate(zip(config.down_block_types, levels, strict=True)):
            crossed = kind.startswith("CrossAttn")
            self.down_blocks.append(
                DownBlock(level, widths[max(i - 1, 0)], widths[i], attention=crossed, downsample=i < last)
            )
            skips += [widths[i]] * (layers[i] + (i < last))
        return skips

    def _build_middle(self, level: _Level) -> None:
        kind, width = self.unet_config.mid_block_type, self.unet_config.block_out_channels[-1]
        self.mid_block = None if kind is None else MidBlock(level, width, attention=kind == "UNetMidBlock2DCrossAttn")

    def _context(
        self, states: Tensor | Context, sample: Tensor, mask: Tensor | None, states_mask: Tensor | None
    ) -> Context:
        if isinstance(states, Context):
            return states
        masks = _additive(mask, sample), _additive(states_mask, sample)
        return Context(states, *masks, keep=not self.is_gradient_checkpointing)

    def read(self, context: Context) -> None:
        """Compute the prompt's keys and values in every layer now, rather than in the first call."""
        for block in self.modules():
            if isinstance(block, (BasicTransformerBlock, KAttention)):
                for layer in block.reading:
                    context.through(layer)

    def _sinusoid(self, values: Tensor, size: int) -> Tensor:
        config = self.unet_config
        return sinusoidal_embedding(values, size, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift)

    def _embedded(self, values: Tensor) -> Tensor:
        """Embed timesteps (B,) for `time_embedding`, in float32."""
        return (
            self.time_proj(values) if self.time_proj else self._sinusoid(values, self.unet_config.block_out_channels[0])
        )

    def moment(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Moment:
        """Compute the time embedding for the residual blocks: one row if timestep is a number, else one per sample.

        class_labels, timestep_cond: one row per sample, or one for all. added_cond_kwargs: if the config's
        `addition_embed_type` is "text_time", `text_embeds` (B, P), the pooled prompts, and `time_ids` (B, N), the
        sizes; B may be a multiple of the number of samples, for guidance. Raises `UsageError` or `ValueError` if an
        input is missing.
        """
        # float32 represents every integer timestep exactly and fractional ones well enough; MPS has no float64.
        dtype = None if isinstance(timestep, Tensor) and timestep.dtype != torch.float64 else torch.float32
        timesteps = torch.as_tensor(timestep, dtype=dtype, device=sample.device).reshape(-1)
        time = self.time_embedding(self._embedded(timesteps).to(sample.dtype), timestep_cond)
        if self.class_embedding is not None:
            if class_labels is None:
                raise UsageError("this U-Net needs class_labels, because its config has class embeddings")
            if self.unet_config.class_embed_type == "timestep":
                class_labels = self._embedded(class_labels).to(sample.dtype)
            classes = self.class_embedding(class_labels).to(sample.dtype)
            time = (
                torch.cat([time.expand(classes.shape[0], -1), classes], dim=-1)
                if self.unet_config.class_embeddings_concat
                else time + classes
            )
        if self.add_embedding is not None:
            time = time + self.add_embedding(self._added(added_cond_kwargs or {}).to(sample.dtype))
        time = self._further(time, added_cond_kwargs or {})
        time = time if self.unet_config.is_k else activation(self.unet_config.act_fn)(time)
        return Moment(time, keep=not self.is_gradient_checkpointing)

    def _further(self, time: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Add further conditions to the time embedding (B, T); none here, but some ControlNets have some."""
        return time

    def _added(self, given: Mapping[str, Tensor]) -> Tensor:
        """Concatenate the pooled prompts and the embedded sizes: (B, P + N × size)."""
        for name in ("text_embeds", "time_ids"):
            if name not in given:
                raise ValueError(f"this U-Net's config requires {name} in added_cond_kwargs")
        text, ids = given["text_embeds"], given["time_ids"]
        waves = self._sinusoid(ids.flatten(), self.unet_config.addition_time_embed_dim or 0).view(ids.shape[0], -1)
        added = torch.cat([text, waves.to(text.dtype)], dim=-1)
        if added.shape[-1] != _projected(self.unet_config):
            raise ValueError(
                f"text_embeds of {text.shape[-1]} numbers and {ids.shape[-1]} time_ids make {added.shape[-1]}, "
                f"but this U-Net takes {_projected(self.unet_config)}; pass those of its own family"
            )
        return added


class UNet2DConditionModel(UNetEncoder, FreeUSwitch):
    """The U-Net of all Stable Diffusion models and their relatives.

    Built from a `UNet2DConditionConfig`. Parameter names are those of diffusers, so that checkpoints load unchanged.
    """

    config_class = UNet2DConditionConfig
    role = "unet"
    weights_name = "diffusion_pytorch_model"
    config: UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        config = self.config
        widths, pad_out = config.block_out_channels, (config.conv_out_kernel - 1) // 2
        self._build_input()
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        self.mid_block = None
        if config.is_k:
            block_time = 2 * config.time_channels if config.class_embeddings_concat else config.time_channels
            k_levels = [KLevel(config, i, block_time) for i in range(len(widths))]
            self.down_blocks.extend(level.down() for level in k_levels)
            self.up_blocks.extend(level.up() for level in reversed(k_levels))
        else:
            levels = self._levels()
            skips = self._build_down(levels)
            self._build_middle(levels[-1])
            self._build_up(levels, skips)
        self.conv_norm_out = None
        if config.norm_num_groups is not None:
            self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_act = activation(config.act_fn)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, config.conv_out_kernel, padding=pad_out)

    def _build_up(self, levels: list[_Level], skips: list[int]) -> None:
        config, widths = self.config, self.config.block_out_channels
        layers, channels = config.per_block("layers_per_block"), widths[-1]
        for kind, level in zip(config.up_block_types, reversed(levels), strict=True):
            i = level.index
            taken = [skips.pop() for _ in range(layers[i] + 1)]
            crossed = kind.startswith("CrossAttn")
            self.up_blocks.append(UpBlock(level, channels, widths[i], taken, attention=crossed, upsample=i > 0))
            channels = widths[i]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | Moment,
        encoder_hidden_states: Tensor | Context,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        cross_attention_kwargs: Mapping[str, object] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] = (),
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] = (),
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise in a sample.

        sample: (B, C, H, W), of any height and width. timestep: a number or (B,), on the scale of the training
        timesteps. encoder_hidden_states: (B, S, C'), or a multiple of B, which gives a prediction for each, as for
        guidance. class_labels (B,), added_cond_kwargs: if the config requires them; see `moment`. Masks: (B, S), 1 for
        positions to keep. A `Moment` and a `Context` can replace timestep and states. Additional residuals: from
        ControlNets, one for each skip connection and one for the middle block; from T2I-Adapters, one for each down
        block and, if there is another, for the middle block. Returns the prediction (B, C, H, W) as `.sample`, or in a
        tuple with `return_dict=False`.
        """
        if cross_attention_kwargs:
            raise UsageError("a U-Net accepts no cross_attention_kwargs; pass them to the call of the pipeline")
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        time, context = timestep, encoder_hidden_states
        if not isinstance(time, Moment):
            time = self.moment(sample, time, class_labels, timestep_cond, added_cond_kwargs)
        context = self._context(context, sample, attention_mask, encoder_attention_mask)
        x = self.conv_in(sample)
        if context.mask is not None or time.activated.shape[0] > x.shape[0]:
            x = context.widen(x)  # masks and per-prompt time embeddings have the prompts' batch size
        skips = [] if self.config.is_k else [x]
        within = list(down_intrablock_additional_residuals or ())
        for block in self.down_blocks:
            x, results = block(x, time, context, within.pop(0)) if within else block(x, time, context)
            skips += results
        for i, residual in enumerate(down_block_additional_residuals or ()):
            skips[i] = _plus(skips[i], residual, context)
        if self.mid_block is not None:
            x = self.mid_block(x, time, context)
        for residual in (*within[:1], mid_block_additional_residual):
            x = x if residual is None else _plus(x, residual, context)
        factors = [] if self.freeu is None else [[one] for one in self.freeu]
        for i, block in enumerate(self.up_blocks):
            x = block(x, time, context, skips, *(factors[i] if i < len(factors) else ()))
        x = context.widen(x)
        x = self.conv_out(x if self.conv_norm_out is None else self.conv_norm_out(x, self.conv_act))
        return UNet2DConditionOutput(x) if return_dict else (x,)


def _projected(config: UNet2DConditionConfig) -> int:
    return config.projection_class_embeddings_input_dim or 0


def _class_embedding(config: UNet2DConditionConfig, channels: int, time_channels: int) -> nn.Module | None:
    given = _projected(config)
    match config.class_embed_type:
        case "timestep":
            return TimestepEmbedding(channels, time_channels, config.act_fn)
        case "identity":
            return nn.Identity()
        case "projection":
            return TimestepEmbedding(given, time_channels, "silu")
        case "simple_projection":
            return nn.Linear(given, time_channels)
        case _ if config.num_class_embeds is not None:
            return nn.Embedding(config.num_class_embeds, time_channels)
        case _:
            return None


def _additive(keep: Tensor | None, sample: Tensor) -> Tensor | None:
    """Convert a mask (B, S), 1 to keep, to finite scores to add (B, 1, 1, S), so that masked rows are not NaN."""
    return None if keep is None else ((1 - keep.to(sample.dtype)) * -10000.0)[:, None, None, :]
