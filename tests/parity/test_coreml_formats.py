"""What we read of coremltools' packages is all of it, and it accepts what we write."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from sfumato.coreml.formats import read_model, write_compiled, write_package
from sfumato.coreml.formats.blobs import RECORD
from support.coreml_equal import plain
from support.coremltools import import_coremltools, quiet

TARGETS = ("iOS15", "iOS16", "iOS17", "iOS18", "iOS26")
# Ways to make weights smaller, and the targets that have them.
COMPRESSIONS = {
    "palette 4": ("iOS16", "iOS18"),
    "palette 6": ("iOS16", "iOS18"),
    "palette 8": ("iOS16", "iOS18"),
    "palette 1": ("iOS18",),
    "palette 2 in groups": ("iOS18",),
    "palette 3": ("iOS18",),
    "int8": ("iOS16", "iOS18"),
    "uint8": ("iOS16", "iOS18"),
    "int4 in blocks": ("iOS18",),
    "sparse": ("iOS16", "iOS18"),
    "sparse palette": ("iOS18",),
}


@pytest.fixture(scope="module")
def ct():
    return import_coremltools()


def network(ct, target: str, seed: int = 0):
    """Every kind of operation and constant of diffusion networks, as a program of coremltools."""
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    generator = np.random.default_rng(seed)

    def weight(*shape):
        return generator.standard_normal(shape).astype(np.float32) / 4

    signature = [mb.TensorSpec((2, 8, 4, 4)), mb.TensorSpec((2, 6), dtype=types.int32)]

    @mb.program(input_specs=signature, opset_version=getattr(ct.target, target))
    def built(sample, tokens):
        x = mb.conv(x=sample, weight=weight(16, 8, 3, 3), bias=weight(16), pad_type="same", name="first")
        groups = mb.reshape(x=x, shape=[2, 4, 4, 4, 4])
        mean = mb.reduce_mean(x=groups, axes=[2, 3, 4], keep_dims=True)
        centred = mb.sub(x=groups, y=mean)
        spread = mb.sqrt(x=mb.add(x=mb.reduce_mean(x=mb.square(x=centred), axes=[2, 3, 4], keep_dims=True), y=1e-5))
        x = mb.reshape(x=mb.real_div(x=centred, y=spread), shape=[2, 16, 4, 4])
        x = mb.batch_norm(x=x, mean=weight(16), variance=np.abs(weight(16)) + 1, gamma=weight(16), beta=weight(16))
        x = mb.silu(x=x)
        halves = mb.split(x=x, num_splits=2, axis=1)
        x = mb.concat(values=[halves[1], halves[0], mb.gelu(x=halves[0])], axis=1)
        flat = mb.reshape(x=x, shape=[2, 24, 1, 16])
        scores = mb.einsum(values=[mb.transpose(x=flat, perm=[0, 3, 2, 1]), flat], equation="bkhc,bchq->bkhq")
        scores = mb.softmax(x=mb.mul(x=scores, y=0.25), axis=1)
        mixed = mb.einsum(values=[flat, scores], equation="bchk,bkhq->bchq")
        mixed = mb.layer_norm(x=mixed, axes=[1], gamma=weight(24), beta=weight(24))
        words = mb.gather(x=weight(50, 24), indices=tokens, axis=0)
        words = mb.linear(x=words, weight=weight(32, 24), bias=weight(32))
        product = mb.matmul(x=mb.transpose(x=words, perm=[0, 2, 1]), y=words)
        larger = mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=2)
        part = mb.slice_by_index(x=larger, begin=[0, 0, 1, 0], end=[2, 24, 0, 8], end_mask=[True, False, True, True])
        marked = mb.select(cond=mb.greater(x=product, y=0.0), a=product, b=mb.sigmoid(x=product))
        exact = mb.cast(x=tokens, dtype="fp32")
        return mixed, part, marked, mb.expand_dims(x=exact, axes=[0])

    return built


def converted(ct, target: str, **options):
    """The program as a model of coremltools; at least iOS 16's is in half precision."""
    with quiet():
        return ct.convert(network(ct, target), minimum_deployment_target=getattr(ct.target, target), **options)


