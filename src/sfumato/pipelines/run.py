"""The way from a request to latents and pixels: every picture takes it, whoever asks."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from sfumato.errors import UsageError
from sfumato.images import open_image, to_pixels
from sfumato.pipelines import stages
from sfumato.pipelines.denoise import DenoiseStep, denoise
from sfumato.pipelines.finite import FiniteWatch
from sfumato.pipelines.guidance import Guidance
from sfumato.schedulers.noise import GaussianNoise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sfumato.pipelines.pipeline import DiffusionPipeline
    from sfumato.pipelines.stages import Given
    from sfumato.request import GenerateRequest
    from sfumato.schedulers.base import Scheduler

__all__ = ["Run"]

log = logging.getLogger("sfumato")


@dataclass
class Run:
    """One request on its way through a pipeline; `notes` and `seconds` fill as it goes."""

    pipeline: DiffusionPipeline
    request: GenerateRequest
    given: Given
    scheduler: Scheduler
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    watch: FiniteWatch = field(default_factory=FiniteWatch)
    guidance: Guidance = field(init=False)

    def latents(self) -> Generator[DenoiseStep, Tensor | None, Tensor]:
        """Encode, denoise, return the latents (B, C, h, w); yields after each step and takes edited latents back."""
        pipeline, request = self.pipeline, self.request
        guided = request.guidance_scale > 1 and pipeline.unet.config.time_cond_proj_dim is None
        self._check()
        with torch.no_grad(), self._timed("encode"):
            conditioning = stages.encode_prompt(pipeline, request, self.given, guided=guided, watch=self.watch)
        self._note_lost(conditioning.lost)
        self.guidance = Guidance(
            unet=pipeline.unet,
            embeds=conditioning.embeds,
            negative_embeds=conditioning.negative_embeds,
            scale=request.guidance_scale,
            rescale=request.guidance_rescale,
        )
        self._set_timesteps()
        with torch.no_grad(), self._timed("encode"):
            start, latents = self._start(conditioning.embeds.shape[0])
        table = self.scheduler.table(start, eta=request.eta)
        noise = self.scheduler.noise_source(latents.shape, self.given.generators, latents.device)
        began = time.perf_counter()
        loop = denoise(self.guidance, table.rows, latents, noise)
        latents = yield from self._watched(loop)
        self.watch.settle()
        self.seconds["denoise"] = time.perf_counter() - began
        return latents

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode latents to pixels (B, 3, H, W) in [0, 1]."""
        with self._timed("decode"):
            return stages.decode(self.pipeline.vae, latents, self.watch)

    def _watched(
        self, loop: Generator[DenoiseStep, Tensor | None, Tensor]
    ) -> Generator[DenoiseStep, Tensor | None, Tensor]:
        edited: Tensor | None = None
        while True:
            try:
                step = loop.send(edited)
            except StopIteration as end:
                return end.value
            self.watch.see(f"U-Net, step {step.index + 1} of {step.total}", self.pipeline.unet, step.latents)
            edited = yield step

    def _check(self) -> None:
        request, given, unet = self.request, self.given, self.pipeline.unet
        if unet.config.in_channels != self.pipeline.vae.config.latent_channels:
            raise UsageError(
                f"this U-Net reads {unet.config.in_channels} channels (inpainting or upscaling), "
                f"but its VAE makes {self.pipeline.vae.config.latent_channels}; use a text-to-image checkpoint"
            )
        if given.prompt_embeds is not None and any(request.prompts):
            raise UsageError("prompt and prompt_embeds both say what to draw; give one of them")
        if given.negative_prompt_embeds is not None and request.negative_prompt is not None:
            raise UsageError("negative_prompt and negative_prompt_embeds exclude each other; give one of them")
        factor = self.pipeline.vae_scale_factor
        for name in ("width", "height"):
            value = getattr(request, name)
            if value is not None and value % factor:
                near = sorted({max(factor, value - value % factor), value + factor - value % factor})
                raise UsageError(
                    f"{name} must be divisible by {factor}, and {value} is not; try {' or '.join(map(str, near))}"
                )
        generators = given.generators
        batch = self._prompts() * request.count
        if isinstance(generators, (list, tuple)) and len(generators) != batch:
            raise UsageError(
                f"there are {len(generators)} generators for {batch} pictures; give one per picture, or a single one"
            )

    def _prompts(self) -> int:
        embeds = self.given.prompt_embeds
        return len(self.request.prompts) if embeds is None else embeds.shape[0]

    def _set_timesteps(self) -> None:
        request, device = self.request, self.pipeline.unet.device
        if request.timesteps is not None:
            self.scheduler.set_timesteps(timesteps=list(request.timesteps), device=device)
        elif request.sigmas is not None:
            self.scheduler.set_timesteps(sigmas=list(request.sigmas), device=device)
        else:
            self.scheduler.set_timesteps(request.steps, device=device)

    def _start(self, batch: int) -> tuple[int, Tensor]:
        """The first entry of the schedule to run, and the latents (batch, C, h, w) to run it on."""
        pipeline, request, given = self.pipeline, self.request, self.given
        dtype = torch.float64 if pipeline.unet.dtype == torch.float64 else torch.float32
        device, generators = pipeline.unet.device, given.generators
        image = given.image if request.image is None else open_image(request.image)
        if image is not None:
            start = self._start_index()
            size = None if request.width is None or request.height is None else (request.width, request.height)
            pixels = to_pixels(image, pipeline.vae_scale_factor, size)
            clean = stages.encode_image(pipeline.vae, pixels, batch, generators, self.watch).to(device, dtype)
            noise = GaussianNoise(clean.shape, generators, device)().to(dtype)
            return start, self.scheduler.table(start).noised(clean, noise)
        width, height = pipeline.size_of(request)
        factor = pipeline.vae_scale_factor
        shape = (batch, pipeline.unet.config.in_channels, height // factor, width // factor)
        latents = given.latents
        if latents is None:
            latents = GaussianNoise(shape, generators, device)()
        elif request.width is None and latents.shape[:2] == shape[:2]:
            pass  # the size of the latents is the size of the picture
        elif tuple(latents.shape) != shape:
            raise UsageError(f"latents must have the shape {shape}, not {tuple(latents.shape)}")
        return 0, latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def _start_index(self) -> int:
        scheduler = self.scheduler
        steps = scheduler.num_inference_steps or self.request.steps
        used = min(int(steps * self.request.strength), steps)
        if used < 1:
            raise UsageError(
                f"strength {self.request.strength:g} of {steps} steps leaves none to draw; raise strength or steps"
            )
        return (steps - used) * scheduler.order

    def _note_lost(self, lost: tuple[str, ...]) -> None:
        length = self.pipeline.tokenizer.model_max_length
        for text in dict.fromkeys(lost):
            note = f"the prompt is longer than the {length} tokens this model reads; it did not see: {text!r}"
            self.notes.append(note)
            log.warning("%s", note)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
