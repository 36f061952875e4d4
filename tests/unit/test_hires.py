"""Two passes of a request, and guidance in an interval: what they compute, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import sfumato
from sfumato import GenerateRequest, GuidanceInterval, Hires
from sfumato.errors import UsageError
from sfumato.pipelines.hires import LATENT, enlarged
from sfumato.pipelines.tasks.task import handover, noise_level, start_index
from sfumato.request import UPSCALERS, Mask, share_of
from sfumato.runtime.choices import published_sizes, task_of
from sfumato.runtime.facts import read_facts
from sfumato.runtime.plan import plan

REQUEST = GenerateRequest(prompt="a photo", steps=4, seed=5, width=64, height=64, scheduler="ddim")


def run(pipe, request):
    """All steps and the result of a request."""
    steps, stream = [], pipe.stream(request)
    while True:
        try:
            steps.append(next(stream))
        except StopIteration as end:
            return steps, end.value


# ---- hires ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upscaler", ["latent", "latent-nearest", "latent-bicubic-antialiased", "lanczos"])
def test_the_second_pass_is_image_to_image_with_the_same_seed(ours, upscaler):
    hires = Hires(scale=1.5, upscaler=upscaler, strength=0.6, steps=3, prompt="a drawing")
    steps, result = run(ours(), REQUEST.replace(hires=hires, scheduler="euler_a"))
    assert [step.number for step in steps] == [*range(1, 8)]
    assert {step.total for step in steps} == {7}
    assert result.images[0].size == (96, 96)
    # The same by hand, through the ecosystem's pipelines.
    call = {"generator": torch.Generator().manual_seed(5), "output_type": "latent", "num_inference_steps": 4}
    first, second = ours(), ours("sd15", sfumato.StableDiffusionImg2ImgPipeline)
    for pipe in (first, second):
        pipe.scheduler = sfumato.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    latents = first("a photo", width=64, height=64, **call).images
    assert torch.equal(latents, steps[3].latents)
    image = enlarged(latents, hires, first.vae_scale_factor, lambda x: pictures(first, x))
    if upscaler in LATENT:
        mode, antialias = LATENT[upscaler]
        size = [side * 3 // 2 for side in latents.shape[2:]]
        assert torch.equal(image, F.interpolate(latents, size, mode=mode, antialias=antialias))
    else:
        assert [one.size for one in image] == [(96, 96)]
    call |= {"generator": torch.Generator().manual_seed(5), "num_inference_steps": 5}  # int(3 / 0.6)
    again = second("a drawing", image=image, strength=share_of(3, 5), **call).images
    assert torch.allclose(again, steps[-1].latents, atol=1e-5)


def pictures(pipe, latents):
    from sfumato.images import to_pictures
    from sfumato.pipelines.finite import FiniteWatch
    from sfumato.pipelines.stages import decode

    return to_pictures(decode(pipe.vae, latents, FiniteWatch([])))


def test_a_second_pass_is_replayed_from_its_recipe(ours):
    hires = Hires(height=96, upscaler="latent-nearest-exact", scheduler="euler_a", guidance_scale=3.0)
    request = REQUEST.replace(hires=hires, count=2, prompt=("a photo", "a cat"), negative_prompt="blue")
    result = ours().generate(request)
    assert len(result.images) == 4
    assert result.recipes[3]["scheduler"]["class"] == "DDIMScheduler"  # the first pass's, which replays begin with
    recipe = result.recipes[3]["request"]
    assert (recipe["width"], recipe["hires"]) == (64, hires.to_dict())
    alone = ours().generate(GenerateRequest.from_dict(recipe))
    # Alone or among others, as for every request: within float32's rounding.
    difference = np.abs(np.asarray(alone.images[0], int) - np.asarray(result.images[3], int))
    assert difference.max() <= 2


def test_a_custom_schedule_is_the_first_passs(ours):
    """The second one takes as many steps, of the scheduler's own."""
    pipe = ours()
    hires = Hires(scale=1.5, strength=0.5)
    request = REQUEST.replace(timesteps=(900, 500, 100), hires=hires, steps=None, scheduler="euler")
    steps, _ = run(pipe, request)
    assert [step.timestep for step in steps[:3]] == [900, 500, 100]
    assert [(step.number, step.total) for step in steps] == [(i, 6) for i in range(1, 7)]
    scheduler = sfumato.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(6)  # 3 / 0.5
    assert [step.timestep for step in steps[3:]] == scheduler.timesteps[3:].tolist()
    assert task_of(published_sizes("sd15"), request).first.steps == task_of(published_sizes("sd15"), request).steps == 3


