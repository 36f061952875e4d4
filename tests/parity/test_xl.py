"""Pictures of Stable Diffusion XL and its relatives against the reference's pipelines, down to the final latents."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch

import sfumato
from sfumato.errors import UsageError
from support.checkpoints import XL_SHAPES
from support.compare import FLOAT32, distance, generator
from support.pictures import PROMPTS, SCHEDULERS, change_scheduler, compare, picture

PREDICTIONS = ("epsilon", "v_prediction", "sample")
# Of every scheduler and every prediction that it knows, once, over all shapes and both tasks.
WITHOUT_SAMPLE = (
    "EDMDPMSolverMultistep",
    "EDMEuler",
    "DPMSolverSDE",
    "EulerAncestralDiscrete",
    "KDPM2AncestralDiscrete",
    "KDPM2Discrete",
    "PNDM",
)
COVERED = [
    (name, prediction, ("sdxl", "turbo", "pruned")[(i + j) % 3], ("text", "image")[(i // 3 + j) % 2])
    for i, name in enumerate(SCHEDULERS)
    for j, prediction in enumerate(PREDICTIONS)
    if prediction != "sample" or name.removesuffix("Scheduler") not in WITHOUT_SAMPLE
]


def both(shape, ours, theirs, *, image=False):
    if not image:
        return ours(shape), theirs(shape)
    return ours(shape, sfumato.StableDiffusionXLImg2ImgPipeline), theirs(
        shape, diffusers.StableDiffusionXLImg2ImgPipeline
    )


def options_of(name, **more):
    # The reference seeds its Brownian path from torch's default generator; a fixed seed makes the two comparable. It
    # also takes the null of a sibling's sigmas for a number.
    own = {"noise_sampler_seed": 7} if name == "DPMSolverSDEScheduler" else {}
    return more | own | ({"sigma_min": 0.002, "sigma_max": 80.0} if name.startswith("EDM") else {})


@pytest.mark.parametrize(
    ("name", "prediction", "shape", "task"), COVERED, ids=lambda value: value.removesuffix("Scheduler")
)
def test_every_scheduler_and_prediction(name, prediction, shape, task, ours, theirs):
    mine, other = both(shape, ours, theirs, image=task == "image")
    # A noise prediction of pure noise says nothing.
    zero = {"rescale_betas_zero_snr": False} if prediction == "epsilon" else {}
    change_scheduler(name, mine, other, **options_of(name, prediction_type=prediction, **zero))
    call = {"image": picture(), "strength": 0.7} if task == "image" else {}
    compare(mine, other, prompt=PROMPTS[0], num_inference_steps=4, **call)


CALLS = {
    "an absent negative prompt is zeros": {},
    "an empty one is a text": {"negative_prompt": ""},
    "a negative prompt": {"negative_prompt": "the horse"},
    "the second text encoder's own": {"prompt_2": "a red cat", "negative_prompt": "the horse", "negative_prompt_2": "cat"},
    "a second negative prompt alone": {"negative_prompt_2": "cat"},
    "lists": {"prompt": PROMPTS, "prompt_2": PROMPTS[::-1], "negative_prompt": ["horse", ""], "seed": [4, 5]},
    "several images": {"prompt": PROMPTS, "num_images_per_prompt": 2, "guidance_rescale": 0.7},
    "no guidance": {"guidance_scale": 1.0, "negative_prompt": "the horse"},
    "clip_skip": {"clip_skip": 1, "negative_prompt": "the horse"},
    "clip_skip to the first layer": {"clip_skip": 1, "prompt": PROMPTS},
    "a prompt too long": {"prompt": "astronaut " * 60},
    "not square": {"width": 40, "height": 24},
    "sizes": {"original_size": (300, 200), "crops_coords_top_left": (3, 5), "target_size": (17, 19)},
    "negative sizes": {"negative_original_size": (30, 20), "negative_target_size": (8, 8), "negative_crops_coords_top_left": (1, 2)},
    "half of the negative sizes": {"negative_original_size": (30, 20), "negative_crops_coords_top_left": (1, 2)},
    "a schedule of one's own": {"timesteps": [900, 640, 233, 17]},
}  # fmt: skip


def test_text_to_image_calls(ours, theirs):
    for call in CALLS.values():
        compare(*both("sdxl", ours, theirs), **{"prompt": PROMPTS[0], "num_inference_steps": 2} | call)


def test_without_zeros_an_absent_negative_prompt_is_empty(ours, theirs):
    mine, other = both("sdxl", ours, theirs)
    zeros = mine(PROMPTS[0], num_inference_steps=2, output_type="latent", generator=generator()).images
    mine = sfumato.StableDiffusionXLPipeline(**mine.components, force_zeros_for_empty_prompt=False)
    other.register_to_config(force_zeros_for_empty_prompt=False)
    mine.set_progress_bar_config(disable=True)
    compare(mine, other, prompt=PROMPTS[0], num_inference_steps=2)
    assert distance(mine(PROMPTS[0], num_inference_steps=2, output_type="latent", generator=generator()).images, zeros) > FLOAT32  # fmt: skip


def test_negative_sizes_reach_every_picture_of_a_batch(ours, theirs):
    """The reference tells them to each second row of guidance's two halves, whichever half that is."""
    sizes = {"negative_original_size": (30, 20), "negative_target_size": (8, 8)}
    call = {"num_inference_steps": 3, "output_type": "latent", **sizes}
    mine, other = both("sdxl", ours, theirs)
    batch = mine(PROMPTS, generator=[generator(1), generator(2)], **call).images
    for i, prompt in enumerate(PROMPTS):
        assert distance(batch[i : i + 1], other(prompt, generator=generator(1 + i), **call).images) < FLOAT32
    assert distance(batch, other(PROMPTS, generator=[generator(1), generator(2)], **call).images) > FLOAT32


