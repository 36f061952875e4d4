"""A packed layer is the plain one, faster: the same results, the same weights, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sfumato
from sfumato.kernels import build, kernels_for
from sfumato.models.attention import sdpa
from sfumato.models.blocks import Downsample2D, GroupNorm, Upsample2D
from sfumato.models.packed import (
    Packed,
    PackedConv2d,
    PackedGEGLU,
    PackedGroupNorm,
    PackedLinear,
    PackedPointwise,
    PackedUpsample2D,
    kernel_attention,
    pack,
    packable,
    unpack,
)
from sfumato.models.transformer import GEGLU
from support.checkpoints import SHAPES, TEXT, UNET, VAE, randomize

pytestmark = [
    pytest.mark.skipif(not packable(torch.float32), reason="this build of torch has no oneDNN"),
    pytest.mark.skipif(build.compiler() is None, reason="there is no C compiler"),
]

# Wide enough that every kind of layer is packed: groups and gates of whole vectors.
WIDE = UNET | {"block_out_channels": [16, 32, 32, 48], "layers_per_block": 2}
MODELS = {
    "U-Net": lambda: sfumato.UNet2DConditionModel(**WIDE),
    "linear": lambda: sfumato.UNet2DConditionModel(**WIDE | {"use_linear_projection": True}),
    "odd": lambda: sfumato.UNet2DConditionModel(**SHAPES["odd"].unet),
    "mish": lambda: sfumato.UNet2DConditionModel(**WIDE | {"act_fn": "mish", "resnet_time_scale_shift": "scale_shift"}),
    "VAE": lambda: sfumato.AutoencoderKL(**VAE | {"block_out_channels": [16, 32]}),
    "tiny VAE": lambda: sfumato.AutoencoderTiny(encoder_block_out_channels=[8] * 4, decoder_block_out_channels=[8] * 4),
    "text": lambda: sfumato.CLIPTextModel(**TEXT),
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def kernels():
    return kernels_for(torch.float32)


def model_of(name: str) -> nn.Module:
    return randomize(MODELS[name]())


def results(model: nn.Module) -> list[Tensor]:
    """What a model makes of two pictures, or prompts."""
    draw = torch.Generator().manual_seed(0)
    if isinstance(model, sfumato.CLIPTextModel):
        return [model(torch.randint(3, 590, (2, 20), generator=draw)).last_hidden_state]
    if isinstance(model, sfumato.UNet2DConditionModel):
        found = []
        for size in ((16, 16), (9, 14)):
            x = torch.randn(2, 4, *size, generator=draw).to(memory_format=torch.channels_last)
            context = torch.randn(2, 7, 24, generator=draw)
            found.append(model(x.to(model.dtype), 37, context.to(model.dtype)).sample)
        return found
    latents = torch.randn(2, 4, 6, 5, generator=draw)
    x = torch.randn(2, 3, 16, 24, generator=draw).to(memory_format=torch.channels_last)
    encoded = model.encode(x)
    return [encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean, model.decode(latents).sample]


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference in units of the largest value."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """The same names in the same order, and the same bits."""
    return list(one) == list(other) and all(
        a.dtype == other[name].dtype and a.shape == other[name].shape and torch.equal(a, other[name])
        for name, a in one.items()
    )


def packed_layers(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, Packed)}


def agree(plain: nn.Module, packed: nn.Module, *inputs: Tensor, **options) -> None:
    """In float32 the same but for the order of additions; in bfloat16 as near to float32 as torch's own layer."""
    want = plain(*inputs, **options)
    assert distance(packed(*inputs, **options), want) < 1e-5
    assert same(packed.state_dict(), plain.state_dict())
    assert type(packed.unpacked()) is type(plain)


bfloat16 = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no bfloat16 products"
)


