"""What is shipped: the contents of wheel and sdist, and the command that an installation puts on the PATH."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import sfumato

ROOT = Path(__file__).parents[2]
SOURCE = Path(sfumato.__file__).parent
VERSION = sfumato.__version__


@pytest.fixture(scope="session")
def built(once) -> Path:
    """The folder of the wheel and the sdist, built by the build backend; it is fetched where it is not installed."""

    def build(folder: Path) -> None:
        folder.mkdir()
        env = dict(os.environ)
        if importlib.util.find_spec("hatchling") is None:
            backend = folder / "backend"
            pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install"]
            subprocess.run([*pip, "-c", ROOT / "constraints.txt", "--target", backend, "hatchling"], check=True)
            env["PYTHONPATH"] = str(backend)
        subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, env=env, check=True)

    return once("built", build)


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
