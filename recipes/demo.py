"""`make demo`: draw a picture from words with the best checkpoint at hand, and print where it is.

The built-in model if this build carries one, else a small trained checkpoint beside the project, else random weights.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from random_checkpoint import build

from sfumato.checkpoints.builtin import builtin_model
from sfumato.errors import UsageError

ROOT = Path(__file__).parent.parent
TRAINED = ROOT.parent / "shared" / "assets" / "mini"


def find_model() -> tuple[Path, str]:
    """A checkpoint folder, and what to say of it."""
    try:
        return builtin_model(), "the built-in model"
    except UsageError:
        pass
    if (TRAINED / "model_index.json").is_file():
        return TRAINED, "a small, roughly trained checkpoint: a heart is about what it can draw"
    return build(ROOT / "out" / "random-checkpoint"), "random weights: the picture is noise, the way to it is real"


def main() -> int:
    """Draw four pictures in a grid."""
    model, words = find_model()
    print(f"drawing with {words}", file=sys.stderr)
    command = [Path(sys.executable).with_name("sfumato"), "generate", "a red heart, 3d", "--model", model]
    options = [
        "--count",
        "4",
        "--grid",
        "--steps",
        "20",
        "--guidance-scale",
        "4",
        "--seed",
        "7",
        "--output",
        ROOT / "out" / "demo.png",
    ]
    return subprocess.run([*map(str, command), *map(str, options)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
