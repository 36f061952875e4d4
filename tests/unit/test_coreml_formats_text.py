"""Compiled models: both dialects of their text, their binary interface and their metadata."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.coreml.formats import is_model, read_model, write_compiled
from sfumato.coreml.formats.compiled import coremldata
from sfumato.coreml.formats.mil_numbers import numbers_of, quoted, text_of, written_array
from sfumato.coreml.formats.mil_reader import read_mil
from sfumato.coreml.formats.mil_writer import mil_lines
from sfumato.coreml.program import (
    Feature,
    Function,
    Interface,
    Model,
    Operation,
    Output,
    Program,
    TensorType,
    Value,
    constant,
)
from sfumato.errors import CheckpointError, ConfigError
from support.assets import asset
from support.coreml_equal import plain

OLD = """program(1.0)
[buildInfo = dict<tensor<string, []>, tensor<string, []>>({{"with [brackets]", "1.0"}, {"b", "]"}})]
{
    func main<ios17>(tensor<int32, [1]> length, tensor<fp32, [1, ?]> signal) [FlexibleShapeInformation = tuple<tuple<tensor<string, []>, dict<tensor<string, []>, tensor<int32, [?]>>>>((("DefaultShapes", {{"signal", [1, 1]}})))] {
            tensor<int32, []> axis = const()[name = tensor<string, []>("axis"), val = tensor<int32, []>(-1)];
            tensor<fp32, [2, 2]> w = const()[name = tensor<string, []>("w"), val = tensor<fp32, [2, 2]>([[0x1.8p+0, -0x0p+0], [0x1p-149, inf]])];
            tensor<bool, [2]> mask = const()[name = tensor<string, []>("mask"), val = tensor<bool, [2]>([true, false])];
            tensor<string, [2]> words = const()[name = tensor<string, []>("words"), val = tensor<string, [2]>(["a, b", "c\\"d"])];
            tensor<fp32, [1, ?]> a, tensor<uint16, [1, ?]> b = topk(k = axis, x = signal)[name = tensor<string, []>("ab")];
            tensor<fp32, [1, ?]> c = concat(axis = axis, values = (a, signal))[name = tensor<string, []>("c")];
        } -> (c, b);
}
"""

NEW = """program(1.3)
[buildInfo = dict<string, string>({{"coremltools-version", "9.0"}})]
{
    func main<ios18>(tensor<fp16, [1, 4]> x) {
            int32 axis = const()[name = string("axis"), val = int32(-1)];
            fp16 half = const()[name = string("half"), val = fp16(0x1p-1)];
            bool yes = const()[name = string("yes"), val = bool(true)];
            string word = const()[name = string("word"), val = string("valid")];
            tensor<fp16, [1, 4]> y = mul(x = x, y = fp16(0x1p+1))[name = string("y")];
            tensor<fp16, [1, 8]> z = concat(axis = axis, interleave = bool(false), values = (x, y))[name = string("z")];
        } -> (z);
    func second<ios18>(tensor<fp16, [1, 4]> x) {
            tensor<fp16, [1, 4]> y = relu(x = x)[name = string("y")];
        } -> (y);
}
"""


def read(folder: Path, text: str) -> Program:
    (folder / "model.mil").write_text(text, encoding="utf-8")
    return read_mil(folder / "model.mil")


def test_the_dialect_of_ios_17_and_before(tmp_path):
    main = read(tmp_path, OLD).functions["main"]
    assert main.opset == "CoreML7"
    assert main.inputs == (Output("length", TensorType("int32", (1,))), Output("signal", TensorType("fp32", (1, None))))
    assert main.outputs == ("c", "b")
    axis, w, mask, words, topk, concat = main.operations
    assert axis.attributes["val"].data == np.array(-1)
    assert axis.outputs[0].type == TensorType("int32")
    want = np.array([[1.5, -0.0], [1e-45, np.inf]], np.float32)
    assert w.attributes["val"].data.tobytes() == want.tobytes()
    assert mask.attributes["val"].data.tolist() == [True, False]
    assert words.attributes["val"].data == ("a, b", 'c"d')
    assert [output.type.dtype for output in topk.outputs] == ["fp32", "uint16"]
    assert concat.inputs == {"axis": ("axis",), "values": ("a", "signal")}


def test_the_dialect_of_ios_18(tmp_path):
    program = read(tmp_path, NEW)
    assert list(program.functions) == ["main", "second"]
    axis, half, yes, word, mul, concat = program.functions["main"].operations
    values = [one.attributes["val"] for one in (axis, half, yes, word)]
    assert [str(value.type) for value in values] == ["int32[]", "fp16[]", "bool[]", "string[]"]
    assert [value.data if isinstance(value.data, str) else value.data.item() for value in values] == [
        -1,
        0.5,
        True,
        "valid",
    ]
    assert mul.inputs["y"][0].data == 2
    assert concat.inputs["interleave"][0].data == np.array(False)
    assert concat.inputs["values"] == ("x", "y")


@pytest.mark.parametrize("text", [OLD, NEW])
def test_what_is_written_is_what_was_read(tmp_path, text):
    program = read(tmp_path, text)
    version = 8 if text is OLD else 9
    build = {"coremltools-version": "9.0"} if text is NEW else {"with [brackets]": "1.0", "b": "]"}
    written = "".join(line + "\n" for line in mil_lines(program, version, lambda value: ("", 0), build))
    if text is NEW:
        assert written == text
    assert plain(read(tmp_path, written)) == plain(program)


def test_white_space_does_not_matter(tmp_path):
    want = plain(read(tmp_path, NEW))
    for sign in "=(){}[]<>,;":
        spaced = NEW.replace(sign, f"\n {sign}\t ").replace("-\n >", "->")
        assert plain(read(tmp_path, spaced)) == want
    assert plain(read(tmp_path, NEW.replace("\n", "\r\n"))) == want


@pytest.mark.parametrize(
    ("before", "after", "line", "says"),
    [
        ("program(1.3)", "programme", 1, "expected program"),
        ("[buildInfo", "[[buildInfo", 2, "expected attributes that end with ']', found '[[buildInfo"),
        ("func main<ios18>", "func main", 4, "expected a function"),
        ("tensor<fp16, [1, 4]> x) {", "x) {", 4, "expected a type, found 'x"),
        ("= int32(-1)", "= int32(one)", 5, "expected 1 values of type int32, found '(one)"),
        ("fp16(0x1p-1)", "fp16(0x1p+99)", 6, "expected 1 values of type fp16"),
        ("fp16(0x1p-1)", "fp16(1, 2)", 6, "expected 1 values"),
        ("bool(true)", "bool(1)", 7, "expected 1 values of type bool"),
        ('string("valid")', 'string("valid)', 8, "expected texts"),
        ('[name = string("y")];', '[name = string("y")]', 10, "expected ';', found 'tensor<fp16"),
        ("values = (x, y)", "values = (x, y", 10, "expected"),
        ("-> (z);", "-> z", 11, "expected a type"),
        ("-> (z);", f"-> ({200 * 'z'}[", 11, "expected a type"),  # and it does not take forever
        ("mul(x = x", "mul(x", 9, "argument"),
        ("\n    func second", "} stray", 11, "the end of the program"),
    ],
)
def test_errors_name_the_line(tmp_path, before, after, line, says):
    assert before in NEW
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, NEW.replace(before, after, 1))
    assert f"line {line}: " in str(caught.value)
    assert says in str(caught.value)


def test_a_text_that_is_cut_off_is_refused_wherever_it_ends(tmp_path):
    whole = OLD.rstrip()
    for size in range(len(whole)):
        with pytest.raises((CheckpointError, ConfigError)):
            read(tmp_path, whole[:size])


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("tensor<fp16, [1, 4]> x) {", "tensor<fp16, [1, 4]> x, state<tensor<fp16, [1]>> s) {", "a state"),
        ("tensor<fp16, [1, 4]> y = mul", "list<fp16, 3> y = mul", "a list"),
        ("tensor<fp16, [1, 4]> y = mul", "tensor<fp5, [1, 4]> y = mul", "type fp5"),
        ("tensor<fp16, [1, 4]> y = mul", "fp8e5m2 y = mul", "type fp8e5m2"),
        ("<ios18>", "<ios99>", "ios99"),
        ('[name = string("y")];', '[name = string("y")] { block0() { } -> (x); };', "blocks"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, before, after, says):
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, NEW.replace(before, after, 1))


@pytest.mark.parametrize("path", ["/etc/passwd", "@model_path/../../secret", "..\\\\secret"])
def test_weights_outside_of_the_folder_are_not_read(tmp_path, path):
    blob = f'tensor<fp16, [1, 4]>(BLOBFILE(path = string("{path}"), offset = uint64(64)))'
    with pytest.raises(CheckpointError, match="out of the folder"):
        read(tmp_path, NEW.replace("fp16(0x1p+1)", blob))


@given(text=st.text())
def test_texts_round_trip(text):
    assert text_of(quoted(text)) == text


@given(value=st.floats(allow_nan=False))
def test_numbers_are_written_as_c_does_and_read_exactly(value):
    array = np.array(value)
    read_again = numbers_of(written_array(array), TensorType("fp64"))
    assert read_again is not None
    assert read_again.tobytes() == array.tobytes()
    assert ".0p" not in written_array(array)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "0x1p+0"),
        (0.0, "0x0p+0"),
        (-0.0, "-0x0p+0"),
        (0.97, "0x1.f0a3d8p-1"),
        (2.0**-149, "0x1p-149"),
        (-np.inf, "-inf"),
    ],
)
def test_numbers_look_as_apple_writes_them(value, text):
    assert written_array(np.array(value, np.float32)) == text


# Whole folders.


def test_apples_own_example(tmp_path):
    """A folder that Apple's compiler made is read; its parts are written again byte for byte."""
    folder = asset("coreml") / "add_model.mlmodelc"
    model = read_model(folder)
    assert [str(feature.type) for feature in model.interface.inputs] == ["fp16[1, 10]"] * 2
    assert model.metadata["com.github.apple.coremltools.version"] == "8.1"
    assert coremldata(model) == (folder / "coremldata.bin").read_bytes()
    build = {
        "coremlc-component-MIL": "3402.3.2",
        "coremlc-version": "3402.4.1",
        "coremltools-component-torch": "2.5.1",
        "coremltools-source-dialect": "TorchScript",
        "coremltools-version": "8.1",
    }
    lines = mil_lines(model.program, model.spec_version, lambda value: ("", 0), build)
    assert "".join(line + "\n" for line in lines) == (folder / "model.mil").read_text(encoding="utf-8")
    write_compiled(model, tmp_path / "add_model.mlmodelc")
    ours, theirs = (
        (one / "metadata.json").read_text(encoding="utf-8") for one in (tmp_path / "add_model.mlmodelc", folder)
    )
    assert json.loads(ours) == json.loads(theirs)
    ours, theirs = (
        (one / "analytics" / "coremldata.bin").read_bytes() for one in (tmp_path / "add_model.mlmodelc", folder)
    )
    before, after = theirs.index(b"modelHash") + len("modelHash") + 8, theirs.index(b"modelName") - 8
    assert (ours[:before], ours[after:]) == (theirs[:before], theirs[after:])


def model_of(*operations: Operation, spec_version: int = 7) -> Model:
    x = TensorType("fp16", (1, 4))
    function = Function((Output("x", x),), ("x",), operations, f"CoreML{spec_version - 1}")
    return Model(Interface((Feature("x", x),), (Feature("x", x),)), Program({"main": function}), spec_version)


def test_inputs_are_listed_by_name(tmp_path):
    """In whatever order a program has them, as Apple's compiler does it."""
    x = TensorType("fp16", (1, 4))
    inputs, total = [Output(name, x) for name in ("z", "a", "b2", "b10")], Output("y", x)
    function = Function(tuple(inputs), ("y",), (Operation("add", {"x": ("z",), "y": ("a",)}, (total,)),), "CoreML6")
    features = tuple(Feature(one.name, one.type) for one in inputs)
    made = Model(Interface(features, (Feature("y", x),)), Program({"main": function}), 7)
    write_compiled(made, tmp_path / "model.mlmodelc")
    text = (tmp_path / "model.mlmodelc" / "model.mil").read_text(encoding="utf-8")
    assert re.findall(r"tensor<fp16, \[1, 4\]> (\w+)[,)]", text) == ["a", "b10", "b2", "z"]
    again = read_model(tmp_path / "model.mlmodelc")
    assert [feature.name for feature in again.interface.inputs] == ["z", "a", "b2", "b10"]


def metadata(folder: Path, model: Model) -> dict:
    write_compiled(model, folder / "a b.mlmodelc")
    return json.loads((folder / "a b.mlmodelc" / "metadata.json").read_text(encoding="utf-8"))[0]


HISTOGRAMS = {
    6: {"Einsum", "Mul", "Softmax", "Split", "Transpose"},
    7: {"Ios16.einsum", "Ios16.mul", "Ios16.softmax", "Split", "Transpose"},
    8: {"Ios16.einsum", "Ios17.mul", "Ios16.softmax", "Split", "Ios17.transpose"},
    9: {"Ios16.einsum", "Ios18.mul", "Ios16.softmax", "Split", "Ios18.transpose"},
}


@pytest.mark.parametrize("spec_version", HISTOGRAMS)
def test_metadata_counts_operations_as_apples_does(tmp_path, spec_version):
    """As in two compiled models of Apple's; apps tell attention by whether "Ios16.einsum" is there."""
    kinds = ["einsum", "mul", "softmax", "split", "transpose", "mul"]
    type_ = TensorType("fp16", (1, 4))
    operations = [Operation(kind, {}, (Output(f"y{i}", type_),), {}) for i, kind in enumerate(kinds)]
    found = metadata(tmp_path, model_of(*operations, spec_version=spec_version))["mlProgramOperationTypeHistogram"]
    assert set(found) == HISTOGRAMS[spec_version]
    assert sorted(found.values()) == [1, 1, 1, 1, 2]


def test_metadata_tells_the_precisions(tmp_path):
    def lut(colours: int) -> Operation:
        indices = Value(TensorType("uint8", (16,)), np.zeros(16, np.uint8))
        palette = Value(TensorType("fp16", (colours,)), np.zeros(colours, np.float16))
        output = (Output("w", TensorType("fp16", (4, 8))),)
        return Operation("constexpr_lut_to_dense", {}, output, {"indices": indices, "lut": palette})

    dense = constant("d", Value(TensorType("fp16", (4, 4)), np.zeros((4, 4), np.float16)))
    axis = constant("a", Value(TensorType("int32"), np.array(1, np.int32)))
    found = metadata(tmp_path, model_of(dense, lut(16), axis))
    assert found["storagePrecision"] == "Mixed (Float16, Palettized (4 bits))"
    assert found["computePrecision"] == "Mixed (Float16, Int32)"
    assert found["generatedClassName"] == "a_b"
    assert metadata(tmp_path, model_of(dense))["storagePrecision"] == "Float16"
    assert "storagePrecision" not in metadata(tmp_path, model_of(axis))


@pytest.fixture
def compiled(tmp_path) -> Path:
    weight = Value(TensorType("fp16", (4, 4)), np.ones((4, 4), np.float16))
    write_compiled(model_of(constant("w", weight)), tmp_path / "a.mlmodelc")
    return tmp_path / "a.mlmodelc"


@pytest.mark.parametrize("name", ["model.mil", "coremldata.bin", "weights/weight.bin"])
@pytest.mark.parametrize(
    "data", [None, b"", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 300, bytes(300)]
)
def test_files_that_are_wrong(compiled, name, data):
    if data is None:
        (compiled / name).unlink()
    else:
        (compiled / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"(?s){Path(name).name}.*again|git lfs pull"):
        read_model(compiled)


def test_what_people_only_look_at_is_not_needed(compiled):
    want = plain(read_model(compiled))
    (compiled / "metadata.json").unlink()
    shutil.rmtree(compiled / "analytics")
    assert plain(read_model(compiled)) == want


def test_compiled_models_of_other_kinds_are_refused_by_name(tmp_path):
    old = tmp_path / "old.mlmodelc"
    old.mkdir()
    for name in ("model.espresso.net", "model.espresso.weights", "coremldata.bin"):
        (old / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match="neural network"):
        read_model(old)
    pipeline = tmp_path / "pipeline.mlmodelc"
    (pipeline / "model0").mkdir(parents=True)
    (pipeline / "coremldata.bin").write_bytes(b"x")
    assert is_model(pipeline)
    with pytest.raises(ConfigError, match="pipeline"):
        read_model(pipeline)


def test_a_newer_version_is_told(compiled):
    data = bytearray((compiled / "coremldata.bin").read_bytes())
    data[43] = 11
    (compiled / "coremldata.bin").write_bytes(data)
    with pytest.raises(ConfigError, match="version 11"):
        read_model(compiled)
