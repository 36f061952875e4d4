"""Encodes and decodes large images in overlapping tiles, and batches one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Tiled"]

Transform = Callable[[Tensor], Tensor]


class Tiled:
    """Switches of an autoencoder. Slicing only saves memory; tiling also slightly changes the image at the seams."""

    use_slicing = False
    use_tiling = False
    tile_overlap = 0.25
    tile_sample_min_size: int
    tile_latent_min_size: int

    def _set_tile_size(self, sample_size: int, scale_factor: int) -> None:
        self.tile_sample_min_size = sample_size
        self.tile_latent_min_size = max(1, sample_size // scale_factor)

    def enable_slicing(self) -> None:
        """Process a batch one image at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Process a batch at once."""
        self.use_slicing = False

    def enable_tiling(self) -> None:
        """Process images larger than a tile in overlapping tiles."""
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Process every image as a whole."""
        self.use_tiling = False

    @contextmanager
    def saving_memory(self, *, slicing: bool, tiling: bool) -> Iterator[None]:
        """Within the block, slice and tile too, in addition to what is already enabled."""
        enabled = self.use_slicing, self.use_tiling
        self.use_slicing, self.use_tiling = self.use_slicing or slicing, self.use_tiling or tiling
        try:
            yield
        finally:
            self.use_slicing, self.use_tiling = enabled

    def _encode_in_parts(self, encode: Transform, x: Tensor) -> Tensor:
        return self._in_parts(encode, x, self.tile_sample_min_size, self.tile_latent_min_size)

    def _decode_in_parts(self, decode: Transform, z: Tensor) -> Tensor:
        return self._in_parts(decode, z, self.tile_latent_min_size, self.tile_sample_min_size)

    def _in_parts(self, transform: Transform, x: Tensor, size_in: int, size_out: int) -> Tensor:
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([self._in_parts(transform, one, size_in, size_out) for one in x.split(1)])
        if self.use_tiling and max(x.shape[2:]) > size_in:
            return _tile(transform, x, size_in, size_out, self.tile_overlap)
        return transform(x)


def _tile(transform: Transform, x: Tensor, size_in: int, size_out: int, overlap: float) -> Tensor:
    """Transform overlapping tiles of `size_in`; blend each with the ones above and to the left."""
    stride = int(size_in * (1 - overlap))
    extent = int(size_out * overlap)
    keep = size_out - extent
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, x.shape[2], stride):
        band = x[:, :, top : top + size_in]
        tiles = [transform(part) for part in _bands(band, size_in, stride)]
        for j, tile in enumerate(tiles):
            if above:
                tiles[j] = _blend(above[j], tile, extent, dim=2)
            if j > 0:
                tiles[j] = _blend(tiles[j - 1], tiles[j], extent, dim=3)
        rows.append(torch.cat([tile[:, :, :keep, :keep] for tile in tiles], dim=3))
        above = tiles
    return torch.cat(rows, dim=2)


def _bands(x: Tensor, size: int, stride: int) -> Iterator[Tensor]:
    return (x[..., left : left + size] for left in range(0, x.shape[3], stride))


def _blend(before: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """Fade from the last `extent` rows (or columns) of one tile to the first ones of the next."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    if extent == 0:
        return tile
    ramp = torch.arange(extent, device=tile.device, dtype=torch.float32) / extent
    ramp = ramp.to(tile.dtype).view([-1 if i == dim else 1 for i in range(4)])
    fading, rising = before.narrow(dim, before.shape[dim] - extent, extent), tile.narrow(dim, 0, extent)
    rest = tile.narrow(dim, extent, tile.shape[dim] - extent)
    return torch.cat([fading * (1 - ramp) + rising * ramp, rest], dim=dim)
