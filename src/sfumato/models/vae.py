"""The autoencoder between images and latents (arXiv 2112.10752, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from sfumato.checkpoints.weights import Rule
from sfumato.configs import AutoencoderKLConfig
from sfumato.models.attention import SelfOrCrossAttention
from sfumato.models.base import Model
from sfumato.models.blocks import Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D, activation
from sfumato.models.scaling import Scaled
from sfumato.models.tiling import Tiled
from sfumato.outputs import Output
from sfumato.runtime.generators import RandomSource, normal

if TYPE_CHECKING:
    from sfumato.checkpoints.single_file import SingleFile

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


@dataclass(frozen=True, eq=False)
class DecoderOutput(Output):
    """Images (B, 3, H, W) in [-1, 1], not clipped."""

    sample: Tensor


class DiagonalGaussianDistribution:
    """The distribution of an image's latents: a mean and a variance for each."""

    def __init__(self, parameters: Tensor) -> None:
        """parameters: means and log variances, concatenated along the channels (B, 2C, h, w)."""
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self, generator: RandomSource | Sequence[RandomSource] | None = None) -> Tensor:
        """Return random latents (B, C, h, w), from one generator or one per image.

        The noise is generated in float32 on the generator's device, then cast.
        """
        shape, device = self.mean.shape, self.mean.device
        if not isinstance(generator, Sequence):
            return self.at(normal(shape, generator, device))
        return self.at(torch.cat([normal((1, *shape[1:]), each, device) for each in generator]))

    def at(self, noise: Tensor) -> Tensor:
        """Return the latents for given standard normal noise (B, C, h, w)."""
        return self.mean + self.std * noise.to(self.mean)

    def mode(self) -> Tensor:
        """Return the most likely latents (B, C, h, w)."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Return the Kullback-Leibler divergence (B,) from another distribution, by default the standard normal one."""
        if other is None:
            return 0.5 * (self.mean**2 + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))
        distance = (self.mean - other.mean) ** 2 / other.var + self.var / other.var
        return 0.5 * (distance - 1.0 - self.logvar + other.logvar).sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Return the negative log density of latents (B, C, h, w), summed over `dims`."""
        return 0.5 * (math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var).sum(dim=list(dims))


@dataclass(frozen=True, eq=False)
class AutoencoderKLOutput(Output):
    """The distribution of the encoded images' latents."""

    latent_dist: DiagonalGaussianDistribution


def _resnet(config: AutoencoderKLConfig, in_channels: int, out_channels: int) -> ResnetBlock2D:
    groups, act_fn = config.norm_num_groups, config.act_fn
    return ResnetBlock2D(in_channels, out_channels, time_channels=None, groups=groups, eps=1e-6, act_fn=act_fn)


class PixelAttention(SelfOrCrossAttention):
    """Single-head self-attention over all pixels, with its own normalization and residual connection."""

    group_norm: GroupNorm

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1, bias=True)
        self._modules = {"group_norm": GroupNorm(groups, channels, eps=1e-6)} | self._modules  # first, as in diffusers

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, C, H, W) -> (B, C, H, W)."""
        # A copy, as in the transformer.
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).contiguous()
        return x + super().forward(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class VAEMidBlock(nn.Module):
    """Two residual blocks with attention in between."""

    def __init__(self, config: AutoencoderKLConfig, channels: int) -> None:
        super().__init__()
        first = _resnet(config, channels, channels)
        attention = [PixelAttention(channels, config.norm_num_groups)] if config.mid_block_add_attention else []
        self.attentions = nn.ModuleList(attention)
        self.resnets = nn.ModuleList([first, _resnet(config, channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class VAELevel(nn.Module):
    """`DownEncoderBlock2D` or `UpDecoderBlock2D`: residual blocks, then optional resizing."""

    def __init__(self, config: AutoencoderKLConfig, widths: Sequence[int], resizers: str | None) -> None:
        """widths: channels before and after each residual block. resizers: "downsamplers", "upsamplers" or None."""
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(config, a, b) for a, b in pairwise(widths))
        self._resizers = resizers
        if resizers is not None:
            down = resizers == "downsamplers"
            resize = Downsample2D(widths[-1], padding=0) if down else Upsample2D(widths[-1])
            setattr(self, resizers, nn.ModuleList([resize]))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self._resizers is None else getattr(self, self._resizers)[0](x)


class Encoder(nn.Module):
    """Encodes images (B, 3, H, W) to the parameters of their latents (B, 2C, H/f, W/f)."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            steps = [widths[max(i - 1, 0)]] + [width] * config.layers_per_block
            self.down_blocks.append(VAELevel(config, steps, "downsamplers" if i < len(widths) - 1 else None))
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
    """Decodes latents (B, C, h, w) to images (B, 3, f h, f w)."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        self.mid_block = VAEMidBlock(config, widths[0])
        for i, width in enumerate(widths):
            steps = [widths[max(i - 1, 0)]] + [width] * (config.layers_per_block + 1)
            self.up_blocks.append(VAELevel(config, steps, "upsamplers" if i < len(widths) - 1 else None))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], eps=1e-6)
        self.conv_act = activation("silu")
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, f h, f w)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, self.conv_act))


class AutoencoderKL(Model, Tiled, Scaled):
    """The variational autoencoder of Stable Diffusion."""

    config_class = AutoencoderKLConfig
    role = "vae"
    weights_name = "diffusion_pytorch_model"
    # Checkpoints of the first years have CompVis's names for the attention layers.
    key_rules = (
        Rule(r"(mid_block\.attentions\.\d+)\.query\.", r"\1.to_q."),
        Rule(r"(mid_block\.attentions\.\d+)\.key\.", r"\1.to_k."),
        Rule(r"(mid_block\.attentions\.\d+)\.value\.", r"\1.to_v."),
        Rule(r"(mid_block\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
    )
    config: AutoencoderKLConfig
    tile_overlap = 0.25

    @classmethod
    def from_file(cls, file: SingleFile, **how: Any) -> Self:
        """Load as in every model, but note that a separate VAE file may not contain its scale."""
        model = super().from_file(file, **how)
        model.scale_assumed = "unet" not in file.detected.parts and not file.options
        return model

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

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Images (B, 3, H, W) in [-1, 1] -> the distribution of their latents, unscaled."""
        posterior = DiagonalGaussianDistribution(self._encode_in_parts(lambda x: self.quant_conv(self.encoder(x)), x))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C, h, w), divided by the scaling factor -> images. `generator` is ignored."""
        sample = self._decode_in_parts(lambda z: self.decoder(self.post_quant_conv(z)), z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: RandomSource | Sequence[RandomSource] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode: (B, 3, H, W) -> (B, 3, H, W).

        Uses the most likely latents or, with `sample_posterior`, random ones from the generator.
        """
        posterior = self.encode(sample, return_dict=False)[0]  # pyright: ignore[reportIndexIssue]
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)
