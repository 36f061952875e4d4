"""`config.json` of T2I-Adapters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from sfumato.configs.checks import MOST_BLOCKS, MOST_LAYERS, check_count
from sfumato.configs.config import Config, one_of

__all__ = ["T2IAdapterConfig"]


@dataclass(frozen=True, kw_only=True)
class T2IAdapterConfig(Config):
    """`config.json` of a `T2IAdapter`."""

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = "full_adapter"
    where = "adapter/config.json"

    def _check(self) -> None:
        kinds = ("full_adapter", "full_adapter_xl", "light_adapter")
        one_of(self.where, "adapter_type", self.adapter_type, kinds)
        check_count(self.where, "channels", len(self.channels), MOST_BLOCKS)
        check_count(self.where, "num_res_blocks", self.num_res_blocks * len(self.channels), MOST_LAYERS)

    @property
    def blocks(self) -> tuple[tuple[int, int, bool], ...]:
        """Input and output channels of each block, and whether it downsamples first."""
        widths = self.channels
        if self.adapter_type == "light_adapter":
            pairs = [(self.in_channels * self.downscale_factor**2, widths[0]), *pairwise(widths)]
            return tuple((a, b, i > 0) for i, (a, b) in enumerate([*pairs, (widths[-1], widths[-1])]))
        if self.adapter_type == "full_adapter_xl":
            before = [widths[i - 1] if i in (1, 2) else width for i, width in enumerate(widths)]
            return tuple((a, b, i == 2) for i, (a, b) in enumerate(zip(before, widths, strict=True)))
        return tuple((widths[max(i - 1, 0)], width, i > 0) for i, width in enumerate(widths))

    @property
    def factor(self) -> int:
        """Control image pixels per latent pixel, along each side; adapters for XL start after the first halving."""
        return self.downscale_factor // (2 if self.adapter_type == "full_adapter_xl" else 1)

    @property
    def conditioning_channels(self) -> int:
        """Channels of a control image."""
        return self.in_channels
