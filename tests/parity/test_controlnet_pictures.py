"""Images steered by ControlNets against the reference's pipelines, down to the final latents."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

import sfumato
from sfumato.errors import UsageError
from support.checkpoints import EVERY
from support.compare import FLOAT32, distance, generator
from support.control import control_net, control_picture
from support.pictures import PROMPTS, SCHEDULERS, change_scheduler, compare, picture

KINDS = {
    ("sd15", False): "StableDiffusionControlNetPipeline",
    ("sd21", False): "StableDiffusionControlNetPipeline",
    ("sd15", True): "StableDiffusionControlNetImg2ImgPipeline",
    ("sdxl", False): "StableDiffusionXLControlNetPipeline",
    ("sdxl", True): "StableDiffusionXLControlNetImg2ImgPipeline",
}


@pytest.fixture
def both(_loaded):
    """`both("sd15")`: the pipelines of both libraries with the same ControlNets, one for each seed."""

    def get(shape="sd15", *seeds, image=False, **options):
        pipes = []
        for name, library in (("ours", sfumato), ("theirs", diffusers)):
            nets = [control_net(library, shape, seed, **options) for seed in seeds or (0,)]
            parts = dict(_loaded(shape, name))
            parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
            flags = {"requires_safety_checker": False} if shape in ("sd15", "sd21") else {"force_zeros_for_empty_prompt": True}  # fmt: skip
            pipe = getattr(library, KINDS[shape, image])(**parts, **flags, controlnet=nets if seeds else nets[0])
            pipe.set_progress_bar_config(disable=True)
            pipes.append(pipe)
        return pipes

    return get


CONTROL = control_picture()
CALLS = {
    "as it is": {},
    "weaker": {"controlnet_conditioning_scale": 0.4},
    "without guidance": {"guidance_scale": 1.0},
    "guess mode": {"guess_mode": True},
    "guess mode without guidance": {"guess_mode": True, "guidance_scale": 1.0},
    "late": {"control_guidance_start": 0.5, "num_inference_steps": 4},
    "early": {"control_guidance_end": 0.4, "num_inference_steps": 4},
    "in lists": {"control_guidance_start": [0.1], "control_guidance_end": [0.8], "num_inference_steps": 5},
    "one list": {"control_guidance_end": [0.8], "num_inference_steps": 5},
    "several of a prompt": {"num_images_per_prompt": 2},
    "a picture for each prompt": {"prompt": PROMPTS, "image": [control_picture(seed=1), control_picture(seed=2)], "num_images_per_prompt": 2, "seed": [1, 2, 3, 4]},
    "one for all prompts": {"prompt": PROMPTS, "negative_prompt": ["horse", ""], "seed": [1, 2]},
    "the picture's size": {"image": control_picture(24, 32)},
    "another size": {"image": control_picture(40, 24), "width": 16, "height": 24},
    "a tensor": {"image": torch.rand(1, 3, 16, 16, generator=generator(5)) * 2 - 1},
    "an array": {"image": np.random.default_rng(0).random((1, 16, 16, 3), dtype=np.float32)},
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_text_to_image(call, both):
    compare(*both(), **{"prompt": PROMPTS[0], "image": CONTROL, "num_inference_steps": 3} | call)


MULTI = {
    "two": {},
    "scales": {"controlnet_conditioning_scale": [0.3, 0.8], "guess_mode": True},
    "in turns": {"control_guidance_start": [0.0, 0.4], "control_guidance_end": [0.5, 1.0], "num_inference_steps": 5},
    "one start, two ends": {"control_guidance_start": 0.2, "control_guidance_end": [0.5, 1.0], "num_inference_steps": 5},
    "for each prompt": {"prompt": PROMPTS, "image": [[control_picture(seed=1), control_picture(seed=2)], [control_picture(seed=3), control_picture(seed=4)]], "seed": [1, 2]},
}  # fmt: skip


@pytest.mark.parametrize("call", MULTI.values(), ids=MULTI)
def test_several_at_once(call, both):
    pictures = [CONTROL, control_picture(seed=7)]
    compare(*both("sd15", 1, 2), **{"prompt": PROMPTS[0], "image": pictures, "num_inference_steps": 3} | call)


@pytest.mark.parametrize("shape", ["sd21", "sdxl"])
@pytest.mark.parametrize("call", [{}, {"guess_mode": True}, {"guidance_scale": 1.0}], ids=str)
def test_other_families(shape, call, both):
    compare(*both(shape), prompt=PROMPTS[0], image=CONTROL, num_inference_steps=3, **call)


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
@pytest.mark.parametrize("call", [{}, {"strength": 0.5, "control_guidance_end": 0.6}, {"prompt": PROMPTS, "seed": [1, 2], "guess_mode": True}])  # fmt: skip
def test_image_to_image(shape, call, both):
    call = {"prompt": PROMPTS[0], "image": picture(), "control_image": CONTROL, "num_inference_steps": 6} | call
    compare(*both(shape, image=True), **call)


def test_pictures_that_are_pooled_force_guess_mode(both):
    compare(*both("sd15", global_pool_conditions=True), prompt=PROMPTS[0], image=CONTROL, num_inference_steps=2)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"])  # fmt: skip
def test_steps_are_counted_as_the_schedulers_count_them(name, both):
    assert name in SCHEDULERS
    mine, other = both()
    change_scheduler(name, mine, other)
    call = {"control_guidance_start": 0.3, "control_guidance_end": 0.7, "num_inference_steps": 5}
    compare(mine, other, prompt=PROMPTS[0], image=CONTROL, **call)


def test_a_scale_of_zero_is_the_plain_pipeline(both, ours):
    mine, _ = both()
    call = {"prompt": PROMPTS[0], "num_inference_steps": 2, "output_type": "latent"}
    steered = mine(image=CONTROL, controlnet_conditioning_scale=0.0, generator=generator(), **call).images
    plain = ours()(width=16, height=16, generator=generator(), **call).images
    assert torch.equal(steered, plain)


def test_a_network_that_does_not_steer_is_not_computed(both, monkeypatch):
    mine, _ = both()
    calls = []
    steer = sfumato.ControlNetModel.steer
    monkeypatch.setattr(sfumato.ControlNetModel, "steer", lambda *args: calls.append(1) or steer(*args))
    mine.scheduler = sfumato.DDIMScheduler.from_config(mine.scheduler.config)
    mine(PROMPTS[0], image=CONTROL, num_inference_steps=10, control_guidance_start=0.2, control_guidance_end=0.6)
    assert len(calls) == 4


def test_image_of_a_batch_is_the_one_made_alone(both):
    mine, _ = both()
    pictures = [control_picture(seed=1), control_picture(seed=2)]
    call = {"num_inference_steps": 2, "output_type": "latent"}
    together = mine(PROMPTS, image=pictures, generator=[generator(1), generator(2)], **call).images
    for i, prompt in enumerate(PROMPTS):
        alone = mine(prompt, image=pictures[i], generator=generator(1 + i), **call).images
        assert distance(together[i : i + 1], alone) < FLOAT32


@pytest.mark.parametrize("count", [1, 2])
def test_saved_and_loaded(count, both, tmp_path):
    mine, other = both("sd15", *range(1, 1 + count)) if count > 1 else both()
    mine.save_pretrained(tmp_path)
    again = sfumato.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is sfumato.StableDiffusionControlNetPipeline
    again.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPTS[0], "image": [CONTROL] * count if count > 1 else CONTROL, "num_inference_steps": 2, "output_type": "latent"}  # fmt: skip
    assert torch.equal(again(generator=generator(), **call).images, mine(generator=generator(), **call).images)
    if count == 1:
        theirs = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path)
        theirs.set_progress_bar_config(disable=True)
        assert distance(theirs(generator=generator(), **call).images, other(generator=generator(), **call).images) == 0


BAD = {
    "image is missing": {"image": None},
    "must be from 0 to 1, with the start below the end": {"control_guidance_start": 0.7, "control_guidance_end": 0.3},
    "must be a single number for a single ControlNet": {"controlnet_conditioning_scale": [0.5, 0.5]},
    "got 3 control images for 2 prompts": {"prompt": PROMPTS, "image": [CONTROL] * 3},
    "must be (3, 16, 16)": {"image": torch.rand(1, 1, 16, 16)},
    "a control image must be a PIL image": {"image": "photo.jpg"},
}  # fmt: skip


@pytest.mark.parametrize(("message", "call"), BAD.items(), ids=BAD)
def test_bad_calls(message, call, both):
    mine, _ = both()
    with pytest.raises(UsageError) as error:
        mine(**{"prompt": PROMPTS[0], "image": CONTROL, "num_inference_steps": 1} | call)
    assert message in str(error.value)


def test_bad_calls_of_several(both):
    mine, _ = both("sd15", 1, 2)
    for message, call in {"need a list of control images": {"image": CONTROL}, "got 3 control images for 2 ControlNets": {"image": [CONTROL] * 3}, "or 2 of them": {"controlnet_conditioning_scale": [1.0]}}.items():  # fmt: skip
        with pytest.raises(UsageError) as error:
            mine(**{"prompt": PROMPTS[0], "image": [CONTROL] * 2, "num_inference_steps": 1} | call)
        assert message in str(error.value)


def test_networks_of_another_kind_are_refused(ours):
    parts = ours().components
    with pytest.raises(UsageError, match="was made for Stable Diffusion XL, not for this checkpoint"):
        sfumato.StableDiffusionControlNetPipeline(**parts, controlnet=control_net(sfumato, "sdxl"))
    with pytest.raises(UsageError, match="it reads 32 values per token, not 24"):
        sfumato.StableDiffusionControlNetPipeline(**parts, controlnet=control_net(sfumato, cross_attention_dim=32))
    with pytest.raises(UsageError, match="needs a ControlNet; pass controlnet"):
        sfumato.StableDiffusionControlNetPipeline(**parts)
    with pytest.raises(UsageError, match="controlnet must be a ControlNetModel or MultiControlNetModel"):
        sfumato.StableDiffusionControlNetPipeline(**parts, controlnet=ours().unet)
    assert EVERY["sd15"].unet["cross_attention_dim"] == 24


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_prompts_are_encoded_without_the_networks(both, shape):
    whole, _ = both(shape)
    given = whole.components
    encoding = {name: one for name, one in given.items() if "text" in name or "tokenizer" in name}
    pipe = type(whole)(**dict.fromkeys(given) | encoding)
    for one, other in zip(pipe.encode_prompt(PROMPTS[0]), whole.encode_prompt(PROMPTS[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=FLOAT32, atol=FLOAT32)
    drawing = {"num_inference_steps": 2, "output_type": "latent"}
    for name in ("unet", "vae", "scheduler", "controlnet"):
        with pytest.raises(UsageError, match=r"controlnet.* left out \(None\), so only encode_prompt works"):
            pipe(PROMPTS[0], image=CONTROL, **drawing)
        setattr(pipe, name, given[name])
    drawn = [one(PROMPTS[0], image=CONTROL, generator=generator(), **drawing).images for one in (pipe, whole)]
    assert distance(*drawn) < FLOAT32
