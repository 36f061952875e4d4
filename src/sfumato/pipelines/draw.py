"""The passes of a request: the first pass, a second pass over its enlarged image, and the refiner's."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from sfumato.adapters.named import with_named_adapters
from sfumato.pipelines import recipe
from sfumato.pipelines.components import choose_scheduler
from sfumato.pipelines.drafts import drafted
from sfumato.pipelines.hires import enlarged
from sfumato.pipelines.result import Result, Step
from sfumato.pipelines.run import Run
from sfumato.pipelines.stages import Given
from sfumato.request import Hires
from sfumato.runtime.generators import generator_for
from sfumato.text.schedules import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sfumato.pipelines.parts import Parts
    from sfumato.pipelines.place import Place
    from sfumato.request import GenerateRequest

__all__ = ["draw"]

log = logging.getLogger("sfumato")


def draw(
    parts: Parts,
    place: Place,
    request: GenerateRequest,
    refiner: tuple[Parts, Place] | None = None,
    seeds: Sequence[int] = (),
) -> Generator[Step, None, Result]:
    """Generate a request step by step: yields each finished `Step`, and returns the `Result`.

    Image i uses seed + i, whatever the batch, so each image can be generated again alone. refiner: continues from the
    request's `denoising_end` on the rest of the same schedule, and decodes; if there is a second pass, in that pass
    (A1111's default). seeds: one per image (default: the request's).
    """
    request, notes = drafted(request, parts)
    for note in notes:
        log.warning("%s", note)
    request = with_named_adapters(request.settled(parts.settings))
    request = request.replace(seed=secrets.randbits(32) if request.seed is None else request.seed)
    seeds = seeds or request.seeds
    width, height = parts.size_of(request)
    if request.image is None:
        request = request.replace(width=width, height=height)
    given = Given(generators=[generator_for(request.rng, seed, request.noise) for seed in seeds])
    scheduler, two = choose_scheduler(request.scheduler, parts.scheduler), request.hires is not None
    run = Run(parts, place, request.first_pass, given, scheduler, notes)
    runs = [run]
    later = request.second_steps * scheduler.order if two else 0
    latents = yield from _watched(run, after=lambda: later or (run.left if refiner else 0))
    if two:
        run = _second_pass(run, request, latents, seeds)
        runs.append(run)
        done = runs[0].steering.num_timesteps
        latents = yield from _watched(run, before=done, after=lambda: run.left if refiner else 0)
    if refiner is not None:
        done = sum(one.steering.num_timesteps for one in runs)
        given = Given(generators=run.given.generators, image=latents)
        timeline = run.timeline and replace(run.timeline, taken=run.steering.num_timesteps)
        run = Run(*refiner, _refining(run.request), given, run.scheduler, timeline=timeline)
        runs.append(run)
        latents = yield from _watched(run, before=done)
    images = [runs[0].task.finish(picture) for picture in run.pictures(latents)]
    notes = tuple(dict.fromkeys(note for one in runs for note in one.notes))
    seconds = {stage: sum(one.seconds.get(stage, 0.0) for one in runs) for one in runs for stage in one.seconds}
    whole = {name: getattr(request, name) for name in ("image", "refiner", "denoising_end")}
    told = runs[0].added.request.replace(**whole)
    other = None if refiner is None else refiner[0]
    recipes = recipe.describe(parts, runs[0].scheduler, run.device, told, notes, other, runs[0].added.hashes)
    return Result(images, request, tuple(seeds), recipes, notes, seconds, runs[0].plan, tuple(runs[0].controls))


def _second_pass(first: Run, request: GenerateRequest, latents: Tensor, seeds: Sequence[int]) -> Run:
    """Create the run that refines the enlarged image of the first run, with fresh noise from the same seeds."""
    unit = first.parts.vae_scale_factor
    second = request.second_pass((latents.shape[3] * unit, latents.shape[2] * unit), unit)
    image = enlarged(latents, request.hires or Hires(), unit, first.pictures)
    generators = [generator_for(request.rng, seed, request.noise) for seed in seeds]
    scheduler = choose_scheduler(second.scheduler, first.parts.scheduler)
    given = Given(generators=generators, image=image, pixels=image if isinstance(image, Tensor) else None)
    before = 1 if first.timeline is None else first.timeline.steps
    timeline = Timeline(request.second_steps * scheduler.order, before)
    return Run(first.bare, first.place, second, given, scheduler, timeline=timeline)


def _refining(request: GenerateRequest) -> GenerateRequest:
    """Return the refiner's part of a request: the remaining steps, without additions and second prompts."""
    others = ("fast", "refiner", "denoising_end", "image", "mask", "width", "height", "prompt_2", "negative_prompt_2")
    added = {"adapters": (), "embeddings": (), "controls": (), "image_prompts": ()}
    return request.replace(**dict.fromkeys(others), **added, denoising_start=request.denoising_end)


def _watched(run: Run, before: int = 0, after: Callable[[], int] = lambda: 0) -> Generator[Step, None, Tensor]:
    """Yield the steps of a run, numbered together with the steps of other runs before and after it. Returns latents."""
    loop = run.latents()
    while True:
        try:
            step = next(loop)
        except StopIteration as end:
            return end.value
        yield Step(
            before + step.index + 1,
            before + step.total + after(),
            step.row.t,
            step.latents,
            lambda s=step: run.preview(s.original()),
            step.original,
        )
