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
    """The timestep at which a share of the noise is gone: one checkpoint takes those from it on, another those below.

    Both take as many steps of the same scheduler. Raises `UsageError` for one whose timesteps are no such thing.
    """
    own = scheduler.config.own
    continuous = (own("timestep_type"), own("prediction_type")) == ("continuous", "v_prediction")
    if continuous or own("sigma_data") is not None:  # EDM's measure the noise
        raise UsageError(
            f"{type(scheduler).__name__} does not use training timesteps, so one checkpoint cannot hand over to "
            "another; use a single checkpoint, or another scheduler"
        )
    trained = scheduler.config.num_train_timesteps
    return round(trained - share * trained)


def takes_over(scheduler: Scheduler, share: float) -> int:
    """The entry of the schedule at which a checkpoint goes on that takes over there; its timesteps are set.

    Raises `UsageError` where nothing is left to it.
    """
    left = int((scheduler.timesteps < handover(scheduler, share)).sum())
    if not left:
        raise UsageError(f"denoising_start {share:g} leaves no steps; lower it, or raise steps")
    # Of two calls a step, the first one is taken, too; the checkpoint before has taken it as well.
    return len(scheduler.timesteps) - left - (scheduler.order == 2 and left % 2 == 0)


def noise_level(scheduler: Scheduler, t: float) -> float:
    """Sigma, sqrt((1 - a) / a) of the cumulative product a, at a timestep; between two, log sigma is interpolated.

    Raises `UsageError` for a scheduler whose timesteps are no training timesteps.
    """
    handover(scheduler, 1.0)
    products = scheduler.alphas_cumprod.double().numpy()
    sigmas = np.log((1 - products) / products) / 2
    return float(np.exp(np.interp(t, np.arange(len(sigmas)), sigmas)))


def start_index(scheduler: Scheduler, request: GenerateRequest) -> int:
    """The entry of the schedule at which an image is begun with. Raises `UsageError` where no step is left."""
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
    """The noise (B, C, h, w) that a task of its size begins with, the caller's or drawn, in the loop's precision.

    Raises `UsageError` for a caller's of another shape.
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
    """What a task may use of a run.

    scheduler: its timesteps are set; device: where the loop runs; encode: pixels (P, 3, H, W) in [-1, 1] to scaled
    latents (B, C, h, w) there, by the autoencoder, which is in memory for as long, with sampled=False its mean;
    pass_over: draw what that draws; see: what the image encoder makes of an image in any form (P, D); depth: what the
    depth estimator makes of one (P, H, W).
    """

    scheduler: Scheduler
    device: torch.device
    encode: Callable[..., Tensor]
    pass_over: Callable[[Tensor], None]
    see: Callable[[Any], Tensor]
    depth: Callable[[Any], Tensor]


@dataclass
class Kept:
    """What stays of an image while the rest is painted: after each step, its latents with that step's noise.

    mask (B, 1, h, w), 1 where it is painted. What is between 0 and 1 stays until that share of the steps is left
    (differential diffusion, arXiv 2306.00950, algorithm 1); clean and noise (B, C, h, w).
    """

    mask: Tensor
    clean: Tensor
    noise: Tensor
    table: Table

    def __call__(self, index: int, steps: int, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) after a step, counted from 0, of how many -> the same with what stays in its place."""
        last = index + 1 == steps
        stays = self.clean if last else self.table.noised(self.clean, self.noise, index + 1)
        mask = (self.mask > 1 - (index + 1) / steps).to(latents.dtype)
        return (1 - mask) * stays + mask * latents


@dataclass(frozen=True)
class Beginning:
    """Where the loop begins: the first entry of the schedule, the latents (B, C, h, w), and what the U-Net is told.

    after: what becomes of the latents after a step, counted from 0, of how many, if not all of them are to change.
    """

    index: int
    latents: Tensor
    conditioning: Conditioning
    after: Kept | None = None


@dataclass(frozen=True)
class Task:
    """One way to begin. It draws its random numbers in the ecosystem's order, so that images are the same."""

    parts: Parts
    request: GenerateRequest
    given: Given

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the images, known before anything is computed."""
        raise NotImplementedError

    @property
    def guided(self) -> bool:
        """Whether the negative prompt is read, too."""
        return self.request.chosen_scale > 1 and not self.parts.distilled

    @property
    def tile(self) -> int | None:
        """The side of the latents that the U-Net reads at once, all of them if None."""
        return None

    def scheduled(self, scheduler: Scheduler) -> Scheduler:
        """The scheduler that this is drawn with."""
        return scheduler

    def grid(self, scheduler: Scheduler) -> dict[str, Any]:
        """What `set_timesteps` is told beside the steps. Raises `UsageError` for what this scheduler has not."""
        original = self.request.original_inference_steps
        if original is None:
            return {}
        if not isinstance(scheduler, ConsistencyScheduler):
            raise UsageError(f"{type(scheduler).__name__} has no original_inference_steps; LCM and TCD have")
        return {"original_inference_steps": original}

    def finish(self, picture: Image) -> Image:
        """A picture as it is handed over."""
        return picture

    def begin(self, text: Conditioning, tools: Tools) -> Beginning:
        """From what the prompts say to where the loop begins. Raises `UsageError` for what cannot be drawn."""
        raise NotImplementedError
