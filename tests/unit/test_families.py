"""The table of families: every row can be built, known again, and planned; what the rows say of one another holds."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
import transformers

import sfumato
from sfumato.configs import AutoencoderKLConfig, CLIPTextConfig, UNet2DConditionConfig, parse
from sfumato.errors import MemoryPlanError, UsageError
from sfumato.families import FAMILIES, find
from sfumato.request import GenerateRequest
from sfumato.runtime.choices import Wishes, published_sizes
from sfumato.runtime.facts import machine
from sfumato.runtime.plan import plan
from support.families import REAL_ENCODERS, REAL_UNETS

ROWS = list(FAMILIES.values())
NAMED = {
    "SD 1.5": "sd15", "SD inpainting": "sd15-inpainting", "depth": "depth", "InstructPix2Pix": "pix2pix",
    "unCLIP h": "unclip-h", "x4 upscaler": "x4-upscaler", "x2 latent upscaler": "x2-upscaler", "SDXL base": "sdxl",
    "SDXL inpainting": "sdxl-inpainting", "SDXL refiner": "sdxl-refiner", "SSD-1B": "ssd-1b", "Segmind Vega": "vega",
    "KOALA 700M": "koala-700m", "KOALA 1B": "koala-1b", "small-sd": "small-sd", "BK-SDM tiny": "tiny-sd",
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_whole(row):
    unet, unknown = parse(UNet2DConditionConfig, row.unet)
    assert unknown == []
    vae, unknown = parse(AutoencoderKLConfig, row.vae)
    assert unknown == []
    for encoder in row.encoders:
        assert parse(CLIPTextConfig, encoder.config)[1] == []
    # What the encoders give is what the U-Net reads.
    if row.encoders:
        assert sum(encoder.config["hidden_size"] for encoder in row.encoders) == unet.cross_attention_dim
    if row.sizes:
        pooled = next(encoder for encoder in row.encoders if encoder.projected).config["projection_dim"]
        ids = sum(1 if name == "aesthetic_score" else 2 for name in row.sizes)
        assert pooled + ids * unet.addition_time_embed_dim == unet.projection_class_embeddings_input_dim
    assert (unet.in_channels > vae.latent_channels) == bool(row.extra)
    assert (unet.class_embed_type is not None or unet.num_class_embeds is not None) == bool(row.labels)
    assert hasattr(__import__("diffusers"), row.pipeline)
    assert row.prediction_type in ("epsilon", "v_prediction", "sample")
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.steps = 3


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_family_is_known_by_its_unet(row):
    found = find(row.unet, encoders=len(row.encoders), prediction_type=row.prediction_type)
    assert row in found
    # Those of the same shapes differ in what their files are called, or in what lies beside the weights.
    for other in found[: found.index(row)]:
        assert row.named or row.markers or other.unet["sample_size"] != row.unet["sample_size"]


@pytest.mark.parametrize("name", NAMED)
def test_published_unets_are_known(name):
    config = parse(UNet2DConditionConfig, REAL_UNETS[name])[0].to_dict()
    row = find(config)[0]
    assert row.name == NAMED[name]
    own = parse(UNet2DConditionConfig, row.unet)[0]
    with torch.device("meta"):
        ours, theirs = (sfumato.UNet2DConditionModel(**dict(values)) for values in (row.unet, REAL_UNETS[name]))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert own.heads == parse(UNet2DConditionConfig, REAL_UNETS[name])[0].heads


def test_published_text_encoders_are_those_of_the_rows():
    for title, values in REAL_ENCODERS.items():
        (config,) = {
            tuple(sorted(encoder.config.items())) for row in ROWS for encoder in row.encoders if encoder.title == title
        }
        assert dict(config).items() >= {key: value for key, value in values.items() if key != "max_position_embeddings"}.items()  # fmt: skip
        read = transformers.CLIPTextConfig(**dict(config))
        assert read.hidden_act == dict(config).get("hidden_act", "quick_gelu")


def test_a_pruned_unet_of_nobodys_is_of_the_family_it_was_pruned_from():
    own = FAMILIES["sdxl"].unet | {"transformer_layers_per_block": (1, 1, 3)}
    assert find(own)[0].name == "sdxl"
    assert find(own, prediction_type="epsilon")[0].name == "sdxl"
    assert find(own | {"in_channels": 9})[0].name == "sdxl-inpainting"


def test_prediction_and_encoders_tell_apart_what_shapes_do_not():
    unet = FAMILIES["sd21"].unet
    assert find(unet, prediction_type="v_prediction")[0].name == "sd21"
    assert find(unet, prediction_type="epsilon")[0].name == "sd21-base"
    narrow = FAMILIES["sdxl"].unet | {"cross_attention_dim": 40}
    assert find(narrow, encoders=1)[0].name == "sdxl-refiner"
    assert find(narrow, encoders=2)[0].name == "sdxl"
    assert find({"in_channels": 77}) == []


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("sd_xl_turbo_1.0_fp16", "sdxl-turbo"),
        ("sdxl-turbo", "sdxl-turbo"),
        ("sd_turbo", "sd-turbo"),
        ("sdxl_lightning_8step", "sdxl-lightning"),
        ("dreamshaperXL_v21TurboDPMSDE", None),
        ("asd-turbo", None),
    ],
)
def test_official_names(name, family):
    text = re.sub(r"[^a-z0-9]+", "-", name.lower())
    found = [row.name for row in ROWS if row.named and re.search(row.named, text)]
    assert found == ([] if family is None else [family])


def test_every_family_can_be_planned_and_a_laptop_is_told_what_fits():
    facts = machine("rtx-4090")
    for row in ROWS:
        if not row.encoders:
            with pytest.raises(UsageError, match="does not use a prompt"):
                published_sizes(row.name)
            continue
        sizes = published_sizes(row.name)
        found = plan(facts, sizes, GenerateRequest(prompt="a fox", width=512, height=512))
        assert found.peak_bytes > 2 * sizes.unet.parameters
        assert found.vae_dtype != "float16" or not sizes.vae_config.force_upcast


def test_stable_diffusion_xl_in_numbers():
    sizes = published_sizes("sdxl")
    assert (sizes.text_encoder.parameters, sizes.unet.parameters) == (123_060_480 + 694_659_840, 2_567_463_684)
    assert sizes.picture_size == (1024, 1024)
    request = GenerateRequest(prompt="a fox")
    roomy, card = machine("h200"), machine("t4-16gb")
    assert plan(roomy, sizes, request).offload == "none"
    assert plan(card, sizes, request).peak_bytes < card.accelerator_memory_free
    staged = plan(machine("m2-16gb"), sizes, request)
    assert (staged.offload, staged.unet_dtype) == ("staged", "float16")
    assert plan(machine("laptop-8gb"), sizes, request).eight_bit
    for name in ("m1-8gb", "laptop-8gb"):
        with pytest.raises(MemoryPlanError, match=r"1024 × 1024 needs at least .* GB; .* GB are free"):
            plan(machine(name), sizes, request, Wishes(eight_bit=False))


def test_the_table_needs_no_torch():
    code = "import sys, sfumato.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