def compressed(ct, model, how: str):
    cto = ct.optimize.coreml

    def config(one):
        one.weight_threshold = 50
        return cto.OptimizationConfig(global_config=one)

    kind, _, rest = how.partition(" ")
    with quiet():
        if kind == "palette":
            groups = {"granularity": "per_grouped_channel", "group_size": 8} if "groups" in rest else {}
            palette = cto.OpPalettizerConfig(mode="uniform", nbits=int(rest.split()[0]), **groups)
            return cto.palettize_weights(model, config(palette))
        if kind == "sparse":
            model = cto.prune_weights(model, config(cto.OpMagnitudePrunerConfig(target_sparsity=0.6)))
            if not rest:
                return model
            palette = cto.OpPalettizerConfig(mode="uniform", nbits=4)
            return cto.palettize_weights(model, config(palette), joint_compression=True)
        blocks = {"granularity": "per_block", "block_size": 8} if "blocks" in rest else {}
        linear = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype=kind, **blocks)
        return cto.linear_quantize_weights(model, config(linear))


def content(ct, package: Path):
    """A package's model as `==` compares it: its message, with the bytes of weights in the place of where they are."""
    with quiet():
        spec = ct.models.MLModel(str(package), skip_model_load=True).get_spec()
    data = package / "Data" / "com.apple.CoreML"

    def digest(value):
        where = value.blobFileValue
        weights = (data / where.fileName.removeprefix("@model_path/")).read_bytes()
        _, dtype, size, start, unused = RECORD.unpack_from(weights, where.offset)
        return f"{dtype} {unused} {hashlib.sha256(weights[start : start + size]).hexdigest()}"

    def walk(message):
        found = {}
        for field, value in message.ListFields():
            if field.name == "attributes" and message.DESCRIPTOR.name == "Program":
                continue  # who built it with what, which the metadata tells, too
            if field.name == "blobFileValue":
                found[field.name] = digest(message)
            elif field.message_type is not None and field.message_type.GetOptions().map_entry:
                whole = {key: walk(one) if hasattr(one, "ListFields") else one for key, one in value.items()}
                found[field.name] = dict(sorted(whole.items()))
            elif field.message_type is None:
                found[field.name] = list(value) if hasattr(value, "append") else value
            else:
                found[field.name] = [walk(one) for one in value] if hasattr(value, "append") else walk(value)
        return found if message.DESCRIPTOR.name != "ModelDescription" else {k: one for k, one in found.items() if one}

    return walk(spec)


def check_with_coremltools(ct, package: Path) -> None:
    """It rebuilds every operation of every program in the package and checks all types."""
    load = ct.converters.mil.frontend.milproto.load.load
    with quiet():
        model = ct.models.MLModel(str(package), skip_model_load=True)
        program = load(model.get_spec(), model.get_spec().specificationVersion, model.weights_dir)
        program.validate()


def round_trip(ct, model, folder: Path):
    """A model of coremltools saved by it, read and written by us, and read by both."""
    theirs, ours = folder / "theirs.mlpackage", folder / "ours.mlpackage"
    with quiet():
        model.save(str(theirs))
    read = read_model(theirs)
    write_package(read, ours)
    assert content(ct, ours) == content(ct, theirs)
    assert plain(read_model(ours)) == plain(read)
    return read, ours


@pytest.mark.parametrize("target", TARGETS)
def test_a_program_of_every_system(ct, tmp_path, target):
    read, ours = round_trip(ct, converted(ct, target), tmp_path)
    check_with_coremltools(ct, ours)
    kinds = {operation.type for operation in read.program.functions["main"].operations}
    assert {"conv", "einsum", "layer_norm", "gather", "split", "concat", "linear"} <= kinds
    write_compiled(read, tmp_path / "ours.mlmodelc")
    assert plain(read_model(tmp_path / "ours.mlmodelc")) == plain(read)


