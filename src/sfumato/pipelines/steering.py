"""What may change during a call: the attributes that the ecosystem's callbacks and cancel buttons set."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

__all__ = ["Steered", "Steering"]


@dataclass
class Steering:
    """How one run goes on: read before each of its steps, and changed by whoever holds it, from any thread."""

    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    clip_skip: int | None = None
    interrupt: bool = False
    num_timesteps: int = 0  # calls of the U-Net that the whole run takes
    _until: int = field(default=sys.maxsize, init=False)

    def stops(self, index: int) -> bool:
        """Whether the run ends before step `index`, counted from 0; taken again after a repair, it ends there again."""
        if self.interrupt:
            self._until = min(self._until, index)
        return index >= self._until

    def restart(self, guidance_scale: float, guidance_rescale: float) -> None:
        """Begin again: the callbacks of all steps are to come once more."""
        self.guidance_scale, self.guidance_rescale, self.interrupt = guidance_scale, guidance_rescale, False


def _steered(name: str) -> property:
    return property(
        lambda self: getattr(self._steering, name), lambda self, value: setattr(self._steering, name, value)
    )


class Steered:
    """The attributes of a pipeline under which the ecosystem knows its call in progress, or else its last one.

    Set while it draws, `_interrupt` ends the call with the latents as they are; `_guidance_scale` and
    `_guidance_rescale` hold from the next step on, a scale of at most 1 without guidance.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")
    _steering: Steering
    _interrupt = _steered("interrupt")
    _guidance_scale = _steered("guidance_scale")
    _guidance_rescale = _steered("guidance_rescale")

    @property
    def interrupt(self) -> bool:
        """Whether `_interrupt` has told the call to stop."""
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
