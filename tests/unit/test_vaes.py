"""Another VAE for a checkpoint, by a request: folders and files, what it changes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato import AutoencoderKL, AutoencoderTiny, GenerateRequest, Hires
from sfumato.checkpoints.builtin import RELATIVES
from sfumato.errors import CheckpointError, UsageError
from sfumato.models.base import Model
from sfumato.pipelines.controlling import with_sizes
from sfumato.pipelines.recipe import checked
from sfumato.pipelines.sizes import read_sizes
from sfumato.pipelines.vaes import open_vae
from support.checkpoints import VAE, XL_VAE, randomize

TINY = {
    "encoder_block_out_channels": [8, 8], "num_encoder_blocks": [1, 2], "decoder_block_out_channels": [8, 8],
    "num_decoder_blocks": [2, 0], "block_out_channels": [8, 8],
}  # fmt: skip
REQUEST = GenerateRequest(prompt="a cat", steps=2, seed=5, width=16, height=16)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("vaes")
    told = VAE | {"block_out_channels": [32, 32], "norm_num_groups": 32}  # the widths whose groups are known
    randomize(AutoencoderKL(**told), 1).save_pretrained(root / "kl")
    randomize(AutoencoderKL(**XL_VAE), 2).save_pretrained(root / "xl")
    randomize(AutoencoderTiny(**TINY), 3).save_pretrained(root / "tiny")
    return root


def drawn(pipe, **changes) -> bytes:
    return pipe.generate(REQUEST.replace(**changes)).images[0].tobytes()


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_a_folder_and_its_file_decode_as_the_assigned_network(ours, files, kind):
    own, pipe, assigned = drawn(ours()), ours(), ours()
    assigned.vae = (AutoencoderKL if kind == "kl" else AutoencoderTiny).from_pretrained(files / kind)
    wanted = drawn(assigned)
    file = str(files / kind / "diffusion_pytorch_model.safetensors")
    assert own != wanted == drawn(pipe, vae=str(files / kind)) == drawn(pipe, vae=file)
    assert drawn(pipe) == own  # the checkpoint's own VAE is back


def test_images_are_also_encoded_with_it(ours, files, tmp_path):
    image = tmp_path / "image.png"
    ours().generate(REQUEST).images[0].save(image)
    assigned, start = ours(), {"image": str(image), "strength": 0.5, "width": None, "height": None}
    assigned.vae = AutoencoderKL.from_pretrained(files / "kl")
    assert drawn(assigned, **start) == drawn(ours(), vae=str(files / "kl"), **start)


@pytest.mark.parametrize("changes", [{}, {"hires": Hires(upscaler="lanczos")}, {"count": 2}])
def test_the_recipe_names_it_with_its_hash_and_repeats_the_image(ours, files, changes):
    result = ours().generate(REQUEST.replace(vae=str(files / "kl"), **changes))
    recipe = result.recipes[-1]
    assert recipe["request"]["vae"] == str(files / "kl")
    assert recipe["model"]["weights"] == ours().generate(REQUEST).recipes[0]["model"]["weights"]
    request, _ = checked(recipe, "the image")
    assert len(request.vae_weights) == 32
    assert ours().generate(request).images[0].tobytes() == result.images[-1].tobytes()
    with pytest.raises(UsageError, match=r"xl differ from the recipe's|scale 0.13025"):
        ours().generate(request.replace(vae=str(files / "xl")))
    with pytest.raises(UsageError, match=r"the weights of .*tiny differ from the recipe's; restore the original"):
        ours().generate(request.replace(vae=str(files / "tiny")))
    del recipe["request"]["vae_weights"]
    with pytest.raises(UsageError, match="does not identify its VAE"):
        checked(recipe, "the image")


def test_it_stays_loaded_for_the_next_request(ours, files, monkeypatch):
    pipe = ours()
    first = drawn(pipe, vae=str(files / "tiny"))
    monkeypatch.setattr(type(open_vae(str(files / "tiny"))), "load", lambda *_, **__: pytest.fail("read again"))
    assert drawn(pipe, vae=str(files / "tiny")) == first


def test_what_was_loaded_for_one_request_reads_it_only_for_its_stage(files, checkpoints, monkeypatch):
    request, read = REQUEST.replace(vae=str(files / "kl")), []
    pipe = sfumato.load(checkpoints(), device="cpu", dtype=torch.float32, request=request, once=True)
    reload = Model.reload
    monkeypatch.setattr(Model, "reload", lambda self, **how: read.append(type(self).__name__) or reload(self, **how))
    result = pipe.generate(request)
    assert result.plan.offload == "staged"
    assert read[-3:] == ["UNet2DConditionModel", "AutoencoderKL", "AutoencoderKL"]  # and that of the recipe's hash
    assert pipe.place.vae[1].device.type == "meta"


def test_plans_count_it_instead_of_the_own_one(files, checkpoints):
    sizes = read_sizes(checkpoints())
    other = with_sizes(sizes, REQUEST.replace(vae=str(files / "tiny")))
    assert other.vae == open_vae(str(files / "tiny" / "diffusion_pytorch_model.safetensors")).size
    assert (other.vae.parameters, other.unet) == (10_943, sizes.unet)
    assert other.picture_size == sizes.picture_size


@pytest.mark.parametrize("name", ["built-in/tiny-vae", "tiny"])
def test_shapes_tell_the_config_of_a_tiny_autoencoder(files, name):
    folder = RELATIVES / "tiny-vae" if "/" in name else files / name
    told, wanted = (open_vae(str(one)).config for one in (folder / "diffusion_pytorch_model.safetensors", folder))
    ignored = {"_class_name", "_diffusers_version", "block_out_channels"}
    assert {k: v for k, v in told.to_dict().items() if k not in ignored} == {
        k: v for k, v in wanted.to_dict().items() if k not in ignored
    }


def test_latents_of_another_family_are_refused_before_any_weight_is_read(ours, files, checkpoints, monkeypatch):
    monkeypatch.setattr(Model, "from_folder", classmethod(lambda *_, **__: pytest.fail("read")))
    wrong = {
        "built-in/tiny-vae": "tiny-vae was made for latents of 12 channels, but this checkpoint has 4; give a VAE of",
        str(files / "xl"): r"xl was made for latents of scale 0\.13025, but this checkpoint has 0\.18215",
    }
    for name, message in wrong.items():
        with pytest.raises(UsageError, match=message):
            sfumato.load(checkpoints(), device="cpu", request=REQUEST.replace(vae=name))
        with pytest.raises(UsageError, match=message):
            ours().generate(REQUEST.replace(vae=name))


def test_another_number_of_pixels_is_refused(ours, tmp_path):
    config = TINY | {key: [8, 8, 8] for key in TINY if "channels" in key} | {"num_encoder_blocks": [1, 1, 1]}
    AutoencoderTiny(**config | {"num_decoder_blocks": [1, 1, 1]}).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="latents of 4 pixels per side, but this checkpoint has 2"):
        ours().generate(REQUEST.replace(vae=str(tmp_path)))


def test_what_is_no_vae_is_named(files, checkpoints, tmp_path):
    half = RELATIVES / "tiny-vae" / "diffusion_pytorch_model.safetensors"
    save_file(AutoencoderTiny(**TINY).decoder.state_dict(prefix="decoder."), tmp_path / "half.safetensors")
    (tmp_path / "pickled.ckpt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    assert open_vae(str(half)).cls is AutoencoderTiny
    wrong = {
        "built-in/few-step": r"few-step\.safetensors is a LoRA, not a VAE; give a file with a VAE",
        "built-in/edges": "edges is a ControlNetModel, not a VAE; give an AutoencoderKL or an AutoencoderTiny",
        "built-in": "built-in is a whole checkpoint, not a VAE; give a VAE, such as its folder vae",
        str(checkpoints() / "unet"): "is a UNet2DConditionModel, not a VAE",
        str(tmp_path / "half.safetensors"): "has only the decoder of a tiny autoencoder; get",
        str(tmp_path / "pickled.ckpt"): "contains pickled weights, which can run code",
        str(tmp_path / "nowhere.safetensors"): "there is no file",
        str(tmp_path / "empty"): "config.json",
        "./nowhere": "there is no folder ./nowhere",
        "owner/name": "is not completely in the local cache",
    }
    for name, message in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            open_vae(name)


def test_a_whole_checkpoint_in_a_file_is_no_vae(written):
    with pytest.raises(CheckpointError, match="is a whole checkpoint, not a VAE; give a file with nothing but a VAE"):
        open_vae(str(written("sd15")[1]))
