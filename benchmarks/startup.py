"""From process start to `import sfumato`, to `--help` and to the first denoising step, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.compare import Comparison, alternate

__all__ = ["startup"]

FIRST_STEP = """
import sys, torch
from {library} import {pipeline}
pipeline = {pipeline}.from_pretrained(sys.argv[1], torch_dtype=torch.float32{more})
pipeline.set_progress_bar_config(disable=True)
class Done(Exception):
    pass
def stop(pipeline, step, timestep, tensors):
    raise Done
try:
    pipeline("a fox", num_inference_steps=20, height=64, width=64, callback_on_step_end=stop)
except Done:
    pass
"""


def startup(checkpoint: Path, runs: int) -> list[Comparison]:
    """Wall time of whole processes; for imports the other column is an empty interpreter."""
    ours = FIRST_STEP.format(library="sfumato", pipeline="StableDiffusionPipeline", more="")
    theirs = FIRST_STEP.format(library="diffusers", pipeline="StableDiffusionPipeline", more=", safety_checker=None")
    empty = _python("pass")
    script = Path(sys.executable).with_name("sfumato")
    return [
        alternate("import sfumato (against an empty process)", _python("import sfumato"), empty, runs),
        alternate("sfumato --help (against an empty process)", _process([str(script), "--help"]), empty, runs),
        alternate(
            "process start to first step", _python(ours, str(checkpoint)), _python(theirs, str(checkpoint)), runs
        ),
    ]


def _python(code: str, *arguments: str) -> Callable[[], None]:
    return _process([sys.executable, "-W", "ignore", "-c", code, *arguments])


def _process(command: list[str]) -> Callable[[], None]:
    return lambda: _run(command)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
