"""The folder that Swift apps read: whole, named as they look for it, by Apple's compiler where there is one."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sfumato.coreml import resources as module
from sfumato.coreml.formats import read_model, write_compiled, write_package
from sfumato.coreml.layout import Models, find_models
from sfumato.coreml.program import Feature, Function, Interface, Model, Operation, Output, Program, TensorType, Value
from sfumato.coreml.program import constant as const
from sfumato.coreml.resources import resources
from sfumato.coreml.runtime import load
from sfumato.errors import OutputError, UsageError
from sfumato.text.tokenizer import CLIPTokenizer


def model(inputs: list[str], output: str, factor: float) -> Model:
    """Each input times a factor, summed."""
    ins = tuple(Output(name, TensorType("fp32", (1, 4, 8, 8))) for name in inputs)
    half = const("factor", Value(TensorType("fp32"), np.array(factor, np.float32)))
    operations, at = [half], inputs[0]
    for number, name in enumerate(inputs):
        to = Output(output if number == len(inputs) - 1 else f"at{number}", ins[0].type)
        operations.append(Operation("mul" if not number else "add", {"x": (at,), "y": ("factor" if not number else name,)}, (to,)))  # fmt: skip
        at = to.name
    interface = Interface(tuple(Feature(one.name, one.type) for one in ins), (Feature(output, ins[0].type),))
    return Model(interface, Program({"main": Function(ins, (output,), tuple(operations), "CoreML6")}), 7)


@pytest.fixture
def packages(tmp_path) -> Models:
    folder = tmp_path / "packages"
    folder.mkdir()
    write_package(model(["input_ids"], "last_hidden_state", 2), folder / "a.mlpackage")
    write_package(model(["sample", "timestep"], "noise_pred", 3), folder / "b.mlpackage")
    write_package(model(["z"], "image", 4), folder / "c.mlpackage")
    return find_models(folder)


@pytest.fixture
def tokenizer(checkpoints) -> CLIPTokenizer:
    return CLIPTokenizer.from_folder(checkpoints("sd15") / "tokenizer")


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)


@pytest.mark.usefixtures("no_compiler")
def test_what_swift_apps_look_for(packages, tokenizer, tmp_path, caplog):
    folder = resources(tmp_path / "out" / "Resources", packages, tokenizer)
    assert folder == tmp_path / "out" / "Resources"
    names = {path.name for path in folder.iterdir()}
    assert {"TextEncoder.mlmodelc", "Unet.mlmodelc", "VAEDecoder.mlmodelc", "vocab.json", "merges.txt"} <= names
    assert not any(name.startswith(".") for name in names)
    assert "experimental" in caplog.text
    found = find_models(tmp_path / "out")
    assert found.kind == "compiled"
    assert found.tokenizer == folder
    assert CLIPTokenizer.from_folder(folder).fitted("a red apple").input_ids.tolist() == tokenizer.fitted("a red apple").input_ids.tolist()  # fmt: skip
    for part in ("text_encoder", "unet", "vae_decoder"):
        (package,), (compiled,) = packages.paths(part), found.paths(part)
        x = {one.name: np.full((1, 4, 8, 8), 0.5, np.float32) for one in read_model(package).interface.inputs}
        got, expected = (next(iter(load(path).predict(x).values())) for path in (compiled, package))
        assert np.array_equal(got, expected)


@pytest.mark.usefixtures("no_compiler")
def test_again_is_anew_and_other_forms_of_the_unet_go(packages, tokenizer, tmp_path, caplog):
    folder = tmp_path / "Resources"
    folder.mkdir()
    for name in ("Unet", "UnetChunk1", "UnetChunk2"):
        write_compiled(model(["old"], "noise_pred", 1), folder / f"{name}.mlmodelc")
    (folder / "mine.txt").write_text("kept")
    resources(folder, packages, tokenizer)
    assert not (folder / "UnetChunk1.mlmodelc").exists()
    assert not (folder / "UnetChunk2.mlmodelc").exists()
    assert "UnetChunk2.mlmodelc, from an earlier conversion, is removed" in caplog.text
    assert (folder / "mine.txt").read_text() == "kept"
    assert find_models(folder).unet == (folder / "Unet.mlmodelc",)


@pytest.mark.usefixtures("no_compiler")
def test_compiled_models_are_not_compiled(packages, tokenizer, tmp_path):
    resources(tmp_path / "once", packages, tokenizer)
    with pytest.raises(UsageError, match="already compiled; give the folder with their packages"):
        resources(tmp_path / "twice", find_models(tmp_path / "once"), tokenizer)


@pytest.mark.usefixtures("no_compiler")
def test_a_tokenizer_in_one_file_gives_the_two_that_are_read(packages, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "two")
    merges = (tmp_path / "two" / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    vocab = json.loads((tmp_path / "two" / "vocab.json").read_text(encoding="utf-8"))
    home = tmp_path / "one"
    home.mkdir()
    tokenizer._tokenizer.save(str(home / "tokenizer.json"))
    single = CLIPTokenizer.from_folder(home)
    folder = resources(tmp_path / "Resources", packages, single)
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == vocab
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#version")
    assert [line for line in lines[1:] if line] == [line for line in merges if line]


class Xcode:
    """Stands in for Apple's compiler: keeps the calls, and makes what it would make."""

    def __init__(self, monkeypatch, *, found: bool = True, code: int = 0, makes: bool = True) -> None:
        self.calls: list[list[str]] = []
        self.found, self.code, self.makes = found, code, makes
        monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(module.subprocess, "run", self.run)

    def run(self, command: list[str], **_: object) -> subprocess.CompletedProcess:
        if "--find" in command:
            assert command == ["xcrun", "--find", "coremlcompiler"]
            return subprocess.CompletedProcess(command, 0 if self.found else 72, "", "")
        self.calls.append(command)
        *begin, package, place = command
        assert begin == ["xcrun", "coremlcompiler", "compile"]
        if self.makes:
            made = Path(place) / f"{Path(package).stem}.mlmodelc"
            write_compiled(read_model(package), made)
            (made / "apple").write_text("by Apple")
        return subprocess.CompletedProcess(
            command, self.code, "", "warning: x\nerror: no such op\n" if self.code else ""
        )


