"""Our chunks and pipelines against those of coremltools, which must read ours and check the type of every operation."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.coreml.chunk import chunk, cut, join
from sfumato.coreml.formats import read_model, write_package
from sfumato.coreml.palettize import palettize
from sfumato.coreml.program import Model
from sfumato.coreml.runtime import Predictor
from support.coremltools import import_coremltools

ct = import_coremltools()

# coremltools leaves its temporary folders to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")

STEPS = ("conv1", "add1", "conv2", "add2", "conv3", "add3", "add4", "noise_pred")


def network(path, target: str = "iOS16") -> Model:
    """A package by coremltools: three convolutions with a skip connection over two, and an input that both ends need."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    version = getattr(ct.target, target)
    random = np.random.default_rng(0)

    def weight():
        return (random.normal(size=(24, 24, 3, 3)) * 0.05).astype(np.float16)

    specs = [mb.TensorSpec((1, 24, 9, 9), types.fp16), mb.TensorSpec((1, 24, 1, 1), types.fp16)]

    @mb.program(input_specs=specs, opset_version=version)
    def program(x, t):
        first = mb.conv(x=x, weight=weight(), pad_type="same", name="conv1")
        skip = mb.add(x=first, y=t, name="add1")
        second = mb.conv(x=skip, weight=weight(), pad_type="same", name="conv2")
        third = mb.conv(x=mb.add(x=second, y=skip, name="add2"), weight=weight(), pad_type="same", name="conv3")
        last = mb.add(x=mb.add(x=third, y=t, name="add3"), y=skip, name="add4")
        return mb.cast(x=last, dtype="fp32", name="noise_pred")

    empty = ct.PassPipeline.EMPTY
    model = ct.convert(program, minimum_deployment_target=version, pass_pipeline=empty, skip_model_load=True)
    model.save(str(path))
    return read_model(path)


def features(model: Model) -> tuple[dict, dict]:
    return tuple({one.name: one.type for one in side} for side in (model.interface.inputs, model.interface.outputs))


def inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    shapes = {"x": (1, 24, 9, 9), "t": (1, 24, 1, 1)}
    return {name: random.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


def loads(path) -> None:
    """Raises if coremltools cannot rebuild the program, or finds a type that is not what it says."""
    from coremltools.converters.mil.frontend.milproto.load import load

    model = ct.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, model.weights_dir)
    said = {one.name: list(one.type.multiArrayType.shape) for one in spec.description.output}
    found = {one.name: list(one.shape) for one in program.functions["main"].outputs}
    assert said == found


def test_the_same_chunks_where_the_same_place_is_cut(tmp_path):
    whole = network(tmp_path / "whole.mlpackage")
    ct.models.utils.bisect_model(str(tmp_path / "whole.mlpackage"), str(tmp_path), check_output_correctness=False)
    theirs = [read_model(tmp_path / f"whole_chunk{number}.mlpackage") for number in (1, 2)]
    last = next(
        one.names[0] for one in theirs[0].program.functions["main"].operations if one.outputs[0].name == "conv2"
    )
    assert last != "conv2"  # a cast to fp32 has the name, as in ours
    ours = cut(whole, [STEPS.index("conv2") + 1])
    for mine, other in zip(ours, theirs, strict=True):
        assert features(mine) == features(other)
        assert [one.name for one in mine.interface.inputs if one.name in "xt"] == [
            one.name for one in other.interface.inputs if one.name in "xt"
        ]
        assert kinds(mine) == kinds(other)
    # Theirs and ours go together.
    for pieces in ((ours[0], theirs[1]), (theirs[0], ours[1])):
        got = Predictor(join(pieces)).predict(inputs())
        assert np.array_equal(got["noise_pred"], Predictor(whole).predict(inputs())["noise_pred"])


def kinds(model: Model) -> list[str]:
    return sorted(one.type for one in model.program.functions["main"].operations if one.type != "const")


@pytest.mark.parametrize("bits", [None, 6])
@pytest.mark.parametrize("target", ["iOS16", "iOS17", "iOS18"])
@pytest.mark.parametrize("parts", [2, 3])
def test_coremltools_reads_our_chunks(parts, target, bits, tmp_path):
    whole = network(tmp_path / "whole.mlpackage", target)
    whole = whole if bits is None else palettize(whole, bits)
    paths = [tmp_path / f"chunk{number}.mlpackage" for number in range(parts)]
    for piece, path in zip(chunk(whole, parts), paths, strict=True):
        write_package(piece, path)
        loads(path)
    joined = join([read_model(path) for path in paths])
    got, expected = (Predictor(one).predict(inputs())["noise_pred"] for one in (joined, whole))
    assert np.array_equal(got, expected)


def test_the_same_pipeline(tmp_path):
    pieces = chunk(network(tmp_path / "whole.mlpackage"), 3)
    paths = [tmp_path / f"chunk{number}.mlpackage" for number in range(3)]
    for piece, path in zip(pieces, paths, strict=True):
        write_package(piece, path)
    models = [ct.models.MLModel(str(path), skip_model_load=True) for path in paths]
    pipeline = ct.utils.make_pipeline(*models)
    pipeline.save(str(tmp_path / "theirs.mlpackage"))
    write_package(join([read_model(path) for path in paths]), tmp_path / "ours.mlpackage")
    mine, theirs = (read_model(tmp_path / f"{name}.mlpackage") for name in ("ours", "theirs"))
    assert features(mine) == features(theirs)
    assert mine.spec_version == theirs.spec_version
    assert [features(one) for _, one in mine.body] == [features(one) for _, one in theirs.body]
    spec = ct.models.MLModel(str(tmp_path / "ours.mlpackage"), skip_model_load=True).get_spec()
    assert spec.WhichOneof("Type") == "pipeline"
    assert len(spec.pipeline.models) == 3
    got, expected = (Predictor(one).predict(inputs())["noise_pred"] for one in (mine, theirs))
    assert np.array_equal(got, expected)
