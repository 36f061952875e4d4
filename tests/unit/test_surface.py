"""What the ecosystem's code asks of a pipeline beside drawing."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import sfumato
from sfumato.errors import UsageError
from sfumato.models.packed import is_packed


@pytest.fixture
def pipe(ours):
    return ours()


def test_parts_with_those_that_are_not_here(pipe, ours):
    names = ["vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor"]
    assert list(pipe.components) == [*names, "image_encoder"]
    assert pipe.components["safety_checker"] is None
    again = sfumato.StableDiffusionImg2ImgPipeline(**pipe.components)
    assert again.unet is pipe.unet
    assert {"text_encoder_2", "image_encoder"} <= set(ours("sdxl").components)


def test_the_config_is_the_index(pipe, ours):
    config = pipe.config
    assert config["_class_name"] == "StableDiffusionPipeline"
    assert config.unet == ["diffusers", "UNet2DConditionModel"]
    assert config.safety_checker == [None, None]
    assert config.requires_safety_checker is False
    assert ours("sdxl").config.force_zeros_for_empty_prompt is True
    assert pipe.name_or_path == config["_name_or_path"]


def test_a_pipeline_shows_its_index(pipe):
    assert repr(pipe).startswith('StableDiffusionPipeline {\n  "_class_name": "StableDiffusionPipeline"')


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, of its compiler
def test_a_compiled_network_may_be_assigned(checkpoints, caplog):
    pipe = sfumato.StableDiffusionPipeline.from_pretrained(checkpoints())
    unet = pipe.unet
    with caplog.at_level(logging.INFO, logger="sfumato"):
        pipe.unet = torch.compile(pipe.unet, mode="reduce-overhead", fullgraph=True)
    assert pipe.unet is unet
    assert unet._compiled_call_impl is not None
    assert "same as pipe.unet.compile()" in caplog.text


def test_a_packed_network_is_not_compiled(checkpoints, caplog):
    """Inductor cannot lower its layers."""
    pipe = sfumato.StableDiffusionPipeline.from_pretrained(checkpoints())
    how = {"num_inference_steps": 1, "output_type": "np"}
    plain = pipe("a cat", **how, generator=torch.Generator().manual_seed(0)).images
    if not is_packed(pipe.unet):
        pytest.skip("the plan packs no layers on this machine")
    pipe.unet.compile()
    again = pipe("a cat", **how, generator=torch.Generator().manual_seed(0)).images
    assert np.array_equal(plain, again)
    assert "torch.compile is not used" in caplog.text
    assert pipe.unet._compiled_call_impl is None


def test_parts_that_may_be_missing(pipe, ours):
    assert set(pipe._optional_components) <= {name for name, part in pipe.components.items() if part is None}
    assert set(ours("sdxl")._optional_components) <= set(ours("sdxl").components)


def test_images_are_prepared_by_a_processor_of_one_s_own(ours):
    """As with latents of a picture that is not brought to [-1, 1]."""
    pipe = ours(cls=sfumato.StableDiffusionImg2ImgPipeline)
    image = torch.rand(1, 3, 32, 32)
    how = {"num_inference_steps": 2, "output_type": "np"}

    def drawn(**call):
        return pipe("a cat", generator=torch.Generator().manual_seed(0), **how, **call).images

    plain = drawn(image=image)
    pipe.image_processor = sfumato.VaeImageProcessor(do_resize=False, do_normalize=False)
    raw = drawn(image=image)
    assert not np.array_equal(raw, plain)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = pipe.vae.encode(image).latent_dist.sample(generator) * pipe.vae.config.scaling_factor
    again = pipe("a cat", image=latents, generator=generator, **how).images
    np.testing.assert_allclose(again, raw, atol=1e-5)


def test_embeddings_go_with_a_negative_prompt_for_each(pipe):
    embeds, _ = pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, False)
    images = pipe(prompt_embeds=embeds, negative_prompt=["x", "y"], num_inference_steps=1).images
    assert len(images) == 2


@pytest.mark.parametrize("name", ["max_sequence_length", "pag_scale"])
def test_arguments_that_are_not_here_answer(name, pipe):
    with pytest.raises(UsageError, match=rf"^{name} \(.*\) is not in Sfumato; "):
        pipe("a cat", **{name: 1})
    assert pipe("a cat", num_inference_steps=1, **{name: None}).images


def test_the_scale_of_no_lora_is_nothing(pipe):
    assert pipe("a cat", num_inference_steps=1, cross_attention_kwargs={"scale": 0.5}).images
    with pytest.raises(UsageError, match="cross_attention_kwargs"):
        pipe("a cat", cross_attention_kwargs={"gligen": 1})


def test_there_is_no_safety_checker(pipe, caplog):
    assert pipe.safety_checker is pipe.feature_extractor is pipe.image_encoder is None
    pipe.safety_checker = None
    with caplog.at_level(logging.WARNING, logger="sfumato"):
        pipe.safety_checker = lambda images, clip_input: (images, [False] * len(images))
    assert "Sfumato has no safety checker" in caplog.text
    with pytest.raises(UsageError, match="safety checker"):
        pipe.safety_checker = torch.nn.Linear(1, 1)


@pytest.mark.parametrize(
    "name",
    [
        "enable_model_cpu_offload",
        "enable_sequential_cpu_offload",
        "enable_xformers_memory_efficient_attention",
        "disable_xformers_memory_efficient_attention",
        "enable_vae_slicing",
        "disable_vae_slicing",
        "enable_vae_tiling",
        "disable_vae_tiling",
        "fuse_qkv_projections",
        "unfuse_qkv_projections",
    ],
)
def test_what_the_plan_decides_is_said_in_one_line(name, pipe, caplog):
    before = pipe("a cat", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="np").images
    with caplog.at_level(logging.INFO, logger="sfumato"):
        getattr(pipe, name)()
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert ": " in lines[0]
    after = pipe("a cat", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="np").images
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_slicing_and_tiling_are_the_autoencoder_s(pipe):
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()
    assert pipe.vae.use_slicing
    assert pipe.vae.use_tiling
    pipe.disable_vae_slicing()
    pipe.disable_vae_tiling()
    assert not pipe.vae.use_slicing
    assert not pipe.vae.use_tiling


def test_networks_take_turns_on_a_device(checkpoints):
    pipe = sfumato.StableDiffusionPipeline.from_pretrained(checkpoints())
    pipe.place.take_turns(pipe.parts, torch.device("cuda:1"))
    assert pipe.device == torch.device("cuda:1")
    assert pipe.unet.device.type == "cpu"
    assert pipe.place.wishes.offload == "staged"


def test_a_bar_with_the_pipeline_s_settings(pipe, capsys):
    pipe.set_progress_bar_config(desc="mine")
    assert list(pipe.progress_bar([1, 2])) == [1, 2]
    with pipe.progress_bar(total=3) as bar:
        bar.update()
    assert "mine" in capsys.readouterr().err
    with pytest.raises(UsageError, match="an iterable or a total"):
        pipe.progress_bar()


def test_what_a_callback_may_read(pipe):
    seen = []

    def callback(pipe, index, timestep, tensors):
        seen.append((pipe.num_timesteps, pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.interrupt))
        return tensors

    pipe("a cat", num_inference_steps=2, guidance_scale=3.0, callback_on_step_end=callback)
    assert seen == [(len(pipe.scheduler.timesteps), 3.0, True, False)] * len(seen)
    assert pipe.cross_attention_kwargs is None


def test_embeddings_draw_what_their_words_draw(pipe):
    how = {"num_inference_steps": 2, "output_type": "np"}
    told = pipe("a cat", negative_prompt="dog", generator=torch.Generator().manual_seed(0), **how).images
    embeds, negative = pipe.encode_prompt("a cat", "cpu", 1, True, "dog")
    ready = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    drawn = pipe(**ready, generator=torch.Generator().manual_seed(0), **how).images
    np.testing.assert_array_equal(drawn, told)
    assert torch.equal(pipe._encode_prompt("a cat", "cpu", 1, True, "dog"), torch.cat([negative, embeds]))


def test_embeddings_of_one_branch_and_of_several_images(pipe):
    embeds, negative = pipe.encode_prompt(["a cat", "a dog"], "cpu", 2, False, negative_prompt=["x", "y", "z"])
    assert embeds.shape[0] == 4
    assert torch.equal(embeds[0], embeds[1])
    assert not torch.equal(embeds[1], embeds[2])
    assert negative is None
    assert pipe._encode_prompt("a cat", "cpu", 1, False).shape[0] == 1
    with pytest.raises(UsageError, match="takes no lora_scale; set the weights with set_adapters"):
        pipe.encode_prompt("a cat", lora_scale=0.5)
    with pytest.raises(UsageError, match="pass prompt or prompt_embeds"):
        pipe.encode_prompt(None)


def test_embeddings_of_two_text_encoders(ours):
    pipe = ours("sdxl")
    how = {"num_inference_steps": 1, "output_type": "np"}
    told = pipe(
        "a cat", prompt_2="red", negative_prompt="dog", generator=torch.Generator().manual_seed(0), **how
    ).images
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    values = pipe.encode_prompt("a cat", "red", negative_prompt="dog")
    drawn = pipe(**dict(zip(names, values, strict=True)), generator=torch.Generator().manual_seed(0), **how).images
    np.testing.assert_array_equal(drawn, told)
    assert pipe.encode_prompt("a cat", do_classifier_free_guidance=False)[1::2] == (None, None)
