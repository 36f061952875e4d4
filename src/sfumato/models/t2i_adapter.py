"""T2I-Adapter: features of a control image for the U-Net's encoder, computed once (arXiv 2302.08453)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.checkpoints.control_file import control_class, open_control_file
from sfumato.configs import T2IAdapterConfig
from sfumato.errors import CheckpointError
from sfumato.models.base import Model

if TYPE_CHECKING:
    from sfumato.checkpoints.single_file import SingleFile

__all__ = ["Adapter", "AdapterBlock", "AdapterResnetBlock", "T2IAdapter"]


class AdapterResnetBlock(nn.Module):
    """Two convolutions with a shortcut; the second is 1 × 1 except in light adapters."""

    def __init__(self, channels: int, *, light: bool) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, 3 if light else 1, padding=1 if light else 0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.block2(F.relu(self.block1(x)))


class AdapterBlock(nn.Module):
    """One feature level: optional downsampling, then residual blocks; in light adapters, at a quarter of the width."""

    def __init__(self, channels: int, out_channels: int, count: int, *, down: bool, light: bool) -> None:
        super().__init__()
        self.down, width = down, out_channels // 4 if light else out_channels
        self.in_conv = nn.Conv2d(channels, width, 1) if light or channels != width else None
        self.resnets = nn.Sequential(*(AdapterResnetBlock(width, light=light) for _ in range(count)))
        self.out_conv = nn.Conv2d(width, out_channels, 1) if light else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W), or half of the height and width, rounded up, if `down`."""
        x = F.avg_pool2d(x, 2, ceil_mode=True) if self.down else x
        x = self.resnets(x if self.in_conv is None else self.in_conv(x))
        return x if self.out_conv is None else self.out_conv(x)


class Adapter(nn.Module):
    """The layers of a T2I-Adapter, under their names in checkpoints."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        light = config.adapter_type == "light_adapter"
        channels = config.in_channels * config.downscale_factor**2
        self.conv_in = None if light else nn.Conv2d(channels, config.channels[0], 3, padding=1)
        count = config.num_res_blocks
        self.body = nn.ModuleList(AdapterBlock(a, b, count, down=down, light=light) for a, b, down in config.blocks)


class T2IAdapter(Model):
    """A T2I-Adapter, for any Stable Diffusion model whose U-Net encoder has the same widths."""

    config_class = T2IAdapterConfig
    role = "t2i_adapter"
    weights_name = "diffusion_pytorch_model"
    config: T2IAdapterConfig
    remedy = "check the control image that was given"

    def __init__(self, config: T2IAdapterConfig | None = None, **values: object) -> None:
        super().__init__(config, **values)
        self.adapter = Adapter(self.config)

    @classmethod
    def _open_file(cls, name: Any, **options: Any) -> SingleFile:
        file = open_control_file(name, **options)
        if (wanted := control_class(file)) != cls.__name__:
            raise CheckpointError(f"{file.path} is not a T2I-Adapter; open it with {wanted}.from_single_file")
        return file

    def forward(self, x: Tensor) -> list[Tensor]:
        """Control images (B, 3, H, W) in [0, 1] -> a feature map (B, C, h, w) for each down block of the U-Net."""
        x = F.pixel_unshuffle(x, self.config.downscale_factor)
        x = x if self.adapter.conv_in is None else self.adapter.conv_in(x)
        features = []
        for block in self.adapter.body:
            x = block(x)
            features.append(x)
        return features

    embed = forward
