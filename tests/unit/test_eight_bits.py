"""Weights in 8 bits: how far they round, who stores them, what they compute, and the way back from adapters."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sfumato
from sfumato.models.blocks import Upsample2D
from sfumato.models.eight_bits import EightBit, EightBitLinear, Stored, eight_bit_layers, lighten, stored
from sfumato.models.overlay import own_weights, put_on, take_off, weight_shapes
from sfumato.models.packed import PackedEightBit, PackedUpsample2D, is_packed, pack, plain, unpack
from sfumato.models.seamless import seamless
from sfumato.pipelines.fingerprint import fingerprint
from sfumato.pipelines.repair import computed_in_float32
from sfumato.runtime import onednn
from support.checkpoints import UNET, XL, randomize
from support.families import LATENT_UPSCALER
from support.single_files import write_small

WIDE = UNET | {"block_out_channels": [16, 32, 32, 48], "layers_per_block": 2}
UNETS = {"convolutions": WIDE, "linear": WIDE | {"use_linear_projection": True}, "xl": XL}
packs = pytest.mark.skipif(not onednn.integers_packable(torch.float32), reason="this build of torch cannot pack them")
WEIGHT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def folder(once):
    return once("eight-bit-unet", lambda path: randomize(sfumato.UNet2DConditionModel(**WIDE)).save_pretrained(path))


def loaded(folder, **options):
    return sfumato.UNet2DConditionModel.from_folder(folder, **{"eight_bit": True} | options)


def light(model: nn.Module) -> nn.Module:
    """The same model with weights in 8 bits."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    lighten(model, None)
    model.eight_bit = True
    model.load_state_dict(state, assign=True)
    return model.eval()


def result(model, size=(16, 16), width=24, **options) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, *size, generator=draw), torch.randn(2, 7, width, generator=draw)
    return model(x.to(model.dtype), 37, context.to(model.dtype), **options).sample


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


class TestRounding:
    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(1, 9),
        shape=st.sampled_from([(5,), (3, 3, 3), (700,), (2, 1, 1)]),
        power=st.integers(-20, 20),
        seed=st.integers(0, 99),
    )
    def test_no_value_is_off_by_more_than_half_a_scale(self, rows, shape, power, seed):
        weight = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed)) * 2.0**power
        small = stored(weight)
        scales = small.scales.view(-1, *[1] * len(shape))
        assert small.values.dtype == torch.int8
        assert ((small.widened() - weight).abs() <= scales / 2).all()
        assert (scales.flatten() <= weight.flatten(1).abs().amax(1) / 127 * (1 + 2**-7)).all()  # and no scale is idle

    def test_widening_is_exact_and_rounding_leaves_the_weight_alone(self):
        weight = torch.randn(40, 300)
        kept = weight.clone()
        first = stored(weight)
        assert torch.equal(weight, kept)
        assert torch.equal(first.scales.bfloat16().float(), first.scales)
        assert torch.equal(first.widened(), first.values.double().mul(first.scales.double()[:, None]).float())

    def test_blocks_do_not_show(self, monkeypatch):
        weight = torch.randn(64, 48)
        whole = stored(weight)
        monkeypatch.setattr("sfumato.models.eight_bits.BLOCK", 100)
        assert torch.equal(stored(weight).values, whole.values)

    def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(self):
        weight = torch.tensor([[0.0, 0.0], [1.0, -2.0], [float("nan"), 1.0]])
        assert torch.equal(stored(weight).widened()[0], weight[0])
        assert not stored(weight).widened()[2].isfinite().any()


