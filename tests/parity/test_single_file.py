"""Checkpoints in one file: equal, tensor for tensor, to the reference's own conversion of the same file."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.checkpoints.single_file import open_single_file
from sfumato.checkpoints.write_file import original_state
from sfumato.pipelines.components import ComponentFiles
from sfumato.pipelines.convert import convert
from sfumato.pipelines.source import Folder, open_source
from support.checkpoints import EVERY, VAE, randomize, write_reference
from support.pictures import compare, picture
from support.single_files import TINY, parts_of, same_state, write_tiny

CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}


@pytest.fixture(scope="module")
def checkpoints_of(tmp_path_factory):
    """`checkpoints_of("sdxl")`: our models, the file with them in the original layout, and the reference's folder."""
    made = {}

    def get(name: str):
        if name not in made:
            parts, file, folder = write_tiny(tmp_path_factory.mktemp(name), name)
            if name == "sd21":  # real files have a projection, and the reference counts on it
                state = load_file(file)
                state["cond_stage_model.model.text_projection"] = torch.randn(24, 24)
                save_file(state, file, {"modelspec.prediction_type": "v_prediction"})
            made[name] = parts, file, folder
        return made[name]

    return get


@pytest.mark.parametrize("name", TINY)
def test_what_is_read_is_what_the_reference_reads(name, checkpoints_of):
    parts, file, folder = checkpoints_of(name)
    kind = getattr(diffusers, TINY[name].pipeline)
    theirs = kind.from_single_file(file, config=str(folder), torch_dtype=torch.float32, local_files_only=True)
    for role, written in parts.items():
        ours = getattr(sfumato, CLASSES[role]).from_single_file(file, config=folder)
        assert same_state(ours, written.state_dict()), role
        assert same_state(ours, getattr(theirs, role).state_dict()), role
        assert ours.config.replace(extra={}) == written.config
        assert not ours.training


@pytest.mark.parametrize("name", TINY)
def test_models_of_the_reference_read_what_is_written(name, checkpoints_of):
    parts, file, folder = checkpoints_of(name)
    for role in ("unet", "vae"):
        cls = getattr(diffusers, CLASSES[role])
        theirs = cls.from_single_file(file, config=str(folder), subfolder=role, torch_dtype=torch.float32)
        assert same_state(parts[role], theirs.state_dict())


@pytest.mark.parametrize("name", TINY)
def test_the_original_layout_is_the_one_the_reference_converts(name):
    parts = parts_of(TINY[name])
    config = parts["unet"].config.to_dict()
    state = original_state(parts["unet"], "original", "model.diffusion_model.")
    theirs = single_file_utils.convert_ldm_unet_checkpoint(dict(state), config)
    assert same_state(parts["unet"], theirs)
    state = original_state(parts["vae"], "original", "first_stage_model.")
    assert same_state(parts["vae"], single_file_utils.convert_ldm_vae_checkpoint(dict(state), parts["vae"].config))


def test_a_file_is_known_without_a_folder(checkpoints_of):
    """In small, shapes say nothing; the names of the text encoders do."""
    for name, row in (("sd15", "sd15"), ("sd21", "sd21"), ("sdxl", "sdxl"), ("sdxl-refiner", "sdxl-refiner"), ("sd15-inpainting", "sd15-inpainting")):  # fmt: skip
        _, file, _ = checkpoints_of(name)
        found = open_single_file(file).detected
        assert found.family.name == row
        assert found.missing == {}
        assert found.scheduler.get("prediction_type", "epsilon") == TINY[name].scheduler.get(
            "prediction_type", "epsilon"
        )


@pytest.mark.parametrize("naming", ["original", "ours"])
def test_an_autoencoder_in_a_file_of_its_own(naming, tmp_path):
    ours = randomize(sfumato.AutoencoderKL(**VAE))
    file = tmp_path / "vae.safetensors"
    state = original_state(ours, "original") if naming == "original" else ours.state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, file)
    ours.save_pretrained(tmp_path / "vae")
    again = sfumato.AutoencoderKL.from_single_file(file, config=tmp_path / "vae")
    theirs = diffusers.AutoencoderKL.from_single_file(file, config=str(tmp_path / "vae"), torch_dtype=torch.float32)
    assert same_state(again, ours.state_dict())
    assert same_state(again, theirs.state_dict())


def test_old_names_of_autoencoders(tmp_path):
    ours = randomize(sfumato.AutoencoderKL(**VAE))
    state = ours.state_dict()
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value for key, value in state.items()}
    state = {key: value[:, :, None, None] if ".query.weight" in key else value for key, value in state.items()}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "vae.safetensors")
    ours.save_pretrained(tmp_path / "vae")
    again = sfumato.AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", config=tmp_path / "vae")
    assert same_state(again, ours.state_dict())


@pytest.mark.parametrize("name", [name for name in TINY if name != "sd15-inpainting"])
def test_pictures_are_the_references(name, checkpoints_of):
    _, file, folder = checkpoints_of(name)
    options = {"config": str(folder), "torch_dtype": torch.float32, "local_files_only": True}
    theirs = getattr(diffusers, TINY[name].pipeline).from_single_file(file, **options)
    ours = getattr(sfumato, TINY[name].pipeline).from_single_file(file, **options)
    theirs.set_progress_bar_config(disable=True)
    ours.set_progress_bar_config(disable=True)
    call = {"image": picture(), "strength": 0.7} if "Img2Img" in TINY[name].pipeline else {}
    compare(ours, theirs, prompt="a photo of an astronaut", **call)


@pytest.mark.parametrize("name", [name for name in TINY if name != "sd15-inpainting"])
def test_what_is_converted_is_drawn_by_the_reference(name, checkpoints_of, tmp_path):
    parts, file, folder = checkpoints_of(name)
    source = open_source(file, ComponentFiles(), {}, options={"config": folder})
    convert(source, tmp_path / "made")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "made")
    assert type(theirs).__name__ == TINY[name].pipeline
    assert all(same_state(model, getattr(theirs, role).state_dict()) for role, model in parts.items())
    theirs.set_progress_bar_config(disable=True)
    ours = sfumato.DiffusionPipeline.from_pretrained(tmp_path / "made")
    ours.set_progress_bar_config(disable=True)
    call = {"image": picture(), "strength": 0.7} if "Img2Img" in TINY[name].pipeline else {}
    compare(ours, theirs, prompt="the red heart", **call)


def test_a_file_distilled_for_few_steps_draws_as_the_references_folder(tmp_path):
    """The reference's own conversion of a file leaves out what reads the guidance."""
    shape = EVERY["lcm"]
    folder = write_reference(tmp_path / "folder", shape)
    convert(Folder(folder, "folder"), tmp_path / "lcm.safetensors")
    theirs = diffusers.LatentConsistencyModelPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    ours = sfumato.DiffusionPipeline.from_single_file(tmp_path / "lcm.safetensors", config=folder)
    assert isinstance(ours, sfumato.LatentConsistencyModelPipeline)
    ours.set_progress_bar_config(disable=True)
    compare(ours, theirs, prompt="the red heart", num_inference_steps=4)
