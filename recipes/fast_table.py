"""Measures what `GenerateRequest.fast` costs in dB and saves in time: `python recipes/fast_table.py`.

Draws each prompt exactly and by every method in turn, in batches, and prints for each method the median and the least
PSNR, the ratio of times, and the row that it earns in `src/sfumato/pipelines/fast.toml`: the largest promise with a
median that keeps it and no image 6 dB below. A checkpoint with random weights tells of time alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from statistics import median

import sfumato
from sfumato import Fast, GenerateRequest, Reuse
from sfumato.images import psnr

# A method in one word: the start and the interval of deep features and their layers, then of guidance.
METHODS = ("0.2:2:1", "0.3:4:1", "0.25:4:1", "0.25:5:1", "0.3:4:1+0.7:99")


def parse(method: str) -> Fast:
    """Read "0.1:3:1+0.5:2", of which either side of the plus sign may be empty."""
    deep, _, guidance = method.partition("+")
    start, every, layers = (*deep.split(":"), "1")[:3] if deep else ("0", "1", "1")
    methods = {"deep": Reuse(start=float(start), every=int(every)), "layers": int(layers)} if deep else {}
    if guidance:
        start, every = guidance.split(":")
        methods["guidance"] = Reuse(start=float(start), every=int(every))
    return Fast(promise=1, **methods)


def row(pipeline: sfumato.DiffusionPipeline, request: GenerateRequest, fast: Fast, promise: int) -> str:
    """Return the row of the table."""
    methods = {key: value for key, value in fast.to_dict().items() if key != "promise"}
    words = ", ".join(f"{key} = {value}".replace("'", "").replace(": ", " = ") for key, value in methods.items())
    return (
        f'[[row]]\nkind = "{pipeline.parts.family.name if pipeline.words is None else pipeline.name}"\n'
        f'scheduler = "{type(pipeline.scheduler).__name__}"\nsteps = [{request.steps}, {request.steps}]\n'
        f"guidance_scale = [{request.guidance_scale}, {request.guidance_scale}]\npromise = {promise}\n"
        f"methods = {{ {words} }}\n"
    )


def told(near: list[float]) -> str:
    """Return the measured distances as text."""
    return f"{len(near)} images: median {median(near):.1f} dB, least {min(near):.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--model", default="built-in")
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "mini" / "prompts.txt")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--seed", type=int, default=1000)
    arguments = parser.parse_args()
    pipeline = sfumato.load(arguments.model)
    asked = {"steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    request = GenerateRequest(seed=arguments.seed, **asked).settled(pipeline.suggested)
    prompts = arguments.prompts.read_text(encoding="utf-8").splitlines()[: arguments.count]
    near: dict[str, list[float]] = {method: [] for method in arguments.methods}
    ratios: dict[str, list[float]] = {method: [] for method in arguments.methods}
    for first in range(0, len(prompts), arguments.batch):
        batch = request.replace(prompt=tuple(prompts[first : first + arguments.batch]), seed=arguments.seed + first)
        exact = pipeline.generate(batch)
        for method in arguments.methods:
            result = pipeline.generate(batch.replace(fast=parse(method)))
            assert not any("drawn exactly" in note for note in result.notes), result.notes
            near[method] += [psnr(a, b) for a, b in zip(result.images, exact.images, strict=True)]
            ratios[method].append(sum(result.seconds.values()) / sum(exact.seconds.values()))
            print(method, told(near[method]), file=sys.stderr)
    for method in arguments.methods:
        promise = math.floor(min(median(near[method]), min(near[method]) + 6))
        print(f"# {told(near[method])}, time {median(ratios[method]):.2f} of exact")
        print(row(pipeline, request, parse(method), promise))


if __name__ == "__main__":
    main()