class TestNetworks:
    def test_the_large_layers_and_no_others(self, folder):
        model = loaded(folder)
        paths = {path for path, _ in eight_bit_layers(model)}
        every = {path for path, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
        left = every - paths
        assert WEIGHT.removesuffix(".weight") in paths
        assert {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"} <= left
        assert all("time" in path or path in ("conv_in", "conv_out") for path in left)
        upscaler = sfumato.UNet2DConditionModel(**LATENT_UPSCALER)
        assert not any("norm" in path or "resize" in path for path, _ in eight_bit_layers(light(upscaler)))

    def test_files_and_state_are_those_of_the_plain_network(self, folder, tmp_path, caplog):
        exact, model = loaded(folder, eight_bit=False), loaded(folder)
        state, want = model.state_dict(), exact.state_dict()
        assert state.keys() == want.keys()
        assert weight_shapes(model) == weight_shapes(exact)
        assert list(weight_shapes(model)) == list(weight_shapes(exact))
        assert 0 < distance(state[WEIGHT], want[WEIGHT]) < 0.01
        assert torch.equal(state["conv_in.weight"], want["conv_in.weight"])
        model.save_pretrained(tmp_path / "saved")
        assert "eight_bit=False" in caplog.text  # a copy that is less exact should not be made unnoticed
        again = sfumato.UNet2DConditionModel.from_pretrained(tmp_path / "saved")
        assert torch.equal(again.state_dict()[WEIGHT], state[WEIGHT])
        assert fingerprint(model) == fingerprint(exact)  # of the weights in the file

    @pytest.mark.parametrize("name", UNETS)
    def test_the_numbers_are_those_of_the_rounded_weights(self, name):
        model = light(randomize(sfumato.UNet2DConditionModel(**UNETS[name])))
        rounded = sfumato.UNet2DConditionModel(**UNETS[name]).eval()
        rounded.load_state_dict(model.state_dict())
        more = {}
        if name == "xl":
            more["added_cond_kwargs"] = {"text_embeds": torch.ones(2, 40), "time_ids": torch.ones(2, 6)}
        width = UNETS[name]["cross_attention_dim"]
        for size in ((16, 16), (18, 10)):
            assert distance(result(model, size, width, **more), result(rounded, size, width, **more)) < 1e-5

    def test_moving_casting_and_repairing(self, folder):
        model = loaded(folder)
        want = result(model)
        half = loaded(folder).to(torch.bfloat16)
        assert half.dtype == torch.bfloat16
        layer = dict(eight_bit_layers(half))[WEIGHT.removesuffix(".weight")]
        assert layer.weight.dtype == torch.bfloat16
        assert layer.values.dtype == torch.int8
        with computed_in_float32(half):
            assert distance(result(half), want) < 0.02
        assert half.dtype == torch.bfloat16
        assert distance(result(half.float()), want) < 0.02  # norms and biases were cast; integers and scales are exact

    def test_unloading_and_loading_again(self, folder):
        model = loaded(folder, later=True)
        assert model.eight_bit
        model.reload()
        want = result(model)
        model.forget()
        model.reload()
        assert torch.equal(result(model), want)
        model.forget()
        model.reload(eight_bit=False)
        assert not model.eight_bit
        assert not list(eight_bit_layers(model))

    def test_a_single_file(self, tmp_path):
        file = write_small(tmp_path / "small.safetensors", "sd15")
        exact, model = (sfumato.load(file, dtype=torch.float32, eight_bit=one).unet for one in (False, True))
        for unet in (exact, model):
            if unet.device.type == "meta":
                unet.reload()
        assert list(eight_bit_layers(model))
        assert fingerprint(model) == fingerprint(exact)
        errors = {
            key: distance(value, exact.state_dict()[key]) for key, value in model.state_dict().items() if value.ndim > 1
        }
        assert 0 < max(errors.values()) < 0.01


@packs
class TestPacked:
    @pytest.mark.parametrize("name", UNETS)
    def test_the_same_numbers_and_the_way_back(self, name):
        model = light(randomize(sfumato.UNet2DConditionModel(**UNETS[name])))
        more = {}
        if name == "xl":
            more["added_cond_kwargs"] = {"text_embeds": torch.ones(2, 40), "time_ids": torch.ones(2, 6)}
        width = UNETS[name]["cross_attention_dim"]
        before = {path: layer.stored for path, layer in eight_bit_layers(model)}
        want = [result(model, size, width, **more) for size in ((16, 16), (18, 10), (16, 16))]
        state = {key: value.clone() for key, value in model.state_dict().items()}
        pack(model, None)
        assert is_packed(model)
        assert not list(eight_bit_layers(model)) or all(not one.values.numel() for _, one in eight_bit_layers(model))
        scratches = {id(one.scratch) for one in model.modules() if isinstance(one, PackedEightBit)}
        assert len(scratches) == 1
        for size, one in zip(((16, 16), (18, 10), (16, 16)), want, strict=True):
            assert distance(result(model, size, width, **more), one) < 1e-5
        packed_state = model.state_dict()
        assert all(torch.equal(value, packed_state[key]) for key, value in state.items())
        unpack(model)
        after = dict(eight_bit_layers(model))
        assert after.keys() == before.keys()
        assert all(torch.equal(one.values, after[path].values) for path, one in before.items())

    @settings(max_examples=20, deadline=None)
    @given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)), odd=st.booleans(), channels=st.sampled_from([8, 24]))
    def test_upsampling(self, size, odd, channels):
        class Blocks(nn.Module):
            def __init__(self):
                super().__init__()
                self.up_blocks = nn.ModuleList([randomize(Upsample2D(channels))])

        model = Blocks()
        state = model.state_dict()
        lighten(model, None)
        model.load_state_dict(state, assign=True)
        layer = model.up_blocks[0]
        x = torch.randn(2, channels, *size)
        target = (2 * size[0] - 1, 2 * size[1]) if odd else None
        want, values = layer(x, target), layer.conv.values
        faster = PackedUpsample2D(layer)
        assert distance(faster(x, target), want) < 1e-5
        assert torch.equal(faster.unpacked().conv.values, values)

    def test_seamless(self, folder):
        model = loaded(folder)
        with seamless(model, "xy"):
            want = result(model)
        pack(model, None)
        with seamless(model, "xy"):
            assert distance(result(model), want) < 1e-5
        assert distance(result(model), want) > 1e-3

    def test_another_release_of_torch_computes_plainly(self, monkeypatch, folder):
        model = loaded(folder)
        want = result(model)
        onednn.integers_packable.cache_clear()
        monkeypatch.setattr(onednn, "_MKLDNN_LAYOUT", 0)
        try:
            pack(model, None)
            assert not onednn.integers_packable(torch.float32)
        finally:
            onednn.integers_packable.cache_clear()
        assert list(eight_bit_layers(model))
        assert distance(result(model), want) < 1e-5


