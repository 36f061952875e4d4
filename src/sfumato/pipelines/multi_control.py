"""Several ControlNets as one component of a pipeline."""

from __future__ import annotations

from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from sfumato.models.controlnet import ControlNetModel, ControlNetOutput

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

__all__ = ["MultiControlNetModel"]


class MultiControlNetModel(nn.Module):
    """Several ControlNets, whose residuals are added up; `nets` holds them."""

    def __init__(self, controlnets: Sequence[ControlNetModel]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(controlnets)

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **keywords: Any) -> Self:
        """Load them from the folders `name`, `name_1`, `name_2`, …; keywords as of one. Raises `CheckpointError`."""
        return cls([ControlNetModel.from_pretrained(folder, **keywords) for folder in cls._folders(Path(name))])

    @classmethod
    def from_folder(cls, folder: Path, **options: Any) -> Self:
        """The same of folders on this machine, with the options of `Model.from_folder`."""
        return cls([ControlNetModel.from_folder(one, **options) for one in cls._folders(folder)])

    @staticmethod
    def _folders(first: Path) -> list[Path]:
        more = takewhile(Path.is_dir, (first.with_name(f"{first.name}_{i}") for i in count(1)))
        return [first, *more]

    def save_pretrained(self, folder: str | PathLike[str], **options: Any) -> None:
        """Write them into the folders `folder`, `folder_1`, …; options as of one. Raises `OutputError`."""
        first = Path(folder)
        for i, net in enumerate(self.nets):
            cast("ControlNetModel", net).save_pretrained(
                first.with_name(f"{first.name}_{i}") if i else first, **options
            )

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Sequence[Tensor],
        conditioning_scale: Sequence[float],
        *,
        return_dict: bool = True,
        **told: Any,
    ) -> ControlNetOutput | tuple[tuple[Tensor, ...], Tensor]:
        """The sums of what they add; a picture and a scale for each, the rest as of one."""
        down: tuple[Tensor, ...] = ()
        middle = torch.zeros((), dtype=sample.dtype, device=sample.device)
        for net, picture, scale in zip(self.nets, controlnet_cond, conditioning_scale, strict=True):
            own, last = net(sample, timestep, encoder_hidden_states, picture, scale, return_dict=False, **told)
            down = tuple(map(torch.add, down, own)) if down else own
            middle = middle + last
        return ControlNetOutput(down, middle) if return_dict else (down, middle)
