"""Models distilled for few steps against the reference's pipelines: latent consistency, and its schedulers elsewhere."""

from __future__ import annotations

import diffusers
import pytest
import torch

import sfumato
from sfumato.errors import UsageError
from support.compare import FLOAT32, distance, generator
from support.pictures import PROMPTS, compare, picture

IMAGE = "LatentConsistencyModelImg2ImgPipeline"


def both(ours, theirs, *, image=False):
    return (ours("lcm", getattr(sfumato, IMAGE)), theirs("lcm", getattr(diffusers, IMAGE))) if image else (ours("lcm"), theirs("lcm"))  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("original", [None, 100])
def test_text_to_image(steps, original, ours, theirs):
    compare(*both(ours, theirs), prompt=PROMPTS[0], num_inference_steps=steps, original_inference_steps=original)


def test_calls(ours, theirs):
    embeds = torch.randn(2, 20, 24, generator=generator(9))
    for call in (
        {"prompt": PROMPTS, "guidance_scale": 1.0},
        {"prompt": PROMPTS, "seed": [3, 4], "num_images_per_prompt": 1},
        {"prompt": PROMPTS[0], "num_images_per_prompt": 2, "guidance_scale": 3.0},
        {"prompt": PROMPTS[0], "timesteps": [799, 399, 19]},
        {"prompt": PROMPTS[0], "latents": torch.randn(1, 4, 8, 8, generator=generator(8))},
        {"prompt_embeds": embeds, "width": 24, "height": 40},
    ):
        compare(*both(ours, theirs), **call)


@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
def test_image_to_image_takes_all_steps_of_a_shorter_schedule(strength, ours, theirs):
    pair = both(ours, theirs, image=True)
    for call in (
        {"prompt": PROMPTS[0], "num_inference_steps": 4},
        {"prompt": PROMPTS, "num_inference_steps": 2, "original_inference_steps": 100, "seed": [1, 2]},
        {"prompt": PROMPTS[0], "timesteps": [799, 599, 399, 199]},
    ):
        compare(*pair, image=picture(), strength=strength, **call)
        assert len(pair[0].scheduler.timesteps) == len(pair[1].scheduler.timesteps)


def test_callbacks(ours, theirs):
    seen: dict[bool, list] = {True: [], False: []}

    def change(pipe, step, timestep, tensors):
        own = isinstance(pipe, sfumato.DiffusionPipeline)
        seen[own].append((step, int(timestep), tensors["latents"].clone(), tensors["prompt_embeds"].clone()))
        return (
            {"latents": tensors["latents"] * 0.9, "prompt_embeds": tensors["prompt_embeds"] * 1.1} if step < 3 else {}
        )

    for image in (False, True):
        given = {"image": picture()} if image else {}
        names = ["latents", "prompt_embeds"]
        compare(*both(ours, theirs, image=image), prompt=PROMPTS, num_inference_steps=4, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names, **given)  # fmt: skip
    for mine, other in zip(seen[True], seen[False], strict=True):
        assert mine[:2] == other[:2]
        assert all(distance(a, b) < FLOAT32 for a, b in zip(mine[2:], other[2:], strict=True))


@pytest.mark.parametrize("image", [False, True])
def test_callbacks_see_and_change_what_is_decoded(image, ours, theirs):
    seen: dict[bool, list] = {True: [], False: []}

    def change(pipe, step, timestep, tensors):
        seen[isinstance(pipe, sfumato.DiffusionPipeline)].append(tensors["denoised"].clone())
        return {"denoised": tensors["denoised"] * 0.5, "latents": tensors["latents"] * 0.9}

    given = {"image": picture()} if image else {}
    call = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "denoised"]}
    compare(*both(ours, theirs, image=image), prompt=PROMPTS, num_inference_steps=4, **call, **given)
    assert all(distance(a, b) < FLOAT32 for a, b in zip(*seen.values(), strict=True))


def test_what_a_callback_makes_of_the_last_latents_is_not_decoded(ours, theirs):
    end = {"callback_on_step_end": lambda *told: {"latents": told[3]["latents"] * 0.0} if told[1] == 3 else {}}
    compare(*both(ours, theirs), prompt=PROMPTS, num_inference_steps=4, **end)


@pytest.mark.parametrize("scheduler", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_their_schedulers_with_other_checkpoints(scheduler, eta, ours, theirs):
    for shape in ("sd15", "turbo"):
        for kind in ("Pipeline", "Img2ImgPipeline"):
            name = ("StableDiffusionXL" if shape == "turbo" else "StableDiffusion") + kind
            pair = ours(shape, getattr(sfumato, name)), theirs(shape, getattr(diffusers, name))
            for pipe, library in zip(pair, (sfumato, diffusers), strict=True):
                pipe.scheduler = getattr(library, scheduler).from_config(pipe.scheduler.config)
            given = {"image": picture(), "strength": 0.6} if kind[0] == "I" else {}
            compare(*pair, prompt=PROMPTS[0], num_inference_steps=4, guidance_scale=1.5, eta=eta, **given)


@pytest.mark.parametrize("by", ["ours", "reference"])
def test_folders(by, checkpoints, tmp_path):
    mine = sfumato.DiffusionPipeline.from_pretrained(checkpoints("lcm", by))
    mine.save_pretrained(tmp_path / "again")
    other = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", torch_dtype=torch.float32)
    assert type(mine).__name__ == type(other).__name__ == "LatentConsistencyModelPipeline"
    for pipe in (mine, other):
        pipe.set_progress_bar_config(disable=True)
    compare(mine, other, prompt=PROMPTS[0])
    image = sfumato.AutoPipelineForImage2Image.from_pipe(mine)
    assert type(image) is getattr(sfumato, IMAGE)
    assert (mine.parts.family.name, mine.parts.settings) == ("sd15-lcm", {"steps": 4, "guidance_scale": 8.5})


def test_a_request_for_few_steps(checkpoints, tmp_path):
    pipe = sfumato.load(checkpoints("lcm"), device="cpu")
    picture().save(tmp_path / "noise.png")
    for image in (None, str(tmp_path / "noise.png")):
        result = pipe.generate(sfumato.GenerateRequest(prompt="cat", image=image, seed=3, original_inference_steps=100))
        assert (result.request.steps, result.request.guidance_scale) == (4, 8.5)
        again = pipe.generate(sfumato.GenerateRequest.from_dict(result.recipes[0]["request"]))
        assert again.images[0].tobytes() == result.images[0].tobytes()


def test_what_does_not_go_with_few_steps_is_refused(ours):
    plain = ours("sd15")
    with pytest.raises(UsageError, match="PNDMScheduler has no original_inference_steps; use LCM or TCD"):
        plain.generate(sfumato.GenerateRequest(prompt="cat", original_inference_steps=50))
    for name, given in (("Pipeline", {}), ("Img2ImgPipeline", {"image": picture()})):
        pipe = getattr(sfumato, f"LatentConsistencyModel{name}").from_pipe(plain)
        with pytest.raises(UsageError, match=f"has no guidance embedding.*use StableDiffusion{name}"):
            pipe("cat", **given)
    with pytest.raises(UsageError, match="image is missing"):
        ours("lcm", getattr(sfumato, IMAGE))("cat")
