"""Deep features of one step, reused at others: they change little from step to step (DeepCache, arXiv 2312.00858)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.models.attention import Context
    from sfumato.models.blocks import Moment
    from sfumato.models.unet import UNet2DConditionModel

__all__ = ["Deep", "shallow"]


@dataclass
class Deep:
    """What a whole call of a U-Net gives to the last `layers` layers of its way up (B, C, H, W), once it has been made.

    One layer, the least, is a residual block with its transformer.
    """

    layers: int
    features: Tensor | None = None


def shallow(
    unet: UNet2DConditionModel, sample: Tensor, time: Moment, context: Context, layers: int, features: Tensor
) -> Tensor:
    """The prediction (B, C, H, W) of a sample by the last `layers` of the way up, from features that `Deep` has kept.

    With those of the same sample and moment it is the prediction of the whole U-Net, to the last bit. Knows neither
    FreeU nor networks beside the U-Net.
    """
    x = unet.entered(sample, time, context)
    skips = [x]
    for block in unet.down_blocks:
        if len(skips) >= layers:
            break
        x, results = block(x, time, context)
        skips += results
    skips, x = skips[:layers], features
    first = sum(len(block.resnets) for block in unet.up_blocks) - layers
    for block in unet.up_blocks:
        if first < len(block.resnets):
            x = block(x, time, context, skips, first=first)
        first = max(0, first - len(block.resnets))
    return unet.left(x, context)
