"""Programs made from networks: names, constants, refusals, and each piece against torch."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sfumato
from sfumato.checkpoints.weights import without_weights
from sfumato.coreml.converter import (
    ATTENTIONS,
    TARGETS,
    attention,
    attention_named,
    target_named,
    text_encoder,
    unet,
    vae_decoder,
    vae_encoder,
)
from sfumato.coreml.converter.builder import Builder
from sfumato.coreml.converter.emitter import identifier
from sfumato.coreml.converter.factors import two_factors
from sfumato.coreml.converter.layers import Layers
from sfumato.coreml.program import MAIN, Model, Value
from sfumato.coreml.runtime import Predictor
from sfumato.errors import CheckpointError, ConfigError, UsageError
from sfumato.models.base import Model as Network
from sfumato.models.blocks import GroupNorm, Upsample2D
from sfumato.models.packed import pack, packable
from support.checkpoints import FULL_SIZE_UNET, SHAPES, TEXT, UNET, VAE, randomize

SIZE = {"height": 6, "width": 5}


def build(dtype: str = "fp32", target: str = "macOS13") -> Builder:
    return Builder(target_named(target), dtype)


def run(model: Model, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    return Predictor(model, precision="float32").predict(inputs)


def operations(model: Model, kind: str | None = None):
    return [op for op in model.program.functions[MAIN].operations if kind in (None, op.type)]


@pytest.fixture(scope="module")
def networks():
    shape = SHAPES["sd15"]
    return (
        randomize(sfumato.CLIPTextModel(**shape.text), 0),
        randomize(sfumato.UNet2DConditionModel(**shape.unet), 1),
        randomize(sfumato.AutoencoderKL(**shape.vae), 2),
    )


@pytest.fixture(scope="module")
def programs(networks):
    text, noise, vae = networks
    return [
        (text, "", text_encoder(text)),
        (noise, "", unet(noise, **SIZE, tokens=7, attention="split_einsum")),
        (vae, "decoder|post_quant_conv", vae_decoder(vae, **SIZE)),
        (vae, "encoder|quant_conv", vae_encoder(vae, **SIZE)),
    ]


# Names and constants


def test_names_are_unique_identifiers_and_defined_before_they_are_read(programs):
    for _, _, model in programs:
        function = model.program.functions[MAIN]
        known = [output.name for output in function.inputs]
        for operation in function.operations:
            assert set(operation.names) <= set(known), operation
            known += [output.name for output in operation.outputs]
            assert operation.attributes["name"].read() == operation.outputs[0].name
        assert set(function.outputs) <= set(known)
        assert max(Counter(known).values()) == 1
        assert all(re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) for name in known)


def test_nothing_is_computed_in_vain(programs):
    for _, _, model in programs:
        function = model.program.functions[MAIN]
        read = {name for operation in function.operations for name in operation.names} | set(function.outputs)
        unread = {output.name for operation in function.operations for output in operation.outputs} - read
        assert unread == set()


def test_every_parameter_is_one_constant_of_its_name(programs):
    for network, prefix, model in programs:
        wanted = {
            name.replace(".", "_"): value for name, value in network.state_dict().items() if re.match(prefix, name)
        }
        found = {op.outputs[0].name: op.attributes["val"] for op in operations(model, "const")}
        assert wanted.keys() <= found.keys()
        for name, tensor in wanted.items():
            value = found[name]
            numbers = value.read()
            assert value.stored
            assert isinstance(numbers, np.ndarray)
            assert numbers.dtype == np.float16
            assert numbers.shape == value.type.shape
            assert np.array_equal(numbers.ravel(), tensor.half().numpy().ravel())


def test_other_constants_are_there_once_and_the_long_ones_are_stored(programs):
    for network, _, model in programs:
        parameters = {identifier(name) for name in network.state_dict()}
        seen = set()
        for operation in operations(model, "const"):
            name, value = operation.outputs[0].name, operation.attributes["val"]
            if name in parameters:
                continue
            data = value.read()
            key = re.sub(r"_\d+$", "", name), value.type, data if isinstance(data, str) else data.tobytes()
            assert key not in seen
            seen.add(key)
            floats = isinstance(data, np.ndarray) and data.dtype.kind == "f"
            assert value.stored == (floats and data.size >= 10), name


@pytest.mark.parametrize(("path", "name"), [("a.b.0", "a_b_0"), ("0.weight", "_0_weight"), ("x-y z", "x_y_z")])
def test_identifiers(path, name):
    assert identifier(path) == name


def test_no_weight_is_read_before_it_is_written():
    with without_weights():
        network = sfumato.UNet2DConditionModel(**UNET)
    model = unet(network, **SIZE, tokens=7)
    (value,) = (op.attributes["val"] for op in operations(model, "const") if op.outputs[0].name == "conv_in_weight")
    with pytest.raises(CheckpointError, match=r"conv_in\.weight of the UNet2DConditionModel is not loaded"):
        value.read()


@pytest.mark.parametrize(
    ("number", "sentence"), [(7e4, "up to 7e\\+04, but .* float16"), (float("nan"), "NaN or infinite")]
)
def test_a_weight_that_is_not_finite_is_named(number, sentence):
    network = randomize(sfumato.CLIPTextModel(**TEXT))
    with torch.no_grad():
        network.text_model.final_layer_norm.bias[3] = number
    values = {op.outputs[0].name: op.attributes["val"] for op in operations(text_encoder(network), "const")}
    with pytest.raises(
        CheckpointError, match=f"text_model.final_layer_norm.bias of the CLIPTextModel has .*{sentence}"
    ):
        values["text_model_final_layer_norm_bias"].read()


@settings(deadline=None)
@given(st.floats(1e-3, 100))
def test_two_factors_of_float16_make_any_number(number):
    first, second = two_factors(number, "fp16")
    assert float(np.float16(first)) == first
    assert float(np.float16(second)) == second
    assert first * second == pytest.approx(number, rel=2**-17)
    assert two_factors(number, "fp32") == (number, 1.0)


def test_a_number_of_float16_needs_no_second_factor():
    assert two_factors(0.125, "fp16") == (0.125, 1.0)
    with pytest.raises(ValueError, match="positive"):
        two_factors(0, "fp16")


# Targets


def test_targets_are_apples():
    assert {name: (target.spec_version, target.opset) for name, target in TARGETS.items()} == {
        "iOS16": (7, "CoreML6"),
        "macOS13": (7, "CoreML6"),
        "iOS17": (8, "CoreML7"),
        "macOS14": (8, "CoreML7"),
        "iOS18": (9, "CoreML8"),
        "macOS15": (9, "CoreML8"),
        "iOS26": (10, "CoreML9"),
        "macOS26": (10, "CoreML9"),
    }


def test_a_target_shows_in_the_model(networks):
    for name in ("iOS16", "iOS17"):
        model = text_encoder(networks[0], target=name)
        target = TARGETS[name]
        assert (model.spec_version, model.program.functions[MAIN].opset) == (target.spec_version, target.opset)
        (gather,) = operations(model, "gather")
        assert ("validate_indices" in gather.inputs) == (name == "iOS17")


def test_unknown_names_are_refused_with_the_nearest(networks):
    with pytest.raises(UsageError, match=r"'macos14' is not a deployment target \(did you mean 'macOS14'\?\)"):
        target_named("macos14")
    with pytest.raises(UsageError, match=r"no attention 'split-einsum' \(did you mean 'split_einsum'\?\)"):
        attention_named("split-einsum")
    with pytest.raises(UsageError, match="'fp16' or 'fp32', not 'float16'"):
        text_encoder(networks[0], dtype="float16")


# Interfaces


def shapes(model: Model) -> dict[str, str]:
    features = (*model.interface.inputs, *model.interface.outputs)
    function = model.program.functions[MAIN]
    assert [output.name for output in function.inputs] == [feature.name for feature in model.interface.inputs]
    assert list(function.outputs) == [feature.name for feature in model.interface.outputs]
    assert all(feature.description for feature in features)
    assert model.description
    return {feature.name: str(feature.type) for feature in features}


def test_interfaces_of_stable_diffusion_1_5_are_those_of_published_packages():
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    vae = VAE | {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
    }
    with without_weights():
        encoder, noise = sfumato.CLIPTextModel(**text), sfumato.UNet2DConditionModel(**FULL_SIZE_UNET)
        autoencoder = sfumato.AutoencoderKL(**vae)
    size = {"height": 64, "width": 64}
    assert shapes(text_encoder(encoder)) == {
        "input_ids": "fp32[1, 77]",
        "last_hidden_state": "fp32[1, 77, 768]",
        "pooled_outputs": "fp32[1, 768]",
    }
    assert shapes(unet(noise, **size, tokens=77, attention="split_einsum")) == {
        "sample": "fp16[2, 4, 64, 64]",
        "timestep": "fp16[2]",
        "encoder_hidden_states": "fp16[2, 768, 1, 77]",
        "noise_pred": "fp32[2, 4, 64, 64]",
    }
    assert shapes(vae_decoder(autoencoder, **size)) == {"z": "fp16[1, 4, 64, 64]", "image": "fp32[1, 3, 512, 512]"}
    assert shapes(vae_encoder(autoencoder, **size)) == {"x": "fp16[1, 3, 512, 512]", "latent": "fp32[1, 8, 64, 64]"}


def test_a_program_in_float32_takes_float32_and_casts_nothing_else(networks):
    model = unet(networks[1], **SIZE, tokens=7, batch=1, dtype="fp32")
    assert set(shapes(model).values()) == {"fp32[1, 4, 6, 5]", "fp32[1]", "fp32[1, 24, 1, 7]"}
    assert operations(model, "cast") == []


def test_angles_of_time_are_computed_in_float32(networks):
    (cosine,) = operations(unet(networks[1], **SIZE, tokens=7), "cos")
    assert cosine.outputs[0].type.dtype == "fp32"


# Attention


@st.composite
def problems(draw):
    batch, heads, width = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    queries, keys, chunk = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 10))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    q = torch.randn(batch, heads * width, 1, queries, generator=generator) * 3
    k, v = (torch.randn(batch, heads * width, 1, keys, generator=generator) for _ in range(2))
    mask = torch.randn(queries, keys, generator=generator) * 5 if draw(st.booleans()) else None
    return heads, chunk, q, k, v, mask


def attended(name: str, heads: int, q, k, v, mask) -> tuple[Model, np.ndarray]:
    b = build()
    handles = [b.input(word, "fp32", tuple(x.shape), "") for word, x in (("q", q), ("k", k), ("v", v))]
    b.result(attention_named(name)(b, *handles, heads, None if mask is None else mask.numpy()), "out", "")
    model = b.model("")
    return model, run(model, q=q.numpy(), k=k.numpy(), v=v.numpy())["out"]


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_every_form_of_attention_is_attention(problem):
    heads, chunk, q, k, v, mask = problem
    split = [x.double().unflatten(1, (heads, -1)).squeeze(3).transpose(2, 3) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*split, attn_mask=None if mask is None else mask.double())
    want = want.transpose(2, 3).reshape(q.shape).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CHUNK", chunk)
        for name in ATTENTIONS:
            assert np.allclose(attended(name, heads, q, k, v, mask)[1], want, atol=3e-6, rtol=3e-6), name


@pytest.mark.parametrize(("queries", "parts"), [(511, 1), (512, 1), (513, 2), (1100, 3)])
def test_version_2_cuts_queries_and_drops_none(queries, parts):
    q, k, v = torch.randn(1, 4, 1, queries), torch.randn(1, 4, 1, 3), torch.randn(1, 4, 1, 3)
    model, got = attended("split_einsum_v2", 2, q, k, v, None)
    products = operations(model, "einsum")
    assert len(products) == 2 * 2 * parts
    assert all(product.outputs[0].type.shape[3] <= 512 for product in products)
    assert np.allclose(got, attended("original", 2, q, k, v, None)[1], atol=1e-6)


def test_apps_tell_the_forms_apart_by_einsum(networks):
    kinds = {
        name: {op.type for op in operations(unet(networks[1], **SIZE, tokens=7, attention=name))} for name in ATTENTIONS
    }
    assert {name: "einsum" in found for name, found in kinds.items()} == {
        "original": False,
        "split_einsum": True,
        "split_einsum_v2": True,
    }
    assert not {"scaled_dot_product_attention", "linear"} & set().union(*kinds.values())


def test_attention_that_asks_for_float32_has_it_in_the_scores():
    for upcast in (True, False):
        network = sfumato.UNet2DConditionModel(**UNET | {"upcast_attention": upcast})
        model = unet(network, **SIZE, tokens=7)
        types = {op.outputs[0].type.dtype for op in operations(model) if op.type in ("matmul", "softmax")}
        assert types == {"fp32" if upcast else "fp16"}


# Layers


class Little(Network):
    """One layer that a program is made of."""

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.layer = randomize(layer)


def through(layer: nn.Module, x: torch.Tensor, emit, dtype: str = "fp32") -> np.ndarray:
    b = build(dtype)
    layers = Layers(b, Little(layer), ATTENTIONS["original"])
    handle = b.input("x", "fp32", tuple(x.shape), "")
    b.result(emit(layers, b.cast(handle, dtype)), "out", "")
    return run(b.model(""), x=x.numpy())["out"]


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 3), per_group=st.integers(1, 3), sides=st.tuples(st.integers(1, 5), st.integers(2, 5)), seed=st.integers(0, 99)
)  # fmt: skip
def test_group_normalization_is_torchs(groups, per_group, sides, seed):
    layer = GroupNorm(groups, groups * per_group, eps=1e-5)
    x = torch.randn(2, groups * per_group, *sides, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    got = through(layer, x, lambda layers, h: layers.group_norm(layer, h))
    assert np.allclose(got, layer(x).detach().numpy(), atol=1e-5)


def test_constants_of_a_program_in_float16_are_exact():
    """In float32 arithmetic, what float16 stores of a normalization and an activation is all that was meant."""
    layer, x = GroupNorm(2, 4, eps=2**-16), torch.randn(1, 4, 3, 3)
    layer.half().float()
    got = through(layer, x, lambda layers, h: layers.group_norm(layer, h), "fp16")
    with torch.no_grad():
        layer.weight.copy_(layer.weight.half())
        layer.bias.copy_(layer.bias.half())
        assert np.allclose(got, layer(x).numpy(), atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), odd=st.tuples(st.booleans(), st.booleans()))
def test_odd_sizes_come_back_as_torch_brings_them(height, width, odd):
    layer = Upsample2D(2)
    size = (2 * height - odd[0], 2 * width - odd[1])
    x = torch.randn(1, 2, height, width)
    got = through(layer, x, lambda layers, h: layers.upsample(layer, h, size))
    with torch.no_grad():
        assert np.allclose(got, layer(x, size).numpy(), atol=1e-5)


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.ReLU(), nn.Mish()])
def test_activations_are_torchs(act):
    x = torch.linspace(-9, 9, 64).reshape(1, 4, 4, 4)
    assert np.allclose(through(act, x, lambda layers, h: layers.activation(act, h)), act(x).numpy(), atol=1e-5)


# The end of the text


@pytest.mark.parametrize("eos", [599, 2, None])
@pytest.mark.parametrize("pad", [599, 0])
def test_the_text_ends_at_its_first_end(eos, pad):
    network = randomize(sfumato.CLIPTextModel(**TEXT | {"eos_token_id": eos}))
    model = text_encoder(network, dtype="fp32")
    for ends in (2, 7, 19):
        ids = torch.full((1, 20), pad)
        ids[0, :ends] = torch.arange(5, 5 + ends)
        ids[0, ends] = 599
        with torch.no_grad():
            want = network(ids).pooler_output.numpy()
        assert np.allclose(run(model, input_ids=ids.float().numpy())["pooled_outputs"], want, atol=1e-5)


def test_among_equals_no_choice_is_left_to_argmax(networks):
    """MIL's argmax may return any of several equals, so they are made to differ."""
    (operation,) = operations(text_encoder(networks[0]), "reduce_argmax")
    (product,) = (op for op in operations(text_encoder(networks[0]), "mul") if op.outputs[0].name == operation.names[0])
    values = {op.outputs[0].name: op.attributes["val"] for op in operations(text_encoder(networks[0]), "const")}
    weights = values[product.inputs["y"][0]]  # pyright: ignore[reportArgumentType]
    assert isinstance(weights, Value)
    assert np.array_equal(weights.read(), np.arange(20, 0, -1, dtype=np.int32)[None])


