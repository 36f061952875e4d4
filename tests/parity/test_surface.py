"""Every name of the reference library is here or answers with a sentence; and what is here means the same."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import sfumato
from sfumato import schedulers
from sfumato.ecosystem import found, table
from sfumato.errors import UsageError
from support.compare import FLOAT32, distance

PIPELINES = [
    name for name in sfumato.__all__ if name.endswith("Pipeline") and not name.startswith(("Auto", "Diffusion"))
]
SCHEDULERS = [name for name in sfumato.__all__ if name.endswith("Scheduler")]
MODELS = ["UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny"]
# Set when one is made, and so not on the class.
OF_INSTANCES = {"config", "begin_index", "step_index"}


def public(thing) -> list[str]:
    return [name for name in dir(thing) if name[0] != "_"]


def unanswered(names, ours, where) -> list[str]:
    return [name for name in names if not hasattr(ours, name) and not found(where, name) and name not in OF_INSTANCES]


def test_every_name_of_the_package():
    names = [name for name in public(diffusers) if "." not in name]
    assert len(names) > 600
    assert unanswered(names, sfumato, "package") == []


@pytest.mark.parametrize("name", PIPELINES)
def test_every_name_of_a_pipeline(name):
    missing = unanswered(public(getattr(diffusers, name)), getattr(sfumato, name), "pipeline")
    assert set(missing) <= {"from_single_file"}


@pytest.mark.parametrize("name", [*MODELS, *SCHEDULERS])
def test_every_name_of_a_part(name):
    missing = unanswered(public(getattr(diffusers, name)), getattr(sfumato, name), "part")
    assert set(missing) <= {"from_single_file"}


def test_no_name_of_the_table_hides_one_that_is_here():
    """A pattern may fit a name that is here, as that one is found first; a name of its own is left over."""
    here = [name for name in table()["package"] if name in sfumato.__all__]
    here += [name for name in table()["pipeline"] for cls in PIPELINES if hasattr(getattr(sfumato, cls), name)]
    here += [name for name in table()["part"] for cls in MODELS + SCHEDULERS if hasattr(getattr(sfumato, cls), name)]
    assert here == []


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_reference_takes_our_config_as_it_is(name):
    own = getattr(sfumato, name)()
    theirs = getattr(diffusers, name).from_config(own.config)
    own.set_timesteps(7)
    theirs.set_timesteps(7)
    np.testing.assert_allclose(own.timesteps.numpy(), theirs.timesteps.numpy(), rtol=1e-6)
    assert float(own.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    assert isinstance(own.init_noise_sigma, torch.Tensor) == isinstance(theirs.init_noise_sigma, torch.Tensor)


VE = [name for name in SCHEDULERS if not getattr(schedulers, name).needs_grid and "EDM" not in name]


@pytest.mark.parametrize("name", [name for name in VE if name != "DPMSolverSDEScheduler"])
def test_a_step_before_set_timesteps(name):
    x, output = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    found = []
    for library in (sfumato, diffusers):
        scheduler = getattr(library, name)(beta_schedule="scaled_linear")
        t = scheduler.timesteps[10]
        torch.manual_seed(0)
        scaled = scheduler.scale_model_input(x, t)
        found.append((scaled, scheduler.step(output, t, x, return_dict=False)[0]))
    for own, theirs in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
@pytest.mark.parametrize("guided", [True, False])
def test_encoded_prompts(shape, guided, ours, theirs):
    how = {"device": "cpu", "num_images_per_prompt": 2, "do_classifier_free_guidance": guided}
    how |= {"negative_prompt": ["dog", "the heart"]} if guided else {}
    own, expected = (pipe(shape).encode_prompt(["a cat", "the red heart"], **how) for pipe in (ours, theirs))
    assert len(own) == len(expected)
    for a, b in zip(own, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert distance(a, b) < FLOAT32


def test_the_index_says_the_same(ours, theirs):
    own, expected = ours().config, theirs().config
    keys = [key for key in expected if key[0] != "_"]
    assert {key: list(own[key]) if own[key] else own[key] for key in keys} == {
        key: list(expected[key]) if expected[key] else expected[key] for key in keys
    }
    assert set(ours().components) == set(theirs().components)


def test_models_count_and_name_the_same(ours, theirs):
    for part in ("unet", "vae"):
        own, expected = getattr(ours(), part), getattr(theirs(), part)
        assert set(own.attn_processors) == set(expected.attn_processors)
        assert own.num_parameters() == expected.num_parameters()
    ours().unet.set_attn_processor(theirs().unet.attn_processors)
    own, expected = ours().text_encoder, theirs().text_encoder
    assert own.num_parameters() == expected.num_parameters()


def test_images_are_prepared_the_same():
    from diffusers.image_processor import VaeImageProcessor

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (21, 34, 3), dtype=np.uint8))
    own, theirs = sfumato.VaeImageProcessor(vae_scale_factor=8), VaeImageProcessor(vae_scale_factor=8)
    for size in ({}, {"height": 16, "width": 24}):
        pixels = own.preprocess(picture, **size)
        assert distance(pixels, theirs.preprocess(picture, **size)) < FLOAT32
        assert np.array_equal(own.postprocess(pixels, "np"), theirs.postprocess(pixels, "np"))
        assert own.postprocess(pixels)[0].tobytes() == theirs.postprocess(pixels)[0].tobytes()


def test_masks_are_prepared_the_same(ours):
    from diffusers.image_processor import VaeImageProcessor

    pipe = sfumato.StableDiffusionInpaintPipeline(**ours().components)
    how = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
    own, theirs = pipe.mask_processor, VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor, **how)
    levels = np.random.default_rng(0).integers(0, 256, (27, 21), dtype=np.uint8)
    mask, picture = Image.fromarray(levels), Image.fromarray(np.dstack([levels] * 3))
    array = levels.astype(np.float32) / 255
    for one in (mask, picture, [mask, mask], array[None], array[None, ..., None], torch.from_numpy(array)[None, None]):
        for size in ({}, {"height": 16, "width": 24}):
            expected = theirs.preprocess(one, **size)
            assert torch.equal(own.preprocess(one, **size), expected)
    soft = {"vae_scale_factor": 2, "do_resize": False, "do_convert_grayscale": True, "do_normalize": False}
    whole = sfumato.VaeImageProcessor(**soft).preprocess(mask)
    assert torch.equal(whole, VaeImageProcessor(**soft).preprocess(mask))
    assert own.blur(mask, blur_factor=3).tobytes() == theirs.blur(mask, blur_factor=3).tobytes()
    spot = Image.new("L", (21, 27))
    spot.paste(255, (4, 6, 9, 15))
    box = own.get_crop_region(spot, 16, 16, pad=2)
    assert box == theirs.get_crop_region(spot, 16, 16, pad=2)
    painted = Image.new("RGB", (16, 16), "red")
    over = own.apply_overlay(spot, picture, painted, box)
    assert over.tobytes() == theirs.apply_overlay(spot, picture, painted, box).convert("RGB").tobytes()
    with pytest.raises(UsageError, match="mask_processor cannot be replaced"):
        pipe.mask_processor = theirs
    assert not hasattr(ours(), "mask_processor")


def test_schedules_of_ten_steps():
    from diffusers.schedulers import AysSchedules

    assert schedulers.AysSchedules == AysSchedules


def test_a_text_encoder_of_the_ecosystem_reads_our_batches(ours, theirs):
    batch = ours().tokenizer(["a cat", "the dog"], padding=True, return_tensors="pt")
    expected = theirs().tokenizer(["a cat", "the dog"], padding=True, return_tensors="pt")
    assert isinstance(theirs().text_encoder, transformers.CLIPTextModel)
    assert distance(theirs().text_encoder(**batch)[0], ours().text_encoder(**batch)[0]) < FLOAT32
    assert list(batch) == list(expected)
