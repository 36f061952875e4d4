"""Less work than the exact image takes: a promise, and the methods that keep it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from sfumato.request.records import Record, Share
from sfumato.values import Within

__all__ = ["Fast", "Hastened", "Reuse"]


@dataclass(frozen=True, kw_only=True)
class Reuse(Record):
    """At which steps something is computed; those between reuse what these steps have computed.

    start  the share of the steps after which it begins: step i of n, counted from 0, computes if i / n <= start
    every  after that, every so manyth step computes; 1: all of them
    """

    start: Share = 0.0
    every: Annotated[int, Within(1, 100)] = 1

    def computes(self, index: int, total: int) -> bool:
        """Whether step `index`, counted from 0, of `total` computes it."""
        first = math.floor(self.start * total)
        return index <= first or (index - first) % self.every == 0


@dataclass(frozen=True, kw_only=True)
class Fast(Record):
    """Draw nearly the exact image with less work.

    promise   how near: the PSNR of the two, in dB; a table measured for the model chooses the methods that keep it
    deep      reuse of the U-Net's deep features (DeepCache, arXiv 2312.00858); in recipes, or chosen by hand
    layers    how many layers of the U-Net's way up compute at every step nevertheless
    guidance  reuse of the direction of guidance: between its steps, only the prompt is computed (arXiv 2410.19355); its
              steps should be among those of `deep`
    """

    promise: Annotated[float, Within(1, 100)]
    deep: Reuse | None = None
    layers: Annotated[int, Within(1, 100)] = 1
    guidance: Reuse | None = None
    nested = {"deep": Reuse, "guidance": Reuse}


Hastened = Annotated[Fast, "the fields of a Fast"]
