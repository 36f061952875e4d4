"""Our palettes against coremltools': the same operations, numbers that it reads as we do, and no larger error."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.coreml.formats import read_model, write_package
from sfumato.coreml.palettize import decompress, palettize
from support.coremltools import import_coremltools

ct = import_coremltools()

# coremltools leaves its temporary folders to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")

TARGETS = {"CoreML6": "iOS16", "CoreML7": "iOS17", "CoreML8": "iOS18"}


def converted(opset: str, path):
    """A package by coremltools, with two convolutions and an embedding."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    target = getattr(ct.target, TARGETS[opset])
    random = np.random.default_rng(0)

    def weight(*shape):
        return (random.normal(size=shape) * 0.05).astype(np.float16)

    @mb.program(input_specs=[mb.TensorSpec((1, 8, 6, 6), types.fp16)], opset_version=target)
    def program(x):
        y = mb.conv(x=x, weight=weight(160, 8, 3, 3), pad_type="same", name="one")
        y = mb.conv(x=y, weight=weight(8, 160, 3, 3), pad_type="same", name="two")
        row = mb.gather(x=weight(500, 6), indices=np.array([3], np.int32), axis=0, name="row")
        return mb.add(x=y, y=mb.mul(x=row, y=np.float16(2)), name="y")

    model = ct.convert(
        program, minimum_deployment_target=target, pass_pipeline=ct.PassPipeline.EMPTY, skip_model_load=True
    )
    model.save(str(path))
    return model


def loaded(path):
    """As coremltools rebuilds and checks it."""
    from coremltools.converters.mil.frontend.milproto.load import load

    model = ct.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    return load(spec, spec.specificationVersion, model.weights_dir)


def dense(program) -> dict[str, np.ndarray]:
    """The numbers that coremltools finds in each palette."""
    return {
        operation.outputs[0].name.removesuffix("_palettized"): operation.materialized_val_inference()
        for operation in program.functions["main"].operations
        if operation.op_type == "constexpr_lut_to_dense"
    }


def forms(program) -> dict[str, object]:
    """Type and shape of each palette, its indices and its table."""
    found = {}
    for operation in program.functions["main"].operations:
        if operation.op_type == "constexpr_lut_to_dense":
            parts = {name: (str(one.dtype), one.shape) for name, one in operation.inputs.items() if one is not None}
            found[operation.outputs[0].name.removesuffix("_palettized")] = parts, str(operation.outputs[0].sym_type)
    return found


@pytest.mark.parametrize("opset", list(TARGETS))
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_coremltools_reads_what_we_do_and_would_write_the_same(opset, bits, tmp_path):
    reference = converted(opset, tmp_path / "whole.mlpackage")
    ours = palettize(read_model(tmp_path / "whole.mlpackage"), bits)
    assert ours.program.functions["main"].opset == opset
    write_package(ours, tmp_path / "ours.mlpackage")
    # As Apple's converter does: everything but what `gather` reads.
    optimize = ct.optimize.coreml
    config = optimize.OptimizationConfig(
        global_config=optimize.OpPalettizerConfig(mode="kmeans", nbits=bits), op_type_configs={"gather": None}
    )
    optimize.palettize_weights(reference, config).save(str(tmp_path / "theirs.mlpackage"))
    mine, theirs = loaded(tmp_path / "ours.mlpackage"), loaded(tmp_path / "theirs.mlpackage")
    assert forms(mine) == forms(theirs)
    assert len(forms(mine)) == 2

    function = decompress(ours).program.functions["main"]
    plain = {one.outputs[0].name: one for one in function.operations}
    again = decompress(read_model(tmp_path / "ours.mlpackage")).program.functions["main"]
    reread = {one.outputs[0].name: one for one in again.operations}
    exact = {one.outputs[0].name: one for one in read_model(tmp_path / "whole.mlpackage").program.functions["main"].operations}  # fmt: skip
    for name, numbers in dense(mine).items():
        assert np.array_equal(numbers, plain[name].attributes["val"].read())
        assert np.array_equal(numbers, reread[name].attributes["val"].read())
        weight = exact[name].attributes["val"].read().astype(np.float64)
        error, least = (((weight - each.astype(np.float64)) ** 2).sum() for each in (numbers, dense(theirs)[name]))
        # Theirs is the optimum, up to the rounding of its table.
        assert error <= least * 1.005


@pytest.mark.parametrize("opset", ["CoreML6", "CoreML8"])
def test_coremltools_unpacks_our_packages(opset, tmp_path):
    converted(opset, tmp_path / "whole.mlpackage")
    write_package(palettize(read_model(tmp_path / "whole.mlpackage"), 4), tmp_path / "ours.mlpackage")
    model = ct.models.MLModel(str(tmp_path / "ours.mlpackage"), skip_model_load=True)
    ct.optimize.coreml.decompress_weights(model).save(str(tmp_path / "plain.mlpackage"))
    theirs = {one.outputs[0].name: one for one in read_model(tmp_path / "plain.mlpackage").program.functions["main"].operations}  # fmt: skip
    ours = decompress(read_model(tmp_path / "ours.mlpackage")).program.functions["main"]
    numbers = [one for one in ours.operations if one.type == "const" and one.outputs[0].type.shape in ((160, 8, 3, 3), (8, 160, 3, 3))]  # fmt: skip
    assert len(numbers) == 2
    for one in numbers:
        assert np.array_equal(theirs[one.outputs[0].name].attributes["val"].read(), one.attributes["val"].read())
