"""Server and worker are killed without a word, and nothing is lost (recipes/studio_chaos.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "studio_chaos.py"


@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.long)])
def test_nothing_is_lost_whatever_is_killed(tmp_path, environment, kills):
    words = [sys.executable, RECIPE, tmp_path / "chaos", "--kills", str(kills)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ended once" in done.stdout
    assert "bit-equal" in done.stdout