IMAGE_CALLS = {
    "by default": {},
    "whole strength": {"strength": 1.0},
    "lists": {"prompt": PROMPTS, "image": [picture(seed=1), picture(seed=2)], "seed": [1, 2], "negative_prompt": ["horse", ""]},
    "several": {"num_images_per_prompt": 2, "negative_prompt": "the horse", "prompt_2": "cat", "guidance_rescale": 0.5},
    "no guidance": {"guidance_scale": 0.0},
    "scores": {"aesthetic_score": 3.5, "negative_aesthetic_score": 7.0, "negative_prompt": ""},
    "sizes": {"original_size": (30, 20), "target_size": (9, 7), "crops_coords_top_left": (3, 5)},
    "negative sizes": {"prompt": PROMPTS, "negative_original_size": (3, 2), "negative_crops_coords_top_left": (1, 2), "negative_target_size": (8, 8)},
    "latents as the image": {"image": torch.randn(1, 4, 8, 8, generator=generator(2))},
    "latents to begin with": {"latents": torch.randn(1, 4, 8, 8, generator=generator(3))},
}  # fmt: skip


@pytest.mark.parametrize("shape", ["sdxl", "refiner", "pruned"])
def test_image_to_image_calls(shape, ours, theirs):
    for call in IMAGE_CALLS.values():
        given = {"prompt": PROMPTS[0], "image": picture(24, 40), "num_inference_steps": 4, "strength": 0.6}
        compare(*both(shape, ours, theirs, image=True), **given | call)


FEW = [(name, 5, 0.7) for name in SCHEDULERS if not name.startswith("EDM")]
MANY = [(f"{name}Scheduler", n, 0.8) for name in ("EulerDiscrete", "DPMSolverMultistep", "HeunDiscrete", "KDPM2Discrete") for n in (20, 21)]  # fmt: skip


