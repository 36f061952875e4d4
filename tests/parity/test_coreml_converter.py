"""Programs made from networks: the numbers are the networks', and coremltools reads and rebuilds every operation."""

from __future__ import annotations

import copy
import gc
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sfumato
from sfumato.coreml.converter import ATTENTIONS, text_encoder, unet, vae_decoder, vae_encoder
from sfumato.coreml.formats import write_package
from sfumato.coreml.program import MAIN, Model
from sfumato.coreml.runtime import Predictor
from support.checkpoints import SHAPES, TEXT, UNET, randomize
from support.coremltools import import_coremltools

# Rounding in float32 leaves some 130 dB; in float16, on networks as small as these, 62 to 71.
FLOAT32, SHIPPED, FLOAT16 = 120, 115, 55
SYSTEMS = {"macOS13": "iOS16", "iOS17": "iOS17", "macOS15": "iOS18", "iOS26": "iOS26"}
SOURCE = Path(sfumato.__file__).parent
HEIGHT, WIDTH, TOKENS = 9, 14, 20
# What configs may say, though no Stable Diffusion does.
UNPUBLISHED = [
    {"resnet_time_scale_shift": "scale_shift"},
    {"center_input_sample": True, "flip_sin_to_cos": False, "freq_shift": 1},
    {"mid_block_type": None},
    {"mid_block_scale_factor": 2.0**0.5},
    {"act_fn": "gelu"},
    {"act_fn": "mish"},
    {"act_fn": "relu"},
    {"transformer_layers_per_block": 2, "layers_per_block": (1, 2, 1, 2), "only_cross_attention": True},
    {"conv_in_kernel": 5, "conv_out_kernel": 1, "time_embedding_dim": 20},
    {"block_out_channels": [15, 30, 30, 30], "norm_num_groups": 5, "attention_head_dim": 3},  # odd: a zero is added
]


def decibels(got: np.ndarray, want: torch.Tensor) -> float:
    """The peak signal-to-noise ratio."""
    assert got.shape == tuple(want.shape)
    error = np.sqrt(np.mean((got.astype(np.float64) - want.double().numpy()) ** 2))
    return 20 * math.log10(want.abs().max().item() / error) if error else math.inf


def networks(shape: str):
    parts = SHAPES[shape]
    return (
        randomize(sfumato.CLIPTextModel(**parts.text), 0),
        randomize(sfumato.UNet2DConditionModel(**parts.unet), 1),
        randomize(sfumato.AutoencoderKL(**parts.vae), 2),
    )


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers that float16 has, so that it is the network that is compared."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().float()


def with_weights_of_float16(network):
    return copy.deepcopy(network).half().float()


# The ways in which a program can be run, and how near to the network it has to come.
WAYS = pytest.mark.parametrize(
    ("dtype", "precision", "least"),
    [("fp32", "float32", FLOAT32), ("fp16", "float32", SHIPPED), ("fp16", "typed", FLOAT16)],
)


def compare_unet(
    network, *, dtype: str, precision: str, least: float, form: str, size=(HEIGHT, WIDTH), batch=2
) -> None:
    config = network.config
    channels = config.per_block("cross_attention_dim")[0]
    sample, states = noise(batch, config.in_channels, *size), noise(batch, TOKENS, channels, seed=1)
    steps = torch.tensor([981.0, 21.0])[:batch]
    options = {"height": size[0], "width": size[1], "tokens": TOKENS, "batch": batch, "attention": form, "dtype": dtype}
    inputs = {
        "sample": sample.numpy(),
        "timestep": steps.numpy(),
        "encoder_hidden_states": states.transpose(1, 2)[:, :, None].contiguous().numpy(),
    }
    got = Predictor(unet(network, **options), precision=precision).predict(inputs)["noise_pred"]
    source = with_weights_of_float16(network) if (dtype, precision) == ("fp16", "float32") else network
    with torch.no_grad():
        assert decibels(got, source(sample, steps, states).sample) >= least