# Refusals


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("class_embed_type", {"class_embed_type": "timestep"}),
        ("num_class_embeds", {"num_class_embeds": 5}),
        ("time_cond_proj_dim", {"time_cond_proj_dim": 8}),
        ("cross_attention_dim", {"cross_attention_dim": [24, 24, 16, 24]}),
        (
            "addition_embed_type",
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 72,
            },
        ),
    ],
)
def test_unets_that_need_more_inputs_are_refused_by_their_key(key, changes):
    with pytest.raises(ConfigError, match=rf"unet/config\.json: {key} "):
        unet(sfumato.UNet2DConditionModel(**UNET | changes), **SIZE, tokens=7)


def test_odd_sizes_without_padding_are_refused():
    network = sfumato.UNet2DConditionModel(**UNET | {"downsample_padding": 0})
    with pytest.raises(ConfigError, match="downsample_padding = 0 halves"):
        unet(network, height=12, width=8, tokens=7)
    unet(network, height=8, width=8, tokens=7)


def test_the_small_autoencoder_is_refused():
    for make in (vae_decoder, vae_encoder):
        with pytest.raises(ConfigError, match="AutoencoderTiny cannot be converted to Core ML"):
            make(sfumato.AutoencoderTiny(), **SIZE)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None])
def test_sizes_are_whole_numbers(networks, size):
    for name in ("height", "width", "tokens", "batch"):
        with pytest.raises(UsageError, match=f"{name} must be a whole number of at least 1"):
            unet(networks[1], **{"height": 8, "width": 8, "tokens": 7, "batch": 2} | {name: size})


