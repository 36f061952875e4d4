"""The tiny autoencoder of the TAESD family: plain convolutions, about 1 % of the work, softer images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.configs import AutoencoderTinyConfig
from sfumato.models.base import Model
from sfumato.models.blocks import activation
from sfumato.models.recomputed import Recomputed
from sfumato.models.scaling import Scaled
from sfumato.models.tiling import Tiled
from sfumato.models.vae import DecoderOutput
from sfumato.outputs import Output

__all__ = ["AutoencoderTiny", "AutoencoderTinyBlock", "AutoencoderTinyOutput", "DecoderTiny", "EncoderTiny"]


@dataclass(frozen=True, eq=False)
class AutoencoderTinyOutput(Output):
    """Latents (B, C, h, w); this encoder predicts no variance."""

    latents: Tensor


def _conv(in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)


class AutoencoderTinyBlock(Recomputed):
    """Three convolutions with a shortcut."""

    def __init__(self, channels: int, act_fn: str) -> None:
        super().__init__()
        act = activation(act_fn)
        self.conv = nn.Sequential(
            _conv(channels, channels), act, _conv(channels, channels), act, _conv(channels, channels)
        )
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.fuse(self.conv(x) + x)


class EncoderTiny(nn.Module):
    """Encodes images (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f)."""

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (count, channels) in enumerate(
            zip(config.num_encoder_blocks, config.encoder_block_out_channels, strict=True)
        ):
            first = _conv(config.in_channels, channels) if i == 0 else _conv(channels, channels, stride=2, bias=False)
            layers += [first, *(AutoencoderTinyBlock(channels, config.act_fn) for _ in range(count))]
        layers.append(_conv(config.encoder_block_out_channels[-1], config.latent_channels))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/f, W/f)."""
        return self.layers(x.add(1).div(2))


class DecoderTiny(nn.Module):
    """Decodes latents (B, C, h, w) to images (B, 3, f h, f w) in [-1, 1]."""

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        widths, counts = config.decoder_block_out_channels, config.num_decoder_blocks
        layers: list[nn.Module] = [_conv(config.latent_channels, widths[0]), activation(config.act_fn)]
        for i, (count, channels) in enumerate(zip(counts, widths, strict=True)):
            layers += [AutoencoderTinyBlock(channels, config.act_fn) for _ in range(count)]
            if i < len(counts) - 1:
                layers += [
                    nn.Upsample(scale_factor=config.upsampling_scaling_factor),
                    _conv(channels, channels, bias=False),
                ]
            else:
                layers.append(_conv(channels, config.out_channels))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, f h, f w)."""
        # Soft clamp: values beyond ±3 carry no further information.
        return self.layers(torch.tanh(z / 3) * 3).mul(2).sub(1)


class AutoencoderTiny(Model, Tiled, Scaled):
    """A drop-in replacement for `AutoencoderKL` when speed matters more than detail."""

    config_class = AutoencoderTinyConfig
    role = "vae"
    weights_name = "diffusion_pytorch_model"
    config: AutoencoderTinyConfig
    tile_overlap = 0.125

    def __init__(self, config: AutoencoderTinyConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        self.encoder = EncoderTiny(self.config)
        self.decoder = DecoderTiny(self.config)
        self._set_tile_size(512, self.config.scale_factor)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, H/f, W/f)."""
        latents = self._encode_in_parts(self.encoder, x)
        return AutoencoderTinyOutput(latents) if return_dict else (latents,)

    def decode(
        self, z: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C, h, w), divided by the scaling factor -> images. `generator` is ignored."""
        sample = self._decode_in_parts(self.decoder, z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode: (B, 3, H, W) -> (B, 3, H, W), with latents rounded to 8 bits as if stored in an image."""
        latents = self.encode(sample, return_dict=False)[0]  # pyright: ignore[reportIndexIssue]
        stored = self.scale_latents(latents).mul(255).round().byte()
        return self.decode(self.unscale_latents(stored / 255.0).to(latents.dtype), return_dict=return_dict)

    def scale_latents(self, x: Tensor) -> Tensor:
        """Map latents to [0, 1], to store them as an image."""
        magnitude = self.config.latent_magnitude
        return x.div(2 * magnitude).add(self.config.latent_shift).clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """The inverse of `scale_latents`."""
        return x.sub(self.config.latent_shift).mul(2 * self.config.latent_magnitude)
