"""The conditional U-Net that predicts noise (Latent Diffusion, arXiv 2112.10752)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.configs import UNet2DConditionConfig
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
from sfumato.models.transformer import BasicTransformerBlock, Transformer2DModel

__all__ = ["DownBlock", "MidBlock", "UNet2DConditionModel", "UNet2DConditionOutput", "UpBlock"]


@dataclass(frozen=True)
class UNet2DConditionOutput:
    """What the U-Net predicts: noise, velocity or the clean latents, as the scheduler's prediction type says."""

    sample: Tensor

    def __getitem__(self, index: int) -> Tensor:
        return (self.sample,)[index]


@dataclass(frozen=True)
class _Level:
    """One resolution of the U-Net: what its residual blocks and transformers are built with."""

    config: UNet2DConditionConfig
    index: int
    time_channels: int

    def resnet(self, in_channels: int, out_channels: int, output_scale: float = 1.0) -> ResnetBlock2D:
        config = self.config
        return ResnetBlock2D(
            in_channels,
            out_channels,
            time_channels=self.time_channels,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            act_fn=config.act_fn,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
            output_scale=output_scale,
            dropout=config.dropout,
        )

    def transformer(self, channels: int, *, only_cross_attention: bool) -> Transformer2DModel:
        config = self.config
        return Transformer2DModel(
            channels,
            config.heads[self.index],
            config.per_block("cross_attention_dim")[self.index],
            layers=config.per_block("transformer_layers_per_block")[self.index],
            groups=config.norm_num_groups,
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


class DownBlock(nn.Module):
    """`DownBlock2D` or, with attention, `CrossAttnDownBlock2D`."""

    def __init__(self, level: _Level, in_channels: int, channels: int, *, attention: bool, downsample: bool) -> None:
        super().__init__()
        config, index = level.config, level.index
        layers = config.per_block("layers_per_block")[index]
        widths = [in_channels] + [channels] * (layers - 1)
        only_cross = config.per_block("only_cross_attention")[index]
        self.resnets = nn.ModuleList(level.resnet(width, channels) for width in widths)
        self.attentions = None
        if attention:
            self.attentions = nn.ModuleList(
                level.transformer(channels, only_cross_attention=only_cross) for _ in widths
            )
        self.downsamplers = None
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample2D(channels, config.downsample_padding)])

    def forward(self, x: Tensor, time: Moment, context: Context) -> list[Tensor]:
        """(B, C, H, W) -> every intermediate result, for the skip connections; the last one goes on down."""
        results: list[Tensor] = []
        for i, resnet in enumerate(self.resnets):
            x = _apply(resnet, self.attentions, i, x, time, context)
            results.append(x)
        if self.downsamplers is not None:
            results.append(self.downsamplers[0](x))
        return results


