"""Everything the U-Net receives besides the latents and the timestep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch

from sfumato.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from sfumato.pipelines.image_prompts import Seen
    from sfumato.pipelines.residuals import Steered

__all__ = ["Branches", "Conditioning"]

Branches = tuple["Tensor", ...]
# The fields that differ between the branches of guidance.
BRANCHED = ("embeds", "pooled", "sizes", "extra", "labels", "time_condition", "weights")


@dataclass(frozen=True)
class Conditioning:
    """All inputs of the U-Net except latents and timestep, for each branch of guidance.

    Branches are ordered from the negative prompt to the prompt; without guidance there is only the prompt's. Prompts
    joined by `AND` have one branch each. All branches form one batch of one call, in this order.

    embeds: (B, S, C) per branch; weights: (B, 1, 1, 1) per branch of joined prompts; pooled: pooled prompts (B, P), and
    sizes: the values of the family's `sizes` (B, N), empty for families without them; extra: further channels
    (B, C, h, w), in one branch for all or one for each; labels: class labels (B,) or (B, N); time_condition: (B, N);
    steered: control networks and their images; images: image prompts.
    """

    embeds: Branches
    pooled: Branches = ()
    sizes: Branches = ()
    weights: Branches = ()
    extra: Branches = ()
    labels: Branches = ()
    time_condition: Branches = ()
    steered: tuple[Steered, ...] = ()
    images: tuple[Seen, ...] = ()

    @property
    def branches(self) -> int:
        """The number of branches of guidance."""
        return len(self.embeds)

    @property
    def prompts(self) -> int:
        """The number of branches that belong to the prompt."""
        return max(1, len(self.weights))

    @property
    def pictures(self) -> int:
        """The number of images, B."""
        return self.embeds[-1].shape[0]

    @property
    def unguided(self) -> Self:
        """A copy with only the prompt's branches."""
        return self._each(lambda branches: branches[-self.prompts :])

    def joined(self, name: str) -> Tensor:
        """Return one of the fields as one batch, such as the embeddings (branches · B, S, C)."""
        return torch.cat(getattr(self, name))

    @property
    def with_time(self) -> dict[str, Tensor]:
        """The inputs of the time embedding, by the U-Net's names for them. A label that all share is one row."""
        fields = {"text_embeds": "pooled", "time_ids": "sizes", "class_labels": "labels"}
        fields |= {"timestep_cond": "time_condition"}
        told = {name: self.joined(field) for name, field in fields.items() if getattr(self, field)}
        labels = told.get("class_labels")
        if labels is not None and bool((labels == labels[:1]).all()):
            told["class_labels"] = labels[:1]
        return told

    def split(self, size: int) -> list[Self]:
        """Split into one conditioning per `size` images; the last may have fewer."""
        return [
            replace(
                self._each(lambda branches, i=i: tuple(branch[i : i + size] for branch in branches)),
                steered=tuple(one.part(i, size) for one in self.steered),
            )
            for i in range(0, self.pictures, size)
        ]

    def told(self, **joined: Tensor) -> Self:
        """Return a copy with other values for some fields. Values for only the prompt's branch end guidance.

        Raises `UsageError` if there are more branches of embeddings than of pooled prompts and sizes.
        """
        changed = replace(self, **{name: values.split(self.pictures) for name, values in joined.items()})
        count = changed.branches
        if count < self.prompts:  # one prompt instead of several joined ones
            changed = replace(changed, weights=())
        if any(0 < len(branches) < count for branches in (changed.pooled, changed.sizes)):
            raise UsageError("got negative embeddings without negative pooled prompts and sizes; pass those too")
        return changed._each(lambda branches: branches[-count:])

    def prompted(self, prompts: Conditioning) -> Self:
        """Return a copy with other prompts, which may have a different number of branches (`AND`)."""
        others, count = self.branches - self.prompts, prompts.prompts
        # The branch of an image without a prompt gets the same embeddings as the unconditional branch.
        more = others - (prompts.branches - count)
        told = {name: own[:1] * more + own for name in ("embeds", "pooled") if (own := getattr(prompts, name))}
        beside = {name: getattr(self, name) for name in ("sizes", "labels", "time_condition")}
        beside |= {"extra": self.extra} if len(self.extra) > 1 else {}
        told |= {name: own[:others] + own[-1:] * count for name, own in beside.items()}
        return replace(self, **told, weights=prompts.weights)

    def _each(self, change: Callable[[Branches], Branches]) -> Self:
        return replace(self, **{name: change(getattr(self, name)) for name in BRANCHED})