class TestLayers:
    @settings(max_examples=30, deadline=None)
    @given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), widths=st.tuples(*[st.integers(1, 70)] * 2), bias=st.booleans())  # fmt: skip
    def test_linear(self, shape, widths, bias):
        layer = randomize(nn.Linear(*widths, bias=bias))
        agree(layer, PackedLinear(layer), torch.randn(*shape, widths[0]))

    @settings(max_examples=30, deadline=None)
    @given(
        channels=st.tuples(*[st.integers(1, 40)] * 2),
        kernel=st.sampled_from([3, 5]),
        stride=st.sampled_from([1, 2]),
        padding=st.sampled_from([0, 1, 2]),
        size=st.tuples(*[st.integers(5, 20)] * 2),
        bias=st.booleans(),
        last=st.booleans(),
    )
    def test_convolution(self, channels, kernel, stride, padding, size, bias, last):
        layer = randomize(nn.Conv2d(*channels, kernel, stride=stride, padding=padding, bias=bias))
        layout = torch.channels_last if last else torch.contiguous_format
        agree(layer, PackedConv2d(layer), torch.randn(2, channels[0], *size).to(memory_format=layout))

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("size", [(1, 1), (7, 12)])
    def test_pointwise_convolution(self, bias, size):
        layer = randomize(nn.Conv2d(13, 21, 1, bias=bias))
        for x in (torch.randn(2, 13, *size), torch.randn(2, 13, *size).to(memory_format=torch.channels_last)):
            agree(layer, PackedPointwise(layer), x)
        assert PackedPointwise(layer)(x).is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (7, 8), (8, 7), (16, 24)])
    def test_upsampling(self, size):
        layer = randomize(Upsample2D(11))
        x = torch.randn(2, 11, *size)
        height, width = size
        for wanted in (
            None,
            (2 * height, 2 * width),
            (2 * height - 1, 2 * width),
            (2 * height + 1, 2 * width - 1),
            (5, 9),
        ):
            agree(layer, PackedUpsample2D(layer), x, size=wanted)
        agree(layer, PackedUpsample2D(layer), x, size=torch.Size((2 * height, 2 * width)))

    @pytest.mark.parametrize("act", [None, nn.SiLU(), nn.Mish()], ids=["plain", "silu", "mish"])
    @pytest.mark.parametrize("rows", [None, 1, 2], ids=["alone", "one moment", "two moments"])
    @pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["last", "first"])
    def test_group_norm(self, kernels, act, rows, layout):
        layer = randomize(GroupNorm(4, 32, eps=1e-5))
        added = None if rows is None else torch.randn(rows, 32)
        x = torch.randn(2, 32, 9, 7).to(memory_format=layout)
        agree(layer, PackedGroupNorm(layer, kernels), x, act, added)
        assert PackedGroupNorm(layer, kernels)(x).is_contiguous(memory_format=layout)

    def test_geglu(self, kernels):
        layer = randomize(GEGLU(12, 48))
        agree(layer, PackedGEGLU(layer, kernels), torch.randn(2, 5, 12))

    @bfloat16
    @pytest.mark.parametrize("kind", ["linear", "convolution", "pointwise", "upsampling", "group norm", "geglu"])
    def test_in_bfloat16(self, kind):
        half = kernels_for(torch.bfloat16)
        layer, pack_one, shape = {
            "linear": (nn.Linear(48, 64), PackedLinear, (3, 48)),
            "convolution": (nn.Conv2d(16, 32, 3, padding=1), PackedConv2d, (2, 16, 9, 8)),
            "pointwise": (nn.Conv2d(16, 32, 1), PackedPointwise, (2, 16, 9, 8)),
            "upsampling": (Upsample2D(16), PackedUpsample2D, (2, 16, 5, 6)),
            "group norm": (GroupNorm(4, 32), lambda layer: PackedGroupNorm(layer, half), (2, 32, 9, 8)),
            "geglu": (GEGLU(16, 64), lambda layer: PackedGEGLU(layer, half), (2, 9, 16)),
        }[kind]
        layer = randomize(layer).bfloat16()
        x = torch.randn(shape).bfloat16()
        x = x.to(memory_format=torch.channels_last) if len(shape) == 4 else x
        packed, plain = pack_one(layer), layer
        got, torchs = packed(x), plain(x)
        want = copy.deepcopy(plain).float()(x.float())
        assert got.dtype == torch.bfloat16
        # Eight bits: rounded at the end, within GEGLU once before, and upsampling adds taps that are rounded again.
        bits = 2**-7 if kind == "upsampling" else 2**-8
        assert distance(got, want) < max(bits, 1.5 * distance(torchs, want))
        assert same(packed.state_dict(), plain.state_dict())

    def test_what_another_precision_meets(self, kernels):
        """Kernels of float32 leave bfloat16 to torch, instead of reading it as what it is not."""
        norm, gate = randomize(GroupNorm(2, 16)).bfloat16(), randomize(GEGLU(4, 16)).bfloat16()
        x = torch.randn(1, 16, 4, 4).bfloat16().to(memory_format=torch.channels_last)
        assert torch.equal(PackedGroupNorm(norm, kernels)(x), norm(x))
        tokens = torch.randn(1, 3, 4).bfloat16()
        assert torch.equal(PackedGEGLU(gate, kernels)(tokens), gate(tokens))

    @pytest.mark.parametrize("size", [(4, 4), (5, 7)])
    @pytest.mark.parametrize("padding", [0, 1])
    def test_downsampling_within_a_model_is_packed(self, kernels, size, padding):
        layer = randomize(Downsample2D(8, padding))
        x = torch.randn(1, 8, *size)
        want = layer(x)
        layer.conv = PackedConv2d(layer.conv)
        assert distance(layer(x), want) < 1e-5


