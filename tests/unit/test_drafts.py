"""Drafts: what a request for a quick first look becomes, on every kind of model, and what is kept of it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

import sfumato
from sfumato import AdapterFile, AutoencoderTiny, GenerateRequest, Hires, Mask
from sfumato.checkpoints.family import settings_of
from sfumato.configs import AutoencoderKLConfig, AutoencoderTinyConfig, parse
from sfumato.errors import UsageError
from sfumato.families import FAMILIES, distilled
from sfumato.pipelines import drafts
from sfumato.pipelines.drafts import Sketched, drafted
from sfumato.pipelines.recipe import checked
from support.checkpoints import VAE

DRAFT = GenerateRequest(prompt="a cat", draft=True)
TINY = {
    "encoder_block_out_channels": [8, 8], "num_encoder_blocks": [1, 1], "decoder_block_out_channels": [8, 8],
    "num_decoder_blocks": [1, 1], "block_out_channels": [8, 8],
}  # fmt: skip


def of(family, name: str = "a model", **settings) -> Sketched:
    row = FAMILIES[family] if isinstance(family, str) else family
    return Sketched(name, row, settings_of(row) | settings, parse(AutoencoderKLConfig, row.vae)[0])


BUILT_IN = replace(
    of("sd15", "built-in", steps=20, guidance_scale=3.0), vae=parse(AutoencoderKLConfig, {"latent_channels": 12})[0]
)


def changed(request: GenerateRequest, model: Sketched) -> dict:
    """What the draft fills in."""
    done, notes = drafted(request, model)
    assert len(notes) == 1
    assert done.draft is False
    before = request.to_dict()
    return {name: value for name, value in done.to_dict().items() if before.get(name) != value}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))


def test_without_draft_nothing_changes():
    request = GenerateRequest(prompt="a cat")
    assert drafted(request, BUILT_IN) == (request, [])


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("sd15", {"steps": 10, "scheduler": "unipc"}),
        ("sd21", {"steps": 10, "scheduler": "unipc"}),
        ("sdxl", {"steps": 10, "scheduler": "unipc"}),
        ("sdxl-refiner", {"steps": 10, "scheduler": "unipc"}),
        ("playground", {"steps": 10, "scheduler": "edm_dpmpp_2m"}),
        ("cosxl", {"steps": 10, "scheduler": "edm_dpmpp_2m"}),
        ("sd-turbo", {"steps": 1}),
        ("sdxl-turbo", {"steps": 1}),
        ("sdxl-lightning", {"steps": 4}),
        ("hyper-sdxl", {"steps": 4}),
        (distilled(FAMILIES["sd15"]), {"steps": 4}),
        (replace(FAMILIES["sdxl-lightning"], steps=8), {"steps": 8}),  # as its file's name says
    ],
)
def test_steps_and_scheduler_by_family(family, wanted):
    assert changed(DRAFT, of(family)) == wanted


def test_every_family_has_a_draft_that_its_scheduler_can_take():
    from sfumato import schedulers
    from sfumato.pipelines.components import choose_scheduler

    for row in FAMILIES.values():
        request, _ = drafted(DRAFT, of(row))
        own = getattr(schedulers, row.scheduler["_class_name"]).from_config(row.scheduler)
        scheduler = choose_scheduler(request.scheduler, own)
        scheduler.set_timesteps(request.chosen_steps)
        assert scheduler.config.prediction_type == row.prediction_type
        assert 1 <= len(scheduler.table(0).rows) <= 20


def test_the_built_in_model_uses_its_few_steps():
    few = {"file": "built-in/few-step"}
    wanted = {"steps": 4, "scheduler": "lcm", "guidance_scale": 1.0, "vae": "built-in/tiny-vae", "adapters": [few]}
    assert changed(DRAFT, BUILT_IN) == wanted
    sketch = AdapterFile(file="built-in/sketch")
    assert changed(DRAFT.replace(adapters=(sketch,)), BUILT_IN) == wanted | {"adapters": [sketch.to_dict(), few]}
    own = DRAFT.replace(adapters=(AdapterFile(file="built-in/few-step", weight=0.9),))
    assert "adapters" not in changed(own, BUILT_IN)


GENERAL = {"steps": 10, "scheduler": "unipc", "vae": "built-in/tiny-vae"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"steps": 3}, {"scheduler": "lcm", "guidance_scale": 1.0, "vae": "built-in/tiny-vae"}),
        ({"scheduler": "euler"}, {"steps": 10, "vae": "built-in/tiny-vae"}),
        ({"guidance_scale": 5.0}, GENERAL),
        ({"refiner": "other"}, GENERAL),
        ({"spacing": "karras"}, {"steps": 10, "vae": "built-in/tiny-vae"}),
        ({"timesteps": (999, 500)}, {"steps": 10, "vae": "built-in/tiny-vae"}),
        ({"vae": "mine"}, {"steps": 4, "scheduler": "lcm", "guidance_scale": 1.0}),
    ],
)
def test_what_was_given_wins(given, wanted):
    found = changed(DRAFT.replace(**given), BUILT_IN)
    assert {name: value for name, value in found.items() if name != "adapters"} == wanted
    assert ("adapters" in found) == ("lcm" in wanted.values())


@pytest.mark.parametrize(
    ("family", "given", "steps"),
    [("sd-turbo", {"strength": 0.5}, 2), ("sd-turbo", {}, 2), ("sd-turbo", {"strength": 0}, 10), ("sd15", {}, 10),
     ("sd-turbo", {"mask": Mask(file="mask.png")}, 1), (distilled(FAMILIES["sd15"]), {}, 4)],
)  # fmt: skip
def test_from_an_image_a_step_is_left(family, given, steps):
    assert changed(DRAFT.replace(image="photo.png", **given), of(family))["steps"] == steps


def test_a_tiny_decoder_is_taken_from_the_models_folder_or_the_cache(tmp_path, monkeypatch):
    model = tmp_path / "models" / "dreamshaper.safetensors"
    model.parent.mkdir()
    model.write_bytes(b"")
    sd, xl = (replace(of(name), path=str(model)) for name in ("sd15", "sdxl"))
    assert (sd.tiny, xl.tiny, of("playground").tiny) == (None, None, None)
    AutoencoderTiny(**TINY).save_pretrained(model.parent / "taesdxl")
    sfumato.AutoencoderKL(**VAE).save_pretrained(model.parent / "taesd-not")  # no tiny one in spite of its name
    (model.parent / "taesd.safetensors").write_bytes(b"damaged")
    assert (sd.tiny, xl.tiny) == (None, str(model.parent / "taesdxl"))
    shutil.copy(model.parent / "taesdxl" / "diffusion_pytorch_model.safetensors", model.parent / "taesd.safetensors")
    assert sd.tiny == str(model.parent / "taesd.safetensors")
    cached = tmp_path / "cache" / "models--madebyollin--taesd"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(model.parent / "taesdxl", cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert of("sd15").tiny == "madebyollin/taesd"
    assert of("sdxl").tiny is None
    assert sd.tiny == str(model.parent / "taesd.safetensors")


def test_where_a_tiny_decoder_would_not_do_there_is_none(monkeypatch):
    monkeypatch.setattr(drafts, "open_vae", lambda name: pytest.fail(name))
    tiny = parse(AutoencoderTinyConfig, {})[0]
    assert [of("pix2pix").tiny, of("x4-upscaler").tiny, replace(of("sd15"), vae=tiny).tiny] == [None] * 3


def test_the_note_says_what_is_done_and_how_to_get_the_full_image():
    notes = [drafted(DRAFT, model)[1][0] for model in (BUILT_IN, of("sd15"), of("sd-turbo"), of("playground"))]
    end = "; for the full image, drop draft (--draft)"
    assert notes == [
        f"a draft: 4 steps of lcm with built-in/few-step, decoded by built-in/tiny-vae{end}",
        f"a draft: 10 steps of unipc, decoded by the model's VAE (--vae madebyollin/taesd would be quicker){end}",
        f"a draft: 1 step of the model's scheduler, decoded by the model's VAE (--vae madebyollin/taesd would be quicker){end}",
        f"a draft: 10 steps of edm_dpmpp_2m, decoded by the model's VAE{end}",
    ]


def test_a_draft_is_drawn_and_repeated_from_its_recipe(ours):
    pipe = ours()
    result = pipe.generate(DRAFT.replace(seed=3, hires=Hires(scale=2, upscaler="lanczos")))
    recipe = result.recipes[0]
    assert result.notes[0].startswith("a draft: 10 steps of unipc")
    assert recipe["scheduler"]["class"] == "UniPCMultistepScheduler"
    assert (recipe["request"]["steps"], recipe["request"]["scheduler"]) == (10, "unipc")
    assert "draft" not in recipe["request"]
    request, scheduler = checked(recipe, "the image")
    again = ours()
    again.scheduler = scheduler
    assert again.generate(request.replace(scheduler=None)).images[0].tobytes() == result.images[0].tobytes()


def test_loading_for_a_draft_plans_what_it_will_do(tmp_path):
    request = GenerateRequest(prompt="a house", draft=True, seed=1)
    pipe = sfumato.load(device="cpu", dtype=torch.float32, request=request)
    result = pipe.generate(request)
    assert (result.request.steps, result.request.vae) == (4, "built-in/tiny-vae")
    assert result.recipes[0]["request"]["vae_weights"]
    assert pipe.generate(request.replace(draft=False)).request.steps == 20


def test_a_draft_promises_nothing():
    with pytest.raises(UsageError, match="draft and fast cannot be combined"):
        DRAFT.replace(fast=sfumato.Fast(promise=30))