def test_apples_compiler_is_used_where_it_is(packages, tokenizer, tmp_path, monkeypatch, caplog):
    xcode = Xcode(monkeypatch)
    folder = resources(tmp_path / "Resources", packages, tokenizer)
    assert [Path(call[3]).name for call in xcode.calls] == ["a.mlpackage", "b.mlpackage", "c.mlpackage"]
    for name in ("TextEncoder", "Unet", "VAEDecoder"):
        assert (folder / f"{name}.mlmodelc" / "apple").is_file()
    assert [path for path in os.listdir(folder) if path.startswith(".")] == []
    assert "experimental" not in caplog.text


@pytest.mark.parametrize(("code", "makes"), [(1, True), (0, False)])
def test_a_compiler_that_fails_leaves_what_was_there(code, makes, packages, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "Resources"
    folder.mkdir()
    write_compiled(model(["old"], "noise_pred", 1), folder / "TextEncoder.mlmodelc")
    Xcode(monkeypatch, code=code, makes=makes)
    words = "error: no such op" if code else "exit code 0"
    with pytest.raises(OutputError, match=rf"a\.mlpackage \({words}\)"):
        resources(folder, packages, tokenizer)
    assert [path.name for path in folder.iterdir()] == ["TextEncoder.mlmodelc"]
    assert read_model(folder / "TextEncoder.mlmodelc").interface.inputs[0].name == "old"


def test_command_line_tools_without_the_compiler(packages, tokenizer, tmp_path, monkeypatch, caplog):
    xcode = Xcode(monkeypatch, found=False)
    resources(tmp_path / "Resources", packages, tokenizer)
    assert xcode.calls == []
    assert "experimental" in caplog.text
