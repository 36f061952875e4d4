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
    """All that the U-Net is told beside the latents and the time, for each branch of guidance.

    embeds: (B, S, C) for each branch: the negative prompt's first and the prompt's last, or the prompt's alone where
    there is no guidance. Prompts that are joined (`AND`) have a branch each, and weights (B, 1, 1, 1) for each of these
    branches. All branches are one batch of one call, in this order. Where a family reads them, pooled are
    the pooled prompts (B, P), sizes the numbers of its `sizes` (B, N); elsewhere both are empty. What else a U-Net may
    read: extra channels (B, C, h, w) beside those of the latents, one branch for all or one each; class labels (B,) or
    (B, N); and a time condition (B, N). steered: the networks beside the U-Net that add to it, and what they see;
    images: what it is told of images, as of a prompt.
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
        """How many branches of guidance there are."""
        return len(self.embeds)

    @property
    def prompts(self) -> int:
        """How many of the branches are the prompt's."""
        return max(1, len(self.weights))

    @property
    def pictures(self) -> int:
        """How many images there are, B."""
        return self.embeds[-1].shape[0]

    @property
    def unguided(self) -> Self:
        """The prompt's branches alone."""
        return self._each(lambda branches: branches[-self.prompts :])

    def joined(self, name: str) -> Tensor:
        """A copy of one of the fields as one batch, such as the embeddings (branches · B, S, C)."""
        return torch.cat(getattr(self, name))

    @property
    def with_time(self) -> dict[str, Tensor]:
        """What goes with time, by the names that the U-Net has for it; a label that all share is one row."""
        fields = {"text_embeds": "pooled", "time_ids": "sizes", "class_labels": "labels"}
        fields |= {"timestep_cond": "time_condition"}
        told = {name: self.joined(field) for name, field in fields.items() if getattr(self, field)}
        labels = told.get("class_labels")
        if labels is not None and bool((labels == labels[:1]).all()):
            told["class_labels"] = labels[:1]
        return told

    def split(self, size: int) -> list[Self]:
        """A conditioning for each `size` images; the last may have fewer."""
        return [
            replace(
                self._each(lambda branches, i=i: tuple(branch[i : i + size] for branch in branches)),
                steered=tuple(one.part(i, size) for one in self.steered),
            )
            for i in range(0, self.pictures, size)
        ]

    def told(self, **joined: Tensor) -> Self:
        """The same images told otherwise: fields as `joined` gives them; the prompt's branch alone ends guidance.

        Raises `UsageError` where there are more branches of embeddings than of what goes with them.
        """
        changed = replace(self, **{name: values.split(self.pictures) for name, values in joined.items()})
        count = changed.branches
        if count < self.prompts:  # another prompt, and no longer several that are joined
            changed = replace(changed, weights=())
        if any(0 < len(branches) < count for branches in (changed.pooled, changed.sizes)):
            raise UsageError("there are negative embeddings, but no negative pooled prompts and sizes; pass those too")
        return changed._each(lambda branches: branches[-count:])

    def prompted(self, prompts: Conditioning) -> Self:
        """The same told by other prompts, of which `AND` may join more or fewer."""
        others, count = self.branches - self.prompts, prompts.prompts
        # An image without a prompt reads what nothing reads.
        more = others - (prompts.branches - count)
        told = {name: own[:1] * more + own for name in ("embeds", "pooled") if (own := getattr(prompts, name))}
        beside = {name: getattr(self, name) for name in ("sizes", "labels", "time_condition")}
        beside |= {"extra": self.extra} if len(self.extra) > 1 else {}
        told |= {name: own[:others] + own[-1:] * count for name, own in beside.items()}
        return replace(self, **told, weights=prompts.weights)

    def _each(self, change: Callable[[Branches], Branches]) -> Self:
        return replace(self, **{name: change(getattr(self, name)) for name in BRANCHED})
