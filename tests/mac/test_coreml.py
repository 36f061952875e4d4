"""What only a Mac can show: Apple's framework and compiler take what we write, and compute what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sfumato
from sfumato.coreml import ConversionOptions, convert, load_pipeline, open_source
from sfumato.coreml.backends import AppleModel
from sfumato.coreml.formats import read_model, write_compiled
from sfumato.coreml.layout import compiled_names, find_models
from sfumato.coreml.measure import decibels
from sfumato.coreml.probes import answer, probes
from sfumato.coreml.roles import PARTS
from sfumato.images import psnr
from sfumato.metadata.carriers import read_recipe
from support.coreml_equal import plain
from support.processes import MAIN

pytestmark = [
    pytest.mark.mac,
    pytest.mark.skipif(sys.platform != "darwin", reason="needs macOS: Apple's framework is nowhere else"),
    pytest.mark.skipif(sys.version_info >= (3, 14), reason="coremltools has no wheels for Python 3.14"),
]

# What verification asks of models as shipped, and how near a picture must be to the same models' on our own runtime.
SHIPPED, PICTURE, PALETTES = 55.0, 40.0, 25.0
KINDS = {
    "original": {"attention": "original"},
    "split_einsum": {"attention": "split_einsum"},
    "split_einsum_v2": {"attention": "split_einsum_v2"},
    "chunks": {"attention": "split_einsum", "chunks": 2},
    "palettes": {"attention": "split_einsum", "bits": 6},
    "newest": {"attention": "original", "target": "iOS18"},
}
REQUEST = sfumato.GenerateRequest(prompt="a red apple, 3d", seed=7, steps=10, guidance_scale=3.0)


@pytest.fixture(scope="module")
def packages(once):
    """`packages("chunks")`: the built-in model converted that way."""

    def get(kind: str) -> Path:
        return once(f"mac/{kind}", lambda folder: convert(open_source(), folder, ConversionOptions(**KINDS[kind])))

    return get


def compiled_by_us(package: Path, folder: Path) -> Path:
    path = folder / f"{package.stem}.mlmodelc"
    write_compiled(read_model(package), path)
    return path


def compiled_by_apple(package: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    subprocess.run(["xcrun", "coremlcompiler", "compile", package, folder], check=True, capture_output=True)
    return folder / f"{package.stem}.mlmodelc"


def ask(path: Path, package: Path, probe) -> dict[str, np.ndarray]:
    """What Apple's framework makes of a probe on the CPU, with the interface that is written in the package."""
    interface = read_model(package).interface
    types = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32}
    inputs = {one.name: probe[one.name].numpy().astype(types[one.type.dtype]) for one in interface.inputs}
    return AppleModel(path, interface, "CPU_ONLY").predict(inputs)


@pytest.mark.parametrize("form", ["package", "compiled by us"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("chunks", "palettes")])
@pytest.mark.parametrize("part", PARTS)
def test_apples_framework_computes_the_source(packages, tmp_path, part, kind, form):
    source = open_source()
    (package,) = find_models(packages(kind)).paths(part)
    path = package if form == "package" else compiled_by_us(package, tmp_path)
    network = source.load(part, torch.float32)
    for probe in probes(part, read_model(package).interface, source):
        outputs, wanted = ask(path, package, probe), answer(part, network, probe)
        for name, tensor in wanted.items():
            got = torch.from_numpy(outputs[name].astype(np.float32)).reshape(tensor.shape)
            assert decibels(got, tensor) >= SHIPPED, name


@pytest.mark.parametrize("form", ["packages", "compiled by us", "compiled by apple"])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_those_of_our_own_runtime(packages, tmp_path, kind, form):
    folder = packages(kind)
    wanted = load_pipeline(folder, compute_unit="CPU_ONLY", portable=True).generate(REQUEST).images[0]
    if form != "packages":
        compile_one = compiled_by_us if form == "compiled by us" else compiled_by_apple
        for part, paths in find_models(folder).parts.items():
            for package, name in zip(paths, compiled_names(part, len(paths)), strict=True):
                compile_one(package, tmp_path).rename(tmp_path / name)
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        folder = tmp_path
    drawn = load_pipeline(folder, compute_unit="CPU_ONLY").generate(REQUEST)
    assert drawn.recipes[0]["coreml"]["engine"] == "core ml"
    assert psnr(wanted, drawn.images[0]) >= (PALETTES if kind == "palettes" else PICTURE)


@pytest.mark.parametrize("kind", KINDS)
def test_our_compiled_form_is_what_apples_compiler_writes(packages, tmp_path, kind):
    """The same program and weights, and the same interface and metadata, read by the one reader."""
    for package in [path for paths in find_models(packages(kind)).parts.values() for path in paths]:
        folders = compiled_by_us(package, tmp_path), compiled_by_apple(package, tmp_path / "theirs")
        a, b = map(read_model, folders)
        assert plain(a.interface) == plain(b.interface), package.name
        assert plain(a.program) == plain(b.program), package.name
        assert dict(a.metadata) == dict(b.metadata), package.name
        texts = [(path / "model.mil").read_text(encoding="utf-8").splitlines() for path in folders]
        ours, theirs = (
            [line for line in text if "buildInfo" not in line] for text in texts
        )  # which names the compiler
        assert ours == theirs, package.name


def test_every_compute_unit_takes_the_models(packages):
    """A virtual Mac has no GPU and no Neural Engine, and Core ML then computes on the CPU without a word."""
    for unit in ("ALL", "CPU_AND_GPU", "CPU_AND_NE"):
        drawn = load_pipeline(packages("split_einsum"), compute_unit=unit).generate(REQUEST.replace(steps=2))
        assert drawn.notes == (), unit


def test_the_command_line(packages, server, tmp_path):
    """`sfumato coreml generate` draws with Apple's framework, and --bundle-resources-for-swift-cli asks Apple's compiler."""

    def run(*words: str):
        done = server.run(MAIN, ["coreml", *words], cwd=tmp_path)
        assert done.code == 0, done.out + done.err
        return done

    made = run("convert", "--no-verify", "--bundle-resources-for-swift-cli", "-o", "out")
    assert "experimental" not in made.err
    run("generate", "a red apple, 3d", "-i", "out", "--steps", "2", "--seed", "7", "-o", "packages.png")
    run("generate", "a red apple, 3d", "-i", "out/Resources", "--steps", "2", "--seed", "7", "-o", "compiled.png")
    for name, kind in (("packages.png", "packages"), ("compiled.png", "compiled")):
        told = read_recipe(tmp_path / name)["coreml"]
        assert (told["engine"], told["kind"], told["compute_unit"]) == ("core ml", kind, "ALL")
