"""Settings that can change during a call, through attributes that the ecosystem's callbacks and cancel buttons set."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

__all__ = ["Steered", "Steering"]


@dataclass
class Steering:
    """The changeable settings of one run. They are read before each step, and can be set from any thread."""

    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    clip_skip: int | None = None
    interrupt: bool = False
    num_timesteps: int = 0  # U-Net calls of the whole run
    _until: int = field(default=sys.maxsize, init=False)

    def stops(self, index: int) -> bool:
        """Return whether the run ends before step `index`, counted from 0. A repeated run ends at the same step."""
        if self.interrupt:
            self._until = min(self._until, index)
        return index >= self._until

    def restart(self, guidance_scale: float, guidance_rescale: float) -> None:
        """Reset the settings, because all steps and their callbacks run again."""
        self.guidance_scale, self.guidance_rescale, self.interrupt = guidance_scale, guidance_rescale, False


def _steered(name: str) -> property:
    return property(
        lambda self: getattr(self._steering, name), lambda self, value: setattr(self._steering, name, value)
    )


class Steered:
    """The ecosystem's attributes of a pipeline for the current call, or else the last one.

    During a call, `_interrupt = True` ends it with the current latents, and `_guidance_scale` and `_guidance_rescale`
    apply from the next step on; a scale of at most 1 means no guidance.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")
    _steering: Steering
    _interrupt = _steered("interrupt")
    _guidance_scale = _steered("guidance_scale")
    _guidance_rescale = _steered("guidance_rescale")

    @property
    def interrupt(self) -> bool:
        """Whether `_interrupt` was set to stop the call."""
        return self._steering.interrupt

    @property
    def guidance_scale(self) -> float:
        """The guidance scale, including changes by callbacks."""
        return self._steering.guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """How much the guided prediction is rescaled to the standard deviation of the unguided one for the prompt."""
        return self._steering.guidance_rescale

    @property
    def clip_skip(self) -> int | None:
        """How many of the text encoder's last layers the call skips."""
        return self._steering.clip_skip

    @property
    def num_timesteps(self) -> int:
        """The number of U-Net calls in the current call; 0 before the first one."""
        return self._steering.num_timesteps
