"""From a request to latents and pixels: the path that all pipelines share."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from sfumato.errors import MemoryPlanError, UsageError
from sfumato.images import open_image, size_notes, to_pictures
from sfumato.pipelines import stages
from sfumato.pipelines.additions import Added, added
from sfumato.pipelines.altered import altered, with_switched
from sfumato.pipelines.controlling import steering, with_networks
from sfumato.pipelines.denoise import DenoiseStep, denoise
from sfumato.pipelines.finite import FiniteWatch
from sfumato.pipelines.guidance import Guidance
from sfumato.pipelines.image_prompts import see, seen_by
from sfumato.pipelines.repair import saved_randomness
from sfumato.pipelines.replayed import Replayed
from sfumato.pipelines.reused import hastened
from sfumato.pipelines.stages import Given
from sfumato.pipelines.steering import Steering
from sfumato.pipelines.tasks import task_for
from sfumato.pipelines.tasks.task import Tools, handover, noise_level, takes_over
from sfumato.pipelines.vaes import with_vae
from sfumato.runtime.choices import check_sides
from sfumato.runtime.device import ran_out_of_memory, release_memory, reused_memory
from sfumato.runtime.graphs import capture_for
from sfumato.schedulers.sigma import SigmaScheduler
from sfumato.text.prompt import plain_words
from sfumato.text.schedules import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from PIL.Image import Image
    from torch import Tensor

    from sfumato.pipelines.conditioning import Conditioning
    from sfumato.pipelines.parts import Parts
    from sfumato.pipelines.place import Place
    from sfumato.pipelines.tasks.task import Beginning, Task
    from sfumato.request import GenerateRequest, GuidanceInterval
    from sfumato.runtime.plan import Plan
    from sfumato.schedulers.base import Scheduler, Table
    from sfumato.schedulers.rows import Row

__all__ = ["Run"]

log = logging.getLogger("sfumato")


@dataclass
class Run:
    """The execution of one request on a checkpoint.

    notes, seconds: filled in during the run; steering: settings that can change during the run; first: index of the
    first entry of the schedule, once known; controls: preprocessed control images; micro_batch: images per U-Net call
    and per decoding (None: all); timeline: the steps that prompt schedules refer to, if not only this run's.
    """

    parts: Parts
    place: Place
    request: GenerateRequest
    given: Given
    scheduler: Scheduler
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    micro_batch: int | None = None
    timeline: Timeline | None = None
    plan: Plan | None = field(init=False, default=None)
    first: int = field(init=False, default=0)
    controls: list[Image] = field(init=False, default_factory=list)
    _steps: int = field(init=False, default=1)
    _lean: bool = field(init=False, default=False)
    _later: dict[int, Conditioning] = field(init=False, default_factory=dict)  # by the first step it applies to
    bare: Parts = field(init=False)  # without the request's additions
    watch: FiniteWatch = field(init=False)
    guidance: Guidance = field(init=False)
    _replayed: Replayed = field(init=False)
    steering: Steering = field(init=False)
    task: Task = field(init=False)  # set by `latents`
    beginning: Beginning = field(init=False)
    added: Added = field(init=False)  # empty until `latents` has read the request's files

    def __post_init__(self) -> None:
        request = self.request = with_switched(self.request.settled(self.parts.settings), self.parts.unet)
        self.bare = self.parts
        self.steering = Steering(request.chosen_scale, request.guidance_rescale, request.clip_skip)
        self.watch = FiniteWatch(self.notes)
        self.added = Added(self.parts, (), [], request)

    @property
    def device(self) -> torch.device:
        """The device of the loop."""
        return self.place.device_of(self.parts)

    def latents(self) -> Generator[DenoiseStep, Tensor | None, Tensor]:
        """Encode and denoise, and return the latents (B, C, h, w). Yields after each step and accepts edited latents.

        If values were not finite on an accelerator, which is checked after the last step, all steps are yielded again.
        """
        self.parts.check_whole()
        if not self.parts.family.encoders and self.given.prompt_embeds is None:
            self._read_image()
        self._check()
        self._add()
        task = self.task = task_for(self.parts, self.place, self.request, self.given)
        self._note_size(task)
        self.scheduler = task.scheduled(self.scheduler)
        self.plan = self.place.plan(
            self.parts, self._asked(task.size, self._prompts() * self.request.count), self.added.worn
        )
        self.micro_batch = self.micro_batch or (None if self.plan is None else self.plan.micro_batch)
        self._set_timesteps(task)
        self._note_schedule()
        self.added.request, notes = hastened(self.added.request, self.parts, self.scheduler)
        self._note(notes)
        text = stages.tell_sizes(self.parts, self.request, task.size, self._encode_prompt(guided=task.guided))
        with torch.no_grad():
            self.beginning = beginning = task.begin(
                text, Tools(self.scheduler, self.device, self._encode_image, self._pass_over, self._see, self._depth)
            )
        self.first = beginning.index
        conditioning = self._steered(beginning.conditioning, beginning.latents)
        table = self.scheduler.table(self.first, eta=self.request.eta)
        self._steps, rows = len(table.rows), table.rows[: self._calls(table)]
        with self._held("unet"), altered(self.parts.unet, self.request):
            began = time.perf_counter()
            result = yield from self._denoised(replace(beginning, conditioning=conditioning), rows)
            self.seconds["denoise"] = time.perf_counter() - began
        return result

    def _add(self) -> None:
        """Read the request's additions to the checkpoint, and report how much of each was applied."""
        self.added = added(self.parts, self.request)
        self.parts = self.added.parts
        self.parts, self.added.request = with_vae(self.parts, self.place, self.added.request)
        if not self.given.steered:
            self.parts = with_networks(self.parts, self.place, self.request.controls)
        for report in self.added.reports:
            self.notes.append(report)
            log.info("%s", report)

    def _read_image(self) -> None:
        """For a family without prompts, use the image encoder's embedding instead of the prompt's."""
        image = self.given.image if self.request.image is None else open_image(self.request.image)
        if image is None:
            raise UsageError(f"{self.parts.family.title} needs an image instead of a prompt; pass one")
        if any(self.request.prompts):
            self._note([f"the prompt has no effect: {self.parts.family.title} reads an image instead"])
        embeds = self._see(image)[:, None]
        given = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds)}
        self.given = replace(self.given, image=None, pixels=None, **given)
        self.request = self.request.replace(image=None, prompt="", negative_prompt=None)

    def _steered(self, told: Conditioning, latents: Tensor) -> Conditioning:
        """Add the control networks and image prompts to the conditioning."""
        every = self.given.steered
        if not every:
            factor = self.parts.vae_scale_factor
            size = (latents.shape[3] * factor, latents.shape[2] * factor)
            every, controls, self.controls, notes = steering(self.parts, self.request.controls, size)
            self.added.request = self.added.request.replace(controls=controls)
            self._note(notes)
        seen, prompts = see(self.parts.unet, self.request.image_prompts, self.device)
        given = (self.given.prompt_images, self.given.prompt_image_embeds, self.given.prompt_image_masks)
        if given[0] is not None or given[1] is not None:
            with self._held("text_encoder"), self._timed("encode"):
                seen += seen_by(
                    self.parts.image_adapters, self.parts.unet, self.parts.image_encoder, *given, self.device
                )
        self.added.request = self.added.request.replace(image_prompts=prompts)
        return replace(told, steered=tuple(one.of(told.pictures, latents) for one in every), images=seen)

    def told(self, *, guided: bool) -> Conditioning:
        """Encode the prompts, for one branch or for both, without generating anything."""
        self._check()
        self._add()
        self.plan = None if self.parts.left_out else self.place.plan(self.parts, self._asked((64, 64), 1))
        return self._encode_prompt(guided=guided)

    def _calls(self, table: Table) -> int:
        """Return the number of rows before `denoising_end`, which this checkpoint runs."""
        end = self.request.denoising_end
        if end is None:
            return len(table.rows)
        calls = int((table.timesteps >= handover(self.scheduler, end)).sum())
        if not calls:
            raise UsageError(f"denoising_end {end:g} leaves no steps; raise it, steps, or the strength")
        return calls

    @property
    def left(self) -> int:
        """The number of U-Net calls that remain for a checkpoint that continues from this run's `denoising_end`."""
        return len(self.scheduler.timesteps) - takes_over(self.scheduler, self.request.denoising_end or 1.0)

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode latents to pixels (B, 3, H, W) in [0, 1]."""
        return torch.cat(list(self._decoded(latents)))

    def pictures(self, latents: Tensor) -> list[Image]:
        """Decode latents to PIL images; at most `micro_batch` of them are held as tensors at a time."""
        return [picture for pixels in self._decoded(latents) for picture in to_pictures(pixels)]

    def preview(self, latents: Tensor) -> list[Image]:
        """Decode a step's latents. Non-finite values, which the loop reports at its end, become gray."""
        return self.pictures(latents.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))

    @torch.no_grad()
    def _encode_prompt(self, *, guided: bool) -> Conditioning:
        parts, request = self.parts, self.request
        self.timeline = self.timeline or Timeline((self.scheduler.num_inference_steps or 1) * self.scheduler.order)
        told = stages.by_step(request, self.timeline)
        asked = tuple(told.values())
        with self._held("text_encoder"), self._timed("encode"):
            text, lost, notes = stages.encode_prompt(
                parts, told.pop(1), self.given, self.device, guided=guided, watch=self.watch
            )
            for step, later in told.items():
                more = stages.encode_prompt(parts, later, self.given, self.device, guided=guided, watch=self.watch)
                self._later[step], notes = more[0], notes + more[2]
        self._note_lost(lost)
        self._note(dict.fromkeys(notes))
        if parts.words is not None:
            self._note(parts.words.notes(request.prompts, lambda prompt: self._in_words(prompt, asked)))
        return text

    def _in_words(self, prompt: str, asked: Sequence[GenerateRequest]) -> str:
        """Return the plain words of a prompt at all steps. asked: the request at each step where it changes."""
        place, syntax = self.request.prompts.index(prompt), self.request.prompt_syntax
        texts = dict.fromkeys(one.prompts[place] for one in asked)
        return " ".join(plain_words(text, syntax, self.parts.outfit.all_embeddings) for text in texts)

    def _encode_image(self, pixels: Tensor, *, sampled: bool = True) -> Tensor:
        """Encode pixels (P, 3, H, W) to scaled latents (B, C, h, w) on the loop's device, in its precision."""
        batch, generators = self._prompts() * self.request.count, self.given.generators
        with self._held("vae"), self._timed("encode"):
            sampled = sampled and self.request.noise.posterior == "sample"
            latents = stages.encode_image(
                self.parts.vae, pixels, batch, generators, self.watch, sampled=sampled, axes=self.request.seamless
            )
        return latents.to(self.device, self.parts.state_dtype)

    def _pass_over(self, pixels: Tensor) -> None:
        """Draw the random numbers that encoding these pixels would draw."""
        if self.request.noise.posterior == "sample":
            batch = self._prompts() * self.request.count
            stages.pass_over(self.parts.vae, pixels, batch, self.given.generators)

    def _see(self, image: Any) -> Tensor:
        """Embed images in any form with the image encoder: (P, D) on the loop's device."""
        with self._held("text_encoder"), self._timed("encode"):
            return stages.see(self.parts, image, self.watch).to(self.device, self.parts.state_dtype)

    def _depth(self, image: Any) -> Tensor:
        """What the depth estimator makes of images in any form (P, H, W)."""
        with self._held("text_encoder"), self._timed("encode"):
            return stages.estimate_depth(self.parts, image, self.watch)

    def _decoded(self, latents: Tensor) -> Iterator[Tensor]:
        with self._held("vae"):
            for part in latents.split(self.micro_batch or latents.shape[0]):
                with self._timed("decode"):
                    pixels = self._with_less(lambda part=part: self._decode(part), lambda: None)
                yield pixels

    def _decode(self, latents: Tensor) -> Tensor:
        lean, plan = self._lean, self.plan
        sliced, tiled = (lean, lean) if plan is None else (lean or plan.vae_slicing, lean or plan.vae_tiling)
        with self.parts.vae.saving_memory(slicing=sliced, tiling=tiled):
            return stages.decode(self.parts.vae, latents, self.watch, self.request.seamless)

    def _with_less(self, compute: Callable[[], Tensor], shrink: Callable[[], None]) -> Tensor:
        """Return the result of `compute`. If memory runs out despite the plan, try once more with less."""
        try:
            return compute()
        except Exception as error:
            if self._lean or not ran_out_of_memory(error):
                raise
        note = "memory ran out, although the plan had room; retrying with one image at a time and tiles"
        self._note([note])
        self._lean = True
        release_memory(self.device)
        shrink()
        try:
            return compute()
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            raise MemoryPlanError(
                "memory ran out twice, even with one image at a time and tiles; close other programs, or generate "
                "smaller images (--width, --height)",
                needed=0 if self.plan is None else self.plan.peak_bytes,
                free=0 if self.plan is None else self.plan.free_bytes,
            ) from error

    def _denoised(self, beginning: Beginning, rows: Sequence[Row]) -> Generator[DenoiseStep, Tensor | None, Tensor]:
        latents, stops = beginning.latents, self.steering.stops
        noise = self.scheduler.noise_source(latents.shape, self.given.generators, latents.device)
        self.steering.num_timesteps = len(rows)
        go_back = saved_randomness(self.given.generators, latents.device)
        while True:
            self.guidance = Guidance(
                unet=self.parts.unet,
                conditioning=beginning.conditioning,
                times=() if self.parts.unet._compiled_call_impl else tuple(row.t for row in rows),
                scale=self.request.chosen_scale,
                rescale=self.request.guidance_rescale,
                image_scale=self.request.chosen_image_scale,
                tile=self.task.tile,
                fast=self.added.request.fast,
                micro_batch=self.micro_batch,
            )
            # Nothing here may hold the run: its tensors would stay until garbage is collected.
            self._replayed = Replayed(self.guidance, capture_for(self.device), self.watch.note)
            result = yield from denoise(self._predictor(len(rows)), rows, latents, noise, stops, beginning.after)
            del self._replayed  # its graph holds the memory of a call, which decoding may need
            if self.watch.settle():
                return result
            go_back()
            self.steering.restart(self.request.chosen_scale, self.request.guidance_rescale)

    def _predictor(self, total: int) -> Callable[[Tensor, float], Tensor]:
        """Return the function that the loop calls once for each step."""
        steps = itertools.count(1)

        def predict(x: Tensor, t: float) -> Tensor:
            stage = f"U-Net, step {(step := next(steps))} of {total}"
            if later := self._later.get(step):
                self.guidance.change(later)
            scale, interval = self.steering.guidance_scale, self.request.guidance_interval
            if interval is not None and not interval.holds(step - 1, total, self._noise_level(interval, t)):
                scale = min(scale, 1.0)
            self.guidance.step = (step - 1, self._steps)
            self.guidance.steer(scale, self.steering.guidance_rescale)
            return self.watch.step(
                stage,
                self.parts.unet,
                lambda: self._with_less(lambda: self._replayed(x, t), self.guidance.one_at_a_time),
            )

        return predict

    def _noise_level(self, interval: GuidanceInterval, t: float) -> float:
        return noise_level(self.scheduler, t) if interval.by_noise else 1.0

    @contextmanager
    def _held(self, part: str) -> Iterator[None]:
        """Keep a stage's networks in memory within the block, set up for speed."""
        with self._timed("prepare"):
            self.place.bring(self.parts, part, self.plan, self.notes, self.added.worn)
        try:
            with reused_memory() if part == "vae" and self.plan and self.plan.keep_freed else nullcontext():
                yield
        finally:
            self.place.leave(self.parts, part, self.plan)

    def _asked(self, size: tuple[int, int], count: int) -> GenerateRequest:
        """Return the request for planning, with the size and number of all images."""
        width, height = size
        return self.request.replace(
            **dict.fromkeys(("negative_prompt", "prompt_2", "negative_prompt_2")),
            prompt=" AND " * self.request.joined,
            count=count,
            width=width,
            height=height,
        )

    def _check(self) -> None:
        request, given = self.request, self.given
        self._check_words()
        check_sides(self.parts.vae_scale_factor, width=request.width, height=request.height)
        generators = given.generators
        batch = self._prompts() * request.count
        if isinstance(generators, (list, tuple)) and len(generators) != batch:
            raise UsageError(f"got {len(generators)} generators for {batch} images; pass one, or one per image")

    def _check_words(self) -> None:
        """Check that prompts and embeddings are not combined, and that all prompts are used."""
        request, given = self.request, self.given
        if given.prompt_embeds is not None and (any(request.prompts) or request.prompt_2):
            raise UsageError("prompt and prompt_embeds cannot be combined; pass one of them")
        negative = request.negative_prompt is not None or request.negative_prompt_2 is not None
        if given.negative_prompt_embeds is not None and negative:
            raise UsageError("negative_prompt and negative_prompt_embeds cannot be combined; pass one of them")
        if len(self.parts.family.encoders) < 2 and (request.prompt_2 or request.negative_prompt_2):
            self._note(["prompt_2 and negative_prompt_2 have no effect: this checkpoint has no second text encoder"])

    def _prompts(self) -> int:
        embeds = self.given.prompt_embeds
        return len(self.request.prompts) if embeds is None else embeds.shape[0]

    def _set_timesteps(self, task: Task) -> None:
        request, device, more = self.request, self.device, task.grid(self.scheduler)
        if request.timesteps is not None:
            self.scheduler.set_timesteps(timesteps=list(request.timesteps), device=device, **more)
        elif request.sigmas is not None:
            self.scheduler.set_timesteps(sigmas=list(request.sigmas), device=device, **more)
        elif request.spacing is not None:
            if not isinstance(self.scheduler, SigmaScheduler):
                raise UsageError(f"{type(self.scheduler).__name__} chooses its steps itself; omit spacing")
            self.scheduler.set_spacing(request.spacing, request.chosen_steps, device)
        else:
            self.scheduler.set_timesteps(request.chosen_steps, device=device, **more)

    def _note_lost(self, lost: tuple[str, ...]) -> None:
        length = self.parts.prompt_tokens
        self._note(
            f"the prompt is longer than the model's {length} tokens; ignored: {text!r}" for text in dict.fromkeys(lost)
        )

    def _note_size(self, task: Task) -> None:
        request, given = self.request, self.given
        own = self.parts.size_of(request.replace(width=None, height=None))
        source = request.image is not None or given.image is not None
        chosen = request.image is None or request.width is not None or request.height is not None
        self._note(size_notes(task.size, own, only=self.parts.words is not None, source=source, chosen=chosen))

    def _note_schedule(self) -> None:
        """Warn about starting from pure noise with a model that predicts noise, which cannot find an image in it."""
        config = self.scheduler.config
        if config.own("rescale_betas_zero_snr") and config.prediction_type == "epsilon":
            self._note(
                [
                    "rescale_betas_zero_snr starts from pure noise, in which prediction_type 'epsilon' finds no image; "
                    "if images look gray, set prediction_type to 'v_prediction' or rescale_betas_zero_snr to false"
                ]
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
