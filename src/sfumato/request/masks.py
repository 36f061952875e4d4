"""The masked area of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sfumato.errors import UsageError
from sfumato.request.records import Record
from sfumato.values import Within

__all__ = ["Mask", "Masked"]

Margin = Annotated[int, Within(0, 2**14)]


@dataclass(frozen=True, kw_only=True)
class Mask(Record):
    """The area of an image to change. The rest stays as it is, bit for bit.

    file       the path of an image of the same size: white areas change, black areas stay, and gray areas change less
               (differential diffusion, arXiv 2306.00950)
    extend     pixels to add on the left, top, right and bottom of the image, and to generate
    edge       width of the soft edge in pixels, inside the mask; with `extend`, it reaches into the image. If None, 16
               with `extend` and 0 otherwise
    crop       generate only the masked area and this many pixels around it, enlarged to the requested size or the
               model's own, and paste the result back; if None, generate the whole image
    composite  False returns the autoencoder's version of the unchanged area instead of the original
    """

    file: Annotated[str, Within(1, 4096)] | None = None
    extend: tuple[Margin, Margin, Margin, Margin] = (0, 0, 0, 0)
    edge: Annotated[int, Within(0, 1024)] | None = None
    crop: Margin | None = None
    composite: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file is None and not any(self.extend):
            raise UsageError("a mask needs a file, or pixels to extend the image by; give one of them")

    @property
    def chosen_edge(self) -> int:
        """The soft edge in pixels."""
        return self.edge if self.edge is not None else 16 * any(self.extend)


Masked = Annotated[Mask, "the fields of a Mask"]
