"""`make demo`: generate eight images with the built-in model and print where they are. Needs no network.

`python recipes/demo.py --readme` makes the image of the README.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import sfumato
from sfumato.images import auto_grid, make_image_grid
from sfumato.metadata.carriers import save_picture

ROOT = Path(__file__).parent.parent
SCENES = (
    *("two red apples on a blue background, flat style", "a penguin on a light blue background, 3d"),
    *("a rocket, line art", "a house and a tree, 3d", "three stars on a dark blue background, flat style"),
    *("a sunflower, gradient", "a dog left of a cat, 3d", "a strawberry on a pink to white background, 3d"),
)


def main() -> None:
    """Generate the prompts in one batch, arrange the images in rows, and print the next steps."""
    pipeline = sfumato.load()
    result = pipeline.generate(sfumato.GenerateRequest(prompt=SCENES, seed=7, **pipeline.suggested))
    if sys.argv[1:] == ["--readme"]:
        print(save_picture(make_image_grid(result.images, rows=2, cols=4), ROOT / "docs/images/built-in.png"))
    else:
        recipe = {**result.recipes[0], "request": result.request.to_dict(), "grid": True}
        print(save_picture(auto_grid(result.images), ROOT / "out" / "demo.png", recipe))
        print(f'Your turn: {_command()} generate "a red apple, 3d"')
        print("To type just 'sfumato', install it: pipx install .   or   uv tool install .")


def _command() -> str:
    """Return the command that runs `sfumato`: its name if it is on the PATH, otherwise its path."""
    script = Path(sys.executable).with_name("sfumato.exe" if sys.platform == "win32" else "sfumato")
    found = shutil.which("sfumato")
    if found is not None and Path(found).samefile(script):
        return "sfumato"
    return os.path.relpath(script)


if __name__ == "__main__":
    main()
