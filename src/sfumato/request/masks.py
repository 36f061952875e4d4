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
    """What of an image is painted. The rest of it stays as it is, bit for bit.

    file       the path of a picture as large as the image: white is painted, black stays, and what is grey is painted
               less, the darker it is (differential diffusion, arXiv 2306.00950)
    extend     pixels to add on the left, top, right and bottom of the image, which are painted, too
    edge       pixels over which what is painted fades into what stays; they lie within the mask, and the mask of an
               extension reaches as far into the image. If None, 16 for an extension and 0 for a file
    crop       paint only the mask and this many pixels around it, enlarged to the size of the request or the model's
               own, and put that back; if None, paint the whole image
    composite  False returns what the autoencoder makes of the parts that stay, too
    """

    file: Annotated[str, Within(1, 4096)] | None = None
    extend: tuple[Margin, Margin, Margin, Margin] = (0, 0, 0, 0)
    edge: Annotated[int, Within(0, 1024)] | None = None
    crop: Margin | None = None
    composite: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file is None and not any(self.extend):
            raise UsageError("a mask needs a file, or pixels by which to extend the image; give one of them")

    @property
    def chosen_edge(self) -> int:
        """The soft edge in pixels."""
        return self.edge if self.edge is not None else 16 * any(self.extend)


Masked = Annotated[Mask, "the fields of a Mask"]
