"""Pictures of the relatives that read an image, against the reference: edited, by depth, enlarged, and alike."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch

import sfumato
from sfumato.errors import UsageError
from support.compare import FLOAT32, distance, generator
from support.pictures import PROMPTS, change_scheduler, compare, picture
from support.relatives import RELATIVES, write_relative

# The reference estimates depth under autocast, which has nothing to do in float32 and says so.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")


def read(folder, name, **parts):
    """The reference's pipeline of a folder; parts that are null there have to be named, but for optional ones."""
    parts |= {"depth_estimator": None, "feature_extractor": None} if name == "depth" else {}
    return getattr(diffusers, RELATIVES[name][0]).from_pretrained(folder, torch_dtype=torch.float32, **parts)


@pytest.fixture
def both(once):
    """`both("edit")`: the pipelines of both libraries over one folder, written by the reference."""

    def get(name):
        folder = once(f"relatives/{name}", lambda folder: write_relative(folder, name))
        mine = sfumato.DiffusionPipeline.from_pretrained(folder)
        other = read(folder, name)
        assert type(mine).__name__ == RELATIVES[name][0]
        for pipe in (mine, other):
            pipe.set_progress_bar_config(disable=True)
        return mine, other

    return get


RANDOM = generator(3)
LATENTS = torch.randn(1, 4, 8, 8, generator=RANDOM)
TENSOR = torch.rand(1, 3, 16, 16, generator=RANDOM)
DEPTH = torch.rand(1, 20, 24, generator=RANDOM)
TWO = [picture(seed=1), picture(seed=2)]
CALLS = {
    "edit": (
        {"prompt": PROMPTS[0], "image": picture()},
        {
            "by default": {},
            "closely": {"image_guidance_scale": 3.0, "negative_prompt": "horse"},
            "not at all closely": {"image_guidance_scale": 0.9},
            "no guidance": {"guidance_scale": 1.0},
            "several": {"prompt": PROMPTS, "image": TWO, "num_images_per_prompt": 1, "seed": [1, 2]},
            "of one": {"num_images_per_prompt": 2},
            "not square": {"image": picture(24, 40)},
            "a tensor": {"image": TENSOR},
            "latents": {"image": LATENTS},
            "noise of one's own": {"latents": LATENTS},
        },
    ),
    "edit-xl": (
        {"prompt": PROMPTS[0], "image": picture()},
        {
            "by default": {},
            "closely": {"image_guidance_scale": 3.0, "negative_prompt": "horse", "prompt_2": "cat", "guidance_rescale": 0.6},
            "not at all closely": {"image_guidance_scale": 0.9},
            "several": {"prompt": PROMPTS, "num_images_per_prompt": 1},
            "a size": {"width": 24, "height": 40, "original_size": (20, 30), "crops_coords_top_left": (1, 2)},
            "a part": {"denoising_end": 0.6, "num_inference_steps": 5},
        },
    ),
    "depth": (
        {"prompt": PROMPTS[0], "image": picture(24, 40), "depth_map": DEPTH},
        {
            "by default": {},
            "half": {"strength": 0.5, "negative_prompt": "horse"},
            "all": {"strength": 1.0, "guidance_scale": 1.0},
            "several": {"prompt": PROMPTS, "image": [picture(24, 40, seed=1), picture(24, 40, seed=2)], "depth_map": torch.cat([DEPTH, DEPTH**2]), "seed": [1, 2]},
            "of one": {"num_images_per_prompt": 2},
            "a tensor": {"image": torch.rand(1, 3, 40, 24, generator=RANDOM)},
        },
    ),
    "by-depth": (
        {"prompt": PROMPTS[0], "image": picture(24, 40)},
        {
            "by default": {},
            "several": {"prompt": PROMPTS, "image": [picture(24, 40, seed=1), picture(24, 40, seed=2)], "seed": [1, 2]},
            "a map": {"depth_map": DEPTH, "num_images_per_prompt": 2},
        },
    ),
    "x4": (
        {"prompt": PROMPTS[0], "image": picture(16, 12)},
        {
            "by default": {},
            "noise": {"noise_level": 150, "negative_prompt": "horse"},
            "none": {"noise_level": 0, "guidance_scale": 1.0},
            "several": {"prompt": PROMPTS, "image": TWO, "seed": [1, 2]},
            "of one": {"num_images_per_prompt": 2},
            "no multiple": {"image": picture(15, 22)},
            "a tensor": {"image": TENSOR},
            "noise of one's own": {"latents": torch.randn(1, 4, 12, 16, generator=RANDOM)},
        },
    ),
    "x2": (
        {"prompt": PROMPTS[0], "image": picture(16, 16)},
        {
            "by default": {},
            "latents": {"image": LATENTS, "negative_prompt": "horse"},
            "no guidance": {"guidance_scale": 1.0},
            "no prompt": {"guidance_scale": 0},
            "several": {"prompt": PROMPTS, "image": TWO},
            "noise of one's own": {"latents": torch.randn(1, 4, 16, 16, generator=RANDOM)},
        },
    ),
    "variations": (
        {"image": picture(40, 24)},
        {
            "by default": {},
            "no guidance": {"guidance_scale": 1.0},
            "several": {"image": TWO, "seed": [1, 2]},
            "of one": {"num_images_per_prompt": 2},
            "a size": {"width": 24, "height": 32},
            "a tensor": {"image": torch.rand(1, 3, 28, 28, generator=RANDOM)},
            "noise of one's own": {"latents": LATENTS},
        },
    ),
    "likeness": (
        {"prompt": PROMPTS[0], "image": picture(40, 24)},
        {
            "by default": {},
            "noise": {"noise_level": 300, "negative_prompt": "horse"},
            "no guidance": {"guidance_scale": 1.0},
            "no prompt": {"prompt": None},
            "of one": {"num_images_per_prompt": 2, "noise_level": 5},
            "several": {"prompt": PROMPTS, "image": TWO, "noise_level": 9, "seed": [1, 2]},
            "embeddings": {"image": None, "image_embeds": torch.randn(1, 24, generator=RANDOM), "noise_level": 40},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELATIVES)
def test_calls(name, both):
    mine, other = both(name)
    given, calls = CALLS[name]
    for what, call in calls.items():
        try:
            compare(mine, other, **{"num_inference_steps": 4} | given | call)
        except Exception as error:
            raise AssertionError(what) from error


@pytest.mark.parametrize("name", ["edit", "depth", "x4", "likeness"])
@pytest.mark.parametrize(
    "scheduler", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler"]
)
def test_other_schedulers(name, scheduler, both):
    mine, other = both(name)
    change_scheduler(scheduler, mine, other)
    compare(mine, other, **{"num_inference_steps": 4} | CALLS[name][0])


@pytest.mark.parametrize("name", RELATIVES)
def test_pixels_outputs_and_older_callbacks(name, both):
    mine, other = both(name)
    call, seen = {"num_inference_steps": 3, "output_type": "np"} | CALLS[name][0], []
    follow = {}
    if name in ("edit-xl", "x4", "x2", "variations", "likeness"):
        follow = {
            "callback": lambda step, t, latents: seen[-1].append((step, float(t), latents.clone())),
            "callback_steps": 2,
        }
    results = []
    for pipe in (mine, other):
        seen.append([])
        results.append(pipe(generator=generator(), **call, **follow))
        assert type(pipe(generator=generator(), return_dict=False, **call)) is tuple
    a, b = results
    assert np.abs(a.images - b.images).max() < FLOAT32
    assert type(a).__name__ == type(b).__name__
    assert len(seen[0]) == len(seen[1])
    assert bool(seen[0]) == bool(follow)
    for one, another in zip(*seen, strict=True):
        assert one[0] == another[0]
        assert name == "x2" or one[1] == another[1]  # where ours counts in the logarithms that its U-Net reads
        assert distance(one[2], another[2]) < FLOAT32


@pytest.mark.parametrize("name", RELATIVES)
def test_what_is_written_is_read_by_either_library(name, both, tmp_path):
    mine, _ = both(name)
    mine.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    again = sfumato.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert index["_class_name"] == RELATIVES[name][0]
    other = read(tmp_path / "again", name, **{part: None for part, entry in index.items() if entry == [None, None]})
    given = dict(CALLS[name][0])
    if RELATIVES[name][1].get("feature_extractor") == "clip":  # which ours has built in, and does not write
        given["image"] = torch.rand(1, 3, 28, 28, generator=generator())
    for pipe in (again, other):
        pipe.set_progress_bar_config(disable=True)
    compare(again, other, num_inference_steps=2, **given)


def test_callbacks_see_and_change_what_is_read(both):
    for name, tensor in (("edit", "image_latents"), ("depth", "depth_mask"), ("by-depth", "depth_mask")):
        mine, other = both(name)
        seen: dict[bool, list] = {True: [], False: []}

        def change(pipe, step, timestep, tensors, seen=seen, tensor=tensor):
            own = isinstance(pipe, sfumato.DiffusionPipeline)
            seen[own].append(tensors[tensor].clone())
            return {"latents": tensors["latents"] * 0.9, tensor: tensors[tensor] * 0.8}

        names = ["latents", tensor, "prompt_embeds"]
        compare(mine, other, **CALLS[name][0], callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
        for a, b in zip(seen[True], seen[False], strict=True):
            ordered = torch.cat(b.chunk(3)[::-1]) if name == "edit" else b  # ours begins with nothing, theirs ends so
            assert distance(a, ordered) < FLOAT32


BAD = {
    "edit": [({"image": None}, "image is missing")],
    "depth": [
        ({"depth_map": None}, "pass an image and its depth map"),
        ({"depth_map": torch.zeros(1, 1, 8, 8)}, r"depth_map must have the shape \(P, H, W\), not \(1, 1, 8, 8\)"),
        ({"depth_map": torch.zeros(3, 8, 8)}, "got 3 depth maps for 1 images"),
    ],
    "by-depth": [({"image": LATENTS}, "depth cannot be estimated from latents; pass a depth_map")],
    "x4": [({"noise_level": 351}, "noise_level must be at most 350"), ({"callback": print, "callback_steps": 0}, "callback_steps")],
    "variations": [({"image": None}, "image is missing")],
    "likeness": [({"image": None}, "either an image or image_embeds"), ({"image_embeds": torch.zeros(1, 24)}, "either an image or")],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_sentence(name, both):
    for call, says in BAD[name]:
        with pytest.raises(UsageError, match=says):
            both(name)[0](**CALLS[name][0] | call)


def test_a_flat_depth_map_is_no_accident(both):
    """Where the reference divides by zero."""
    out = both("depth")[0](
        **CALLS["depth"][0] | {"depth_map": torch.ones(1, 8, 8)}, num_inference_steps=2, output_type="np"
    )
    assert np.isfinite(out.images).all()


def test_upscalers_have_the_scale_of_their_family(both):
    """The configs of early copies do not name it, and so say what Stable Diffusion 1's is."""
    mine, _ = both("x4")
    parts = mine.components | {"vae": sfumato.AutoencoderKL(**mine.vae.config.to_dict() | {"scaling_factor": 0.18215})}
    assert type(mine)(**parts).vae.config.scaling_factor == 0.08333
