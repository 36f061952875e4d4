"""`make demo`: draw four pictures from words with the built-in model, and print where they are. Needs no network.

`python recipes/demo.py --readme` draws the picture of the README.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sfumato
from sfumato.images import auto_grid, make_image_grid, save_png

ROOT = Path(__file__).parent.parent
DEMO = ("a red apple, 3d", "a smiling cat, flat style", "a rocket, line art", "a sunflower, gradient")
README = (
    *("a red apple, 3d", "a smiling cat, flat style", "a rocket, line art", "a sunflower, gradient"),
    *("a car, 3d", "a house, flat style", "an umbrella, line art", "a slice of pizza, gradient"),
)


def main() -> None:
    """Draw the prompts in one batch and lay them out in rows."""
    for_readme = sys.argv[1:] == ["--readme"]
    pipeline = sfumato.load()
    request = sfumato.GenerateRequest(prompt=README if for_readme else DEMO, seed=7, **pipeline.suggested)
    result = pipeline.generate(request)
    if for_readme:
        print(save_png(make_image_grid(result.images, rows=2, cols=4, resize=128), ROOT / "docs/images/built-in.png"))
    else:
        recipe = {**result.recipes[0], "request": result.request.to_dict(), "grid": True}
        print(save_png(auto_grid(result.images), ROOT / "out" / "demo.png", recipe))


if __name__ == "__main__":
    main()
