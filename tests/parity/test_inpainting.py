"""Pictures painted in part, against the reference's inpainting pipelines: latents, generators, and what is put back."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.errors import UsageError
from support.compare import FLOAT32, distance, generator
from support.pictures import PROMPTS, SCHEDULERS, change_scheduler, compare, picture

KINDS = {
    "sd15": "StableDiffusionInpaintPipeline",
    "sd21": "StableDiffusionInpaintPipeline",
    "inpaint": "StableDiffusionInpaintPipeline",
    "inpaint21": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLInpaintPipeline",
    "inpaint-xl": "StableDiffusionXLInpaintPipeline",
}


def both(shape, ours, theirs):
    return (get(shape, getattr(library, KINDS[shape])) for get, library in ((ours, sfumato), (theirs, diffusers)))


def mask(width=16, height=16, box=(3, 5, 11, 14)):
    image = Image.new("L", (width, height))
    image.paste(255, box)
    return image


def levels(seed=0):
    """A mask of all levels, as an array (16, 16)."""
    return np.random.default_rng(seed).random((16, 16), dtype=np.float32)


def given(**more):
    return {"prompt": PROMPTS[0], "image": picture(), "mask_image": mask()} | more


LATENTS = torch.randn(1, 4, 8, 8, generator=generator(2))
CALLS = {
    "by default": {},
    "half the strength": {"strength": 0.5},
    "nearly all of it": {"strength": 0.9999},
    "all of it": {"strength": 1.0},
    "no guidance": {"guidance_scale": 1.0, "strength": 0.7},
    "lists": {"prompt": PROMPTS, "image": [picture(seed=1), picture(seed=2)], "mask_image": [mask(), mask(box=(0, 0, 8, 9))], "seed": [3, 4]},
    "several of one": {"num_images_per_prompt": 2, "prompt": PROMPTS, "strength": 0.8},
    "another size": {"image": picture(40, 24), "mask_image": mask(40, 24), "width": 24, "height": 32},
    "arrays": {"image": np.asarray(picture(), np.float32)[None] / 255, "mask_image": levels()[None, ..., None]},
    "an array of two sides": {"mask_image": levels()},
    "tensors": {"image": torch.rand(1, 3, 16, 16, generator=generator(1)), "mask_image": torch.from_numpy(levels())[None, None]},
    "tensors of three sides": {"image": torch.rand(3, 16, 16, generator=generator(1)), "mask_image": torch.from_numpy(levels())[None]},
    "a tensor of two sides": {"mask_image": torch.from_numpy(levels())},
    "tensors of other sizes": {"image": torch.rand(1, 3, 32, 32, generator=generator(1)), "mask_image": torch.from_numpy(levels())[None]},
    "a grey picture": {"mask_image": Image.fromarray((levels() * 255).astype(np.uint8)).convert("RGB")},
    "noise of one's own": {"latents": LATENTS},
    "noise of one's own, later": {"latents": LATENTS, "strength": 0.6},
    "a schedule of one's own": {"timesteps": [900, 640, 233, 17], "strength": 0.75},
    "the surroundings ready-made": {"masked_image_latents": torch.randn(1, 4, 8, 8, generator=generator(5))},
}  # fmt: skip


@pytest.mark.parametrize("shape", KINDS)
def test_calls(shape, ours, theirs):
    for name, call in CALLS.items():
        mine, other = both(shape, ours, theirs)
        if "timesteps" in call:
            change_scheduler("EulerDiscreteScheduler", mine, other)
        try:
            compare(mine, other, num_inference_steps=4, **given(**call))
        except Exception as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("shape", KINDS)
def test_each_generator_draws_its_own_picture(shape, ours, theirs):
    """The reference encodes one image with the first generator, for all."""
    mine, other = both(shape, ours, theirs)
    call = given(num_inference_steps=3, strength=0.7, output_type="latent")
    batch = mine(generator=[generator(1), generator(2)], num_images_per_prompt=2, **call).images
    for i in range(2):
        assert distance(batch[i : i + 1], other(generator=generator(1 + i), **call).images) < FLOAT32


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_latents_as_the_image(shape, ours, theirs):
    for call in ({}, {"strength": 0.6}):
        mine, other = both(shape, ours, theirs)
        if shape == "sd15":  # where the reference masks latents by pixels, and fails
            call = call | {"masked_image_latents": torch.zeros(1, 4, 8, 8)}
        compare(mine, other, **given(image=LATENTS, **call))
    mine, _ = both(f"inpaint{'-xl' if shape == 'sdxl' else ''}", ours, theirs)
    with pytest.raises(UsageError, match="latents cannot be masked"):
        mine(**given(image=LATENTS))


# What the reference blends after a step has that scheduler's noise of the next one, also between the two calls of a step.
@pytest.mark.parametrize(("name", "shape"), [(name, ("sd15", "inpaint", "sdxl")[i % 3]) for i, name in enumerate(SCHEDULERS)])  # fmt: skip
def test_every_scheduler(name, shape, ours, theirs):
    if name.startswith("EDM"):
        pytest.skip("the reference cannot inpaint with it: it takes no timesteps to add noise at")
    for strength in (1.0, 0.7):
        mine, other = both(shape, ours, theirs)
        own = {"noise_sampler_seed": 7} if name == "DPMSolverSDEScheduler" else {}
        change_scheduler(name, mine, other, **own)
        compare(mine, other, num_inference_steps=5, **given(strength=strength))


def test_a_black_image_differs_by_rounding_alone(ours, theirs, monkeypatch):
    """Group norms divide what hardly varies by next to nothing: rounding to float32 then differs by up to 1e-3."""
    draw = torch.randn  # the reference draws float64, ours always float32
    monkeypatch.setattr(torch, "randn", lambda *sides, dtype=None, **how: draw(*sides, **how).to(dtype))
    black = given(image=Image.new("RGB", (16, 16)), mask_image=Image.new("L", (16, 16)), output_type="pt")
    pipes = [pipe.to(torch.float64) for pipe in both("sd15", ours, theirs)]
    try:
        mine, other = (pipe(generator=generator(), num_inference_steps=3, **black).images for pipe in pipes)
    finally:  # the networks are shared
        for pipe in pipes:
            pipe.to(torch.float32)
    assert mine.dtype == torch.float64
    assert distance(mine, other) < 1e-6


def test_hand_over(ours, theirs):
    for shape in ("sdxl", "inpaint-xl"):
        mine, other = both(shape, ours, theirs)
        compare(mine, other, num_inference_steps=6, **given(denoising_end=0.6))
        compare(mine, other, num_inference_steps=6, **given(denoising_start=0.5, strength=0.9))
        compare(mine, other, num_inference_steps=6, **given(denoising_start=0.5, denoising_end=0.9, image=LATENTS, masked_image_latents=LATENTS))  # fmt: skip


XL_CALLS = {
    "scores and sizes": {"original_size": (30, 20), "target_size": (9, 7), "crops_coords_top_left": (3, 5)},
    "negative sizes": {"prompt": PROMPTS, "negative_original_size": (3, 2), "negative_crops_coords_top_left": (1, 2)},
    "two prompts": {"prompt_2": "cat", "negative_prompt": "horse", "guidance_rescale": 0.5, "clip_skip": 1},
}


def test_what_xl_reads_beside(ours, theirs):
    for call in XL_CALLS.values():
        compare(*both("inpaint-xl", ours, theirs), **given(**call))


BOXES = {
    "within": (30, 20, 50, 34), "left": (0, 20, 9, 30), "top": (40, 0, 60, 6), "right": (70, 30, 80, 50),
    "bottom": (10, 50, 40, 56), "all": (0, 0, 80, 56), "a corner": (76, 0, 80, 3), "a line": (0, 20, 80, 21),
}  # fmt: skip


@pytest.mark.parametrize("margin", [0, 5, 40])
def test_crops(margin, ours, theirs):
    """The same part of the image is enlarged, and put back within rounding."""
    mine, other = both("inpaint", ours, theirs)
    for size in ({}, {"width": 24, "height": 16}):
        for box in BOXES.values():
            call = given(image=picture(80, 56), mask_image=mask(80, 56, box), padding_mask_crop=margin, **size)
            a, b = (pipe(generator=generator(), num_inference_steps=2, **call).images[0] for pipe in (mine, other))
            assert a.size == (80, 56)
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 2
            stays = np.asarray(call["mask_image"]) == 0
            assert np.array_equal(np.asarray(a)[stays], np.asarray(call["image"])[stays])


def test_pixels_and_outputs(ours, theirs):
    for shape in ("sd15", "inpaint-xl"):
        mine, other = both(shape, ours, theirs)
        for kind in ("np", "pt"):
            a, b = (
                pipe(generator=generator(), output_type=kind, num_inference_steps=2, **given())
                for pipe in (mine, other)
            )
            assert np.abs(np.asarray(a.images) - np.asarray(b.images)).max() < FLOAT32
            assert type(a).__name__ == type(b).__name__
        a, b = (
            pipe(generator=generator(), num_inference_steps=2, return_dict=False, **given())[0][0]
            for pipe in (mine, other)
        )
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_pipelines_made_of_one_another(ours, theirs):
    for shape, kind in (("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL")):
        made = sfumato.AutoPipelineForInpainting.from_pipe(ours(shape))
        other = diffusers.AutoPipelineForInpainting.from_pipe(theirs(shape))
        assert type(made).__name__ == type(other).__name__ == f"{kind}InpaintPipeline"
        for pipe in (made, other):
            pipe.set_progress_bar_config(disable=True)
        compare(made, other, **given())
        back = sfumato.AutoPipelineForText2Image.from_pipe(made)
        assert type(back).__name__ == f"{kind}Pipeline"
        assert all(back.components[name] is part for name, part in made.components.items())


@pytest.mark.parametrize("by", ["ours", "reference"])
@pytest.mark.parametrize("shape", ["inpaint", "inpaint-xl"])
def test_both_libraries_read_and_write_one_folder(shape, by, checkpoints, tmp_path):
    mine = sfumato.DiffusionPipeline.from_pretrained(checkpoints(shape, by))
    assert type(mine).__name__ == KINDS[shape]
    mine.save_pretrained(tmp_path / "again")
    other = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", torch_dtype=torch.float32)
    assert type(other).__name__ == KINDS[shape]
    for pipe in (mine, other):
        pipe.set_progress_bar_config(disable=True)
    compare(mine, other, **given())
    assert type(sfumato.AutoPipelineForInpainting.from_pretrained(tmp_path / "again")).__name__ == KINDS[shape]


@pytest.mark.parametrize("shape", ["sd15", "inpaint", "inpaint-xl"])
def test_callbacks_see_and_change_the_same(shape, ours, theirs):
    """Every tensor that the reference names may be asked for; changed latents hold from the next step on."""
    mine, other = both(shape, ours, theirs)
    seen: dict[bool, list] = {True: [], False: []}

    names = ["latents", "mask"] + ["masked_image_latents"] * (shape != "sd15")  # which no plain U-Net reads

    def change(pipe, step, timestep, tensors):
        own = isinstance(pipe, sfumato.DiffusionPipeline)
        seen[own].append({name: tensors[name].clone() for name in names})
        changed = {} if step != 1 else {"mask": 1 - tensors["mask"]}
        return changed | {"latents": tensors["latents"] * 0.9}

    call = given(callback_on_step_end=change, callback_on_step_end_tensor_inputs=[*names, "prompt_embeds"])
    compare(mine, other, num_inference_steps=4, **call)
    for a, b in zip(seen[True], seen[False], strict=True):
        for name, value in a.items():
            assert distance(value, b[name]) < FLOAT32
    # The reference does not compute pooled negative prompts where it names them.
    assert set(mine._callback_tensor_inputs) >= set(other._callback_tensor_inputs) - {"negative_pooled_prompt_embeds"}