class TestAdapters:
    def test_changes_are_rounded_and_own_weights_come_back(self, folder):
        model = loaded(folder)
        layer = plain(model, WEIGHT.removesuffix(".weight"))
        assert isinstance(layer, EightBitLinear)
        before, known = layer.stored, fingerprint(model)
        changed: list[torch.Tensor] = []

        def make(own, into):
            into.copy_(own + 0.01 * torch.ones_like(own).cumsum(0))
            changed.append(into.clone())

        if onednn.integers_packable(torch.float32):
            pack(model, None)
        for _ in range(2):  # always from the model's own
            put_on(model, "key", {WEIGHT: make})
            now = plain(model, WEIGHT.removesuffix(".weight"))
            assert isinstance(now, EightBit)
            assert torch.equal(now.values, stored(changed[-1]).values)
            assert torch.equal(changed[0], changed[-1])
        unpack(model)
        assert fingerprint(model) == known
        assert torch.equal(own_weights(model)[WEIGHT], before.widened())
        take_off(model)
        now = plain(model, WEIGHT.removesuffix(".weight"))
        assert isinstance(now, EightBit)
        assert torch.equal(now.values, before.values)
        assert torch.equal(now.scales, before.scales)
        assert model.overlay is None


PROBE = """
import sys
from pathlib import Path
from sfumato import UNet2DConditionModel

def status(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":"))
    return int(line.split()[1]) * 1024

small, large = map(Path, sys.argv[1:])
UNet2DConditionModel.from_folder(small, eight_bit=True, copy=True)
before = status("VmRSS")
model = UNet2DConditionModel.from_folder(large, eight_bit=True, copy=True)
numbers = sum(p.numel() for p in model.parameters()) + sum(p.values.numel() for p in model.modules() if hasattr(p, "values"))
print(numbers, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status, which only Linux has")
def test_memory_while_loading(folder, tmp_path):
    """The exact weights are never in memory together: at most two of the 32 bits of each number are there in excess."""
    with torch.device("meta"):
        model = sfumato.UNet2DConditionModel(
            **UNET | {"block_out_channels": [128, 256, 384, 512], "norm_num_groups": 32}
        )
    model = model.to_empty(device="cpu")
    for value in model.parameters():
        nn.init.constant_(value, 0.5)
    model.save_pretrained(tmp_path / "large")
    command = [sys.executable, "-c", PROBE, str(folder), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    numbers, peak = map(int, done.stdout.split())
    assert numbers > 30e6
    assert peak < 1.6 * numbers + 40 * 2**20


def test_stored_weights_pass_for_weights():
    small = stored(torch.randn(3, 4))
    assert isinstance(small, Stored)
    assert small.is_floating_point()
    assert small.shape == (3, 4)
    assert small.widened(torch.bfloat16).dtype == torch.bfloat16
