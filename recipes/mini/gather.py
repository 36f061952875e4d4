"""Put published weights (`together.py`, PUBLISH) into WORK, for the steps that follow there.

What was published are averages in fp16: enough to evaluate, to export, and for the relatives to begin from.
"""

from __future__ import annotations

from pathlib import Path

from common import RecipeError, arguments, load, save
from torch import Tensor


def parts(folder: Path, name: str) -> dict[str, Tensor]:
    """The weights of NAME.0.pt, NAME.1.pt and so on, in fp32."""
    made: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{name}.*.pt")):
        made.update({key: value.float() if value.is_floating_point() else value for key, value in load(path).items()})
    return made


def main() -> None:
    args, _, work = arguments(__doc__, {"--published": {"required": True}})
    found = []
    for name in ("train", "judge", "vae_final"):
        weights = parts(Path(args.published), name)
        if weights:
            save(work / f"{name}.pt", {"model": weights} if name == "vae_final" else {"average": weights})
            found.append(name)
    if not found:
        raise RecipeError(f"{args.published} holds no published weights, such as train.0.pt.")
    print(f"gather: {', '.join(found)} in {work}")


if __name__ == "__main__":
    main()