class TestAttention:
    def test_is_the_kernel_where_that_pays(self, kernels, monkeypatch):
        asked = []
        monkeypatch.setattr(kernels, "attention", lambda *inputs: asked.append(inputs[0].shape) or sdpa(*inputs))
        attention = kernel_attention(kernels)
        long, short = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 3, 8)
        for q, k in ((long, short), (long, long), (short, long), (long.bfloat16(), long.bfloat16())):
            assert torch.equal(attention(q, k, k), sdpa(q, k, k))
        assert asked == [long.shape] * 2

    def test_elsewhere_than_on_a_cpu(self, kernels):
        x = torch.empty(1, 2, 40, 8, device="meta")
        assert kernel_attention(kernels)(x, x, x).shape == x.shape


class TestModels:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("own", [True, False], ids=["kernels", "no kernels"])
    def test_packed_is_plain(self, kernels, name, own):
        model = model_of(name)
        want, weights = results(model), weights_of(model)
        layers = [type(module) for module in model.modules()]
        pack(model, kernels if own else None)
        if own:
            model.set_attention(kernel_attention(kernels))
        assert PackedLinear in packed_layers(model) or PackedConv2d in packed_layers(model)
        assert not any(type(module) in (nn.Linear, nn.Conv2d) for module in model.modules())
        for got, plain in zip(results(model), want, strict=True):
            assert distance(got, plain) < 1e-5
        assert same(weights_of(model), weights)
        unpack(model)
        assert [type(module) for module in model.modules()] == layers
        assert same(weights_of(model), weights)
        model.set_attention(sdpa)
        for got, plain in zip(results(model), want, strict=True):
            assert torch.equal(got, plain)

    def test_every_kind_of_layer_is_there(self, kernels):
        model = model_of("U-Net")
        pack(model, kernels)
        kinds = {PackedConv2d, PackedGEGLU, PackedGroupNorm, PackedLinear, PackedPointwise, PackedUpsample2D}
        assert packed_layers(model) == kinds
        pack(other := model_of("U-Net"), None)
        assert packed_layers(other) == kinds - {PackedGroupNorm, PackedGEGLU}

    def test_layers_of_broken_vectors_stay(self, kernels):
        """What fills no whole vector of sixteen is left to torch, norms and gates alike."""
        widths = {"block_out_channels": [6, 14, 22], "norm_num_groups": 2, "attention_head_dim": [1, 2, 2]}
        model = randomize(sfumato.UNet2DConditionModel(**SHAPES["odd"].unet | widths))
        want = results(model)
        pack(model, kernels)
        assert packed_layers(model) == {PackedConv2d, PackedLinear, PackedPointwise, PackedUpsample2D}
        assert all(distance(a, b) < 1e-5 for a, b in zip(results(model), want, strict=True))

    @pytest.mark.parametrize("name", ["U-Net", "VAE"])
    def test_packing_again_changes_nothing(self, kernels, name):
        model = model_of(name)
        weights = weights_of(model)
        pack(model, None)
        pack(model, kernels)
        want, layers = results(model), list(model.modules())
        pack(model, kernels)
        pack(model, None)
        assert list(model.modules()) == layers
        assert all(torch.equal(a, b) for a, b in zip(results(model), want, strict=True))
        unpack(model)
        unpack(model)
        assert packed_layers(model) == set()
        assert same(weights_of(model), weights)

    def test_a_plain_model_has_nothing_to_unpack(self):
        model = model_of("U-Net")
        layers = list(model.modules())
        unpack(model)
        assert list(model.modules()) == layers

    @bfloat16
    def test_bfloat16(self):
        model = model_of("U-Net")
        exact = results(model)
        model.bfloat16()
        plain, weights = results(model), weights_of(model)
        pack(model, kernels_for(torch.bfloat16))
        model.set_attention(kernel_attention(kernels_for(torch.bfloat16)))
        for got, torchs, want in zip(results(model), plain, exact, strict=True):
            assert (got - want).square().mean() < 1.5**2 * (torchs - want).square().mean()
        assert same(weights_of(model), weights)
        unpack(model)
        assert same(weights_of(model), weights)

    @pytest.mark.parametrize("name", ["U-Net", "VAE", "text"])
    def test_is_saved_as_a_plain_one(self, kernels, name, tmp_path):
        model = model_of(name)
        model.save_pretrained(tmp_path / "plain")
        pack(model, kernels)
        model.save_pretrained(tmp_path / "packed")
        files = sorted(path.name for path in (tmp_path / "plain").iterdir())
        assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == files
        for file in files:
            assert (tmp_path / "packed" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()

    @pytest.mark.parametrize("trainable", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_comes_back_as_it_went(self, kernels, trainable, training):
        model = model_of("U-Net").requires_grad_(trainable).train(training)
        pack(model, kernels)
        unpack(model)
        assert all(parameter.requires_grad == trainable for parameter in model.parameters())
        assert all(module.training == training for module in model.modules())

    @pytest.mark.parametrize("move", [lambda m: m.to(torch.float64), lambda m: m.double(), lambda m: m.half(), lambda m: m.to("meta"), lambda m: nn.Sequential(m).bfloat16()[0]], ids=["to", "double", "half", "meta", "inside another"])  # fmt: skip
    def test_moves_and_casts_as_a_plain_one(self, kernels, move):
        plain, packed = model_of("U-Net"), model_of("U-Net")
        pack(packed, kernels)
        plain, packed = move(plain), move(packed)
        assert packed_layers(packed) == set()
        for (name, a), (other, b) in zip(plain.state_dict().items(), packed.state_dict().items(), strict=True):
            assert (name, a.dtype, a.device) == (other, b.dtype, b.device)
            assert a.is_meta or torch.equal(a, b)

    def test_knows_its_precision_and_place(self, kernels):
        for name in MODELS:
            pack(model := model_of(name), kernels)
            assert model.dtype == torch.float32
            assert model.device == torch.device("cpu")

    def test_takes_other_weights(self, kernels):
        packed, other = model_of("U-Net"), randomize(MODELS["U-Net"](), seed=9)
        pack(packed, kernels)
        assert packed.load_state_dict(other.state_dict()) == ([], [])
        assert all(torch.equal(a, b) for a, b in zip(results(packed), results(other), strict=True))
        pack(packed, kernels)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            packed.load_state_dict(other.state_dict() | {"surplus": torch.zeros(1)})

    def test_a_copy_is_its_own(self, kernels):
        model = model_of("U-Net")
        weights = weights_of(model)
        pack(model, kernels)
        want = results(model)
        twin = copy.deepcopy(model)
        assert packed_layers(twin) == set()
        assert same(weights_of(twin), weights)
        for parameter in twin.parameters():
            parameter.zero_()
        assert all(torch.equal(a, b) for a, b in zip(results(model), want, strict=True))
        assert same(weights_of(model), weights)

    def test_feed_forward_in_stretches(self, kernels, monkeypatch):
        monkeypatch.setattr("sfumato.models.packed.STRETCH_BYTES", 1)
        model = model_of("U-Net")
        x, context = torch.randn(1, 4, 24, 24), torch.randn(1, 7, 24)
        want = model(x, 5, context).sample
        pack(model, kernels)  # 576 tokens, 256 at a time
        assert distance(model(x, 5, context).sample, want) < 1e-5

    def test_nan_shows(self, kernels):
        model = model_of("U-Net")
        pack(model, kernels)
        x = torch.randn(1, 4, 16, 16)
        x[0, 0, 3, 3] = float("nan")
        assert model(x, 5, torch.randn(1, 7, 24)).sample.isnan().all()


def test_packable():
    assert packable(torch.float32)
    # Processors with AVX2 alone have no bfloat16 products.
    assert packable(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert not packable(torch.float16)
    assert not packable(torch.float64)