@pytest.mark.skipif(not packable(torch.float32), reason="this torch has no oneDNN")
def test_packed_models_are_refused():
    network = sfumato.CLIPTextModel(**TEXT)
    pack(network, None)
    with pytest.raises(UsageError, match="packed for the CPU"):
        text_encoder(network)


def test_values_far_from_their_mean_are_normalized_in_half_precision():
    """An autoencoder's lie hundreds away, and the square of 256 is beyond float16; small and constant groups stay right."""
    from sfumato.coreml.runtime import Predictor
    from sfumato.coreml.runtime.fuse import fused

    norm = nn.GroupNorm(4, 8, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8, generator=torch.Generator().manual_seed(0)))
        norm.bias.copy_(torch.arange(8) / 8)
    x = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(1))
    x[:, :2] *= 3000
    x[:, 2:4] *= 1e-2
    x[:, 4:6] = 7.0
    x = x.half().float()
    b = Builder(target_named("macOS13"), "fp16")
    layers = Layers(b, Little(norm), ATTENTIONS["original"], far=True)
    given = b.input("x", "fp16", tuple(x.shape), "pictures")
    b.result(layers.group_norm(norm, given), "y", "normalized")
    made = b.model("a group normalization")
    expected = norm.half().float()(x).detach()
    for fuse in (True, False):
        for precision, tolerance in (("float32", 1e-4), ("typed", 4e-3)):
            got = Predictor(made, precision=precision, fuse=fuse).run({"x": x})["y"]
            assert torch.isfinite(got).all()
            torch.testing.assert_close(
                got[:, [0, 1, 4, 5, 6, 7]], expected[:, [0, 1, 4, 5, 6, 7]], rtol=tolerance, atol=tolerance
            )
            # Where the variance is near epsilon, what counts is epsilon itself, which float16 says to a part in a thousand.
            torch.testing.assert_close(got[:, 2:4], expected[:, 2:4], rtol=2e-2, atol=2e-2)
    kinds = [operation.type for operation in fused(made.program.functions["main"]).operations]
    assert kinds.count("fused group_norm") >= 1
