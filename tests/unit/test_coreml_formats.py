"""Packages and compiled models: what is written is read again, and what is wrong is named."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import folders
from sfumato.coreml.formats import is_model, read_model, write_compiled, write_package
from sfumato.coreml.formats.schema import message
from sfumato.coreml.program import (
    ARRAY_DTYPES,
    Feature,
    Flexibility,
    Function,
    Interface,
    LazyArray,
    Model,
    Operation,
    Output,
    Program,
    TensorType,
    Value,
    constant,
)
from sfumato.errors import CheckpointError, ConfigError, OutputError, UsageError
from support.coreml_equal import plain

INNER = Path("Data", "com.apple.CoreML")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def text(value: str) -> Value:
    return Value(TensorType("string"), value)


def numbers(dtype: str, *shape: int, seed: int = 0) -> Value:
    """Random bits of a type, which as numbers are of every size; no NaN, whose bits the text form does not keep."""
    array_type, generator = ARRAY_DTYPES[dtype], np.random.default_rng(seed)
    count = int(np.prod(shape))
    if array_type.kind == "f":
        array = np.nan_to_num(np.frombuffer(generator.bytes(count * array_type.itemsize), array_type))
        if dtype == "bf16":
            array = (array.view(np.uint32) & 0xFFFF0000).view(np.float32)
    elif dtype == "bool":
        array = generator.integers(0, 2, count).astype(np.bool_)
    else:
        bits = int(dtype.lstrip("uint"))
        low = 0 if dtype.startswith("u") else -(2 ** (bits - 1))
        array = generator.integers(low, low + 2**bits, count, dtype=np.uint64 if dtype == "uint64" else np.int64)
        array = array.astype(array_type)
    return Value(TensorType(dtype, shape), array.reshape(shape))


def stored(value: Value) -> Value:
    return Value(value.type, LazyArray(lambda: value.data))


def model_of(*operations: Operation, spec_version: int = 9, **fields) -> Model:
    """A model that returns its input, and holds the operations besides."""
    x = TensorType("fp16", (1, 4))
    program = Program({"main": Function((Output("x", x),), ("y",), (*operations, relu()), f"CoreML{spec_version - 1}")})
    return Model(Interface((Feature("x", x),), (Feature("y", x),)), program, spec_version, **fields)


def relu() -> Operation:
    return Operation("relu", {"x": ("x",)}, (Output("y", TensorType("fp16", (1, 4))),), {"name": text("y")})


def example(spec_version: int = 7) -> Model:
    """A model with weights, literals, several outputs and all metadata."""
    weight = stored(numbers("fp16", 4, 4))
    half = TensorType("fp16", (1, 2))
    return model_of(
        constant("w", weight),
        constant("again", Value(weight.type, weight.data)),
        constant("s", text('quoted "text", \\ and\nlines')),
        constant("axis", Value(TensorType("int32"), np.array(-1, np.int32))),
        Operation(
            "split",
            {"axis": ("axis",), "num_splits": (Value(TensorType("int32"), np.array(2, np.int32)),), "x": ("x",)},
            (Output("a", half), Output("b", half)),
            {"name": text("ab")},
        ),
        Operation(
            "concat",
            {"axis": ("axis",), "values": ("a", "b")},
            (Output("c", TensorType("fp16", (1, None))),),
            {"name": text("c")},
        ),
        spec_version=spec_version,
        metadata={"b": "2", "a": "1"},
        author="Ana",
        license="none",
        version="3",
        description="what it does",
    )


@pytest.fixture
def package(tmp_path) -> Path:
    write_package(example(), tmp_path / "a.mlpackage")
    return tmp_path / "a.mlpackage"


@pytest.fixture
def compiled(tmp_path) -> Path:
    write_compiled(example(), tmp_path / "a.mlmodelc")
    return tmp_path / "a.mlmodelc"


@pytest.mark.parametrize("spec_version", [6, 7, 8, 9, 10])
def test_what_is_written_is_read_again(tmp_path, spec_version):
    model = example(spec_version)
    write_package(model, tmp_path / "a.mlpackage")
    write_compiled(model, tmp_path / "a.mlmodelc")
    assert plain(read_model(tmp_path / "a.mlpackage")) == plain(model)
    assert plain(read_model(tmp_path / "a.mlmodelc")) == plain(model)
    assert plain(read_model(tmp_path / "a.mlpackage" / INNER / "model.mlmodel")) == plain(model)
    assert all(is_model(tmp_path / name) for name in ("a.mlpackage", "a.mlmodelc"))
    assert not is_model(tmp_path)


ANY_NUMBERS = st.builds(
    numbers,
    st.sampled_from(sorted(ARRAY_DTYPES)),
    st.integers(1, 5),
    st.integers(1, 40),
    seed=st.integers(0, 2**32),
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.tuples(ANY_NUMBERS, st.booleans()), max_size=6))
def test_constants_of_every_type_keep_every_bit(values):
    """Whether they are wished to be in the weight file or not, in packages and in compiled models."""
    operations = [constant(f"c{i}", stored(one) if wished else one) for i, (one, wished) in enumerate(values)]
    model = model_of(*operations)
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (("a.mlpackage", write_package), ("a.mlmodelc", write_compiled)):
            write(model, Path(folder, name))
            assert plain(read_model(Path(folder, name))) == plain(model)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (9,), (10,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["fp16", "fp32", "int32", "bool", "uint4", "int4", "uint3"])
def test_shapes_of_constants(tmp_path, dtype, shape):
    model = model_of(constant("c", numbers(dtype, *shape)))
    write_package(model, tmp_path / "a.mlpackage")
    write_compiled(model, tmp_path / "a.mlmodelc")
    assert plain(read_model(tmp_path / "a.mlpackage")) == plain(model)
    assert plain(read_model(tmp_path / "a.mlmodelc")) == plain(model)


@pytest.mark.parametrize("value", [np.inf, -np.inf, -0.0, 65504.0, 6e-8, np.nan])
def test_floating_point_numbers_that_are_special(tmp_path, value):
    for dtype in ("fp16", "fp32"):
        model = model_of(constant("c", Value(TensorType(dtype), np.array(value, ARRAY_DTYPES[dtype]))))
        for name, write in (("a.mlpackage", write_package), ("a.mlmodelc", write_compiled)):
            write(model, tmp_path / name)
            assert plain(read_model(tmp_path / name)) == plain(model)


@pytest.mark.parametrize(
    ("spec_version", "dtype", "count", "where"),
    [
        (7, "fp16", 10, "file"),
        (7, "fp16", 9, "program"),
        (7, "int8", 10, "file"),
        (7, "int32", 100, "program"),
        (9, "int32", 10, "file"),
        (9, "uint4", 10, "file"),
        (9, "int64", 100, "program"),
        (9, "bool", 100, "program"),
    ],
)
def test_which_constants_are_in_the_weight_file(tmp_path, spec_version, dtype, count, where):
    write_package(model_of(constant("c", numbers(dtype, count)), spec_version=spec_version), tmp_path / "a.mlpackage")
    read = read_model(tmp_path / "a.mlpackage").program.functions["main"].operations[0].attributes["val"]
    assert read.stored == (where == "file")
    assert (tmp_path / "a.mlpackage" / INNER / "weights").exists() == (where == "file")


def test_constants_with_the_same_numbers_are_stored_once(package):
    weights = (package / INNER / "weights" / "weight.bin").read_bytes()
    assert struct.unpack_from("<II", weights) == (1, 2)
    assert len(weights) == 64 + 64 + 64
    operations = read_model(package).program.functions["main"].operations
    assert operations[0].attributes["val"].data is operations[1].attributes["val"].data


def test_weights_are_read_one_at_a_time(tmp_path):
    """While a model is written, the numbers of one weight are gone before those of the next are made."""
    alive = []

    class Numbers(np.ndarray):
        def __del__(self) -> None:
            alive.remove(id(self))

    def make() -> np.ndarray:
        made = np.zeros((64, 64), np.float16).view(Numbers)
        alive.append(id(made))
        assert len(alive) == 1
        return made

    values = [Value(TensorType("fp16", (64, 64)), LazyArray(lambda: make())) for _ in range(5)]
    write_package(model_of(*(constant(f"c{i}", one) for i, one in enumerate(values))), tmp_path / "a.mlpackage")
    write_compiled(model_of(*(constant(f"c{i}", one) for i, one in enumerate(values))), tmp_path / "a.mlmodelc")
    assert alive == []


def test_weights_are_views_that_torch_can_share(package):
    weight = read_model(package).program.functions["main"].operations[0].attributes["val"]
    first, second = weight.read(), weight.read()
    assert np.shares_memory(first, second)
    assert first.flags.writeable
    before = (package / INNER / "weights" / "weight.bin").read_bytes()
    first[:] = 0
    assert (package / INNER / "weights" / "weight.bin").read_bytes() == before


def test_several_functions(tmp_path):
    model = example(9)
    interfaces = {"one": model.interface, "two": model.interface}
    functions = dict.fromkeys(interfaces, model.program.functions["main"])
    several = replace(model, body=Program(functions), interfaces=interfaces, default_function="two")
    write_package(several, tmp_path / "a.mlpackage")
    assert plain(read_model(tmp_path / "a.mlpackage")) == plain(several)
    with pytest.raises(ConfigError, match="several functions"):
        write_compiled(several, tmp_path / "a.mlmodelc")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mlpackage"]


def test_pipelines(tmp_path):
    inner = example()
    pipeline = Model(inner.interface, (("first", inner), ("second", inner)), 7)
    write_package(pipeline, tmp_path / "a.mlpackage")
    read = read_model(tmp_path / "a.mlpackage")
    assert plain(read) == plain(pipeline)
    weights = tmp_path / "a.mlpackage" / INNER / "weights"
    assert sorted(path.name for path in weights.iterdir()) == ["0-weight.bin", "1-weight.bin"]
    with pytest.raises(ConfigError, match="pipeline"):
        write_compiled(pipeline, tmp_path / "a.mlmodelc")


FLEXIBLE = [
    Flexibility((1, 4), shapes=((1, 4), (1, 8))),
    Flexibility((1, 4), ranges=((1, 1), (4, None))),
    Flexibility((1, 4), ranges=((1, 1), (2, 8))),
]


@pytest.mark.parametrize("flexibility", FLEXIBLE)
def test_shapes_that_vary(tmp_path, flexibility):
    model = example()
    feature = Feature("x", TensorType("fp16", (1, None)), True, "an input", flexibility)
    model = replace(model, interface=replace(model.interface, inputs=(feature,)))
    write_package(model, tmp_path / "a.mlpackage")
    assert plain(read_model(tmp_path / "a.mlpackage")) == plain(model)
    with pytest.raises(ConfigError, match="several shapes"):
        write_compiled(model, tmp_path / "a.mlmodelc")
    loose = replace(model, interface=replace(model.interface, inputs=(replace(feature, flexibility=None),)))
    with pytest.raises(UsageError, match="flexibility"):
        write_package(loose, tmp_path / "a.mlpackage")
    assert plain(read_model(tmp_path / "a.mlpackage")) == plain(model)


SIZES = Flexibility((1, 3, 8, 8), shapes=((1, 3, 8, 8), (1, 3, 16, 12)))
FEATURES = [
    Feature("x", TensorType("fp16", (1, 4)), optional=True, default=0.5),
    Feature("x", TensorType("int32", (1, 4)), optional=True, default=-3),
    Feature("x", TensorType("fp32", (1, 3, 16, 12)), image="RGB"),
    Feature("x", TensorType("fp32", (1, 3, 16, 12)), image="BGR", description="a photo"),
    Feature("x", TensorType("fp32", (1, 1, 16, 12)), image="GRAYSCALE"),
    Feature("x", TensorType("fp16", (1, 1, 16, 12)), image="GRAYSCALE_FLOAT16"),
    Feature("x", TensorType("fp32", (1, 3, None, None)), flexibility=SIZES, image="RGB"),
    Feature(
        "x", TensorType("fp32", (1, 1, None, 8)), image="GRAYSCALE",
        flexibility=Flexibility((1, 1, 16, 8), ranges=((1, 1), (1, 1), (8, None), (8, 8))),
    ),
]  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES, ids=lambda one: f"{one.image or 'default'} {one.type}")
def test_images_and_default_values(tmp_path, feature):
    model = example()
    model = replace(model, interface=replace(model.interface, inputs=(feature,)))
    write_package(model, tmp_path / "a.mlpackage")
    assert plain(read_model(tmp_path / "a.mlpackage")) == plain(model)
    with pytest.raises(ConfigError, match="is unknown; write a package instead"):
        write_compiled(model, tmp_path / "a.mlmodelc")


# What can be wrong with a package.


def spoil_manifest(package: Path, value: object) -> None:
    (package / "Manifest.json").write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        ("{", "JSON"),
        ([], "object"),
        ({}, "where the model is"),
        ({"rootModelIdentifier": "a", "itemInfoEntries": {}}, "where the model is"),
        ({"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": 3}}}, "where the model is"),
        ({"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "../../secret"}}}, "out of the folder"),
        ({"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "/etc/passwd"}}}, "out of the folder"),
        ({"rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": "not/there"}}}, "is missing"),
        (POINTER.decode(), "git lfs pull"),
    ],
)
def test_manifests_that_are_wrong(package, manifest, says):
    spoil_manifest(package, manifest)
    with pytest.raises(CheckpointError, match=says):
        read_model(package)


@pytest.mark.parametrize("name", ["model.mlmodel", "weights/weight.bin"])
@pytest.mark.parametrize(
    ("data", "says"),
    [(None, "is missing"), (POINTER, "git lfs pull"), (b"", ""), (b"\xff" * 99, ""), (bytes(64), "")],
)
def test_files_of_packages_that_are_wrong(package, name, data, says):
    file = package / INNER / name
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"(?s){file.name}.*{says}"):
        read_model(package)


def change_weights(package: Path, at: int, data: bytes) -> None:
    with (package / INNER / "weights" / "weight.bin").open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize(
    ("at", "data", "says"),
    [
        (4, struct.pack("<I", 3), "version 2"),
        (64, b"\0", "mark"),
        (68, struct.pack("<I", 2), "contains fp32"),
        (68, struct.pack("<I", 99), "type 99"),
        (72, struct.pack("<Q", 30), "30 bytes"),
        (80, struct.pack("<Q", 2**60), "cut off"),
        (80, struct.pack("<Q", 0), "cut off"),
    ],
)
def test_records_that_are_wrong(package, at, data, says):
    change_weights(package, at, data)
    with pytest.raises(CheckpointError, match=says):
        read_model(package)


def test_a_weight_file_that_is_cut_off(package):
    file = package / INNER / "weights" / "weight.bin"
    whole = file.read_bytes()
    for size in (130, 127, 100, 64, 63, 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"weight.bin.*again"):
            read_model(package)


def test_a_model_that_is_cut_off_is_never_half_read(package):
    """Wherever it ends, reading it either says so or gives fewer whole operations; it never fails otherwise."""
    file = package / INNER / "model.mlmodel"
    whole = file.read_bytes()
    refused = 0
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        try:
            read_model(package)
        except (CheckpointError, ConfigError):
            refused += 1
    assert refused > len(whole) / 7 * 0.9


def spec_of(package: Path):
    spec = message("Model")
    spec.ParseFromString((package / INNER / "model.mlmodel").read_bytes())
    return spec, spec.mlProgram.functions["main"].block_specializations["CoreML6"].operations


def weight_elsewhere(spec, operations) -> None:
    operations[0].attributes["val"].blobFileValue.fileName = "@model_path/../../../etc/passwd"


def no_such_record(spec, operations) -> None:
    operations[0].attributes["val"].blobFileValue.offset = 100


def far_record(spec, operations) -> None:
    operations[0].attributes["val"].blobFileValue.offset = 2**40


def too_few_numbers(spec, operations) -> None:
    operations[3].attributes["val"].immediateValue.tensor.ints.values.pop()


def wrong_rank(spec, operations) -> None:
    operations[-1].outputs[0].type.tensorType.rank = 3


def other_opset(spec, operations) -> None:
    spec.mlProgram.functions["main"].opset = "CoreML5"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (weight_elsewhere, "out of the folder"),
        (no_such_record, "is impossible"),
        (far_record, "is impossible"),
        (too_few_numbers, r"'axis'.* 0 ints"),
        (wrong_rank, "rank 3"),
        (other_opset, "CoreML5"),
    ],
)
def test_programs_that_are_damaged(package, change, says):
    spec, operations = spec_of(package)
    change(spec, operations)
    (package / INNER / "model.mlmodel").write_bytes(spec.SerializeToString())
    with pytest.raises(CheckpointError, match=says):
        read_model(package)


def newer(spec, operations) -> None:
    spec.specificationVersion = 11


def with_blocks(spec, operations) -> None:
    operations[-1].blocks.add()


def with_list(spec, operations) -> None:
    operations[-1].outputs[0].type.listType = b""


def with_state(spec, operations) -> None:
    spec.description.state.add(name="cache")


def with_image(spec, operations) -> None:
    spec.description.input[0].type.imageType.colorSpace = 77


def with_dictionary(spec, operations) -> None:
    spec.description.input[0].type.dictionaryType = b""


def any_rank(spec, operations) -> None:
    operations[-1].outputs[0].type.tensorType.dimensions[0].unknown.variadic = True


def unknown_type(spec, operations) -> None:
    operations[-1].outputs[0].type.tensorType.dataType = 77


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (newer, "version 11.*newer"),
        (with_blocks, "blocks"),
        (with_list, "a list"),
        (with_state, "state 'cache'"),
        (with_image, "'x' has the unknown color space 77"),
        (with_dictionary, "'x' is a dictionary, but only arrays and images"),
        (any_rank, "unknown rank"),
        (unknown_type, "type 77"),
    ],
)
def test_programs_that_are_not_supported(package, change, says):
    spec, operations = spec_of(package)
    change(spec, operations)
    (package / INNER / "model.mlmodel").write_bytes(spec.SerializeToString())
    with pytest.raises(ConfigError, match=says):
        read_model(package)


def read_before(spec, operations) -> None:
    operations[-1].inputs["x"].arguments[0].name = "later"


def computed_twice(spec, operations) -> None:
    operations[-1].outputs[0].name = "x"


def never_computed(spec, operations) -> None:
    spec.mlProgram.functions["main"].block_specializations["CoreML6"].outputs[0] = "z"


def no_value(spec, operations) -> None:
    del operations[0].attributes["val"]


def other_input(spec, operations) -> None:
    spec.description.input[0].name = "other"


def other_output(spec, operations) -> None:
    spec.description.output[0].name = "other"


def no_main(spec, operations) -> None:
    spec.mlProgram.functions["other"].CopyFrom(spec.mlProgram.functions.pop("main"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (read_before, "reads 'later' before"),
        (computed_twice, "'x' is computed twice"),
        (never_computed, "'z' is returned"),
        (no_value, "has no value"),
        (other_input, "input 'other'"),
        (other_output, "output 'other'"),
        (no_main, "no function 'main'"),
    ],
)
def test_programs_that_do_not_hang_together(package, change, says):
    spec, operations = spec_of(package)
    change(spec, operations)
    (package / INNER / "model.mlmodel").write_bytes(spec.SerializeToString())
    with pytest.raises(CheckpointError, match=says):
        read_model(package)


@pytest.mark.parametrize(("write", "name"), [(write_package, "a.mlpackage"), (write_compiled, "a.mlmodelc")])
def test_what_does_not_hang_together_is_not_written(tmp_path, write, name):
    with pytest.raises(UsageError, match="'y' is computed twice"):
        write(model_of(relu()), tmp_path / name)
    inner = model_of(relu())
    with pytest.raises(UsageError, match="in the model 'a'"):
        write_package(Model(inner.interface, (("a", inner),), 9), tmp_path / "a.mlpackage")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_told_or_harmless(data):
    """Whichever bytes of whichever file are changed, reading raises one of our errors or gives a whole model."""
    with tempfile.TemporaryDirectory() as folder:
        package, compiled = Path(folder, "a.mlpackage"), Path(folder, "a.mlmodelc")
        write_package(example(9), package)
        write_compiled(example(9), compiled)
        inner = package / INNER
        files = [inner / "model.mlmodel", inner / "weights" / "weight.bin", package / "Manifest.json"]
        files += [compiled / name for name in ("model.mil", "coremldata.bin", "weights/weight.bin")]
        file = data.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        says = str(folder)
        try:
            plain(read_model(compiled if compiled in file.parents else package))
        except (CheckpointError, ConfigError) as error:
            says = str(error)
        assert str(folder) in says


def test_fields_that_are_not_known_are_passed_over(package):
    file = package / INNER / "model.mlmodel"
    before = plain(read_model(package))
    file.write_bytes(file.read_bytes() + b"\xba\x3e\x03abc")  # field 999, three bytes
    assert plain(read_model(package)) == before


def test_folders_that_hold_no_model(tmp_path, package):
    with pytest.raises(CheckpointError, match=r"did you mean .*a.mlpackage"):
        read_model(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_model(tmp_path / "nothing.mlpackage")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither"):
        read_model(tmp_path / "empty")


PACKAGED = ("Manifest.json", f"{INNER}/model.mlmodel", f"{INNER}/weights/weight.bin")
COMPILED = ("coremldata.bin", "model.mil", "weights/weight.bin")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("name", [*PACKAGED, *COMPILED])
def test_only_regular_files_are_read(tmp_path, name, kind):
    """Reading a pipe would wait for ever, and /dev/zero would fill the memory."""
    place = tmp_path / ("a.mlpackage" if name in PACKAGED else "a.mlmodelc")
    (write_package if name in PACKAGED else write_compiled)(example(), place)
    file = place / name
    file.unlink()
    {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](file)
    with pytest.raises(CheckpointError, match=rf"{file.name} is not a regular file|neither a package's"):
        plain(read_model(place))


def test_files_larger_than_such_files_are(tmp_path):
    write_compiled(example(), tmp_path / "a.mlmodelc")
    for name in ("coremldata.bin", "model.mil"):
        with (tmp_path / "a.mlmodelc" / name).open("r+b") as file:
            file.truncate(2**30 + 1)  # a hole, which takes no room
    with pytest.raises(CheckpointError, match=r"coremldata.bin has 1,074 MB, which is too large for such a file"):
        read_model(tmp_path / "a.mlmodelc")
    (tmp_path / "a.mlmodelc" / "coremldata.bin").unlink()
    write_package(example(), tmp_path / "a.mlpackage")
    with (tmp_path / "a.mlpackage" / INNER / "model.mlmodel").open("r+b") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(CheckpointError, match=r"model.mlmodel has 1,074 MB"):
        read_model(tmp_path / "a.mlpackage")


# What can be wrong with writing.


@pytest.mark.parametrize(("write", "suffix"), [(write_package, ".mlpackage"), (write_compiled, ".mlmodelc")])
def test_a_broken_write_leaves_the_old_model_and_nothing_else(tmp_path, monkeypatch, write, suffix):
    target = tmp_path / f"a{suffix}"
    write(example(), target)
    before = plain(read_model(target))

    def full() -> np.ndarray:
        raise OSError(errno.ENOSPC, "full")

    def damaged() -> np.ndarray:
        raise CheckpointError("the source is damaged")

    def stopped() -> np.ndarray:
        raise KeyboardInterrupt("by hand")

    for make, error, says in (
        (full, OutputError, "no space left"),
        (damaged, CheckpointError, "source is damaged"),
        (stopped, KeyboardInterrupt, "by hand"),
    ):
        weights = [stored(numbers("fp16", 4, 4)), Value(TensorType("fp16", (4, 4)), LazyArray(make))]
        with pytest.raises(error, match=says):
            write(model_of(*(constant(f"c{i}", one) for i, one in enumerate(weights))), target)
        assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert plain(read_model(target)) == before
    write(example(8), target)
    assert read_model(target).spec_version == 8
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_last_step_that_fails_puts_the_old_model_back(tmp_path, monkeypatch, package):
    def fail(self: Path, target: Path) -> Path:
        raise OSError(errno.EACCES, "no")

    monkeypatch.setattr(folders, "_exchanged", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="no permission"):
        write_package(example(9), package)
    assert read_model(package).spec_version == 7
    assert [path.name for path in tmp_path.iterdir()] == [package.name]


def test_names_and_places_that_are_refused(tmp_path):
    for write, suffix in ((write_package, ".mlpackage"), (write_compiled, ".mlmodelc")):
        with pytest.raises(UsageError, match=suffix):
            write(example(), tmp_path / "a.zip")
        mine = tmp_path / f"mine{suffix}"
        mine.mkdir()
        (mine / "letter.txt").write_text("dear")
        with pytest.raises(OutputError, match="exists and is not a"):
            write(example(), mine)
        assert (mine / "letter.txt").read_text() == "dear"
        with pytest.raises(OutputError):
            write(example(), mine / "letter.txt" / f"a{suffix}")


@pytest.mark.parametrize(
    "value",
    [
        Value(TensorType("fp16", (3,)), np.zeros(4, np.float16)),
        Value(TensorType("fp16", (20,)), np.zeros(4, np.float16)),
        Value(TensorType("fp16", (20,)), np.zeros(20, np.float32)),
        Value(TensorType("fp16"), np.zeros((), np.float32)),
        Value(TensorType("fp16"), "text"),
        Value(TensorType("string"), np.zeros((), np.float32)),
    ],
)
def test_constants_that_are_not_of_their_type(tmp_path, value):
    for name, write in (("a.mlpackage", write_package), ("a.mlmodelc", write_compiled)):
        with pytest.raises(UsageError, match="make both the same"):
            write(model_of(constant("c", value)), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_copies_of_packages_are_packages(tmp_path, package):
    shutil.copytree(package, tmp_path / "any name")
    assert plain(read_model(tmp_path / "any name")) == plain(read_model(package))
