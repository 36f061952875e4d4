"""Proofs: what passes, what fails, and that the operation at fault is named."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from sfumato.coreml.conversion import ConversionOptions, build, convert
from sfumato.coreml.departure import departure
from sfumato.coreml.formats import read_model, write_package
from sfumato.coreml.measure import decibels
from sfumato.coreml.probes import TIMESTEPS, probes
from sfumato.coreml.program import Model, TensorType, Value, renamed
from sfumato.coreml.runtime import Predictor
from sfumato.coreml.source import open_source
from sfumato.coreml.verification import Check, Verification, prove, verify
from sfumato.errors import CheckpointError, UsageError
from support.coreml_programs import operation as step


@pytest.fixture(scope="module")
def source(checkpoints):
    return open_source(checkpoints("sd15"))


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    place = tmp_path_factory.mktemp("verified") / "packages"
    convert(source, place)
    return place


def changed(model: Model, name: str, change) -> Model:
    """The model with one constant's numbers changed."""
    function = model.program.functions["main"]
    operations = []
    for operation in function.operations:
        if operation.outputs[0].name == name:
            value = operation.attributes["val"]
            new = Value(value.type, change(np.array(value.read())))
            operation = replace(operation, attributes={**operation.attributes, "val": new})
        operations.append(operation)
    return model.with_functions(lambda _: replace(function, operations=tuple(operations)))


def test_decibels():
    x = torch.tensor([1.0, -2.0, 3.0])
    assert decibels(x, x) == math.inf
    assert decibels(x + 0.3, x) == pytest.approx(20.0)
    assert decibels(x * 1000, x * 1000 + 3) == pytest.approx(60.0, abs=0.1)
    assert decibels(torch.tensor([math.nan, 1, 1]), x) == -math.inf
    assert decibels(torch.tensor([math.inf, 1, 1]), x) == -math.inf
    assert decibels(x, torch.tensor([math.nan, 1, 1])) == -math.inf


def test_every_part_is_compared_as_the_page_says(folder, source):
    proof = verify(folder, source, picture=False)
    assert proof.passed
    compared = [(check.part, check.what, check.needed) for check in proof.checks]
    assert sorted(compared) == sorted(
        (part, what, needed)
        for part in ("text_encoder", "unet", "vae_decoder", "vae_encoder")
        for what, needed in (("weights", math.inf), ("graph in float32", 100.0), ("as shipped", 55.0))
    )


def test_models_that_name_their_source_are_verified_without_it_being_named(folder, source):
    assert verify(folder, parts=("vae_decoder",), picture=False).source == source.name


def test_another_training_is_no_proof(folder, checkpoints, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoints("sd15"), other)
    from support.checkpoints import write_ours

    write_ours(other, "sd15", seed=5)
    proof = verify(folder, open_source(other), parts=("vae_decoder",), picture=False)
    assert not proof.passed
    assert proof.checks[0].db < 60


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_a_negated_weight_is_found_in_every_part(part, source):
    model = build(source, part, ConversionOptions())
    model = replace(model, metadata={"sfumato.part": part, "sfumato.attention": "split_einsum"})
    names = [op.outputs[0].name for op in model.program.functions["main"].operations if op.type == "const"]
    name = next(each for each in names if each.endswith("_weight") and ("conv1" in each or "fc1" in each))
    checks = list(prove(part, [changed(model, name, np.negative)], source))
    assert not checks[0].passed
    assert name.removesuffix("_weight") in checks[0].hint, checks[0]


def test_an_overflow_of_half_precision_is_named(source):
    """The graph is right and its precision is not: the first result beyond 65504 is the one to look at."""
    model = build(source, "vae_decoder", ConversionOptions())
    function = model.program.functions["main"]
    first = next(op for op in function.operations if op.type == "conv")
    weight = first.inputs["weight"][0]
    loud = changed(model, str(weight), lambda values: np.full_like(values, 6e4))
    probe = probes("vae_decoder", model.interface, source)[0]
    said = departure(Predictor(loud, fuse=False), Predictor(loud, precision="float32"), probe)
    assert said.startswith("the first non-finite result is that of operation")
    assert first.outputs[0].name in said


