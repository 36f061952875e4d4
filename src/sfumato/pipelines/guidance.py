"""What the loop asks at each step: the U-Net's prediction, steered by the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sfumato.models.attention import Context
from sfumato.models.blocks import Moment, sinusoidal_embedding

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.models.unet import UNet2DConditionModel

__all__ = ["Guidance", "guide", "rescale"]

# Micro-batches of different prompts that keep their keys and values between steps: about 8 MB each for Stable Diffusion
# 1.5. More of them are projected anew at each step, half a per cent of its time.
KEPT = 4


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6): away from the negative prompt, towards the prompt."""
    return unconditional + scale * (conditional - unconditional)


def rescale(guided: Tensor, conditional: Tensor, factor: float) -> Tensor:
    """Bring the guided prediction back towards the conditional one's spread (arXiv 2305.08891, eq. 15 and 16)."""
    dims = tuple(range(1, guided.ndim))
    spread = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return factor * (guided * spread) + (1 - factor) * guided


@dataclass(kw_only=True)
class Guidance:
    """The U-Net together with what it is told.

    embeds (B, S, C); negative_embeds the same, or None for no guidance; `replace_embeds` changes both between steps.
    micro_batch: pictures per call of the U-Net, all if None. Predictions come back in float32 (float64 if the U-Net
    is), so that guidance does not round twice.
    """

    unet: UNet2DConditionModel
    embeds: Tensor
    negative_embeds: Tensor | None
    scale: float
    rescale: float = 0.0
    micro_batch: int | None = None
    _contexts: list[Context] = field(default_factory=list, init=False)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Scaled latents (B, C, h, w) at timestep t -> the prediction (B, C, h, w)."""
        narrow = x.to(self.unet.dtype)
        size = self.micro_batch or x.shape[0]
        if not self._contexts or self._contexts[0].states.dtype != narrow.dtype:  # a repair changes the precision
            self._contexts = self._read(size)
        moment = self.unet.moment(narrow[:size], t, timestep_cond=self._scale_condition(narrow[:1]))
        parts = zip(narrow.split(size), self._contexts, strict=True)
        return torch.cat([self._predict(part, moment, context).to(x.dtype) for part, context in parts])

    def _predict(self, x: Tensor, moment: Moment, context: Context) -> Tensor:
        output = self.unet(x, moment, context, return_dict=False)[0]
        if self.negative_embeds is None:
            return output
        unconditional, conditional = output.to(_wide(output)).chunk(2)
        guided = guide(unconditional, conditional, self.scale)
        return rescale(guided, conditional, self.rescale) if self.rescale > 0 else guided

    def _read(self, size: int) -> list[Context]:
        """What each micro-batch reads; those that read the same share it, and with it what layers make of it."""
        negatives = self.negative_embeds.split(size) if self.negative_embeds is not None else None
        contexts: list[Context] = []
        for index, embeds in enumerate(self.embeds.split(size)):
            states = (embeds if negatives is None else torch.cat([negatives[index], embeds])).to(self.unet.dtype)
            same = (one for one in contexts[-1:] if torch.equal(one.states, states))
            contexts.append(next(same, None) or Context(states, keep=self.embeds.shape[0] <= KEPT * size))
        for context in dict.fromkeys(contexts):
            if context.keep:
                self.unet.read(context)
        return contexts

    def one_at_a_time(self) -> None:
        """From here on, one picture per call of the U-Net."""
        self.micro_batch, self._contexts = 1, []

    def replace_embeds(self, embeds: Tensor) -> None:
        """Read other embeddings: (B, S, C), which ends guidance, or (2B, S, C) with the negative ones first."""
        self._contexts = []
        batch = self.embeds.shape[0]
        if embeds.shape[0] == batch:
            self.embeds, self.negative_embeds = embeds, None
        else:
            self.negative_embeds, self.embeds = embeds.chunk(2)

    def _scale_condition(self, x: Tensor) -> Tensor | None:
        """Models distilled for guidance read the scale itself (arXiv 2310.04378, section 4.2)."""
        channels = self.unet.config.time_cond_proj_dim
        if channels is None:
            return None
        scale = torch.full((x.shape[0],), (self.scale - 1) * 1000, device=x.device)
        return sinusoidal_embedding(scale, channels, flip_sin_to_cos=False, freq_shift=1).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
