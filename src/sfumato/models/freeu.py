"""FreeU: reweights backbone and skip features in the U-Net's decoder (arXiv 2309.11497)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sfumato.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FreeUSwitch", "reweighted"]

Factors = tuple[float, float]


def reweighted(x: Tensor, skip: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Scale half of the channels of x (B, C, H, W) by the first factor, and the skip's low frequencies by the second.

    Follows section 3.2 with the authors' constants: the first half of the channels, and the four frequencies -1 and 0.
    """
    backbone, low = factors
    x = x.clone()
    x[:, : x.shape[1] // 2] *= backbone
    spectrum = torch.fft.fft2(skip.double() if skip.dtype == torch.float64 else skip.float())
    rows, columns = (sorted({0, size - 1}) for size in skip.shape[2:])
    spectrum[..., torch.tensor(rows)[:, None], torch.tensor(columns)] *= low
    return x, torch.fft.ifft2(spectrum).real.to(skip.dtype)


class FreeUSwitch:
    """FreeU methods of a U-Net, as in diffusers. `freeu` has factors (b, s) for the first two up blocks, or is None."""

    config: Any
    freeu: tuple[Factors, Factors] | None = None

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Scale by b1 and s1 in the first up block, and by b2 and s2 in the second.

        Raises `UsageError` for factors that are not numbers, and for a U-Net without a skip connection per layer.
        """
        if self.config.is_k:
            raise UsageError("FreeU does not support U-Nets of k-diffusion blocks; leave it off")
        if not all(isinstance(one, (int, float)) for one in (s1, s2, b1, b2)):
            raise UsageError(f"FreeU takes four numbers, not s1={s1!r}, s2={s2!r}, b1={b1!r}, b2={b2!r}")
        self.freeu = (b1, s1), (b2, s2)

    def disable_freeu(self) -> None:
        """Restore the U-Net as trained."""
        self.freeu = None
