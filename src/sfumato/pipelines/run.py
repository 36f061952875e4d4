"""The way from a request to latents and pixels: every picture takes it, whoever asks."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from sfumato.errors import MemoryPlanError, UsageError
from sfumato.images import open_image, to_pictures
from sfumato.pipelines import stages
from sfumato.pipelines.denoise import DenoiseStep, denoise
from sfumato.pipelines.finite import FiniteWatch
from sfumato.pipelines.guidance import Guidance
from sfumato.pipelines.repair import saved_randomness
from sfumato.runtime.choices import check_sides
from sfumato.runtime.device import ran_out_of_memory, release_memory, reused_memory
from sfumato.schedulers.noise import GaussianNoise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from sfumato.pipelines.pipeline import DiffusionPipeline
    from sfumato.pipelines.stages import Conditioning, Given
    from sfumato.request import GenerateRequest
    from sfumato.runtime.plan import Plan
    from sfumato.schedulers.base import Scheduler
    from sfumato.schedulers.rows import Row

__all__ = ["Run"]

log = logging.getLogger("sfumato")


@dataclass
class Run:
    """One request on its way through a pipeline; `notes` and `seconds` fill as it goes.

    micro_batch: pictures per call of the U-Net, and pictures decoded at a time; all of them if None.
    """

    pipeline: DiffusionPipeline
    request: GenerateRequest
    given: Given
    scheduler: Scheduler
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    micro_batch: int | None = None
    plan: Plan | None = field(init=False, default=None)
    _lean: bool = field(init=False, default=False)
    watch: FiniteWatch = field(init=False)
    guidance: Guidance = field(init=False)

    def __post_init__(self) -> None:
        self.watch = FiniteWatch(self.notes)

    def latents(self) -> Generator[DenoiseStep, Tensor | None, Tensor]:
        """Encode, denoise, return the latents (B, C, h, w); yields after each step and takes edited latents back.

        Where a step has gone wrong on an accelerator, which shows after the last one, all steps are yielded again.
        """
        pipeline, request = self.pipeline, self.request
        guided = request.guidance_scale > 1 and pipeline.unet.config.time_cond_proj_dim is None
        self._check()
        self.plan = pipeline.place.plan(pipeline, self._asked())
        self.micro_batch = self.micro_batch or (None if self.plan is None else self.plan.micro_batch)
        with torch.no_grad(), self._held("text_encoder"), self._timed("encode"):
            conditioning = stages.encode_prompt(pipeline, request, self.given, guided=guided, watch=self.watch)
        self._note_lost(conditioning.lost)
        if pipeline.words is not None:
            self._note(pipeline.words.notes(request.prompts))
        self._set_timesteps()
        with torch.no_grad():
            start, latents = self._start(conditioning.embeds.shape[0])
        with self._held("unet"):
            began = time.perf_counter()
            result = yield from self._denoised(conditioning, self.scheduler.table(start, eta=request.eta).rows, latents)
            self.seconds["denoise"] = time.perf_counter() - began
        return result

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode latents to pixels (B, 3, H, W) in [0, 1]."""
        return torch.cat(list(self._decoded(latents)))

    def pictures(self, latents: Tensor) -> list[Image]:
        """Decode latents to PIL images; no more than `micro_batch` of them are held as numbers at a time."""
        return [picture for pixels in self._decoded(latents) for picture in to_pictures(pixels)]

    def preview(self, latents: Tensor) -> list[Image]:
        """Decode latents of a step; what has gone wrong in it, and will show at the end of the loop, is grey."""
        return self.pictures(latents.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))

    def _decoded(self, latents: Tensor) -> Iterator[Tensor]:
        with self._held("vae"):
            for part in latents.split(self.micro_batch or latents.shape[0]):
                with self._timed("decode"):
                    pixels = self._with_less(lambda part=part: self._decode(part), lambda: None)
                yield pixels

    def _decode(self, latents: Tensor) -> Tensor:
        vae, asked = self.pipeline.vae, self.pipeline.vae.use_tiling
        vae.use_tiling = asked or self._lean or (self.plan is not None and self.plan.vae_tiling)
        try:
            return stages.decode(vae, latents, self.watch)
        finally:
            vae.use_tiling = asked

    def _with_less(self, compute: Callable[[], Tensor], shrink: Callable[[], None]) -> Tensor:
        """What `compute` gives; where memory runs out against the plan, once more with less of it."""
        try:
            return compute()
        except Exception as error:
            if self._lean or not ran_out_of_memory(error):
                raise
        note = "memory ran out although the plan had room for this; trying again with one picture at a time and tiles"
        self._note([note])
        self._lean = True
        release_memory(self.pipeline.device)
        shrink()
        try:
            return compute()
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            raise MemoryPlanError(
                "memory ran out twice, also with one picture at a time and tiles; close other programs, or ask for "
                "smaller pictures (--width, --height)",
                needed=0 if self.plan is None else self.plan.peak_bytes,
                free=0 if self.plan is None else self.plan.free_bytes,
            ) from error

    def _denoised(
        self, conditioning: Conditioning, rows: Sequence[Row], latents: Tensor
    ) -> Generator[DenoiseStep, Tensor | None, Tensor]:
        noise = self.scheduler.noise_source(latents.shape, self.given.generators, latents.device)
        go_back = saved_randomness(self.given.generators, latents.device)
        while True:
            self.guidance = Guidance(
                unet=self.pipeline.unet,
                embeds=conditioning.embeds,
                negative_embeds=conditioning.negative_embeds,
                scale=self.request.guidance_scale,
                rescale=self.request.guidance_rescale,
                micro_batch=self.micro_batch,
            )
            result = yield from denoise(self._predictor(len(rows)), rows, latents, noise)
            if self.watch.settle():
                return result
            go_back()

    def _predictor(self, total: int) -> Callable[[Tensor, float], Tensor]:
        """What the loop asks, once for each of its steps."""
        steps = itertools.count(1)

        def predict(x: Tensor, t: float) -> Tensor:
            stage = f"U-Net, step {next(steps)} of {total}"
            return self.watch.step(
                stage,
                self.pipeline.unet,
                lambda: self._with_less(lambda: self.guidance(x, t), self.guidance.one_at_a_time),
            )

        return predict

    @contextmanager
    def _held(self, part: str) -> Iterator[None]:
        """Within the block a network is in memory, and as fast as it gets."""
        with self._timed("prepare"):
            self.pipeline.place.bring(self.pipeline, part, self.plan, self.notes)
        try:
            with reused_memory() if part == "vae" and self.plan and self.plan.keep_freed else nullcontext():
                yield
        finally:
            self.pipeline.place.leave(self.pipeline, part, self.plan)

    def _asked(self) -> GenerateRequest:
        """The request as a plan needs it: with all its pictures, and their size."""
        factor, image, latents = self.pipeline.vae_scale_factor, self._picture, self.given.latents
        width, height = self.pipeline.size_of(self.request)
        if image is not None:
            height, width = (side * (factor if image.shape[1] == 4 else 1) for side in image.shape[2:])
        elif latents is not None and self.request.width is None and latents.ndim == 4:
            height, width = (side * factor for side in latents.shape[2:])
        return self.request.replace(
            prompt="", negative_prompt=None, count=self._prompts() * self.request.count, width=width, height=height
        )

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
        check_sides(self.pipeline.vae_scale_factor, width=request.width, height=request.height)
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
        request, device = self.request, self.pipeline.device
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
        device, generators = pipeline.device, given.generators
        pixels = self._picture
        if pixels is not None:
            start = self._start_index()
            with self._held("vae"), self._timed("encode"):
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

    @cached_property
    def _picture(self) -> Tensor | None:
        """What image-to-image starts from: pixels (P, 3, H, W) in [-1, 1], or latents (P, 4, h, w)."""
        request = self.request
        image = self.given.image if request.image is None else open_image(request.image)
        size = None if request.width is None or request.height is None else (request.width, request.height)
        return None if image is None else self.pipeline.read_picture(image, size)

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
        self._note(
            f"the prompt is longer than the {length} tokens this model reads; it did not see: {text!r}"
            for text in dict.fromkeys(lost)
        )

    def _note(self, notes: Iterable[str]) -> None:
        for note in notes:
            self.notes.append(note)
            log.warning("%s", note)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began
