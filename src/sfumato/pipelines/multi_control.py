"""Several ControlNets or T2I-Adapters as one component of a pipeline."""

from __future__ import annotations

from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from sfumato.models.controlnet import ControlNetModel, ControlNetOutput
from sfumato.models.controlnet_union import ControlNetUnionModel
from sfumato.models.t2i_adapter import T2IAdapter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from sfumato.models.base import Model

__all__ = ["MultiAdapter", "MultiControlNetModel", "MultiControlNetUnionModel", "Several"]


class Several(nn.Module):
    """Several networks of one kind, whose residuals are added. nets: the networks."""

    kind: ClassVar[type[Any]]

    def __init__(self, networks: Sequence[Any]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(networks)

    @staticmethod
    def of(networks: Sequence[Any]) -> Several:
        """Combine networks in the class for the kind of the first one."""
        kinds: dict[Any, Any] = {one.kind: one for one in Several.__subclasses__()}
        return kinds.get(type(next(iter(networks), None)), MultiControlNetModel)(networks)

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **keywords: Any) -> Self:
        """Load the networks from the folders `name`, `name_1`, `name_2`, …, with the keywords for a single network.

        Raises `CheckpointError`.
        """
        return cls([cls.kind.from_pretrained(folder, **keywords) for folder in cls._folders(Path(name))])

    @classmethod
    def from_folder(cls, folder: Path, **options: Any) -> Self:
        """Load the networks from folders on this machine, with the options of `Model.from_folder`."""
        return cls([cls.kind.from_folder(one, **options) for one in cls._folders(folder)])

    @staticmethod
    def _folders(first: Path) -> list[Path]:
        more = takewhile(Path.is_dir, (first.with_name(f"{first.name}_{i}") for i in count(1)))
        return [first, *more]

    def save_pretrained(self, folder: str | PathLike[str], **options: Any) -> None:
        """Write the networks to the folders `folder`, `folder_1`, …, with the options for a single network.

        Raises `OutputError`.
        """
        first = Path(folder)
        for i, net in enumerate(self.nets):
            cast("Model", net).save_pretrained(first.with_name(f"{first.name}_{i}") if i else first, **options)


class MultiControlNetModel(Several):
    """Several ControlNets."""

    kind = ControlNetModel

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
        """Return the sums of the networks' residuals. Takes one image and one scale per network."""
        down: tuple[Tensor, ...] = ()
        middle = torch.zeros((), dtype=sample.dtype, device=sample.device)
        for net, picture, scale in zip(self.nets, controlnet_cond, conditioning_scale, strict=True):
            own, last = net(sample, timestep, encoder_hidden_states, picture, scale, return_dict=False, **told)
            down = tuple(map(torch.add, down, own)) if down else own
            middle = middle + last
        return ControlNetOutput(down, middle) if return_dict else (down, middle)


class MultiControlNetUnionModel(Several):
    """Several ControlNet Unions, which receive the kind of each control image."""

    kind = ControlNetUnionModel


class MultiAdapter(Several):
    """Several T2I-Adapters."""

    kind = T2IAdapter

    def forward(self, pictures: Sequence[Tensor], adapter_weights: Sequence[float] | None = None) -> list[Tensor]:
        """Return the weighted sums of the features. Default: equal weights."""
        weights = [1 / len(self.nets)] * len(self.nets) if adapter_weights is None else adapter_weights
        every = [[w * one for one in net(x)] for net, x, w in zip(self.nets, pictures, weights, strict=True)]
        return [torch.stack(same).sum(0) for same in zip(*every, strict=True)]
