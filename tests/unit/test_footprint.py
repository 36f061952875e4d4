"""Counting layers from configs: exact against the networks themselves; peaks and times that obey their laws."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sfumato.configs import AutoencoderKLConfig, AutoencoderTinyConfig, CLIPTextConfig, UNet2DConditionConfig, parse
from sfumato.models import (
    AutoencoderKL,
    AutoencoderTiny,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UNet2DConditionModel,
)
from sfumato.models.eight_bits import eight_bit_layers, lighten
from sfumato.request import GenerateRequest
from sfumato.runtime.choices import Plan, Wishes, count_parameters, published_sizes, task_of
from sfumato.runtime.clip_layers import text_layers
from sfumato.runtime.facts import machine
from sfumato.runtime.footprint import footprint, seconds_of
from sfumato.runtime.layers import decoder_layers, encoder_layers, unet_layers
from sfumato.runtime.plan import plan
from support.checkpoints import PRUNED, REFINER, SHAPES, TEXT_2, XL
from support.families import LATENT_UPSCALER, SHALLOW

SD15 = published_sizes("sd15")
CONFIGS = [
    pytest.param(parse(cls, getattr(shape, part))[0], model, id=f"{name}-{part}")
    for name, shape in SHAPES.items()
    for part, cls, model in (
        ("text", CLIPTextConfig, CLIPTextModel),
        ("unet", UNet2DConditionConfig, UNet2DConditionModel),
        ("vae", AutoencoderKLConfig, AutoencoderKL),
    )
]
CONFIGS += [pytest.param(AutoencoderTinyConfig(), AutoencoderTiny, id="tiny-vae")]
FAMILIES = {"xl": XL, "refiner": REFINER, "pruned": PRUNED, "shallow": SHALLOW, "upscaler": LATENT_UPSCALER}
CONFIGS += [
    pytest.param(parse(UNet2DConditionConfig, values)[0], UNet2DConditionModel, id=name)
    for name, values in FAMILIES.items()
]
WHOLE = [
    (SD15.text_encoder_config, CLIPTextModel),
    (SD15.unet_config, UNet2DConditionModel),
    (SD15.vae_config, AutoencoderKL),
]
CONFIGS += [pytest.param(config, model, id=f"sd15-full-{model.__name__}") for config, model in WHOLE]


def on_meta(model, config):
    with torch.device("meta"):
        return model(config).eval()


@pytest.mark.parametrize(("config", "model"), CONFIGS)
def test_parameters_are_counted_exactly(config, model):
    assert count_parameters(config) == sum(value.numel() for value in on_meta(model, config).parameters())


def counted(layers):
    return sum(layer.operations for layer in layers)


def measured(run):
    """Torch's own count of the multiplications of one pass over empty tensors."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", ["sd15", "sd21", "odd"])