@WAYS
@pytest.mark.parametrize("shape", SHAPES)
def test_text_encoder(shape, dtype, precision, least):
    network = networks(shape)[0]
    ids = torch.randint(0, 598, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    ids[:, 7:] = 599
    got = Predictor(text_encoder(network, dtype=dtype), precision=precision).predict({"input_ids": ids.float().numpy()})
    source = with_weights_of_float16(network) if (dtype, precision) == ("fp16", "float32") else network
    with torch.no_grad():
        want = source(ids)
    assert decibels(got["last_hidden_state"], want.last_hidden_state) >= least
    assert decibels(got["pooled_outputs"], want.pooler_output) >= least


@WAYS
@pytest.mark.parametrize("shape", SHAPES)
def test_vae(shape, dtype, precision, least):
    network = networks(shape)[2]
    source = with_weights_of_float16(network) if (dtype, precision) == ("fp16", "float32") else network
    factor, options = network.config.scale_factor, {"height": HEIGHT, "width": WIDTH, "dtype": dtype}
    z, x = noise(1, 4, HEIGHT, WIDTH), noise(1, 3, factor * HEIGHT, factor * WIDTH).clamp(-1, 1)
    image = Predictor(vae_decoder(network, **options), precision=precision).predict({"z": z.numpy()})["image"]
    latent = Predictor(vae_encoder(network, **options), precision=precision).predict({"x": x.numpy()})["latent"]
    with torch.no_grad():
        assert decibels(image, source.decode(z).sample) >= least
        assert decibels(latent, source.encode(x).latent_dist.parameters) >= least


@WAYS
@pytest.mark.parametrize("form", ATTENTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_unet(shape, form, dtype, precision, least):
    compare_unet(networks(shape)[1], dtype=dtype, precision=precision, least=least, form=form)


def test_unet_of_one_prompt():
    compare_unet(networks("sd15")[1], dtype="fp32", precision="float32", least=FLOAT32, form="split_einsum", batch=1)


def test_unet_with_more_queries_than_a_chunk():
    size = (23, 24)  # 552 pixels
    compare_unet(
        networks("sd15")[1], dtype="fp32", precision="float32", least=FLOAT32, form="split_einsum_v2", size=size
    )


@pytest.mark.parametrize("changes", UNPUBLISHED)
def test_unets_that_nobody_published(changes):
    network = randomize(sfumato.UNet2DConditionModel(**UNET | changes), 1)
    for dtype, precision, least in (("fp32", "float32", FLOAT32), ("fp16", "float32", SHIPPED)):
        compare_unet(network, dtype=dtype, precision=precision, least=least, form="original")


def test_the_model_in_the_package():
    """Trained, not random: activations and weights are of the size they have in earnest."""
    folder = SOURCE / "mini"
    noise_model = sfumato.UNet2DConditionModel.from_folder(folder / "unet", dtype=torch.float32)
    vae = sfumato.AutoencoderKL.from_folder(folder / "vae", dtype=torch.float32)
    text = sfumato.CLIPTextModel.from_folder(folder / "text_encoder", dtype=torch.float32)
    for form in ATTENTIONS:
        compare_unet(noise_model, dtype="fp16", precision="typed", least=FLOAT16, form=form, size=(8, 8))
        compare_unet(noise_model, dtype="fp16", precision="float32", least=SHIPPED, form=form, size=(8, 8))
    z = noise(1, vae.config.latent_channels, 8, 8)
    image = Predictor(vae_decoder(vae, height=8, width=8)).predict({"z": z.numpy()})["image"]
    ids = torch.full((1, text.config.max_position_embeddings), text.config.eos_token_id)
    ids[0, :3] = torch.tensor([text.config.eos_token_id - 1, 5, 9])
    states = Predictor(text_encoder(text)).predict({"input_ids": ids.float().numpy()})
    with torch.no_grad():
        assert decibels(image, vae.decode(z).sample) >= FLOAT16
        assert decibels(states["last_hidden_state"], text(ids).last_hidden_state) >= FLOAT16


# coremltools as the judge


def rebuilt(model: Model, folder):
    """The operations of our package after coremltools has built each anew."""
    tools = import_coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load

    write_package(model, folder / "model.mlpackage")
    spec = tools.utils.load_spec(str(folder / "model.mlpackage"))
    weights = folder / "model.mlpackage" / "Data" / "com.apple.CoreML" / "weights"
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=str(weights))
    return program.functions[MAIN]


def judge(model: Model, system: str, folder) -> None:
    from coremltools.converters.mil.mil.types import builtin_to_string

    ours = {op.outputs[0].name: op for op in model.program.functions[MAIN].operations}
    theirs = rebuilt(model, folder)
    assert theirs.opset_version.name == system
    assert [output.name for output in theirs.outputs] == list(model.program.functions[MAIN].outputs)
    assert len(theirs.operations) == len(ours)
    for operation in theirs.operations:
        own = ours[operation.outputs[0].name]
        assert operation.op_type == own.type
        types = [(builtin_to_string(var.dtype), tuple(var.shape)) for var in operation.outputs if own.type != "const"]
        assert types == [(output.type.dtype, output.type.shape) for output in own.outputs if own.type != "const"], own


@pytest.mark.parametrize(
    ("shape", "target"), [*((shape, "macOS13") for shape in SHAPES), *(("odd", name) for name in list(SYSTEMS)[1:])]
)
def test_coremltools_infers_the_types_we_wrote(shape, target, tmp_path):
    import_coremltools()
    text, noise_model, vae = networks(shape)
    size = {"height": HEIGHT, "width": WIDTH, "target": target}
    models = [text_encoder(text, target=target), vae_decoder(vae, **size), vae_encoder(vae, **size)]
    models += [unet(noise_model, **size, tokens=TOKENS, attention=form) for form in ATTENTIONS]
    for i, model in enumerate(models):
        (tmp_path / str(i)).mkdir()
        judge(model, SYSTEMS[target], tmp_path / str(i))


@pytest.mark.parametrize("changes", UNPUBLISHED)
def test_coremltools_knows_the_rarer_operations(changes, tmp_path):
    import_coremltools()
    network = sfumato.UNet2DConditionModel(**UNET | changes)
    judge(unet(network, height=8, width=8, tokens=3, batch=1), "iOS16", tmp_path)


@pytest.mark.parametrize("eos", [2, 599])
def test_coremltools_reads_programs_in_float32(eos, tmp_path):
    import_coremltools()
    judge(text_encoder(sfumato.CLIPTextModel(**TEXT | {"eos_token_id": eos}), dtype="fp32"), "iOS16", tmp_path)


class Traced(nn.Module):
    """What our networks consist of, written so that coremltools converts it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2)
        self.norm = randomize(nn.GroupNorm(2, 8))
        self.layer_norm = randomize(nn.LayerNorm(8))

    def forward(self, ids: torch.Tensor, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        ids = ids.int()
        text = self.layer_norm(self.embedding(ids.long()))
        text = text[torch.arange(1), (ids == 49).int().argmax(-1)]
        x = F.silu(self.norm(self.conv(x)))
        x = F.interpolate(self.down(F.pad(x, (0, 1, 0, 1))), scale_factor=2.0, mode="nearest")
        first, second = x.chunk(2, dim=1)
        x = torch.cat([first * F.gelu(second), second * torch.sigmoid(first)], 1)
        angles = time[:, None] * torch.arange(1.0, 5.0)
        x = x + torch.cat([angles.cos(), angles.sin()], -1)[:, :, None, None]
        tokens = x.reshape(1, 8, 1, 16)
        keys = tokens.transpose(1, 3)
        scores = torch.einsum("bchq,bkhc->bkhq", tokens[:, 2:6], keys[:, :, :, 2:6]).softmax(1)
        mixed = torch.einsum("bkhq,bchk->bchq", scores, tokens[:, 2:6])
        heads = mixed.reshape(1, 2, 2, 16)
        return torch.einsum("bhcq,bhck->bhqk", heads, heads).softmax(3).reshape(1, -1) + text.sum()


# The converter of coremltools overflows on its way, and leaves its temporary folders to the garbage collector.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:Implicitly cleaning:ResourceWarning")
@pytest.mark.parametrize("target", ["iOS16", "iOS17"])
def test_operations_are_given_what_coremltools_gives_them(target):
    """Every input that the converter of coremltools writes for an operation, we write too, and no other."""
    tools = import_coremltools()
    network = Traced().eval()
    example = (torch.arange(6.0)[None] + 44, torch.rand(1, 8, 4, 4), torch.rand(1))
    inputs = [tools.TensorType(name, shape=x.shape) for name, x in zip(("ids", "x", "time"), example, strict=True)]
    with torch.no_grad(), pytest.warns():
        traced = torch.jit.trace(network, example)
    options = {"outputs": [tools.TensorType("out")], "minimum_deployment_target": tools.target[target]}
    theirs = tools.convert(traced, inputs=inputs, **options, skip_model_load=True)
    function = theirs.get_spec().mlProgram.functions[MAIN]
    del theirs
    gc.collect()
    wanted = defaultdict(set)
    for operation in function.block_specializations[function.opset].operations:
        wanted[operation.type].add(frozenset(operation.inputs))
    text, noise_model, vae = networks("sd15")
    size = {"height": HEIGHT, "width": WIDTH, "target": target}
    models = [text_encoder(text, target=target), vae_encoder(vae, **size)]
    models += [unet(noise_model, **size, tokens=TOKENS, attention=form) for form in ("original", "split_einsum")]
    ours = defaultdict(set)
    for model in models:
        for operation in model.program.functions[MAIN].operations:
            ours[operation.type].add(frozenset(operation.inputs))
    compared = wanted.keys() & ours.keys() - {"const"}
    assert len(compared) >= 24
    for kind in compared:
        assert ours[kind] <= wanted[kind] | {inputs - {"bias"} for inputs in wanted[kind]}, kind
