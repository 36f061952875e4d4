"""The interface of a task: what it accepts and what it produces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato.errors import UsageError
from sfumato.schedulers.consistency import ConsistencyScheduler
from sfumato.schedulers.noise import GaussianNoise

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from sfumato.pipelines.conditioning import Conditioning
    from sfumato.pipelines.parts import Parts
    from sfumato.pipelines.stages import Given
    from sfumato.request import GenerateRequest
    from sfumato.schedulers.base import Scheduler, Table

__all__ = [
    "Beginning", "Kept", "Task", "Tools", "first_noise", "for_batch", "handover", "noise_level", "start_index",
    "takes_over",
]  # fmt: skip


def handover(scheduler: Scheduler, share: float) -> int:
    """Return the timestep at which this fraction of the noise has been removed.

    One checkpoint runs the timesteps from here up, the other those below, with the same scheduler and steps. Raises
    `UsageError` if the scheduler does not use training timesteps.
    """
    own = scheduler.config.own
    continuous = (own("timestep_type"), own("prediction_type")) == ("continuous", "v_prediction")
    if continuous or own("sigma_data") is not None:  # these timesteps encode noise levels
        raise UsageError(
            f"{type(scheduler).__name__} does not use training timesteps, so one checkpoint cannot hand over to "
            "another; use a single checkpoint, or another scheduler"
        )
    trained = scheduler.config.num_train_timesteps
    return round(trained - share * trained)


def takes_over(scheduler: Scheduler, share: float) -> int:
    """Return the entry of the schedule at which a checkpoint takes over. The scheduler's timesteps must be set.

    Raises `UsageError` if no steps remain.
    """
    left = int((scheduler.timesteps < handover(scheduler, share)).sum())
    if not left:
        raise UsageError(f"denoising_start {share:g} leaves no steps; lower it, or raise steps")
    # With two calls per step, start at the first one, even if the previous checkpoint has run it too.
    return len(scheduler.timesteps) - left - (scheduler.order == 2 and left % 2 == 0)


def noise_level(scheduler: Scheduler, t: float) -> float:
    """Return sigma = sqrt((1 - a) / a) at a timestep, with the cumulative product a; log sigma is interpolated.

    Raises `UsageError` if the scheduler does not use training timesteps.
    """
    handover(scheduler, 1.0)
    products = scheduler.alphas_cumprod.double().numpy()
    sigmas = np.log((1 - products) / products) / 2
    return float(np.exp(np.interp(t, np.arange(len(sigmas)), sigmas)))


def start_index(scheduler: Scheduler, request: GenerateRequest) -> int:
    """Return the entry of the schedule at which image-to-image starts. Raises `UsageError` if no step remains."""
    if request.denoising_start is not None:
        return takes_over(scheduler, request.denoising_start)
    steps = scheduler.num_inference_steps or request.chosen_steps
    used = min(int(steps * request.chosen_strength), steps)
    if used < 1:
        raise UsageError(
            f"strength {request.chosen_strength:g} leaves none of the {steps} steps; raise strength or steps"
        )
    return (steps - used) * scheduler.order


def first_noise(task: Task, batch: int, tools: Tools) -> Tensor:
    """Return the initial noise (B, C, h, w), the caller's or new, in the loop's precision.

    Raises `UsageError` if the caller's noise has the wrong shape.
    """
    parts, latents = task.parts, task.given.latents
    (width, height), factor = task.size, task.parts.vae_scale_factor
    shape = (batch, parts.vae.config.latent_channels, height // factor, width // factor)
    if latents is None:
        latents = GaussianNoise(shape, task.given.generators, tools.device)()
    elif tuple(latents.shape) != shape:
        raise UsageError(f"latents must have the shape {shape}, not {tuple(latents.shape)}")
    return latents.to(tools.device, parts.state_dtype)


def for_batch(given: Tensor, batch: int, what: str) -> Tensor:
    """Repeat what was given, (P, …), to (B, …). Raises `UsageError` unless the batch is a multiple of it."""
    count = given.shape[0]
    if batch % count:
        raise UsageError(f"got {count} {what} for {batch} images; pass one, or one per image")
    return given.repeat(batch // count, *[1] * (given.ndim - 1))


@dataclass(frozen=True)
class Tools:
    """A run's functions for tasks.

    scheduler: with its timesteps set; device: of the loop; encode: encodes pixels (P, 3, H, W) in [-1, 1] to scaled
    latents (B, C, h, w) on that device, with sampled=False to the posterior's mean; pass_over: draws the random numbers
    of `encode`; see: embeds images in any form as (P, D); depth: estimates their depth (P, H, W).
    """

    scheduler: Scheduler
    device: torch.device
    encode: Callable[..., Tensor]
    pass_over: Callable[[Tensor], None]
    see: Callable[[Any], Tensor]
    depth: Callable[[Any], Tensor]


@dataclass
class Kept:
    """Restores the unmasked area of an image after each step, with that step's noise.

    mask (B, 1, h, w): 1 in the area to change; values between 0 and 1 are kept until this fraction of the steps remains
    (differential diffusion, arXiv 2306.00950, algorithm 1); clean, noise: (B, C, h, w).
    """

    mask: Tensor
    clean: Tensor
    noise: Tensor
    table: Table

    def __call__(self, index: int, steps: int, latents: Tensor) -> Tensor:
        """Restore the unmasked area in latents (B, C, h, w) after step `index`, counted from 0, of `steps`."""
        last = index + 1 == steps
        stays = self.clean if last else self.table.noised(self.clean, self.noise, index + 1)
        mask = (self.mask > 1 - (index + 1) / steps).to(latents.dtype)
        return (1 - mask) * stays + mask * latents


@dataclass(frozen=True)
class Beginning:
    """The start of the loop: the first entry of the schedule, the latents (B, C, h, w), and the conditioning.

    after: a change to the latents after each step, if only a part of the image may change.
    """

    index: int
    latents: Tensor
    conditioning: Conditioning
    after: Kept | None = None


@dataclass(frozen=True)
class Task:
    """A way to start the loop. Draws random numbers in the ecosystem's order, so that images are the same."""

    parts: Parts
    request: GenerateRequest
    given: Given

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the images, known before anything is computed."""
        raise NotImplementedError

    @property
    def guided(self) -> bool:
        """Whether guidance is applied, which needs the negative prompt."""
        return self.request.chosen_scale > 1 and not self.parts.distilled

    @property
    def tile(self) -> int | None:
        """The side of the latents' tiles for the U-Net; None for no tiles."""
        return None

    def scheduled(self, scheduler: Scheduler) -> Scheduler:
        """Return the scheduler adapted to this task."""
        return scheduler

    def grid(self, scheduler: Scheduler) -> dict[str, Any]:
        """Return additional arguments for `set_timesteps`. Raises `UsageError` if this scheduler does not have them."""
        original = self.request.original_inference_steps
        if original is None:
            return {}
        if not isinstance(scheduler, ConsistencyScheduler):
            raise UsageError(f"{type(scheduler).__name__} has no original_inference_steps; use LCM or TCD, or omit it")
        return {"original_inference_steps": original}

    def finish(self, picture: Image) -> Image:
        """Return the final image for a decoded one."""
        return picture

    def begin(self, text: Conditioning, tools: Tools) -> Beginning:
        """Return the start of the loop for encoded prompts. Raises `UsageError` for invalid inputs."""
        raise NotImplementedError
