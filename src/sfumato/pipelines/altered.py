"""Changes to the U-Net for the duration of one run."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from sfumato.models.seamless import seamless
from sfumato.request import FreeU

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sfumato.models import UNet2DConditionModel
    from sfumato.request import GenerateRequest

__all__ = ["altered", "with_switched"]


@contextmanager
def altered(unet: UNet2DConditionModel, request: GenerateRequest) -> Iterator[None]:
    """Apply the request's FreeU to the U-Net within the block, and circular padding for seamless images."""
    before, freeu = unet.freeu, request.freeu
    if freeu is not None:
        unet.enable_freeu(s1=freeu.s1, s2=freeu.s2, b1=freeu.b1, b2=freeu.b2)
    try:
        with seamless(unet, request.seamless) if request.seamless else nullcontext():
            yield
    finally:
        unet.freeu = before


def with_switched(request: GenerateRequest, unet: UNet2DConditionModel) -> GenerateRequest:
    """Add settings enabled in the U-Net itself (`enable_freeu`) to the request, so that its recipe contains them."""
    if request.freeu is not None or unet.freeu is None:
        return request
    (b1, s1), (b2, s2) = unet.freeu
    return request.replace(freeu=FreeU(b1=b1, b2=b2, s1=s1, s2=s2))
