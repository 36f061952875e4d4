"""Whole pictures against the reference's pipelines, in float32, down to the final latents; the noise to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sfumato
from sfumato.schedulers.noise import GaussianNoise
from support.compare import FLOAT32, distance, generator
from support.pictures import PROMPTS, SCHEDULERS, change_scheduler, compare, picture


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("shape", ["sd15", "sd21"])
def test_text_to_image_with_every_scheduler(shape, name, ours, theirs):
    mine, other = ours(shape), theirs(shape)
    # The reference seeds its Brownian path from torch's default generator; a fixed seed makes the two comparable.
    change_scheduler(name, mine, other, **({"noise_sampler_seed": 7} if name == "DPMSolverSDEScheduler" else {}))
    compare(mine, other, prompt=PROMPTS[0], num_inference_steps=4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image_with_every_scheduler(name, ours, theirs):
    import diffusers

    mine = ours("sd15", sfumato.StableDiffusionImg2ImgPipeline)
    other = theirs("sd15", diffusers.StableDiffusionImg2ImgPipeline)
    change_scheduler(name, mine, other, **({"noise_sampler_seed": 7} if name == "DPMSolverSDEScheduler" else {}))
    compare(mine, other, prompt=PROMPTS[0], image=picture(), strength=0.7, num_inference_steps=5)


CALLS = {
    "two prompts": {"prompt": PROMPTS, "seed": 3},
    "a generator per image": {"prompt": PROMPTS, "seed": [5, 0]},
    "several images per prompt": {"prompt": PROMPTS[0], "num_images_per_prompt": 3},
    "both, with generators": {"prompt": PROMPTS, "num_images_per_prompt": 2, "seed": [1, 2, 3, 4]},
    "negative prompt": {"prompt": PROMPTS[0], "negative_prompt": "the horse"},
    "negative prompts": {"prompt": PROMPTS, "negative_prompt": ["the horse", ""]},
    "no guidance": {"prompt": PROMPTS[0], "guidance_scale": 1.0},
    "weak guidance": {"prompt": PROMPTS[0], "guidance_scale": 1.01},
    "rescaled guidance": {"prompt": PROMPTS, "guidance_rescale": 0.7, "negative_prompt": ["horse", "cat"]},
    "a prompt too long": {"prompt": "astronaut " * 60},
    "an empty prompt": {"prompt": ""},
    "one step": {"prompt": PROMPTS[0], "num_inference_steps": 1},
    "not square": {"prompt": PROMPTS[0], "width": 40, "height": 24},
}


@pytest.mark.parametrize("shape", ["sd15", "sd21", "odd"])
def test_text_to_image_calls(shape, ours, theirs):
    for call in CALLS.values():
        compare(ours(shape), theirs(shape), **call)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_eta(eta, ours, theirs):
    mine, other = ours("sd21"), theirs("sd21")
    compare(mine, other, prompt=PROMPTS, eta=eta)
    compare(mine, other, prompt=PROMPTS, eta=eta, seed=[3, 4])


def test_noisy_schedulers_with_a_generator_per_picture(ours, theirs):
    for name in ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
        mine, other = ours(), theirs()
        change_scheduler(name, mine, other)
        compare(mine, other, prompt=PROMPTS, seed=[11, 12])


def test_sigma_options(ours, theirs):
    for options in ({"use_karras_sigmas": True}, {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}, {"timestep_spacing": "trailing"}):  # fmt: skip
        mine, other = ours(), theirs()
        change_scheduler("DPMSolverMultistepScheduler", mine, other, **options)
        compare(mine, other, prompt=PROMPTS[0], num_inference_steps=6)


def test_custom_timesteps_and_sigmas(ours, theirs):
    mine, other = ours(), theirs()
    change_scheduler("EulerDiscreteScheduler", mine, other)
    compare(mine, other, prompt=PROMPTS[0], timesteps=[900, 640, 233, 17])
    compare(mine, other, prompt=PROMPTS[0], sigmas=[14.6, 7.1, 2.2, 0.4, 0.0])
    change_scheduler("DDPMScheduler", mine, other)
    compare(mine, other, prompt=PROMPTS[0], timesteps=[900, 640, 233, 17])


def test_given_latents_and_embeddings(ours, theirs):
    mine, other = ours(), theirs()
    latents = torch.randn(2, 4, 8, 8, generator=generator(8))
    kept = latents.clone()
    embeds, negative = torch.randn(2, 2, 20, 24, generator=generator(9))
    compare(mine, other, prompt=PROMPTS, latents=latents)
    compare(mine, other, prompt_embeds=embeds, negative_prompt_embeds=negative)
    compare(mine, other, prompt_embeds=embeds[:1], guidance_scale=1)
    compare(
        mine, other, prompt_embeds=embeds, negative_prompt_embeds=negative, latents=latents, num_images_per_prompt=1
    )
    compare(mine, other, prompt_embeds=embeds[:1], negative_prompt_embeds=negative[:1], num_images_per_prompt=2)
    assert torch.equal(latents, kept)  # what a caller hands over stays the caller's


def test_embeddings_with_the_empty_negative_prompt(ours, theirs):
    embeds = torch.randn(2, 20, 24, generator=generator(9))
    compare(ours(), theirs(), prompt_embeds=embeds)


def test_a_model_distilled_for_guidance(ours, theirs):
    """With `time_cond_proj_dim` the U-Net reads the guidance scale and is called once a step."""
    import diffusers

    from support.checkpoints import UNET, randomize

    mine, other = ours(), theirs()
    unet = randomize(diffusers.UNet2DConditionModel(**UNET, time_cond_proj_dim=16))
    other.register_modules(unet=unet)
    mine.unet = sfumato.UNet2DConditionModel(**UNET, time_cond_proj_dim=16).eval()
    mine.unet.load_state_dict(unet.state_dict())
    compare(mine, other, prompt=PROMPTS[0], guidance_scale=8.5)


def test_the_initial_noise_is_bit_equal(ours, theirs):
    first: dict[str, torch.Tensor] = {}

    def keep(name):
        def callback(pipe, step, timestep, tensors):
            first.setdefault(name, tensors["latents"])
            return tensors

        return callback

    for seeds in (4, [4, 5]):
        first.clear()
        shape = (2, 4, 8, 8)
        given = [generator(s) for s in seeds] if isinstance(seeds, list) else generator(seeds)
        mine = GaussianNoise(shape, given)()
        given = [generator(s) for s in seeds] if isinstance(seeds, list) else generator(seeds)
        other = theirs().prepare_latents(2, 4, 16, 16, torch.float32, torch.device("cpu"), given)
        assert torch.equal(mine, other)  # PNDM starts from a standard deviation of 1


IMAGE_CALLS = {
    "whole strength": {"strength": 1.0},
    "a little": {"strength": 0.21},
    "two prompts": {"prompt": PROMPTS},
    "a generator per image": {"prompt": PROMPTS, "seed": [1, 2]},
    "several": {"num_images_per_prompt": 2},
    "negative": {"negative_prompt": "the horse", "guidance_scale": 3.0},
    "no guidance": {"guidance_scale": 0.0},
}


@pytest.mark.parametrize("shape", ["sd15", "sd21"])
def test_image_to_image_calls(shape, ours, theirs):
    import diffusers

    for call in IMAGE_CALLS.values():
        mine = ours(shape, sfumato.StableDiffusionImg2ImgPipeline)
        other = theirs(shape, diffusers.StableDiffusionImg2ImgPipeline)
        compare(mine, other, **({"prompt": PROMPTS[0], "image": picture(24, 40), "num_inference_steps": 5} | call))


def test_images_of_every_kind(ours, theirs):
    import diffusers

    array = np.asarray(picture(), dtype=np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    latents = torch.randn(1, 4, 8, 8, generator=generator(2))
    odd_sized = picture(19, 27)  # resized down to what the autoencoder can take
    for image in (array, array[None], tensor[None], tensor[None] * 2 - 1, [picture()], latents, odd_sized):
        mine = ours("sd15", sfumato.StableDiffusionImg2ImgPipeline)
        other = theirs("sd15", diffusers.StableDiffusionImg2ImgPipeline)
        compare(mine, other, prompt=PROMPTS[0], image=image, strength=0.6)
    two = [picture(seed=1), picture(seed=2)]
    compare(mine, other, prompt=PROMPTS, image=two, strength=0.6)


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_pixels(output_type, ours, theirs):
    call = {"prompt": PROMPTS, "num_inference_steps": 2, "output_type": output_type}
    a = ours()(generator=generator(), **call).images
    b = theirs()(generator=generator(), **call).images
    if output_type == "pil":
        assert [image.size for image in a] == [image.size for image in b]
        a, b = (np.stack([np.asarray(image, dtype=np.int16) for image in images]) for images in (a, b))
        assert np.abs(a - b).max() <= 1  # a value on the edge of rounding
        return
    assert type(a) is type(b)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    assert np.abs(np.asarray(a) - np.asarray(b)).max() < FLOAT32


def test_tuples(ours, theirs):
    call = {"prompt": PROMPTS[0], "num_inference_steps": 1, "output_type": "latent", "return_dict": False}
    a, b = ours()(generator=generator(), **call), theirs()(generator=generator(), **call)
    assert len(a) == len(b) == 2
    assert distance(a[0], b[0]) < FLOAT32
    assert a[1] is b[1] is None


def test_callbacks_see_and_change_the_same(ours, theirs):
    """Guidance is switched off half-way and the latents are damped, as the reference's own recipes do."""
    seen: dict[str, list] = {"ours": [], "theirs": []}

    def change(name):
        def callback(pipe, step, timestep, tensors):
            seen[name].append((step, float(timestep), tensors["latents"].clone(), tensors["prompt_embeds"].shape))
            return {"latents": tensors["latents"] * 0.9}

        return callback

    call = {
        "prompt": PROMPTS[0],
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "negative_prompt_embeds"],
    }
    a = ours()(generator=generator(), output_type="latent", num_inference_steps=4, callback_on_step_end=change("ours"), **call).images  # fmt: skip
    b = theirs()(generator=generator(), output_type="latent", num_inference_steps=4, callback_on_step_end=change("theirs"), **call).images  # fmt: skip
    assert distance(a, b) < FLOAT32
    assert len(seen["ours"]) == len(seen["theirs"]) == 5  # PNDM calls the model once more
    for mine, other in zip(seen["ours"], seen["theirs"], strict=True):
        assert mine[:2] == other[:2]
        assert mine[3] == other[3]
        assert distance(mine[2], other[2]) < FLOAT32


