"""Time from process start to `import sfumato`, `--help` and the first denoising step, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.results import Result
from sfumato.bench.timing import alternate, timed

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


def startup(checkpoint: Path, runs: int) -> list[Result]:
    """Measure the wall time of whole processes."""
    ours = FIRST_STEP.format(library="sfumato", pipeline="StableDiffusionPipeline", more="")
    theirs = FIRST_STEP.format(library="diffusers", pipeline="StableDiffusionPipeline", more=", safety_checker=None")
    empty = _python("pass")
    script = Path(sys.executable).with_name("sfumato")
    pairs = {
        "import sfumato (an empty process)": (_python("import sfumato"), empty),
        "sfumato --help (an empty process)": (_process([str(script), "--help"]), empty),
        "process start to first step, 64² (diffusers)": (
            _python(ours, str(checkpoint)),
            _python(theirs, str(checkpoint)),
        ),
    }
    results = []
    for name, (mine, other) in pairs.items():
        times = alternate({"ours": timed(mine), "theirs": timed(other)}, runs)
        results.append(Result.of_times(name, times["ours"], times["theirs"]))
    return results


def _python(code: str, *arguments: str) -> Callable[[], None]:
    return _process([sys.executable, "-W", "ignore", "-c", code, *arguments])


def _process(command: list[str]) -> Callable[[], None]:
    return lambda: _run(command)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