@pytest.mark.parametrize(("how", "target"), [(how, one) for how, targets in COMPRESSIONS.items() for one in targets])
def test_compressed_weights(ct, tmp_path, how, target):
    read, ours = round_trip(ct, compressed(ct, converted(ct, target), how), tmp_path)
    check_with_coremltools(ct, ours)
    assert any(one.type.startswith("constexpr_") for one in read.program.functions["main"].operations)
    write_compiled(read, tmp_path / "ours.mlmodelc")
    assert plain(read_model(tmp_path / "ours.mlmodelc")) == plain(read)


def test_weights_are_the_numbers_that_coremltools_reads(ct, tmp_path):
    """Of every type: its own reader of weight files gives the same as ours, in the order of the program."""
    from coremltools.libmilstoragepython import _BlobStorageReader

    model = compressed(ct, converted(ct, "iOS18"), "palette 3")
    read, ours = round_trip(ct, model, tmp_path)
    reader = _BlobStorageReader(str(ours / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"))
    seen = set()
    for operation in read.program.functions["main"].operations:
        for value in [*operation.attributes.values(), *(one for entry in operation.inputs.values() for one in entry)]:
            if isinstance(value, str) or not value.stored:
                continue
            dtype, record = value.type.dtype, value.data.start - RECORD.size
            want = getattr(reader, f"read_{ {'fp32': 'float'}.get(dtype, dtype) }_data")(record)
            got = value.read().reshape(-1)
            assert np.array_equal(got.view(np.uint16) if dtype == "fp16" else got, want)
            seen.add(dtype)
    assert {"fp16", "uint3"} <= seen


def test_full_precision(ct, tmp_path):
    read, ours = round_trip(ct, converted(ct, "iOS16", compute_precision=ct.precision.FLOAT32), tmp_path)
    check_with_coremltools(ct, ours)
    assert {output.type.dtype for one in read.program.functions["main"].operations for output in one.outputs} >= {
        "fp32"
    }


def test_several_functions_share_their_weights(ct, tmp_path):
    packages = []
    for name in ("a", "b"):
        packages.append(str(tmp_path / f"{name}.mlpackage"))
        with quiet():
            converted(ct, "iOS18").save(packages[-1])
    both = ct.utils.MultiFunctionDescriptor()
    both.add_function(packages[0], src_function_name="main", target_function_name="first")
    both.add_function(packages[1], src_function_name="main", target_function_name="second")
    both.default_function_name = "second"
    with quiet():
        ct.utils.save_multifunction(both, str(tmp_path / "both.mlpackage"))
    read = read_model(tmp_path / "both.mlpackage")
    assert (set(read.program.functions), read.default_function) == ({"first", "second"}, "second")
    assert read.interface == read.interfaces["second"]
    write_package(read, tmp_path / "ours.mlpackage")
    assert content(ct, tmp_path / "ours.mlpackage") == content(ct, tmp_path / "both.mlpackage")
    check_with_coremltools(ct, tmp_path / "ours.mlpackage")
    where = Path("Data", "com.apple.CoreML", "weights", "weight.bin")
    sizes = [(tmp_path / name / where).stat().st_size for name in ("ours.mlpackage", "both.mlpackage")]
    assert sizes[0] == sizes[1]


def layer(ct, source: str, result: str, number: float):
    """One layer whose weights are all one number, as a model of coremltools."""
    from coremltools.converters.mil.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec((1, 8))], opset_version=ct.target.iOS16)
    def built(x):
        return mb.linear(x=x, weight=np.full((8, 8), number, np.float32), name=result)

    model = ct.convert(built, minimum_deployment_target=ct.target.iOS16)
    spec = model.get_spec()
    ct.utils.rename_feature(spec, "x", source)
    return ct.models.MLModel(spec, weights_dir=model.weights_dir, skip_model_load=True)


def test_a_pipeline(ct, tmp_path):
    with quiet():
        pipeline = ct.utils.make_pipeline(layer(ct, "x", "y", 1), layer(ct, "y", "z", 2))
    read, _ = round_trip(ct, pipeline, tmp_path)
    assert [name for name, _ in read.body] == ["model0", "model1"]
    assert [feature.name for feature in read.interface.inputs + read.interface.outputs] == ["x", "z"]
    for number, (_, inner) in enumerate(read.body):
        values = [one.attributes["val"] for one in inner.program.functions["main"].operations if one.type == "const"]
        (weight,) = [value.read() for value in values if value.stored and len(value.type.shape) == 2]
        assert (weight == number + 1).all()