def test_operations_are_torchs_own_count(shape):
    unet = parse(UNet2DConditionConfig, SHAPES[shape].unet)[0]
    vae = parse(AutoencoderKLConfig, SHAPES[shape].vae)[0]
    text = parse(CLIPTextConfig, SHAPES[shape].text)[0]
    with torch.device("meta"):
        x, words = torch.empty(1, 4, 12, 20), torch.empty(1, 7, unet.per_block("cross_attention_dim")[0])
        ids = torch.zeros(1, 9, dtype=torch.long)
        pixels = torch.empty(1, 3, 16, 32)
    network = on_meta(UNet2DConditionModel, unet)
    assert counted(unet_layers(unet, 12, 20, 7)) == measured(lambda: network(x, torch.empty(1, device="meta"), words))
    coder = on_meta(AutoencoderKL, vae)
    assert counted(decoder_layers(vae, 12, 20)) == measured(lambda: coder.decode(x))
    assert counted(encoder_layers(vae, 16, 32)) == pytest.approx(measured(lambda: coder.encode(pixels)), rel=0.01)
    # The causal mask makes torch count what it does not skip.
    reader = on_meta(CLIPTextModel, text)
    assert counted(text_layers(text, 9)) == pytest.approx(measured(lambda: reader(ids)), rel=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_operations_of_the_other_families_are_torchs_own_count(name):
    config = parse(UNet2DConditionConfig, FAMILIES[name])[0]
    network = on_meta(UNet2DConditionModel, config)
    with torch.device("meta"):
        x, words, time = (
            torch.empty(1, config.in_channels, 16, 24),
            torch.empty(1, 7, config.cross_attention_dim),
            torch.empty(1),
        )
        options = {"timestep_cond": torch.empty(1, config.time_cond_proj_dim)} if config.time_cond_proj_dim else {}
        if config.addition_embed_type is not None:
            count = (config.projection_class_embeddings_input_dim - 40) // 8
            options["added_cond_kwargs"] = {"text_embeds": torch.empty(1, 40), "time_ids": torch.empty(1, count)}
    ours = counted(unet_layers(config, 16, 24, 7))
    theirs = measured(lambda: network(x, time, words, **options))
    # Fixed filters run over a padded picture on the way up, of which the padding is not counted here.
    assert ours == (pytest.approx(theirs, rel=1e-3) if config.is_k else theirs)


@pytest.mark.parametrize("config", [SD15.unet_config, published_sizes("sdxl").unet_config], ids=["sd15", "sdxl"])
def test_what_is_stored_in_eight_bits_is_counted(config):
    network = on_meta(UNet2DConditionModel, config)
    lighten(network, None)
    large = sum(layer.values.numel() for _, layer in eight_bit_layers(network))
    counted = sum(layer.parameters for layer in unet_layers(config, 64, 64, 77) if layer.is_large)
    assert counted == pytest.approx(large, rel=1e-3)


def test_adapters_keep_weights_in_eight_bits_as_such():
    def peak(**wishes):
        found = [plan(machine("laptop-8gb"), sizes, GenerateRequest(prompt=""), Wishes(offload="staged", **wishes)) for sizes in (SD15, kept)]  # fmt: skip
        return found[1].peak_bytes - found[0].peak_bytes

    kept = dataclasses.replace(SD15, kept={"unet": 400_000_000})
    assert peak(eight_bit=True) == pytest.approx(peak() / 4, rel=0.01)


def test_the_projection_of_a_text_encoder_is_counted():
    config = parse(CLIPTextConfig, TEXT_2)[0]
    layers = text_layers(config, 20, projected=True)
    assert sum(layer.parameters for layer in layers) == sum(
        value.numel() for value in on_meta(CLIPTextModelWithProjection, config).parameters()
    )


def test_stable_diffusion_15_is_itself():
    assert (SD15.text_encoder.parameters, SD15.unet.parameters, SD15.vae.parameters) == (123060480, 859520964, 83653863)
    layers = unet_layers(SD15.unet_config, 64, 64, 77)
    dense = 2 * sum(layer.operations for layer in layers if layer.kind in ("conv", "linear"))
    attention = 2 * sum(layer.operations for layer in layers if layer.kind == "attention")
    assert dense == pytest.approx(1.35e12, rel=0.01)
    assert attention == pytest.approx(0.25e12, rel=0.02)
    assert SD15.picture_size == (512, 512)


MACHINES = ["t4-16gb", "rtx-4090", "h200", "m1-8gb", "m2-16gb", "m3-max-64gb", "m4-16gb", "m5-24gb", "laptop-8gb"]
sides = st.integers(1, 40).map(lambda n: 64 * n)


def base_plan(facts, request) -> Plan:
    return plan(facts, SD15, GenerateRequest(width=256, height=256, **request))


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(MACHINES), width=sides, height=sides, more=sides, count=st.integers(1, 8))
def test_more_work_never_takes_less(name, width, height, more, count):
    facts = machine(name)
    choices = base_plan(facts, {})

    def cost(**request):
        task = task_of(SD15, GenerateRequest(**request))
        return footprint(facts, task, choices), seconds_of(facts, task, choices)

    small, fast = cost(width=width, height=height, count=count)
    for request in (
        {"width": width + more, "height": height, "count": count},
        {"width": width, "height": height + more, "count": count},
        {"width": width, "height": height, "count": count + 1},
    ):
        large, slow = cost(**request)
        assert (large.encode, large.denoise, large.decode) >= (small.encode, small.denoise, small.decode)
        assert large.denoise >= small.denoise
        assert large.decode >= small.decode
        assert slow > fast
    alone, less = cost(width=width, height=height, count=count, guidance_scale=1.0)
    assert alone.denoise <= small.denoise
    assert less < fast


def test_each_saving_saves():
    facts = machine("rtx-4090")
    task = task_of(SD15, GenerateRequest(width=1024, height=1024, count=4))
    rich = dataclasses.replace(base_plan(facts, {}), micro_batch=4, attention="chunked", attention_bytes=2**30)
    peak = footprint(facts, task, rich)
    for changes, stage in (
        ({"micro_batch": 2}, "denoise"),
        ({"unet_dtype": "float16", "offload": "staged"}, "denoise"),
        ({"attention_bytes": 2**24}, "denoise"),
        ({"attention": "fused", "attention_bytes": None}, "denoise"),
        ({"vae_slicing": True}, "decode"),
        ({"vae_tiling": True}, "decode"),
        ({"offload": "staged"}, "decode"),
        ({"offload": "staged"}, "encode"),
    ):
        lean = footprint(facts, task, dataclasses.replace(rich, **changes))
        assert getattr(lean, stage) < getattr(peak, stage), changes
    doubled = dataclasses.replace(rich, unet_dtype="float32")
    assert footprint(facts, task, doubled).denoise > peak.denoise


def test_mapped_files_count_where_addresses_are_limited():
    facts = machine("laptop-8gb")
    task, choices = task_of(SD15, GenerateRequest()), base_plan(facts, {})
    limited = dataclasses.replace(facts, address_limited=True)
    more = footprint(limited, task, choices).denoise - footprint(facts, task, choices).denoise
    assert more == pytest.approx(SD15.unet.stored_bytes, rel=0.02)