def test_a_refiner_ends_the_second_pass(ours):
    pipe = ours("sdxl")
    pipe.refiner = ours("refiner")
    hires = Hires(scale=1.5, steps=5, strength=0.5)
    request = REQUEST.replace(refiner="x", denoising_end=0.8, hires=hires, scheduler="euler")
    steps, result = run(pipe, request)
    # Of ten steps, five are taken: three before the 200 last timesteps, and two in them.
    assert [(step.number, step.total) for step in steps] == [(i, 9) for i in range(1, 10)]
    assert [step.timestep >= 200 for step in steps[4:]] == [True] * 3 + [False] * 2
    assert result.images[0].size == (96, 96)
    told = result.recipes[0]["request"]
    assert (told["hires"], told["refiner"], told["denoising_end"]) == (hires.to_dict(), "x", 0.8)
    # The first pass is the base's alone, and the third is what the refiner makes of the second.
    first, _ = run(ours("sdxl"), request.replace(refiner=None, denoising_end=None, hires=None))
    assert torch.equal(first[-1].latents, steps[3].latents)
    whole, _ = run(ours("sdxl"), request.replace(refiner=None, denoising_end=None))
    assert torch.equal(whole[6].latents, steps[6].latents)
    assert not torch.equal(whole[7].latents, steps[7].latents)
    again = pipe.generate(GenerateRequest.from_dict(told))
    assert again.images[0].tobytes() == result.images[0].tobytes()
    with pytest.raises(UsageError, match="leaves no steps; raise it, steps, or the strength"):
        pipe.generate(request.replace(hires=hires.replace(strength=0.1)))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("strength", [None, 0.5, 0.7])
def test_the_plan_of_both_checkpoints_has_the_steps_that_they_take(strength, spacing):
    sizes = dataclasses.replace(published_sizes("sdxl"), spacing=spacing)
    scheduler = sfumato.EulerDiscreteScheduler(timestep_spacing=spacing, steps_offset=1)
    hires = None if strength is None else Hires(scale=1.5, strength=strength)
    for steps in range(6, 41):
        for end in (0.6, 0.75, 0.8):
            request = GenerateRequest(prompt="a photo", steps=steps, refiner="x", denoising_end=end, hires=hires)
            then = request.last_pass((1024, 1024), 8)
            scheduler.set_timesteps(then.chosen_steps)
            times = scheduler.timesteps[0 if hires is None else start_index(scheduler, then) :]
            rest = then.replace(refiner=None, denoising_start=end, denoising_end=None)
            planned = [task_of(sizes, one).steps for one in (request, rest)]
            later = int((times < handover(scheduler, end)).sum())
            assert planned == [len(times) - later, later]


def test_prompts_are_timed_over_both_passes(ours):
    """A1111's 1.5 is the middle of the second pass, and whole numbers count on."""
    pipe = ours()
    request = REQUEST.replace(prompt_syntax="a1111", hires=Hires(scale=1.5, steps=2, strength=0.5))
    one, other = (run(pipe, request.replace(prompt=prompt))[0] for prompt in ("a cat", "a red heart"))
    for when in ("1.5", "5"):
        steps, _ = run(pipe, request.replace(prompt=f"a [cat:red heart:{when}]"))
        assert [torch.equal(a.latents, b.latents) for a, b in zip(steps, one, strict=True)] == [True] * 5 + [False]
    early, _ = run(
        pipe, request.replace(prompt="a [cat:red heart:2]", hires=request.hires.replace(prompt="a red heart"))
    )
    later, _ = run(pipe, request.replace(prompt="a [cat:red heart:2]"))
    assert torch.equal(early[-1].latents, later[-1].latents)
    assert not torch.equal(later[-1].latents, other[-1].latents)


def test_what_is_enlarged_is_cut_evenly():
    latents = torch.arange(64.0).reshape(1, 1, 8, 8)
    hires = Hires(width=128, height=96, upscaler="latent-nearest")
    assert hires.sizes(64, 64, 8) == ((128, 128), (128, 96))
    image = enlarged(latents, hires, 8, list)
    assert torch.equal(image, F.interpolate(latents, (16, 16), mode="nearest")[:, :, 2:14])


@given(
    size=st.tuples(st.integers(8, 2000), st.integers(8, 2000)),
    hires=st.builds(
        Hires,
        scale=st.floats(1, 8),
        width=st.none() | st.integers(64, 4000),
        height=st.none() | st.integers(64, 4000),
    ),
)
def test_sizes_are_multiples_and_fit(size, hires):
    whole, kept = hires.sizes(*size, 8)
    assert all(side % 8 == 0 for side in (*whole, *kept))
    assert all(0 < less <= more for less, more in zip(kept, whole, strict=True))