def hiding_nan(model: Model) -> Model:
    """The model with NaN computed beside its result, and left out of it."""
    function = model.program.functions["main"]
    (name,), type_ = function.outputs, model.interface.outputs[0].type
    steps = (
        step("mul", {"nothing": type_}, x=("plain",), y=np.float32(0)),
        step("sub", {"negative": type_}, x=("nothing",), y=np.float32(1)),
        step("sqrt", {"lost": type_}, x=("negative",)),
        step("greater", {"never": TensorType("bool", type_.shape)}, x=("negative",), y=np.float32(0)),
        step("select", {name: type_}, cond=("never",), a=("lost",), b=("plain",)),
    )
    own = (renamed(one, {name: "plain"}) for one in function.operations)
    return model.with_functions(lambda _: replace(function, operations=(*own, *steps)))


def test_nan_that_later_operations_hide_is_no_proof(source):
    model = hiding_nan(build(source, "vae_decoder", ConversionOptions()))
    weights, graph, shipped = prove("vae_decoder", [replace(model, metadata={"sfumato.part": "vae_decoder"})], source)
    assert weights.passed
    assert graph.passed
    assert shipped.verdict == "WRONG"
    assert shipped.db == -math.inf
    assert "'sqrt' (lost) returns NaN, which later operations hide" in shipped.hint


def test_two_runs_that_agree_have_no_operation_at_fault(source):
    model = build(source, "vae_decoder", ConversionOptions())
    probe = probes("vae_decoder", model.interface, source)[0]
    exact = Predictor(model, precision="float32")
    assert departure(exact, exact, probe) == "no single operation stands out"


def test_a_failure_inside_a_run_is_not_swallowed(source):
    model = build(source, "vae_decoder", ConversionOptions())
    exact = Predictor(model, precision="float32")
    with pytest.raises(UsageError):
        departure(exact, exact, {})


def test_models_without_a_source(folder, tmp_path, source):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    path = next(folder.glob("*_vae_decoder.mlpackage"))
    write_package(replace(read_model(path), metadata={}), foreign / path.name)
    with pytest.raises(UsageError, match="give it with --against"):
        verify(foreign, picture=False)
    # What others converted is held to what float16 constants allow, and its weights have other names.
    proof = verify(foreign, source, picture=False)
    assert [check.needed for check in proof.checks] == [60.0, 55.0]


def test_a_source_that_is_gone_or_changed(folder, tmp_path):
    path = next(folder.glob("*_vae_decoder.mlpackage"))
    model = read_model(path)
    for value, error, message in (
        ("./gone", UsageError, "which was not found"),
        ("built-in", CheckpointError, "has other weights"),
    ):
        place = tmp_path / value.strip("./")
        place.mkdir()
        write_package(replace(model, metadata={**model.metadata, "sfumato.source": value}), place / path.name)
        with pytest.raises(error, match=message):
            verify(place, picture=False)


def test_a_picture_needs_all_parts(folder, source, tmp_path, caplog):
    path = next(folder.glob("*_vae_decoder.mlpackage"))
    shutil.copytree(path, tmp_path / path.name)
    proof = verify(tmp_path, source)
    assert [check.part for check in proof.checks] == ["vae_decoder"] * 3
    assert "no image is compared" in caplog.text


def test_probes_are_the_same_at_every_call_and_exact_in_half_precision(source):
    for part in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        interface = build(source, part, ConversionOptions()).interface
        first, second = probes(part, interface, source), probes(part, interface, source)
        assert len(first) == (1 if part.startswith("vae") else 2)
        for a, b in zip(first, second, strict=True):
            assert {feature.name: feature.type.shape for feature in interface.inputs} == {
                name: tuple(tensor.shape) for name, tensor in a.items()
            }
            assert all(torch.equal(a[name], b[name]) for name in a)
            exact = [tensor for name, tensor in a.items() if name != "input_ids"]
            assert all(torch.equal(tensor, tensor.half().float()) for tensor in exact)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_timestep_is_tried_whatever_the_batch(batch, source):
    interface = build(source, "unet", ConversionOptions()).interface
    inputs = tuple(
        replace(one, type=TensorType(one.type.dtype, (batch, *one.type.shape[1:]))) for one in interface.inputs
    )
    tried = probes("unet", replace(interface, inputs=inputs), source)
    assert {float(time) for probe in tried for time in probe["timestep"]} == set(TIMESTEPS)
    assert all(len({*probe["timestep"].tolist()}) == batch for probe in tried)


def test_infinity_is_written_so_that_json_can_say_it(tmp_path):
    proof = Verification(
        tmp_path, "x", (Check("unet", "palettes, unpacked", math.inf, math.inf), Check("a", "b", 3.0, None))
    )
    first, second = proof.to_dict()["checks"]
    assert (first["db"], first["needed"], first["equal"], first["passed"]) == (None, None, True, True)
    assert (second["db"], second["needed"], second["equal"], second["passed"]) == (3.0, None, False, True)