@pytest.mark.parametrize(("name", "steps", "share"), FEW + MANY)
def test_one_checkpoint_hands_over_to_another(name, steps, share, ours, theirs):
    base, refiner = both("sdxl", ours, theirs), both("refiner", ours, theirs, image=True)
    for pair in (base, refiner):
        change_scheduler(name, *pair, **options_of(name))
    call = {"prompt": PROMPTS[0], "num_inference_steps": steps}
    compare(*base, denoising_end=share, **call)
    left = base[1](denoising_end=share, output_type="latent", generator=generator(), **call).images
    compare(*refiner, denoising_start=share, image=left, **call)
    compare(*refiner, denoising_start=0.4, denoising_end=0.8, image=picture(), **call)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"])
def test_callbacks_are_told_the_timesteps_of_their_own_part(name, ours, theirs):
    base, refiner = both("sdxl", ours, theirs), both("refiner", ours, theirs, image=True)
    for pair in (base, refiner):
        change_scheduler(name, *pair)
    told: dict[type, list] = {}

    def tell(pipe, step, timestep, tensors):
        told.setdefault(type(pipe), []).append((step, float(timestep)))
        return {}

    call = {"num_inference_steps": 7, "callback_on_step_end": tell, "output_type": "latent", "prompt": "cat"}
    for mine, other in (base, refiner):
        for pipe in (mine, other):
            begun = {"image": picture(), "denoising_start": 0.3} if pipe in refiner else {}
            pipe(denoising_end=0.8, **begun, **call)
        assert told[type(mine)] == told[type(other)]


def test_the_class_says_what_is_absent_where_nobody_else_does(ours, theirs):
    for mine, other in (both("refiner", ours, theirs, image=True), both("sdxl", ours, theirs)):
        refining = mine.parts.text_encoder is None
        flags = {"requires_aesthetics_score": True} if refining else {}
        pair = (type(pipe)(**pipe.components, **flags) for pipe in (mine, other))
        given = {"image": picture(), "strength": 0.7} if refining else {}
        compare(*pair, prompt="cat", num_inference_steps=3, **given)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_a_checkpoint_that_hands_over_to_itself_draws_the_whole(name, ours):
    text, image = ours("sdxl"), ours("sdxl", sfumato.StableDiffusionXLImg2ImgPipeline)
    for pipe in (text, image):
        pipe.scheduler = getattr(sfumato, name).from_config(pipe.scheduler.config)
    call = {"prompt": PROMPTS, "num_inference_steps": 7, "output_type": "latent"}
    whole = text(generator=generator(3), **call).images
    for share in (0.2, 0.31, 0.5, 0.99):
        source = generator(3)
        left = text(generator=source, denoising_end=share, **call).images
        assert distance(image(generator=source, denoising_start=share, image=left, **call).images, whole) < 1e-6


def test_what_cannot_be_handed_over_is_refused(ours):
    text, image = ours("sdxl"), ours("sdxl", sfumato.StableDiffusionXLImg2ImgPipeline)
    latents = torch.zeros(1, 4, 8, 8)
    with pytest.raises(UsageError, match=r"denoising_end 0\.001 leaves no steps"):
        text("cat", denoising_end=0.001)
    with pytest.raises(UsageError, match=r"denoising_start 0\.999 leaves no steps"):
        image("cat", image=latents, denoising_start=0.999, num_inference_steps=3)
    with pytest.raises(UsageError, match=r"denoising_start, 0\.8, must be below denoising_end, 0\.8"):
        image("cat", image=latents, denoising_start=0.8, denoising_end=0.8)
    with pytest.raises(UsageError, match="pass them as the image"):
        text.generate(sfumato.GenerateRequest(prompt="cat", denoising_start=0.5))
    for name, changes in (
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ):
        text.scheduler = getattr(sfumato, name).from_config(text.scheduler.config, **changes)
        with pytest.raises(UsageError, match=f"{name} does not use training timesteps"):
            text("cat", denoising_end=0.8)


def encoded(pipe, **call):
    with torch.no_grad():
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, pipe.encode_prompt(**call), strict=True))


