"""Real data that lies beside the repository on some machines; tests that need it are skipped elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

ASSETS = Path(__file__).resolve().parents[3] / "shared" / "assets"


def asset(name: str) -> Path:
    """A folder of the shared assets; skips the test where it is absent."""
    folder = ASSETS / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which is not on this machine")
    return folder
