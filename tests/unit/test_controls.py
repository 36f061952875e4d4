"""Controls of requests: files found and checked, pictures fitted, results repeated, memory planned."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sfumato
from sfumato.configs import ControlNetConfig, UNet2DConditionConfig
from sfumato.errors import CheckpointError, MissingExtra, UsageError
from sfumato.models.packed import is_packed
from sfumato.pipelines.conditioning import Conditioning
from sfumato.pipelines.controlling import open_control, with_sizes
from sfumato.pipelines.guidance import Guidance
from sfumato.pipelines.recipe import checked
from sfumato.pipelines.residuals import Steered
from sfumato.pipelines.sizes import read_sizes
from sfumato.preprocess import control_image, prepare
from sfumato.request import PREPROCESSORS, Control, GenerateRequest
from sfumato.runtime.choices import count_parameters, task_of
from sfumato.runtime.facts import facts_named
from sfumato.runtime.plan import plan
from support.checkpoints import FULL_SIZE_UNET, SHAPES
from support.control import control_config, control_net, control_picture, union_net


@pytest.fixture(scope="module")
def files(checkpoints, tmp_path_factory):
    """A folder with two ControlNets and two pictures."""
    root = tmp_path_factory.mktemp("controls")
    control_net(sfumato).save_pretrained(root / "net")
    control_net(sfumato, seed=1).save_pretrained(root / "other")
    control_net(sfumato, "sdxl").save_pretrained(root / "xl")
    control_picture().save(root / "picture.png")
    control_picture(32, 16, seed=1).save(root / "wide.png")
    return root


@pytest.fixture(scope="module")
def pipeline(checkpoints):
    return sfumato.load(checkpoints(), device="cpu", dtype=torch.float32)


def request(files, *controls, **fields):
    made = tuple(
        Control(**{"model": str(files / "net"), "image": str(files / "picture.png")} | one) for one in controls
    )
    return GenerateRequest(**{"prompt": "a photo", "seed": 3, "steps": 3, "controls": made} | fields)


def arrays(result):
    return [np.asarray(image).astype(int) for image in result.images]


def test_a_request_is_the_call_of_the_ecosystem(files, pipeline, checkpoints):
    result = pipeline.generate(request(files, {"scale": 0.7, "end": 0.8}))
    assert is_packed(pipeline.unet)
    assert all(is_packed(net) for net in pipeline.place.kept.values())
    other = sfumato.StableDiffusionControlNetPipeline.from_pretrained(
        checkpoints(), controlnet=sfumato.ControlNetModel.from_pretrained(files / "net")
    )
    other.set_progress_bar_config(disable=True)
    call = {"controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.8, "num_inference_steps": 3}
    again = other(
        "a photo", image=Image.open(files / "picture.png"), generator=torch.Generator().manual_seed(3), **call
    )
    # By another engine, and rounded to eight bits.
    assert abs(arrays(result)[0] - np.asarray(again.images[0]).astype(int)).max() <= 1
    plain = pipeline.generate(request(files))
    assert abs(arrays(result)[0] - arrays(plain)[0]).max() > 10
    assert pipeline.place.kept == {}


def test_recipes_repeat_controls_and_refuse_others(files, pipeline, tmp_path):
    first = pipeline.generate(request(files, {}, {"model": str(files / "other"), "guess": True}))
    told, scheduler = checked(first.recipes[0], "here")
    assert [one.weights is not None and one.sha256 is not None for one in told.controls] == [True, True]
    assert GenerateRequest.from_dict(told.to_dict()) == told
    pipeline.scheduler = scheduler
    assert (arrays(pipeline.generate(told.replace(scheduler=None)))[0] == arrays(first)[0]).all()
    swapped = told.controls[0].replace(model=str(files / "other"))
    with pytest.raises(UsageError, match="differ from the recipe's"):
        pipeline.generate(told.replace(controls=(swapped,)))
    moved = told.controls[0].replace(image=str(files / "wide.png"))
    with pytest.raises(UsageError, match="is not the image that the recipe was made with"):
        pipeline.generate(told.replace(controls=(moved,)))
    recipe = first.recipes[0]
    del recipe["request"]["controls"][0]["weights"]
    with pytest.raises(UsageError, match="does not identify the files of its controls"):
        checked(recipe, "here")


def test_networks_are_read_once_and_share_a_run(files, pipeline, monkeypatch):
    pipeline.generate(request(files, {}, {"scale": 0.5, "preprocessor": "invert"}))
    (net,) = pipeline.place.kept.values()
    monkeypatch.setattr(type(open_control(str(files / "net"))), "load", lambda *_: pytest.fail("read again"))
    pipeline.generate(request(files, {"scale": 0.2}, count=2))
    assert list(pipeline.place.kept.values()) == [net]


def test_images_of_a_batch_are_those_made_alone(files, pipeline):
    batch = pipeline.generate(request(files, {}, count=2))
    alone = [pipeline.generate(request(files, {}, seed=seed)) for seed in batch.seeds]
    assert all((one == arrays(other)[0]).all() for one, other in zip(arrays(batch), alone, strict=True))


def test_staged_networks_leave_memory_and_come_back(files, checkpoints, pipeline):
    wanted = arrays(pipeline.generate(request(files, {})))[0]
    staged = sfumato.load(
        checkpoints(), device="cpu", dtype=torch.float32, offload="staged", request=request(files, {})
    )
    for _ in range(2):
        assert (arrays(staged.generate(request(files, {})))[0] == wanted).all()
        assert {net.device.type for net in staged.place.kept.values()} == {"meta"}


def test_layers_scale_single_residuals(files, pipeline):
    none = pipeline.generate(request(files))
    count = len(control_net(sfumato).controlnet_down_blocks) + 1
    silent = pipeline.generate(request(files, {"layers": (0.0,) * count}))
    assert (arrays(none)[0] == arrays(silent)[0]).all()
    ones = pipeline.generate(request(files, {"layers": (1.0,) * count}))
    assert (arrays(ones)[0] == arrays(pipeline.generate(request(files, {})))[0]).all()
    with pytest.raises(UsageError, match=f"got 2 scales for the network's {count} layers"):
        pipeline.generate(request(files, {"layers": (1.0, 0.5)}))


def test_pictures_are_kept_as_the_networks_saw_them(files, pipeline):
    result = pipeline.generate(request(files, {"image": str(files / "wide.png"), "preprocessor": "invert"}))
    assert [one.size for one in result.controls] == [(16, 16)]
    assert any("wide.png of 32 × 16 was cropped to 16 × 16" in note for note in result.notes)
    middle = Image.open(files / "wide.png").crop((8, 0, 24, 16))
    assert (np.asarray(result.controls[0]) == 255 - np.asarray(middle)).all()


@pytest.mark.parametrize(("how", "size"), [("crop", (24, 8)), ("pad", (24, 8)), ("stretch", (24, 8)), ("pad", (8, 24))])
def test_other_shapes_are_cropped_padded_or_stretched(how, size):
    image = Image.new("RGB", (16, 16), "white")
    made, note = control_image(image, size, how, "none")
    assert made.size == size
    words = {"crop": "cropped", "pad": "padded", "stretch": "stretched"}
    assert note == f"16 × 16 was {words[how]} to {size[0]} × {size[1]}"
    black = (np.asarray(made) == 0).all(axis=2).mean()
    assert black == pytest.approx(2 / 3 if how == "pad" else 0, abs=0.01)
    assert control_image(image, (8, 8), how, "none")[1] is None


def test_one_pixel_is_a_picture_too(files, pipeline, tmp_path):
    Image.new("RGBA", (1, 1), (255, 0, 0, 128)).save(tmp_path / "dot.png")
    for kind in PREPROCESSORS:
        made, _ = control_image(Image.open(tmp_path / "dot.png").convert("RGB"), (64, 64), "pad", kind)
        assert made.size == (64, 64)
    control_picture().convert("P").save(tmp_path / "palette.png")
    pipeline.generate(request(files, {"image": str(tmp_path / "palette.png")}, steps=1))
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(UsageError, match="has more than 67 million pixels; make it smaller first"):
        pipeline.generate(request(files, {"image": str(tmp_path / "huge.png")}))


def bars():
    pixels = np.full((64, 64, 3), 200, dtype=np.uint8)
    pixels[:, 20:24] = 30  # a dark line, four pixels wide
    return Image.fromarray(pixels)


def test_preprocessors_find_the_line():
    import cv2

    image = bars()
    made = {kind: np.asarray(prepare(kind, image)).astype(int) for kind in PREPROCESSORS}
    assert all(one.shape == (64, 64, 3) for one in made.values())
    assert (made["canny"] == cv2.Canny(np.asarray(image), 100, 200)[..., None]).all()
    columns = {kind: set(np.flatnonzero(one[32, :, 0] > 100).tolist()) for kind, one in made.items()}
    assert columns["canny"] == {19, 24} or columns["canny"] <= {19, 20, 23, 24}
    assert columns["scribble"] >= {20, 21, 22, 23}
    assert columns["lineart"] == {20, 21, 22, 23}
    assert columns["softedge"] >= {19, 20, 23, 24}
    assert 45 not in columns["softedge"] | columns["scribble"] | columns["lineart"] | columns["canny"]
    assert columns["threshold"] == set(range(64)) - {20, 21, 22, 23}
    assert (made["invert"] == 255 - np.asarray(image)).all()
    assert 30 < made["blur"][32, 21, 0] < 200 == made["blur"][32, 63, 0]
    assert (made["tile"] == np.asarray(image)).mean() > 0.8
    assert len(np.unique(made["recolor"])) == 2


def test_without_opencv_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(MissingExtra, match=r"pip install 'sfumato\[control\]'"):
        prepare("canny", bars())
    assert prepare("invert", bars()).size == (64, 64)


BAD = {
    "a control's start, 0.8, must be below its end, 0.5": {"start": 0.8, "end": 0.5},
    "preprocessor must be none, canny": {"preprocessor": "cany"},
    "fit must be crop, pad or stretch": {"fit": "squeeze"},
    "end must be a number from 0 to 1": {"end": 2.0},
}


@pytest.mark.parametrize(("message", "fields"), BAD.items(), ids=BAD)
def test_what_a_control_cannot_say(message, fields):
    with pytest.raises(UsageError) as error:
        Control(model="net", image="picture.png", **fields)
    assert message in str(error.value)


def test_files_that_are_no_controlnet(files, pipeline, checkpoints, tmp_path):
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    wrong = {
        "is a LoRA, not a ControlNet": str(tmp_path / "lora.safetensors"),
        "is a whole checkpoint, not a ControlNet": str(checkpoints()),
        "is a UNet2DConditionModel, not a ControlNet": str(checkpoints() / "unet"),
    }
    for message, model in wrong.items():
        with pytest.raises(CheckpointError) as error:
            pipeline.generate(request(files, {"model": model}))
        assert message in str(error.value)
    with pytest.raises(UsageError, match="was made for Stable Diffusion XL, not for this checkpoint"):
        pipeline.generate(request(files, {"model": str(files / "xl")}))
    with pytest.raises(UsageError, match="there is no image"):
        pipeline.generate(request(files, {"image": "nowhere.png"}))


@pytest.mark.parametrize("shape", ["sd15", "sd21", "sdxl"])
def test_parameters_are_counted_from_the_config(shape):
    net = control_net(sfumato, shape)
    assert count_parameters(net.config) == sum(one.numel() for one in net.parameters())


def test_parameters_of_a_union_are_counted_too():
    net = union_net(sfumato)
    assert count_parameters(net.config) == sum(one.numel() for one in net.parameters())


def test_plans_count_the_networks(files, checkpoints):
    """At its full size a ControlNet is 0.36 thousand million parameters, and costs two fifths of a step."""
    shared = {key: value for key, value in FULL_SIZE_UNET.items() if key in ControlNetConfig()}
    assert count_parameters(ControlNetConfig(**shared)) == 361_279_120
    sizes = read_sizes(checkpoints())
    with_net = with_sizes(sizes, request(files, {}, {}))
    assert with_net.unet.parameters - sizes.unet.parameters == count_parameters(ControlNetConfig(**control_config()))
    facts, asked = facts_named("m1-8gb"), request(files, width=64, height=64)
    plain, steered = (plan(facts, one, asked) for one in (sizes, with_net))
    assert steered.peak_bytes > plain.peak_bytes
    assert steered.seconds > plain.seconds
    full = dataclasses.replace(sizes, unet_config=UNet2DConditionConfig(**FULL_SIZE_UNET))
    both = dataclasses.replace(full, control_configs=(ControlNetConfig(**shared),))
    work = [sum(layer.operations for layer in task_of(one, asked.replace(width=128, height=128)).unet_layers) for one in (full, both)]  # fmt: skip
    assert 1.3 < work[1] / work[0] < 1.45
    assert SHAPES["sd15"].unet["block_out_channels"] == [16, 16, 32, 32]


def test_a_request_that_does_not_fit_is_refused_with_its_networks(files, checkpoints, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "sfumato.pipelines.loading.plan", lambda facts, sizes, *_: seen.append(sizes) or plan(facts, sizes, *_)
    )
    sfumato.load(checkpoints(), device="cpu", request=request(files, {}))
    assert len(seen[0].control_configs) == 1


def test_a_union_sees_all_pictures_of_a_request_in_one_call(files, checkpoints, monkeypatch):
    union_net(sfumato).save_pretrained(files / "union")
    pipeline = sfumato.load(checkpoints("sdxl"), device="cpu", dtype=torch.float32)
    calls = []
    steer = sfumato.ControlNetUnionModel.steer
    monkeypatch.setattr(sfumato.ControlNetUnionModel, "steer", lambda *a: calls.append(1) or steer(*a))
    one, two = (
        {"model": str(files / "union"), "mode": "depth"},
        {"model": str(files / "union"), "preprocessor": "canny"},
    )
    made = {}
    for name, controls in {"one": [one], "two": [one, two], "in turns": [one | {"end": 0.5}, two]}.items():
        calls.clear()
        result = pipeline.generate(request(files, *controls, steps=2, guidance_scale=1.0))
        made[name] = (arrays(result)[0], len(calls))
    assert [count for _, count in made.values()] == [2, 2, 3]
    assert abs(made["one"][0] - made["two"][0]).max() > 1
    told, _ = checked(result.recipes[0], "here")
    assert told.controls[0].mode == "depth"
    with pytest.raises(UsageError, match=r"set the control's mode to the kind of "):
        pipeline.generate(request(files, one | {"mode": None}))
    with pytest.raises(UsageError, match="mode must be openpose, depth"):
        Control(model="net", image="picture.png", mode="depht")


def test_tiles_have_residuals_of_what_they_show(pipeline):
    """As many pixels of the picture as the tile has, and what it makes of these once for all steps."""
    net, seen = control_net(sfumato), []
    embed = net.embed
    net.embed = lambda picture: seen.append(tuple(picture.shape[2:])) or embed(picture)
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    told = Conditioning((torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(3)),), steered=(Steered(net, picture),))  # fmt: skip
    with torch.no_grad():
        tiled = Guidance(unet=pipeline.unet, conditioning=told, scale=1.0, tile=8)
        made = tiled(x, 1.0)
        count = len(seen)
        assert set(seen) == {(16, 16)}
        tiled(x, 2.0)
        assert len(seen) == count
        corner = Conditioning(told.embeds, steered=(Steered(net, picture[:, :, :16, :16]),))
        alone = Guidance(unet=pipeline.unet, conditioning=corner, scale=1.0)(x[:, :, :8, :8], 1.0)
    # Only one tile covers the first two rows and columns.
    assert torch.allclose(made[:, :, :2, :2], alone[:, :, :2, :2], atol=1e-5)


def test_a_controlnet_is_no_checkpoint(files, tmp_path):
    with pytest.raises(
        CheckpointError, match="is one ControlNetModel, not a whole checkpoint; give the folder of a checkpoint"
    ):
        sfumato.load(files / "net")
    save_file({key: one.contiguous() for key, one in control_net(sfumato).state_dict().items()}, tmp_path / "net.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match="is a ControlNet, not a checkpoint"):
        sfumato.load(tmp_path / "net.safetensors")