@given(steps=st.integers(1, 150), strength=st.floats(0.01, 1))
def test_all_steps_of_a_second_pass_are_taken(steps, strength):
    second = GenerateRequest(steps=steps, hires=Hires(strength=strength)).second_pass((512, 512), 8)
    assert int(second.steps * second.strength) == steps
    assert second.steps == min(10_000, max(steps, int(steps / min(strength, 0.999))))
    assert second.hires is None
    masked = GenerateRequest(image="a.png", mask=Mask(file="b.png"), hires=Hires())
    assert masked.second_pass((512, 512), 8).mask is None  # it goes over the whole image
    assert (second.width, second.height) == (1024, 1024)


def test_the_plan_counts_the_larger_size():
    sizes, facts = published_sizes("sd15"), read_facts("cpu")
    request = GenerateRequest(steps=20, width=512, height=512)
    two = request.replace(hires=Hires(scale=2, steps=10))
    task = task_of(sizes, two)
    assert (task.width, task.steps, task.first.width, task.first.steps) == (1024, 10, 512, 20)
    large = plan(facts, sizes, request.replace(width=1024, height=1024, steps=10))
    small, both = plan(facts, sizes, request), plan(facts, sizes, two)
    assert both.peak_bytes == large.peak_bytes > small.peak_bytes
    assert both.seconds == pytest.approx(large.seconds + small.seconds, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoising_start": 0.5}, "hires and denoising_start cannot be combined"),
        ({"denoising_end": 0.5}, "hires and denoising_end cannot be combined"),
        ({"hires": {"upscaler": "esrgan"}}, "upscaler must be latent, .* or lanczos, not 'esrgan'"),
        ({"hires": {"scale": 0.5}}, "scale"),
        ({"hires": {"spacing": "karas"}}, "karras"),
        ({"seamless": "z"}, "seamless must be x, y or xy, not 'z'"),
        ({"guidance_interval": {"start": 0.5, "stop": 0.5}}, "lower its start, or raise its end"),
        ({"freeu": {"b1": 1}}, "FreeU needs 'b2'"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        GenerateRequest.from_dict({"hires": {}} | changes)


def test_there_is_a_way_for_every_upscaler():
    assert {*UPSCALERS} == {*LATENT, "lanczos"}


# ---- guidance in an interval ----------------------------------------------------------------------------------------


def branches(pipe, request) -> list[int]:
    """How many prompts each call of the U-Net read."""
    read: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, given: read.append(given[2].states.shape[0]))
    try:
        pipe.generate(request)
    finally:
        handle.remove()
    return read


def test_outside_the_interval_only_the_prompt_is_computed(ours):
    request = REQUEST.replace(steps=10, guidance_interval=GuidanceInterval(start=0.2, stop=0.7))
    assert branches(ours(), request) == [1, 1, 2, 2, 2, 2, 2, 1, 1, 1]


def test_outside_it_the_step_is_that_without_guidance(ours):
    from sfumato.pipelines.guidance import Guidance

    pipe, scales = ours(), []
    steer = Guidance.steer

    def watch(self, scale, rescale):
        scales.append(scale)
        steer(self, scale, rescale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guidance, "steer", watch)
        none = pipe.generate(REQUEST.replace(guidance_interval=GuidanceInterval(stop=1e-9, start=0.0)))
        assert scales == [7.5, 1, 1, 1]
    one = pipe.generate(REQUEST.replace(guidance_interval=GuidanceInterval()))
    assert one.images[0].tobytes() == pipe.generate(REQUEST).images[0].tobytes() != none.images[0].tobytes()


def test_noise_levels_limit_guidance(ours):
    pipe = ours()
    scheduler = sfumato.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(10)
    sigmas = [noise_level(scheduler, float(t)) for t in scheduler.timesteps]
    assert torch.allclose(torch.tensor(sigmas), scheduler.sigmas[:-1], rtol=0.02)
    limits = {"sigma_min": sigmas[6] * 1.001, "sigma_max": sigmas[3] * 1.001}
    request = REQUEST.replace(steps=10, scheduler="euler", guidance_interval=GuidanceInterval(**limits))
    assert branches(pipe, request) == [1, 1, 1, 2, 2, 2, 1, 1, 1, 1]
    edm = request.replace(scheduler="edm_euler")
    with pytest.raises(UsageError, match="does not use training timesteps"):
        pipe.generate(edm)