def test_embeddings_in_place_of_prompts(ours, theirs):
    embeds = encoded(theirs("sdxl"), prompt=PROMPTS, negative_prompt=["horse", ""])
    without = {name: value for name, value in embeds.items() if "negative" not in name}
    for image in (False, True):
        given = {"image": picture(), "strength": 0.8} if image else {}
        mine, other = both("sdxl", ours, theirs, image=image)
        compare(mine, other, **embeds, **given)
        compare(mine, other, **without, **given, num_images_per_prompt=2)
        mine.text_encoder = mine.text_encoder_2 = mine.tokenizer = mine.tokenizer_2 = None
        compare(mine, other, **embeds, **given)
        with pytest.raises(UsageError, match="needs 2 text encoders with a tokenizer each, but there are 0"):
            mine("cat", **given)
    with pytest.raises(UsageError, match="also needs pooled embeddings"):
        ours("sdxl")(prompt_embeds=embeds["prompt_embeds"])
    with pytest.raises(UsageError, match="embeddings have 24 values per token, but this U-Net needs 64"):
        ours("sdxl")(
            prompt_embeds=embeds["prompt_embeds"][..., :24], pooled_prompt_embeds=embeds["pooled_prompt_embeds"]
        )


def test_a_pooled_prompt_of_ones_own_goes_with_words(ours, theirs):
    pooled = torch.randn(1, 40, generator=generator(5))
    compare(*both("sdxl", ours, theirs), prompt=PROMPTS[0], negative_prompt="", pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=2 * pooled)  # fmt: skip


def test_a_model_distilled_for_guidance(ours, theirs):
    from support.checkpoints import XL, randomize

    for image in (False, True):
        mine, other = both("sdxl", ours, theirs, image=image)
        unet = randomize(diffusers.UNet2DConditionModel(**XL, time_cond_proj_dim=16))
        other.register_modules(unet=unet)
        mine.unet = sfumato.UNet2DConditionModel(**XL, time_cond_proj_dim=16).eval()
        mine.unet.load_state_dict(unet.state_dict())
        given = {"image": picture(), "strength": 0.9} if image else {}
        compare(mine, other, prompt=PROMPTS, guidance_scale=8.5, **given)


@pytest.mark.parametrize("image", [False, True])
def test_callbacks_see_and_change_the_same(image, ours, theirs):
    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    seen: dict[bool, list] = {True: [], False: []}

    def change(pipe, step, timestep, tensors):
        own = isinstance(pipe, sfumato.DiffusionPipeline)
        seen[own].append((step, float(timestep), {name: tensors[name].clone() for name in names}))
        tensors["add_time_ids"].add_(3)  # in place, which the reference does not tell apart
        return {"latents": tensors["latents"] * 0.9, "add_text_embeds": tensors["add_text_embeds"] * 1.1}

    given = {"image": picture(), "strength": 0.8} if image else {}
    pair = both("sdxl", ours, theirs, image=image)
    call = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names, **given}
    compare(*pair, prompt=PROMPTS, negative_prompt=["", "cat"], num_inference_steps=4, **call)
    for mine, other in zip(seen[True], seen[False], strict=True):
        assert mine[:2] == other[:2]
        for name in names:
            assert distance(mine[2][name], other[2][name]) < FLOAT32
    with pytest.raises(UsageError, match="'negative_prompt_embeds' is not one of latents, prompt_embeds, add_text"):
        pair[0](
            "cat", callback_on_step_end=change, callback_on_step_end_tensor_inputs=["negative_prompt_embeds"], **given
        )


def test_guidance_ends_where_the_references_callback_says_so(ours, theirs):
    from diffusers.callbacks import SDXLCFGCutoffCallback

    compare(*both("sdxl", ours, theirs), prompt=PROMPTS[0], num_inference_steps=4, callback_on_step_end=SDXLCFGCutoffCallback(cutoff_step_ratio=0.5))  # fmt: skip


