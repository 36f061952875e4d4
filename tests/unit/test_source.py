"""Pipelines from one file: what is given in its place, precisions, what is said of it, and folders made of it."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.errors import CheckpointError, ConfigError, OutputError, UnknownArgument, UsageError
from sfumato.families import FAMILIES
from sfumato.pipelines.components import ComponentFiles
from sfumato.pipelines.convert import convert
from sfumato.pipelines.sizes import read_sizes
from sfumato.pipelines.source import Folder, open_source
from sfumato.request import GenerateRequest
from support.checkpoints import VAE, randomize
from support.hub import FakeHub
from support.single_files import TINY, same_state

UNET = "model.diffusion_model."


def latents(pipe, **call):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, generator=generator, output_type="latent", **call).images


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_file_draws_as_its_folder_does(name, written):
    parts, file, folder = written(name)
    pipe = sfumato.DiffusionPipeline.from_single_file(file, config=folder)
    assert type(pipe).__name__ == TINY[name].pipeline
    assert all(same_state(getattr(pipe, role), model.state_dict()) for role, model in parts.items())
    expected = latents(sfumato.DiffusionPipeline.from_pretrained(folder))
    assert torch.equal(latents(pipe), expected)
    assert torch.equal(latents(sfumato.load(file, config=folder, dtype=torch.float32)), expected)
    assert pipe.name == str(file)
    assert pipe.parts.options == {"config": str(folder)}
    assert pipe.parts.family.title == FAMILIES[name].title


def test_keywords(written):
    _, file, folder = written()
    vae = randomize(sfumato.AutoencoderKL(**VAE), seed=9)
    scheduler = sfumato.EulerDiscreteScheduler()
    options = {"config": folder, "local_files_only": True, "safety_checker": None, "disable_mmap": True}
    pipe = sfumato.StableDiffusionPipeline.from_single_file(
        str(file), vae=vae, scheduler=scheduler, torch_dtype=torch.float64, **options
    )
    assert pipe.vae is vae
    assert type(pipe.scheduler) is sfumato.EulerDiscreteScheduler
    assert pipe.unet.dtype == torch.float64
    mixed = sfumato.DiffusionPipeline.from_single_file(file, dtype={"unet": torch.float64}, **options)
    assert (mixed.unet.dtype, mixed.vae.dtype) == (torch.float64, torch.float32)
    assert sfumato.StableDiffusionPipeline.from_single_file(file, **options).dtype == torch.float32
    assert type(sfumato.StableDiffusionImg2ImgPipeline.from_single_file(file, **options)).__name__.endswith("Img2ImgPipeline")  # fmt: skip
    said = sfumato.DiffusionPipeline.from_single_file(file, prediction_type="v_prediction", **options)
    assert said.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(UnknownArgument, match="from_single_file has no argument 'famly'"):
        sfumato.DiffusionPipeline.from_single_file(file, famly="sdxl")
    with pytest.raises(UsageError, match=r"does not support Stable Diffusion 1\.x; use StableDiffusionPipeline"):
        sfumato.StableDiffusionXLPipeline.from_single_file(file, **options)


def test_from_pretrained_takes_a_file(written):
    _, file, folder = written()
    with pytest.raises(
        CheckpointError, match="incomplete, or not of the family sd15"
    ):  # as small as this one is, nothing tells its shape
        sfumato.DiffusionPipeline.from_pretrained(file)
    with pytest.raises(CheckpointError, match=r"is a single file, but a folder is needed.*from_single_file"):
        sfumato.UNet2DConditionModel.from_pretrained(file)
    with pytest.raises(UsageError, match="has no variants"):
        sfumato.DiffusionPipeline.from_pretrained(file, variant="fp16")
    with pytest.raises(UsageError, match="family applies only to single files"):
        sfumato.load(folder, family="sd15")


def test_what_a_file_lacks_comes_from_the_folder_of_its_configs(written, tmp_path):
    parts, file, folder = written("sdxl")
    state = {key: value for key, value in load_file(file).items() if key.startswith(UNET)}
    save_file(state, tmp_path / "bare.safetensors")
    pipe = sfumato.DiffusionPipeline.from_single_file(tmp_path / "bare.safetensors", config=folder)
    assert all(same_state(getattr(pipe, role), model.state_dict()) for role, model in parts.items())
    sizes = read_sizes(open_source(tmp_path / "bare.safetensors", ComponentFiles(), {}, options={"config": folder}))
    assert sizes == read_sizes(Folder(folder, str(tmp_path / "bare.safetensors")))
    configs = tmp_path / "configs"
    for path in folder.rglob("*.json"):
        (configs / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (configs / path.relative_to(folder)).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"no VAE; pass one with vae=….*it also lacks text_encoder and text_enc"):
        sfumato.DiffusionPipeline.from_single_file(tmp_path / "bare.safetensors", config=configs)
    given = {role: parts[role] for role in ("vae", "text_encoder", "text_encoder_2")}
    with pytest.raises(CheckpointError, match="token ids up to 49407"):  # without files of its own, CLIP's
        sfumato.DiffusionPipeline.from_single_file(tmp_path / "bare.safetensors", config=configs, **given)
    given |= {name: getattr(pipe, name) for name in ("tokenizer", "tokenizer_2")}
    pipe = sfumato.DiffusionPipeline.from_single_file(tmp_path / "bare.safetensors", config=configs, **given)
    assert pipe.vae is parts["vae"]


def test_the_scale_of_a_vae_comes_from_the_family(written, tmp_path, caplog):
    _, _, folder = written("sdxl")
    vae = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2}
    vae |= {"up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1}
    save_file(sfumato.AutoencoderKL(**vae).state_dict(), tmp_path / "vae.safetensors")
    lone = sfumato.AutoencoderKL.from_single_file(tmp_path / "vae.safetensors")
    assert "does not contain the scale" in caplog.text
    assert lone.config.scaling_factor == FAMILIES["sd15"].vae["scaling_factor"]
    pipe = sfumato.DiffusionPipeline.from_pretrained(folder, vae=lone)
    assert pipe.vae.config.scaling_factor == FAMILIES["sdxl"].vae["scaling_factor"]
    told = sfumato.AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", family="sd15")
    pipe.vae = told  # said in so many words, and kept
    assert pipe.vae.config.scaling_factor == FAMILIES["sd15"].vae["scaling_factor"]


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_there_and_back(suffix, written, tmp_path):
    for name in TINY:
        parts, file, folder = written(name)
        source = open_source(file, ComponentFiles(), {}, options={"config": folder})
        assert convert(source, tmp_path / f"{name}{suffix}") == ()
        back = open_source(
            tmp_path / f"{name}{suffix}", ComponentFiles(), {}, options={"config": folder} if suffix else {}
        )
        for role, model in parts.items():
            assert same_state(back.load(role), model.state_dict())
        assert back.load("scheduler").config.prediction_type == TINY[name].scheduler.get("prediction_type", "epsilon")
        if not suffix:
            index, theirs = (json.loads((path / "model_index.json").read_text()) for path in (tmp_path / name, folder))
            assert index["_class_name"] == theirs["_class_name"]
            assert {key: value for key, value in index.items() if value != [None, None]}.keys() >= {key for key, value in theirs.items() if isinstance(value, list) and value != [None, None]}  # fmt: skip


def test_precisions_of_what_is_converted(written, tmp_path):
    _, file, folder = written()
    half = {key: value.half() for key, value in load_file(file).items()}
    save_file(half, tmp_path / "half.safetensors")
    source = open_source(tmp_path / "half.safetensors", ComponentFiles(), {}, options={"config": folder})
    convert(source, tmp_path / "own")
    assert Folder(tmp_path / "own", "own").load("unet").dtype == torch.float16
    convert(source, tmp_path / "new.safetensors", dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(tmp_path / "new.safetensors").values()} == {torch.bfloat16}


def test_what_is_not_converted(written, tmp_path):
    _, file, folder = written()
    source = open_source(file, ComponentFiles(), {}, options={"config": folder})
    with pytest.raises(UsageError, match=r"tiny\.safetensors already exists"):
        convert(source, file)
    with pytest.raises(UsageError, match=r"model_index\.json already exists"):
        convert(source, folder)
    with pytest.raises(OutputError):
        convert(source, tmp_path / "none" / "x.safetensors")
    (tmp_path / "c").mkdir()
    for name in ("tokenizer", "text_encoder", "unet", "vae", "scheduler"):
        (tmp_path / "c" / name).symlink_to(folder / name)
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "c" / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
    with pytest.raises(UsageError, match="AutoencoderTiny, which cannot be written to a single file"):
        convert(Folder(tmp_path / "c", "c"), tmp_path / "x.safetensors")
    (tmp_path / "c" / "scheduler").unlink()
    (tmp_path / "c" / "scheduler").mkdir()
    (tmp_path / "c" / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EulerDiscreteScheduler"}')
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (tmp_path / "c" / "model_index.json").write_text(json.dumps(index))
    (note,) = convert(Folder(tmp_path / "c", "c"), tmp_path / "x.safetensors")
    assert note == "a file cannot store a scheduler; it will be loaded with PNDMScheduler, its family's default"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "x.safetensors"]


def test_schedulers_that_do_not_exist(written, tmp_path):
    _, file, folder = written()
    for path in folder.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(folder)).write_bytes(path.read_bytes())
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "Zebra"}')
    with pytest.raises(ConfigError, match="there is no scheduler 'Zebra'"):
        sfumato.DiffusionPipeline.from_single_file(file, config=tmp_path)


def test_a_file_of_the_hub_is_drawn_and_recorded_by_its_name(written, tmp_path, monkeypatch):
    _, file, folder = written()
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "tiny.safetensors").write_bytes(file.read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub = FakeHub(monkeypatch, tmp_path / "cache", {"owner/name": remote})
    name = "https://huggingface.co/owner/name/blob/main/tiny.safetensors"
    pipe = sfumato.DiffusionPipeline.from_single_file(name, config=folder)
    assert len(hub.asked) == 2
    result = pipe.generate(GenerateRequest(prompt="a cat", seed=0, steps=1))
    assert result.recipes[0]["model"] | {"weights": ""} == {
        "name": name,
        "weights": "",
        "options": {"config": str(folder)},
    }
    again = sfumato.load(name, config=folder, local_files_only=True)
    assert len(hub.asked) == 2
    assert again.name == name


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
def test_what_is_written_can_be_read_by_others(written, tmp_path):
    _, file, folder = written()
    (tmp_path / "plain").touch()
    convert(open_source(file, ComponentFiles(), {}, options={"config": folder}), tmp_path / "new.safetensors")
    assert (tmp_path / "new.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