def test_shapes_that_vary(ct, tmp_path):
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import get_new_symbol

    side = get_new_symbol()

    @mb.program(input_specs=[mb.TensorSpec((1, 4, side, 8))], opset_version=ct.target.iOS16)
    def built(x):
        return mb.relu(x=x)

    shapes = {
        "listed": ct.EnumeratedShapes([(1, 4, 8, 8), (1, 4, 16, 8)], default=(1, 4, 16, 8)),
        "ranged": ct.Shape((1, 4, ct.RangeDim(2, 64, default=8), 8)),
    }
    found = {}
    for name, shape in shapes.items():
        with quiet():
            model = ct.convert(built, inputs=[ct.TensorType("x", shape)], minimum_deployment_target=ct.target.iOS16)
        (tmp_path / name).mkdir()
        read, _ = round_trip(ct, model, tmp_path / name)
        feature = read.interface.inputs[0]
        assert feature.type.shape == (1, 4, None, 8)
        found[name] = feature.flexibility
    assert (found["listed"].default, set(found["listed"].shapes)) == ((1, 4, 16, 8), {(1, 4, 8, 8), (1, 4, 16, 8)})
    assert (found["ranged"].default, found["ranged"].ranges) == ((1, 4, 8, 8), ((1, 1), (4, 4), (2, 64), (8, 8)))


def test_images_and_default_values(ct, tmp_path):
    """Scale and bias are operations of the program, so an image is an array of numbers from 0 to 255."""
    from coremltools.converters.mil.mil import Builder as mb
    from PIL import Image

    from sfumato.coreml.runtime import load

    def add(x, y):
        return mb.add(x=x, y=y, name="z")

    specs = [mb.TensorSpec((1, 3, 4, 6)), mb.TensorSpec((1, 3, 1, 1))]
    bias = [-1.0, -0.5, 0.25]
    default = ct.TensorType("y", (1, 3, 1, 1), default_value=np.full((1, 3, 1, 1), 0.5, np.float32))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    for layout in ("RGB", "BGR"):
        image = ct.ImageType("x", (1, 3, 4, 6), scale=1 / 127.5, bias=bias, color_layout=ct.colorlayout[layout])
        (tmp_path / layout).mkdir()
        built = mb.program(input_specs=specs, opset_version=ct.target.iOS16)(add)
        with quiet():
            model = ct.convert(
                built, inputs=[image, default], minimum_deployment_target=ct.target.iOS16,
                compute_precision=ct.precision.FLOAT32, skip_model_load=True,
            )  # fmt: skip
        read, path = round_trip(ct, model, tmp_path / layout)
        x, y = read.interface.inputs
        assert (x.image, x.type.shape, y.default, y.optional) == (layout, (1, 3, 4, 6), 0.5, True)
        got = load(path).predict({"x": Image.fromarray(pixels)})["z"]
        ordered = pixels if layout == "RGB" else pixels[..., ::-1]
        wanted = ordered.transpose(2, 0, 1) / 127.5 + np.reshape(bias, (3, 1, 1)) + 0.5
        assert np.allclose(got[0], wanted, atol=1e-5)


def test_other_kinds_of_model_are_refused_by_name(ct, tmp_path):
    from sfumato.errors import ConfigError

    kinds = [field.name for field in ct.proto.Model_pb2.Model.DESCRIPTOR.oneofs_by_name["Type"].fields]
    for kind in set(kinds) - {"mlProgram", "pipeline"}:
        spec = ct.proto.Model_pb2.Model(specificationVersion=5)
        getattr(spec, kind).SetInParent()
        (tmp_path / "a.mlmodel").write_bytes(spec.SerializeToString())
        with pytest.raises(ConfigError, match=kind):
            read_model(tmp_path / "a.mlmodel")
    assert len(kinds) > 30
