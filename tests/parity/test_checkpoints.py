"""Folders: ours are read by the reference, theirs by us, in every layout the ecosystem writes."""

from __future__ import annotations

import json
import logging
import shutil

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.errors import CheckpointError
from support.checkpoints import SHAPES, TEXT, VAE, randomize, reference_pipeline, write_tokenizer
from support.compare import FLOAT32, distance, generator

PROMPT = "a photo of the red heart!"


def draw(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPT, num_inference_steps=3, output_type="latent", generator=generator(1)).images


@pytest.mark.parametrize("by", ["ours", "reference"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_both_libraries_draw_the_same_from_one_folder(shape, by, checkpoints):
    folder = checkpoints(shape, by)
    mine = sfumato.DiffusionPipeline.from_pretrained(folder)
    other = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert type(other).__name__ == type(mine).__name__ == "StableDiffusionPipeline"
    assert distance(draw(mine), draw(other)) < FLOAT32


def test_the_reference_reads_our_parts_one_by_one(checkpoints):
    folder = checkpoints("sd21")
    text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    mine = sfumato.CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    ids = torch.tensor([[598, 4, 5, 599]])
    with torch.no_grad():
        assert distance(mine(ids).last_hidden_state, text(ids).last_hidden_state) < FLOAT32
    for name, part in (("UNet2DConditionModel", "unet"), ("AutoencoderKL", "vae")):
        theirs = getattr(diffusers, name).from_pretrained(folder, subfolder=part)
        ours = getattr(sfumato, name).from_pretrained(folder, subfolder=part)
        assert theirs.state_dict().keys() == ours.state_dict().keys()
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
        for key, value in ours.config.items():
            assert theirs.config[key] == value
    for kind in ("DDIMScheduler", "PNDMScheduler"):
        assert getattr(diffusers, kind).from_pretrained(folder, subfolder="scheduler").config.steps_offset == 1


def test_the_image_to_image_class_is_written_and_read(checkpoints, tmp_path):
    pipe = sfumato.StableDiffusionImg2ImgPipeline.from_pretrained(checkpoints())
    pipe.save_pretrained(tmp_path / "saved")
    assert type(sfumato.DiffusionPipeline.from_pretrained(tmp_path / "saved")) is sfumato.StableDiffusionImg2ImgPipeline
    other = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    assert type(other) is diffusers.StableDiffusionImg2ImgPipeline


@pytest.mark.parametrize("by", ["ours", "reference"])
def test_shards(by, checkpoints, tmp_path):
    folder = tmp_path / "sharded"
    if by == "ours":
        sfumato.DiffusionPipeline.from_pretrained(checkpoints("sd15", "reference")).save_pretrained(folder, max_shard_size="100KB")  # fmt: skip
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(checkpoints("sd15"), torch_dtype=torch.float32)
        pipe.save_pretrained(folder, max_shard_size="100KB")
    for part in ("unet", "text_encoder"):
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1
        assert len(list((folder / part).glob("*.safetensors.index.json"))) == 1
    mine = sfumato.DiffusionPipeline.from_pretrained(folder)
    other = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert distance(draw(mine), draw(other)) < FLOAT32


@pytest.mark.parametrize("by", ["ours", "reference"])
@pytest.mark.parametrize("size", ["10GB", "100KB"], ids=["whole", "sharded"])
def test_variants(by, size, checkpoints, tmp_path):
    folder = tmp_path / "half"
    library = sfumato if by == "ours" else diffusers
    half = library.DiffusionPipeline.from_pretrained(checkpoints(), torch_dtype=torch.float16)
    half.save_pretrained(folder, variant="fp16", max_shard_size=size)
    assert list((folder / "unet").glob("*fp16*.safetensors"))
    assert not (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()
    mine = sfumato.DiffusionPipeline.from_pretrained(folder, variant="fp16", use_safetensors=True)
    other = diffusers.DiffusionPipeline.from_pretrained(folder, variant="fp16", torch_dtype=torch.float32)
    assert distance(draw(mine), draw(other)) < FLOAT32
    with pytest.raises(CheckpointError, match=r"has no (text_encoder|model|diffusion_pytorch_model)"):
        sfumato.DiffusionPipeline.from_pretrained(folder)


def test_a_component_without_the_variant_falls_back_and_says_so(checkpoints, tmp_path, caplog):
    folder = tmp_path / "mixed"
    shutil.copytree(checkpoints(), folder)
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    halves = {key: (value * 2).half() for key, value in load_file(plain).items()}
    save_file(halves, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    with caplog.at_level(logging.WARNING, logger="sfumato"):
        pipe = sfumato.DiffusionPipeline.from_pretrained(folder, variant="fp16")
    assert [record.getMessage() for record in caplog.records] == [
        "no 'fp16' variant of text_encoder, vae; using the plain weights instead"
    ]
    key = "conv_in.weight"
    assert torch.equal(pipe.unet.state_dict()[key], halves[key].float())
    with pytest.raises(CheckpointError, match="no variant 'bf16'"):
        sfumato.DiffusionPipeline.from_pretrained(folder, variant="bf16")


def test_dtypes(checkpoints):
    folder = checkpoints()
    load = sfumato.DiffusionPipeline.from_pretrained
    assert load(folder).dtype == torch.float32
    for keyword in ("torch_dtype", "dtype"):
        pipe = load(folder, **{keyword: torch.bfloat16})
        assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    pipe = load(folder, torch_dtype={"vae": torch.float32, "default": torch.float16})
    assert (pipe.vae.dtype, pipe.unet.dtype, pipe.text_encoder.dtype) == (torch.float32, torch.float16, torch.float16)
    pipe = load(folder, torch_dtype={"unet": torch.bfloat16})
    assert (pipe.vae.dtype, pipe.unet.dtype, pipe.text_encoder.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert sfumato.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float16).dtype == torch.float16
    assert sfumato.AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float16).dtype == torch.float16


def test_components_given_in_place_of_the_stored_ones(checkpoints, tmp_path):
    folder = tmp_path / "partial"
    shutil.copytree(checkpoints(), folder)
    vae = sfumato.AutoencoderKL.from_pretrained(folder / "vae")
    scheduler = sfumato.EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    shutil.rmtree(folder / "vae")  # what is given is not even looked for
    pipe = sfumato.DiffusionPipeline.from_pretrained(folder, vae=vae, scheduler=scheduler, safety_checker=None)
    assert pipe.vae is vae
    assert pipe.scheduler is scheduler
    assert draw(pipe).isfinite().all()


def test_a_safety_checker_in_the_index_is_not_loaded_and_said_so(checkpoints, tmp_path, caplog):
    folder = tmp_path / "checked"
    shutil.copytree(checkpoints(), folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    sfumato.DiffusionPipeline.from_pretrained(folder)
    assert "safety checker" in caplog.text
    caplog.clear()
    sfumato.DiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    assert caplog.text == ""


def test_attention_names_of_the_first_years(tmp_path):
    """Old autoencoders say query, key, value and proj_attn, and keep them as 1×1 convolutions or as matrices."""
    theirs = randomize(diffusers.AutoencoderKL(**VAE))
    state = theirs.state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in state.items()}
    assert any(".proj_attn." in key for key in state)
    theirs.save_config(tmp_path)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    mine = sfumato.AutoencoderKL.from_pretrained(tmp_path)
    z = torch.randn(1, 4, 8, 8, generator=generator())
    with torch.no_grad():
        assert distance(mine.decode(z).sample, theirs.decode(z).sample) < FLOAT32
    mine.save_pretrained(tmp_path / "new")
    assert not any("proj_attn" in key for key in load_file(tmp_path / "new" / "diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("prefix", ["", "text_model."], ids=["bare", "prefixed"])
@pytest.mark.parametrize("position_ids", [False, True])
def test_text_encoder_keys_of_every_age(prefix, position_ids, tmp_path):
    mine = randomize(sfumato.CLIPTextModel(**TEXT))
    state = {key.replace("text_model.", prefix): value for key, value in mine.state_dict().items()}
    if position_ids:
        state[f"{prefix}embeddings.position_ids"] = torch.arange(20)[None]
    mine.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    again = sfumato.CLIPTextModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in mine.state_dict().items())


def test_text_encoders_of_older_config_files(checkpoints, tmp_path):
    """Nested configs and `torch_dtype` of years past are read, and what is written is plain."""
    folder = tmp_path / "old"
    shutil.copytree(checkpoints() / "text_encoder", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16", "_name_or_path": "/x"}))
    sfumato.CLIPTextModel.from_pretrained(folder).save_pretrained(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "torch_dtype" not in written
    assert written["dtype"] == "float32"


def test_pickled_weights_the_reference_writes(tmp_path):
    """Only after `use_safetensors=False`."""
    folder = tmp_path / "pickled"
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    pipe = reference_pipeline(tokenizer=tokenizer)
    pipe.save_pretrained(folder)
    for part, old, new in (
        ("unet", "diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model", "diffusion_pytorch_model"),
        ("text_encoder", "model", "pytorch_model"),
    ):
        file = folder / part / f"{old}.safetensors"
        torch.save(load_file(file), folder / part / f"{new}.bin")
        file.unlink()
    for options in ({}, {"use_safetensors": True}):
        with pytest.raises(CheckpointError, match=r"pickled weights.*use_safetensors=False"):
            sfumato.DiffusionPipeline.from_pretrained(folder, **options)
    mine = sfumato.DiffusionPipeline.from_pretrained(folder, use_safetensors=False)
    assert distance(draw(mine), draw(pipe)) < FLOAT32


def test_saving_again_leaves_no_stale_weights(checkpoints, tmp_path):
    pipe = sfumato.DiffusionPipeline.from_pretrained(checkpoints())
    pipe.save_pretrained(tmp_path, max_shard_size="50KB")
    pipe.save_pretrained(tmp_path)
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    pipe.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert torch.equal(draw(sfumato.DiffusionPipeline.from_pretrained(tmp_path)), draw(pipe))


def test_a_pipeline_of_another_precision_is_written_as_it_is(checkpoints, tmp_path):
    sfumato.DiffusionPipeline.from_pretrained(checkpoints(), torch_dtype=torch.bfloat16).save_pretrained(tmp_path)
    state = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "text_encoder" / "config.json").read_text())["dtype"] == "bfloat16"
