"""The autoencoder between pictures and latents (arXiv 2112.10752, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sfumato.checkpoints.weights import Rule
from sfumato.configs import AutoencoderKLConfig
from sfumato.models.attention import SelfOrCrossAttention
from sfumato.models.base import Model
from sfumato.models.blocks import Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D, activation
from sfumato.models.tiling import Tiled

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLOutput",
    "Decoder",
    "DecoderOutput",
    "DiagonalGaussianDistribution",
    "Encoder",
    "PixelAttention",
    "VAELevel",
    "VAEMidBlock",
]


@dataclass(frozen=True)
class DecoderOutput:
    """Pictures (B, 3, H, W) in [-1, 1], not clipped."""

    sample: Tensor

    def __getitem__(self, index: int) -> Tensor:
        return (self.sample,)[index]


class DiagonalGaussianDistribution:
    """What the encoder knows of the latents: a mean and a variance for each."""

    def __init__(self, parameters: Tensor) -> None:
        """From means and log variances, one after the other along the channels (B, 2C, h, w)."""
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Latents drawn at random (B, C, h, w); the noise is drawn in float32 on the generator's device, then cast."""
        device = generator.device if generator is not None else self.mean.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=torch.float32)
        return self.at(noise)

    def at(self, noise: Tensor) -> Tensor:
        """The latents that a given standard normal noise (B, C, h, w) picks."""
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """The most likely latents (B, C, h, w)."""
        return self.mean


@dataclass(frozen=True)
class AutoencoderKLOutput:
    """The distribution of the latents of the pictures encoded."""

    latent_dist: DiagonalGaussianDistribution


def _resnet(config: AutoencoderKLConfig, in_channels: int, out_channels: int) -> ResnetBlock2D:
    groups, act_fn = config.norm_num_groups, config.act_fn
    return ResnetBlock2D(in_channels, out_channels, time_channels=None, groups=groups, eps=1e-6, act_fn=act_fn)


class PixelAttention(SelfOrCrossAttention):
    """Single-headed self-attention over all pixels, with its own normalization and shortcut."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        return x + super().forward(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class VAEMidBlock(nn.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, config: AutoencoderKLConfig, channels: int) -> None:
        super().__init__()
        attention = [PixelAttention(channels, config.norm_num_groups)] if config.mid_block_add_attention else []
        self.attentions = nn.ModuleList(attention)
        self.resnets = nn.ModuleList(_resnet(config, channels, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class VAELevel(nn.Module):
    """`DownEncoderBlock2D` or `UpDecoderBlock2D`: residual blocks, then a change of size or none."""

    def __init__(self, config: AutoencoderKLConfig, widths: Sequence[int], resize: nn.Module | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(config, a, b) for a, b in pairwise(widths))
        if isinstance(resize, Downsample2D):
            self.downsamplers = nn.ModuleList([resize])
        elif isinstance(resize, Upsample2D):
            self.upsamplers = nn.ModuleList([resize])
        self._resizers = "downsamplers" if isinstance(resize, Downsample2D) else "upsamplers"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        for resnet in self.resnets:
            x = resnet(x)
        for resize in getattr(self, self._resizers, ()):
            x = resize(x)
        return x


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) to the parameters of their latents (B, 2C, H/f, W/f)."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            steps = [widths[max(i - 1, 0)]] + [width] * config.layers_per_block
            resize = Downsample2D(width, padding=0) if i < len(widths) - 1 else None
            self.down_blocks.append(VAELevel(config, steps, resize))
        self.mid_block = VAEMidBlock(config, widths[-1])
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_act = activation("silu")
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2C, H/f, W/f)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x), self.conv_act))


class Decoder(nn.Module):
    """Latents (B, C, h, w) to pictures (B, 3, f h, f w)."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = VAEMidBlock(config, widths[0])
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            steps = [widths[max(i - 1, 0)]] + [width] * (config.layers_per_block + 1)
            self.up_blocks.append(VAELevel(config, steps, Upsample2D(width) if i < len(widths) - 1 else None))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_act = activation("silu")
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, f h, f w)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, self.conv_act))


class AutoencoderKL(Model, Tiled):
    """The variational autoencoder of Stable Diffusion."""

    config_class = AutoencoderKLConfig
    weights_name = "diffusion_pytorch_model"
    # Checkpoints of the first years name the attention layers as CompVis did.
    key_rules = (
        Rule(r"(mid_block\.attentions\.\d+)\.query\.", r"\1.to_q."),
        Rule(r"(mid_block\.attentions\.\d+)\.key\.", r"\1.to_k."),
        Rule(r"(mid_block\.attentions\.\d+)\.value\.", r"\1.to_v."),
        Rule(r"(mid_block\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    )
    config: AutoencoderKLConfig
    tile_overlap = 0.25

    def __init__(self, config: AutoencoderKLConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        config = self.config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else nn.Identity()
        size = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
        self._set_tile_size(size, config.scale_factor)

    def encode(
        self, x: Tensor, *, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pictures (B, 3, H, W) in [-1, 1] -> the distribution of their latents, not yet scaled."""
        posterior = DiagonalGaussianDistribution(self._encode_in_parts(lambda x: self.quant_conv(self.encoder(x)), x))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, *, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C, h, w), divided by the scaling factor -> pictures. Nothing is drawn from `generator`."""
        sample = self._decode_in_parts(lambda z: self.decoder(self.post_quant_conv(z)), z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(self, sample: Tensor) -> DecoderOutput:
        """Encode to the most likely latents and decode again: (B, 3, H, W) -> (B, 3, H, W)."""
        posterior = self.encode(sample, return_dict=False)[0]  # pyright: ignore[reportIndexIssue]
        return DecoderOutput(self.decode(posterior.mode(), return_dict=False)[0])
