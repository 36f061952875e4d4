"""Core ML models that are damaged, mixed or not what they seem, and conversions that cannot end well: one sentence each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sfumato.coreml.formats.schema import message
from support.checkpoints import write_ours
from support.converted import write_converted

CONVERT = ["coreml", "convert"]
VERIFY = ["coreml", "verify"]
DRAW = ["coreml", "generate", "horse", "--portable", "--compute-unit", "CPU_ONLY", "--steps", "1"]
INNER = Path("Data/com.apple.CoreML")
WEIGHTS = INNER / "weights" / "weight.bin"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def models(model, tmp_path_factory) -> Path:
    return write_converted(model, tmp_path_factory.mktemp("converted") / "models")


def of(folder: Path, part: str) -> Path:
    """The package of a part."""
    return next(folder.glob(f"*_{part}.mlpackage"))


def edited(package: Path, change) -> None:
    """Let a function change the message in a package."""
    path, spec = package / INNER / "model.mlmodel", message("Model")
    spec.ParseFromString(path.read_bytes())
    change(spec)
    path.write_bytes(spec.SerializeToString())


def cut_off(package: Path) -> None:
    os.truncate(package / WEIGHTS, 1000)


def empty(package: Path) -> None:
    os.truncate(package / WEIGHTS, 0)


def without_weights(package: Path) -> None:
    shutil.rmtree((package / WEIGHTS).parent)


def without_mark(package: Path) -> None:
    with (package / WEIGHTS).open("r+b") as file:
        file.seek(64)
        file.write(bytes(4))


def pointing_outside(package: Path) -> None:
    manifest = package / "Manifest.json"
    manifest.write_text(manifest.read_text().replace("com.apple.CoreML/model.mlmodel", "../../../../etc/passwd"))


def no_manifest(package: Path) -> None:
    (package / "Manifest.json").write_text("{]")


def of_the_future(package: Path) -> None:
    edited(package, lambda spec: setattr(spec, "specificationVersion", 99))


def of_no_version(package: Path) -> None:
    edited(package, lambda spec: setattr(spec, "specificationVersion", 0))


def neural_network(package: Path) -> None:
    # A field of that number is the old kind of model; what is in it does not matter.
    spec = message("Model")
    spec.specificationVersion = 4
    (package / INNER / "model.mlmodel").write_bytes(spec.SerializeToString() + b"\xa2\x1f\x00")


def half_a_program(package: Path) -> None:
    os.truncate(package / INNER / "model.mlmodel", 3000)


def weights_by_pointer(package: Path) -> None:
    (package / WEIGHTS).write_bytes(POINTER)


def program_by_pointer(package: Path) -> None:
    (package / INNER / "model.mlmodel").write_bytes(POINTER)


DAMAGE = [
    (cut_off, "the file is cut off; copy or download the model again"),
    (empty, "weight.bin cannot be read"),
    (without_weights, "weight.bin is missing; copy or download"),
    (without_mark, "does not start with the expected mark"),
    (pointing_outside, "'../../../../etc/passwd' leads out of the folder; do not use"),
    (no_manifest, "Manifest.json cannot be read as JSON"),
    (of_the_future, "version 99 of the Core ML format, which is newer"),
    (of_no_version, "it has no version of the format"),
    (neural_network, "not an ML Program; convert it again"),
    (half_a_program, "not a Core ML model, or damaged"),
    (weights_by_pointer, "weight.bin is a Git LFS pointer, not the file; run `git lfs pull`"),
    (program_by_pointer, "model.mlmodel is a Git LFS pointer"),
]


def test_damaged_models_are_neither_drawn_with_nor_proved(sfumato_each, models, model, tmp_path):
    commands = []
    for damage, _ in DAMAGE:
        folder = shutil.copytree(models, tmp_path / damage.__name__)
        damage(of(folder, "unet"))
        commands += [[*DRAW, "-i", damage.__name__], [*VERIFY, damage.__name__, "--against", model]]
    before = set(tmp_path.iterdir())
    outcomes = sfumato_each(commands, cwd=tmp_path)
    for (damage, sentence), drawn, proved in zip(DAMAGE, outcomes[::2], outcomes[1::2], strict=True):
        drawn.failed(1, f"{damage.__name__} has no U-Net that can be read: ", sentence)
        assert proved.code == 1, proved
        assert proved.out == ""
        assert sentence in proved.err
        assert "unexpected" not in proved.err
    assert set(tmp_path.iterdir()) == before


def test_compiled_models_by_pointer(sfumato_each, model, tmp_path):
    write_converted(model, tmp_path / "whole", kind="compiled")
    names = ("weights/weight.bin", "coremldata.bin", "model.mil")
    for name in names:
        folder = shutil.copytree(tmp_path / "whole", tmp_path / Path(name).stem)
        for one in folder.glob("*.mlmodelc"):
            (one / name).write_bytes(POINTER)
    outcomes = sfumato_each([[*DRAW, "-i", Path(name).stem] for name in names], cwd=tmp_path)
    for name, outcome in zip(names, outcomes, strict=True):
        outcome.failed(1, "TextEncoder.mlmodelc", f"{Path(name).name} is a Git LFS pointer", "git lfs pull")


def test_an_operation_that_is_not_known(sfumato_each, models, model, tmp_path):
    def change(spec):
        function = spec.mlProgram.functions["main"]
        next(
            one for one in function.block_specializations[function.opset].operations if one.type == "conv"
        ).type = "odd"

    edited(of(shutil.copytree(models, tmp_path / "odd"), "unet"), change)
    drawn, proved = sfumato_each([[*DRAW, "-i", "odd"], [*VERIFY, "odd", "--against", model]], cwd=tmp_path)
    drawn.failed(1, "_unet.mlpackage: operation ", "'odd' (", "of function 'main' is not supported")
    proved.failed(1, "odd, unet: operation ", "of function 'main' is not supported")


def test_packages_of_two_conversions(sfumato_each, models, model, tmp_path):
    """Two checkpoints, two sizes, chunks of two: refused by drawing and by proving, before anything is computed."""
    other = write_ours(tmp_path / "other", seed=5)
    quiet = ["--no-verify", "-q"]
    made = [
        [*CONVERT, other, "-o", "of-other", "--convert-unet", *quiet],
        [*CONVERT, model, "-o", "wide", "--convert-unet", "--convert-vae-encoder", "--latent-w", "16", *quiet],
        [*CONVERT, model, "-o", "cut", "--convert-unet", "--chunk-unet", *quiet],
        [*CONVERT, other, "-o", "cut-other", "--convert-unet", "--chunk-unet", *quiet],
    ]
    for outcome in sfumato_each(made, cwd=tmp_path):
        outcome.succeeded()

    def mixed(name: str, *added: Path, without: str) -> None:
        folder = shutil.copytree(models, tmp_path / name)
        shutil.rmtree(of(folder, without))
        for path in added:
            shutil.copytree(path, folder / path.name)

    mixed("checkpoints", of(tmp_path / "of-other", "unet"), without="unet")
    mixed("sizes", of(tmp_path / "wide", "unet"), without="unet")
    mixed("encoders", of(tmp_path / "wide", "vae_encoder"), without="vae_encoder")
    mixed("chunks", of(tmp_path / "cut", "unet_chunk1"), of(tmp_path / "cut-other", "unet_chunk2"), without="unet")
    mixed("half", of(tmp_path / "cut", "unet_chunk1"), without="unet")
    cases = [
        ("checkpoints", "were made from different checkpoints"),
        ("sizes", "has latents of width 8 and "),
        ("encoders", "_vae_encoder.mlpackage has latents of width 16 and "),
        ("chunks", "were made from different checkpoints"),
        ("half", "the next chunk is missing"),
    ]
    commands = [words for name, _ in cases for words in ([*DRAW, "-i", name], [*VERIFY, name, "--against", model])]
    outcomes = sfumato_each(commands, cwd=tmp_path)
    for (_, sentence), *both in zip(cases, outcomes[::2], outcomes[1::2], strict=True):
        for outcome in both:
            outcome.failed(1, sentence)


def test_proving_against_another_kind_of_checkpoint_says_so(sfumato, models, checkpoints, tmp_path):
    outcome = sfumato(*VERIFY, models, "--against", checkpoints("sd21"), "--no-picture", cwd=tmp_path)
    assert outcome.code == 1
    assert "WRONG" in outcome.out
    assert "unexpected" not in outcome.err


def test_models_that_say_nothing_are_drawn_by_the_checkpoint_they_are_proved_against(sfumato, model, tmp_path):
    write_converted(model, tmp_path / "bare", dtype="fp16", described=False, tokenizer=False)
    proof = sfumato(*VERIFY, "bare", "--against", model, "--json", cwd=tmp_path).succeeded().json
    assert [check["part"] for check in proof["checks"]][-1] == "picture"


def with_weight(checkpoint: Path, network: str, number: float) -> Path:
    """The checkpoint with one number of one weight replaced."""
    file = next((checkpoint / network).glob("*.safetensors"))
    weights = load_file(file)
    first = min(weights)
    weights[first].view(-1)[0] = number
    save_file(weights, file, {"format": "pt"})
    return checkpoint


def test_weights_that_packages_cannot_hold(sfumato_each, model, tmp_path):
    cases = [
        (
            "unet",
            float("nan"),
            "of the UNet2DConditionModel has NaN or infinite values; download the checkpoint again",
        ),
        ("vae", float("inf"), "of the AutoencoderKL has NaN or infinite values"),
        ("text_encoder", 1e6, "of the CLIPTextModel has values up to 1e+06"),
    ]
    commands = []
    for network, number, _ in cases:
        folder = with_weight(shutil.copytree(model, tmp_path / f"bad-{network}"), network, number)
        commands.append([*CONVERT, folder, "-o", f"{network}-packages"])
    for outcome, (network, _, sentence) in zip(sfumato_each(commands, cwd=tmp_path), cases, strict=True):
        outcome.failed(1, "the weight ", sentence)
        assert not list((tmp_path / f"{network}-packages").glob(f"*_{network}*"))
        assert not list(tmp_path.rglob(".*"))


def test_places_that_packages_cannot_go_to(sfumato_each, models, model, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "Resources").touch()
    shutil.copytree(models, tmp_path / "models")
    package = of(tmp_path / "models", "unet").relative_to(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    cases = [
        (["-o", "file"], 1, "file is not a folder"),
        (["-o", "file/deeper"], 1, "file is not a folder"),
        (["-o", "one.mlpackage"], 2, "is the name of a single model; give a folder"),
        (["-o", package], 2, "is the name of a single model; give a folder"),
        (["-o", "n" * 300], 1, "choose a shorter one"),
        (["-o", "taken", "--bundle-resources-for-swift-cli"], 1, "Resources is not a folder"),
        (["-o", "models", "--overwrite"], 2, "is from a conversion with other options; choose another folder"),
        (["-o", "new", "--chunks", "0"], 2, "1 to 8 chunks, not 0"),
        (["-o", "new", "--quantize-to-db", "nan"], 2, "must be a positive number of dB, not nan"),
        (["-o", "new", "--quantize-to-db", "-5"], 2, "must be a positive number of dB, not -5.0"),
    ]
    outcomes = sfumato_each([[*CONVERT, model, *words] for words, *_ in cases], cwd=tmp_path)
    for outcome, (_, code, sentence) in zip(outcomes, cases, strict=True):
        outcome.failed(code, sentence)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_one_part_can_be_bundled_alone(sfumato, model, tmp_path):
    words = ["--convert-unet", "--bundle-resources-for-swift-cli", "-o", "out", "--no-verify", "-q"]
    sfumato(*CONVERT, model, *words, cwd=tmp_path).succeeded()
    assert [path.name for path in (tmp_path / "out" / "Resources").glob("*.mlmodelc")] == ["Unet.mlmodelc"]


def test_a_checkpoint_may_be_the_folder_one_is_in(sfumato, model, tmp_path):
    words = ["--convert-vae-decoder", "--no-verify", "-q", "-o", tmp_path / "out"]
    sfumato(*CONVERT, ".", *words, cwd=model).succeeded()
    assert of(tmp_path / "out", "vae_decoder").name == f"Stable_Diffusion_version_{model.name}_vae_decoder.mlpackage"


def test_too_little_memory_is_said_before_anything_is_written(sfumato_each, model, tmp_path):
    before = "import sfumato.coreml.conversion as made\nmade.memory_needed = lambda *_: 10**15\n"
    (outcome,) = sfumato_each([[*CONVERT, model, "-o", "out"]], cwd=tmp_path, before=before)
    outcome.failed(1, "needs 1,000,000,000 MB of memory, but only ", " MB are free; close other programs")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up(sfumato_each, model, tmp_path):
    before = (
        "import errno, sfumato.coreml.formats.blob_writer as blobs\n"
        "def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "blobs.BlobWriter.add = full\n"
    )
    (outcome,) = sfumato_each([[*CONVERT, model, "-o", "out", "--no-verify"]], cwd=tmp_path, before=before)
    outcome.failed(1, "no space left to write out/", "free some space and run the command again")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is another thing on Windows")
@pytest.mark.parametrize("moment", ["before", "writing", "proving"])
def test_interrupted_and_resumed(sfumato, environment, model, tmp_path, moment):
    """Ctrl-C at three moments, held there by a long sleep in the command's own process."""
    where = {
        "before": "import sfumato.coreml.source as module; name = 'open_source'",
        "writing": "import sfumato.coreml.formats.blob_writer as home; module = home.BlobWriter; name = 'add'",
        "proving": "import sfumato.coreml.verification as module; name = 'prove'",
    }[moment]
    code = f"""
import pathlib, time
{where}
def wait(*_, **__):
    pathlib.Path("there").touch()
    time.sleep(600)
setattr(module, name, wait)
from sfumato.cli.main import main
main()
"""
    words = ["coreml", "convert", str(model), "-o", "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=tmp_path, env=environment, text=True, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not (tmp_path / "there").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "sfumato: interrupted; no unfinished files were left behind"
    assert "Traceback" not in err
    left = {path.name for path in (tmp_path / "out").glob("*.mlpackage")}
    assert len(left) == (4 if moment == "proving" else 0)
    assert not list(tmp_path.rglob(".*"))
    made = sfumato(*words, "--resume", "--no-verify", "--json", cwd=tmp_path).succeeded().json
    assert [part["kept"] for part in made["parts"]] == [moment == "proving"] * 4


def test_predicting_with_inputs_that_do_not_fit(models, server, tmp_path):
    """In Python as on the command line: one sentence that names the input."""
    code = f"""
import json, numpy as np, sfumato.coreml
from sfumato.errors import UsageError

predictor = sfumato.coreml.load({str(of(models, "vae_decoder"))!r})
said = []
for inputs in (None, [1], {{}}, {{"y": 1}}, {{1: 2}}, {{"z": "text"}}, {{"z": np.zeros((1, 4, 9, 8))}}, {{"z": [[1], [1, 2]]}}):
    try:
        predictor.predict(inputs)
    except UsageError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    done = server.run(code, [], cwd=tmp_path)
    assert done.code == 0, done.err
    said = json.loads(done.out)
    expected = (
        "not a NoneType",
        "not a list",
        "'z' is missing",
        "no input 'y'",
        "no input 1",
        "not an array of",
        "shape is",
    )
    assert len(said) == 8
    for sentence, words in zip(said, (*expected, "it is not an array"), strict=True):
        assert words in sentence