@pytest.mark.parametrize("shape", ["sdxl", "pruned"])
def test_pixels_and_outputs(shape, ours, theirs):
    call = {"prompt": PROMPTS, "num_inference_steps": 2, "output_type": "np"}
    mine, other = both(shape, ours, theirs)
    a, b = mine(generator=generator(), **call), other(generator=generator(), **call)
    assert np.abs(a.images - b.images).max() < FLOAT32
    assert type(a).__name__ == type(b).__name__
    assert np.array_equal(a["images"], a[0])
    for pipe in (mine, other):
        assert len(pipe(**call, return_dict=False)) == 1
    call |= {"image": picture(), "strength": 0.9}
    mine, other = both(shape, ours, theirs, image=True)
    a, b = mine(generator=generator(), **call).images, other(generator=generator(), **call).images
    assert np.abs(a - b).max() < FLOAT32


def test_pipelines_made_of_one_another(ours, theirs):
    text = ours("sdxl")
    for auto, kind in (("Text2Image", ""), ("Image2Image", "Img2Img")):
        made = getattr(sfumato, f"AutoPipelineFor{auto}").from_pipe(text)
        other = getattr(diffusers, f"AutoPipelineFor{auto}").from_pipe(theirs("sdxl"))
        assert type(made).__name__ == type(other).__name__ == f"StableDiffusionXL{kind}Pipeline"
        assert all(made.components[name] is part for name, part in text.components.items())
        assert made.place is text.place
        made.set_progress_bar_config(disable=True)
        other.set_progress_bar_config(disable=True)
        compare(made, other, prompt=PROMPTS[0], **({"image": picture(), "strength": 0.9} if kind else {}))
    plain = sfumato.AutoPipelineForImage2Image.from_pipe(ours("sd15"))
    assert type(plain) is sfumato.StableDiffusionImg2ImgPipeline
    with pytest.raises(UsageError, match=r"created with AutoPipelineForText2Image\.from_pretrained"):
        sfumato.AutoPipelineForText2Image()
    with pytest.raises(UsageError, match="does not support Stable Diffusion XL; use StableDiffusionXLPipeline"):
        sfumato.StableDiffusionPipeline.from_pipe(text)
    with pytest.raises(UsageError, match=r"does not support Stable Diffusion 1\.x; use StableDiffusionPipeline"):
        sfumato.StableDiffusionXLPipeline.from_pipe(ours("sd15"))


@pytest.mark.parametrize("by", ["ours", "reference"])
@pytest.mark.parametrize("shape", XL_SHAPES)
def test_both_libraries_read_and_write_one_folder(shape, by, checkpoints, tmp_path):
    def index(folder):
        told = json.loads((folder / "model_index.json").read_text())
        tokenizers = {name: "CLIPTokenizer" for name in told if name.startswith("tokenizer") and told[name][0]}
        return {name: value for name, value in told.items() if name[0] != "_"} | tokenizers

    folder = checkpoints(shape, by)
    mine = sfumato.DiffusionPipeline.from_pretrained(folder)
    mine.save_pretrained(tmp_path / "again")
    assert index(tmp_path / "again") == index(folder) == index(checkpoints(shape, "reference"))
    other = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", torch_dtype=torch.float32)
    assert type(other).__name__ == type(mine).__name__
    for pipe in (mine, other):
        pipe.set_progress_bar_config(disable=True)
    given = {"image": picture(), "strength": 0.9} if "Img2Img" in type(mine).__name__ else {}
    compare(mine, other, prompt=PROMPTS[0], **given)


@pytest.mark.parametrize("by", ["ours", "reference"])
def test_auto_pipelines_load_either_family(by, checkpoints):
    for shape, kind in (("sd21", "StableDiffusion"), ("sdxl", "StableDiffusionXL"), ("refiner", "StableDiffusionXL")):
        folder = checkpoints(shape, by)
        text = sfumato.AutoPipelineForText2Image.from_pretrained(folder, torch_dtype=torch.bfloat16)
        assert type(text).__name__ == f"{kind}Pipeline"
        assert text.dtype == torch.bfloat16
        assert type(sfumato.AutoPipelineForImage2Image.from_pretrained(folder)).__name__ == f"{kind}Img2ImgPipeline"