class MidBlock(nn.Module):
    """`UNetMidBlock2DCrossAttn`."""

    def __init__(self, level: _Level, channels: int) -> None:
        super().__init__()
        layers, scale = 1, level.config.mid_block_scale_factor
        self.resnets = nn.ModuleList(level.resnet(channels, channels, scale) for _ in range(layers + 1))
        self.attentions = nn.ModuleList(level.transformer(channels, only_cross_attention=False) for _ in range(layers))

    def forward(self, x: Tensor, time: Moment, context: Context) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        x = _apply(self.resnets[0], self.attentions, 0, x, time, context)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """`UpBlock2D` or, with attention, `CrossAttnUpBlock2D`."""

    def __init__(
        self, level: _Level, in_channels: int, channels: int, skips: list[int], *, attention: bool, upsample: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * (len(skips) - 1)
        only_cross = level.config.per_block("only_cross_attention")[level.index]
        self.resnets = nn.ModuleList(
            level.resnet(width + skip, channels) for width, skip in zip(widths, skips, strict=True)
        )
        self.attentions = None
        if attention:
            self.attentions = nn.ModuleList(level.transformer(channels, only_cross_attention=only_cross) for _ in skips)
        self.upsamplers = nn.ModuleList([Upsample2D(channels)]) if upsample else None

    def forward(self, x: Tensor, time: Moment, context: Context, skips: list[Tensor]) -> Tensor:
        """X (B, C, H, W) -> (B, C', 2H, 2W); takes its skip connections off the end of the list."""
        for i, resnet in enumerate(self.resnets):
            x = _apply(resnet, self.attentions, i, _joined(x, skips.pop(), context), time, context)
        if self.upsamplers is None:
            return x
        # The next level's skip says how large the picture was before it was halved: odd sizes come back exactly.
        height, width = skips[-1].shape[2:]
        return self.upsamplers[0](x, (height, width))


class UNet2DConditionModel(Model):
    """The U-Net of Stable Diffusion 1.x and 2.x.

    Built from a `UNet2DConditionConfig`; parameter names are the ecosystem's, so that its checkpoints load as they are.
    """

    config_class = UNet2DConditionConfig
    weights_name = "diffusion_pytorch_model"
    config: UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        config = self.config
        widths = config.block_out_channels
        time_channels = config.time_embedding_dim or 4 * widths[0]
        pad_in, pad_out = (config.conv_in_kernel - 1) // 2, (config.conv_out_kernel - 1) // 2
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], config.conv_in_kernel, padding=pad_in)
        self.time_embedding = TimestepEmbedding(widths[0], time_channels, config.act_fn, config.time_cond_proj_dim)
        self.class_embedding = _class_embedding(config, widths[0], time_channels)
        block_time = 2 * time_channels if config.class_embeddings_concat else time_channels
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        self.mid_block = None
        self._build_blocks([_Level(config, i, block_time) for i in range(len(widths))])
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_act = activation(config.act_fn)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, config.conv_out_kernel, padding=pad_out)

    def _build_blocks(self, levels: list[_Level]) -> None:
        config, widths = self.config, self.config.block_out_channels
        last = len(widths) - 1
        layers = config.per_block("layers_per_block")
        skips = [widths[0]]  # channels of every skip connection, in the order in which they arise
        for i, (kind, level) in enumerate(zip(config.down_block_types, levels, strict=True)):
            crossed = kind.startswith("CrossAttn")
            self.down_blocks.append(
                DownBlock(level, widths[max(i - 1, 0)], widths[i], attention=crossed, downsample=i < last)
            )
            skips += [widths[i]] * (layers[i] + (i < last))
        if config.mid_block_type is not None:
            self.mid_block = MidBlock(levels[-1], widths[-1])
        channels = widths[-1]
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
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise in a sample.

        sample (B, C, H, W); timestep a number or (B,) on the scale of the training timesteps; encoder_hidden_states
        (B, S, C'), or a multiple of B of them: the sample is then predicted for each, as for guidance; class_labels
        (B,) where the config asks for them; masks (B, S) with 1 for positions to keep. Any height and width. A `Moment`
        and a `Context` made once may take the place of timestep and states. Returns the prediction (B, C, H, W) as
        `.sample`, or in a tuple with `return_dict=False`.
        """
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        time, context = timestep, encoder_hidden_states
        if not isinstance(time, Moment):
            time = self.moment(sample, time, class_labels, timestep_cond)
        if not isinstance(context, Context):
            context = Context(context, _additive(attention_mask, sample), _additive(encoder_attention_mask, sample))
        if context.mask is not None:
            sample = context.widen(sample)  # the mask is as wide as the prompt's batch from the first layer on
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            skips += block(x, time, context)
            x = skips[-1]
        if self.mid_block is not None:
            x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            x = block(x, time, context, skips)
        x = self.conv_out(self.conv_norm_out(context.widen(x), self.conv_act))
        return UNet2DConditionOutput(x) if return_dict else (x,)

    def read(self, context: Context) -> None:
        """Make keys and values of a prompt in every layer now, rather than in the first call."""
        for block in self.modules():
            if isinstance(block, BasicTransformerBlock):
                context.through(block.attn2)
                if block.only_cross_attention:
                    context.through(block.attn1)

    def _sinusoid(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        config = self.config
        embedded = sinusoidal_embedding(
            values,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        return embedded.to(dtype)

    def moment(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Moment:
        """What the residual blocks read of time: one row if timestep is a number, else one for each sample."""
        # float32 is exact for every integer timestep and enough for the fractional ones; MPS has no float64.
        dtype = None if isinstance(timestep, Tensor) and timestep.dtype != torch.float64 else torch.float32
        timesteps = torch.as_tensor(timestep, dtype=dtype, device=sample.device).reshape(-1)
        time = self.time_embedding(self._sinusoid(timesteps, sample.dtype), timestep_cond)
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("this U-Net's config asks for class embeddings, so class_labels must be given")
            if self.config.class_embed_type == "timestep":
                class_labels = self._sinusoid(class_labels, sample.dtype)
            classes = self.class_embedding(class_labels).to(sample.dtype)
            time = (
                torch.cat([time.expand(classes.shape[0], -1), classes], dim=-1)
                if self.config.class_embeddings_concat
                else time + classes
            )
        return Moment(self.conv_act(time))


def _class_embedding(config: UNet2DConditionConfig, channels: int, time_channels: int) -> nn.Module | None:
    given = config.projection_class_embeddings_input_dim or 0
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
    """A mask (B, S) of ones to keep, as scores to add (B, 1, 1, S); a wholly masked row stays finite."""
    return None if keep is None else ((1 - keep.to(sample.dtype)) * -10000.0)[:, None, None, :]