@pytest.mark.filterwarnings("ignore:.*callback:FutureWarning")
@pytest.mark.parametrize("every", [1, 2])
def test_older_callbacks_are_called_as_by_the_reference(every, ours, theirs):
    seen: list[list] = []
    for pipe in (ours(), theirs()):
        seen.append([])
        call = {"callback": lambda step, t, latents: seen[-1].append((step, float(t), latents.clone()))}
        pipe(
            PROMPTS[0], generator=generator(), output_type="latent", num_inference_steps=4, callback_steps=every, **call
        )
    mine, other = seen
    assert [told[:2] for told in mine] == [told[:2] for told in other]
    assert all(distance(a[2], b[2]) < FLOAT32 for a, b in zip(mine, other, strict=True))


def test_guidance_ends_where_a_callback_says_so(ours, theirs):
    """The reference's recipe for dynamic guidance, and its own callback class for it."""
    from diffusers.callbacks import SDCFGCutoffCallback

    def end(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}
        return {}

    compare(ours(), theirs(), prompt=PROMPTS[0], callback_on_step_end=end, callback_on_step_end_tensor_inputs=["prompt_embeds"])  # fmt: skip
    compare(ours(), theirs(), prompt=PROMPTS[0], callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5))


@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
def test_callbacks_steer_the_scales_of_guidance(pipeline, ours, theirs):
    import diffusers

    def follow(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.5 + step
        if not image:
            pipe._guidance_rescale = 0.2 * step
        assert pipe.guidance_scale == 1.5 + step
        return {}

    image = {} if pipeline == "StableDiffusionPipeline" else {"image": picture()}
    compare(
        ours("sd15", getattr(sfumato, pipeline)),
        theirs("sd15", getattr(diffusers, pipeline)),
        prompt=PROMPTS,
        num_inference_steps=4,
        callback_on_step_end=follow,
        **image,
    )


def test_embeddings_changed_in_place_are_read_and_shown_again(ours, theirs):
    def change(pipe, step, timestep, tensors):
        seen.append({name: tensor.clone() for name, tensor in tensors.items()})
        tensors["prompt_embeds"].mul_(0.9)
        return {"negative_prompt_embeds": tensors["negative_prompt_embeds"] * 2}

    call = {"prompt": PROMPTS, "num_inference_steps": 3, "output_type": "latent", "callback_on_step_end": change}
    call["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    all_seen = []
    for pipe in (ours(), theirs()):
        seen: list[dict[str, torch.Tensor]] = []
        pipe(generator=generator(), **call)
        all_seen.append(seen)
    for mine, other in zip(*all_seen, strict=True):
        assert all(distance(mine[name], other[name]) < FLOAT32 for name in other)


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("last", [0, 2, 6])
def test_an_interrupted_call_ends_with_the_latents_as_they_are(scheduler, last, ours, theirs):
    taken: dict[bool, list[int]] = {True: [], False: []}

    def cancel(pipe, step, timestep, tensors):
        taken[isinstance(pipe, sfumato.DiffusionPipeline)].append((step, pipe.num_timesteps))
        pipe._interrupt = step == last
        assert pipe.interrupt is (step == last)
        return {"latents": tensors["latents"] * 0.9}

    mine, other = ours(), theirs()
    change_scheduler(scheduler, mine, other)
    for output_type in ("latent", "pt"):
        compare(mine, other, prompt=PROMPTS[0], num_inference_steps=7, output_type=output_type, callback_on_step_end=cancel)  # fmt: skip
    assert taken[True] == taken[False]
    assert len(taken[True]) == 2 * (last + 1)
    assert mine.interrupt
    assert other.interrupt
    compare(mine, other, prompt=PROMPTS[0])  # the next call begins anew
    assert not mine.interrupt


def test_a_call_interrupted_before_its_first_step_takes_none(ours, theirs):
    mine, other = ours(), theirs()
    for pipe in (mine, other):
        pipe.text_encoder.register_forward_hook(lambda *_, pipe=pipe: setattr(pipe, "_interrupt", True))
    compare(mine, other, prompt=PROMPTS[0], callback_on_step_end=lambda *_: pytest.fail("a step was taken"))


def test_clip_skip(ours, theirs):
    """The reference's own clip_skip fails with transformers 5, so its layers are taken by hand."""
    mine, other = ours("sd21"), theirs("sd21")
    ids = other.tokenizer(PROMPTS[0], padding="max_length", truncation=True, return_tensors="pt").input_ids
    encoder = other.text_encoder
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    with torch.no_grad():
        states = encoder(ids, output_hidden_states=True).hidden_states
        negative = mine.text_encoder(mine.tokenizer.fitted("").input_ids, output_hidden_states=True).hidden_states
    for skip in (0, 1, 2):
        embeds = norm(states[-1 - skip]).detach()
        other_negative = norm(negative[-1 - skip]).detach()
        a = mine(PROMPTS[0], clip_skip=skip, generator=generator(), num_inference_steps=3, output_type="latent").images
        b = other(prompt_embeds=embeds, negative_prompt_embeds=other_negative, generator=generator(), num_inference_steps=3, output_type="latent").images  # fmt: skip
        assert distance(a, b) < FLOAT32


def test_the_tiny_autoencoder_in_both_pipelines(ours, theirs):
    import diffusers

    from support.checkpoints import randomize

    config = {
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "num_encoder_blocks": [1, 1],
        "num_decoder_blocks": [1, 1],
    }
    tiny = randomize(diffusers.AutoencoderTiny(**config))
    mine, other = ours(), theirs()
    mine.vae = sfumato.AutoencoderTiny(**config).eval()
    mine.vae.load_state_dict(tiny.state_dict())
    other = type(other)(**{**other.components, "vae": tiny}, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    a = mine(PROMPTS[0], generator=generator(), num_inference_steps=2, output_type="np").images
    b = other(PROMPTS[0], generator=generator(), num_inference_steps=2, output_type="np").images
    assert np.abs(a - b).max() < FLOAT32
