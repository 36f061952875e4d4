"""What is shipped: the contents of wheel and sdist, and the command that an installation puts on the PATH."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato.kernels import kernels_for
from sfumato.kernels.build import compiler
from sfumato.kernels.variants import VARIANTS, fitting

ROOT = Path(__file__).parents[2]
SOURCE = Path(sfumato.__file__).parent
VERSION = sfumato.__version__


@pytest.fixture(scope="session")
def built(once) -> Path:
    """The folder of the wheel and the sdist, built by the build backend; it is fetched where it is not installed."""

    return once("built", partial(build_into, kernels=False))


def build_into(folder: Path, *, kernels: bool) -> None:
    folder.mkdir()
    env = os.environ | {"SFUMATO_BUILD_KERNELS": str(int(kernels))}
    if importlib.util.find_spec("hatchling") is None:
        backend = folder / "backend"
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", "--target", backend, "hatchling"], check=True)
        env["PYTHONPATH"] = str(backend)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, env=env, check=True)


def sources() -> set[str]:
    """Every file of the package, from its folder."""
    files = (path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {f"sfumato/{path.relative_to(SOURCE).as_posix()}" for path in files}


def test_the_wheel_has_the_package_its_types_and_its_licenses(built):
    with zipfile.ZipFile(built / f"sfumato-{VERSION}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"sfumato-{VERSION}.dist-info/METADATA").decode()
        scripts = wheel.read(f"sfumato-{VERSION}.dist-info/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(f"sfumato-{VERSION}.dist-info/")} == sources()
    assert "sfumato/py.typed" in names
    assert "sfumato/mini/unet/diffusion_pytorch_model.safetensors" in names
    # The license of the code, of the built-in model's training material, and of CLIP's vocabulary.
    for license in ("LICENSE", "src/sfumato/mini/NOTICE", "src/sfumato/text/clip/LICENSE"):
        assert f"sfumato-{VERSION}.dist-info/licenses/{license}" in names
        assert f"License-File: {license}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Classifier: Typing :: Typed\n" in metadata
    assert "sfumato = sfumato.cli.main:main" in scripts


def test_the_sdist_has_all_it_takes_to_build_test_and_read(built):
    with tarfile.open(built / f"sfumato-{VERSION}.tar.gz") as sdist:
        names = {name.removeprefix(f"sfumato-{VERSION}/") for name in sdist.getnames()}
    assert {f"src/{name}" for name in sources()} <= names
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt", "pyproject.toml", "PKG-INFO"):
        assert name in names
    assert {"tests/conftest.py", "docs/cli.md", "docs/images/built-in.png", "recipes/demo.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "out/")) or "__pycache__" in name]


def test_an_installed_wheel_puts_the_command_on_the_path(built, environment, tmp_path):
    wheel = built / f"sfumato-{VERSION}-py3-none-any.whl"
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--prefix", tmp_path, "--ignore-installed", wheel], check=True)
    (package,) = tmp_path.rglob("site-packages/sfumato")
    (command,) = [path for path in tmp_path.rglob("sfumato*") if path.parent.name in ("bin", "Scripts")]
    env = environment | {"PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [command, "show", "--json"], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"name": "built-in"' in done.stdout
    where = [sys.executable, "-c", "import sfumato; print(sfumato.__file__)"]
    assert subprocess.run(where, env=env, capture_output=True, text=True, check=True).stdout.startswith(str(tmp_path))


# What the installed wheel computes where there is no compiler, and what a local build computes.
WITHOUT_A_COMPILER = """
import sys
import torch
from sfumato.kernels import build, kernels_for
assert build.compiler() is None and build.shipped("float32") is not None
x = torch.randn(2, 4, 50, 40, generator=torch.Generator().manual_seed(0))
torch.save(kernels_for(torch.float32).attention(x, x, x), sys.argv[1])
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not fitting("float32") or compiler() is None, reason="no such wheel for this machine"
)
def test_a_wheel_with_kernels_needs_no_compiler(once, environment, tmp_path):
    wheel = (
        once("built-with-kernels", partial(build_into, kernels=True)) / f"sfumato-{VERSION}-py3-none-linux_x86_64.whl"
    )
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path)
        assert "Root-Is-Purelib: false" in packed.read(f"sfumato-{VERSION}.dist-info/WHEEL").decode()
    built = tmp_path / "sfumato" / "kernels" / "built"
    assert {path.name for path in built.iterdir()} == {variant.file for variant in VARIANTS}
    env = environment | {"PYTHONPATH": str(tmp_path), "PATH": "/nonexistent", "SFUMATO_CACHE": str(tmp_path / "cache")}
    env.pop("CC", None)

    def python(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = python("-c", WITHOUT_A_COMPILER, tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    x = torch.randn(2, 4, 50, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.load(tmp_path / "out.pt"), kernels_for(torch.float32).attention(x, x, x))
    said = python("-c", "from sfumato.cli.main import main; main()", "doctor")
    assert "the kernels came with the package" in said.stdout
    # Like those in the cache, they run as us: others must not be able to replace them.
    built.chmod(0o777)
    done = python("-c", WITHOUT_A_COMPILER, tmp_path / "out.pt")
    assert "AssertionError" in done.stderr
