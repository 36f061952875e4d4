"""Random tensors, as in the ecosystem's pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sfumato.runtime.generators import normal

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.runtime.generators import RandomSource

__all__ = ["randn_tensor"]


def randn_tensor(
    shape: Sequence[int],
    generator: RandomSource | Sequence[RandomSource] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return standard normal numbers of a shape, from one generator or one for each entry of the first axis.

    They are generated in float32 on the generator's device and cast afterwards, so a seed gives the same noise in every
    precision.
    """
    place = torch.device(device or "cpu")
    if isinstance(generator, Sequence):
        rows = [normal((1, *shape[1:]), one, place) for one in generator]
        return torch.cat(rows).to(dtype or torch.float32)
    return normal(tuple(shape), generator, place).to(dtype or torch.float32)
