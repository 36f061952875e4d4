"""The worker: the process that generates images, and the only one that imports torch.

It reads messages from standard input and writes messages to standard output, one JSON object per line. It exits at once
when its input ends, because its parent is gone. Image files are written atomically, so none is left incomplete.
"""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import queue
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import CheckpointError, MemoryPlanError, SfumatoError, UsageError
from sfumato.jobs.keys import file_name
from sfumato.values import reason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sfumato.jobs.drawing import Loaded, Shown
    from sfumato.pipelines.result import Step
    from sfumato.request import GenerateRequest

__all__ = ["Cancelled", "Worker", "failure", "main"]


class Cancelled(Exception):
    """The job has been cancelled."""


class Worker:
    """Runs one job after another with a model that stays in memory, and estimates requests."""

    def __init__(self, output: io.BufferedWriter) -> None:
        self._output = output
        self._device = self._dtype = None
        self._lock, self._cancelled = threading.Lock(), set[str]()
        self._todo: queue.Queue[dict[str, Any]] = queue.Queue()
        self._asked: queue.Queue[dict[str, Any]] = queue.Queue()
        self._loaded: Loaded | None = None

    def run(self) -> None:
        """Work until the input ends."""
        threading.Thread(target=self._listen, daemon=True).start()
        gc.disable()  # while torch is imported, there is no garbage, but half a million objects to look through
        import torch

        import sfumato.jobs.drawing  # noqa: F401
        from sfumato.runtime.device import parse_device
        from sfumato.runtime.processor import processor_name

        gc.freeze()
        gc.enable()
        begin = self._todo.get()  # the first message, which may have been here for long
        os.chdir(begin["folder"])
        self._device, self._dtype = begin["device"], begin["dtype"]
        device = parse_device(self._device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
        self._say("ready", device=name, kind=device.type, torch=torch.__version__)
        threading.Thread(target=self._answer, daemon=True).start()
        while True:
            message = self._todo.get()
            if message["do"] == "draw":
                self._draw(message)
            elif self._todo.empty():
                self._warm(message)

    def _listen(self) -> None:
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if message["do"] == "cancel":
                self._cancelled.add(message["job"])
            else:
                (self._asked if message["do"] == "plan" else self._todo).put(message)
        os._exit(0)

    def _say(self, what: str, **more: Any) -> None:
        line = json.dumps({"is": what, **more}).encode() + b"\n"
        with self._lock:
            self._output.write(line)
            self._output.flush()

    def _draw(self, message: Mapping[str, Any]) -> None:
        job = message["job"]
        try:
            notes = self._images(message)
            self._say("done", job=job, notes=notes)
        except Cancelled:
            self._say("cancelled", job=job)
        except Exception as error:
            self._say("failed", job=job, **failure(error))
        self._cancelled.discard(job)

    def _warm(self, message: Mapping[str, Any]) -> None:
        """Load a model before a job needs it. Errors are ignored here and reported when a job uses the model."""
        with suppress(Exception):
            self._model({**message, "options": {}})

    def _images(self, message: Mapping[str, Any]) -> list[str]:
        """Generate the missing images of a job. Returns notes."""
        from sfumato.jobs.drawing import settled
        from sfumato.request import GenerateRequest

        job, done = message["job"], set(message["done"])
        request = GenerateRequest.from_dict(message["request"])
        self._check(job)
        model = self._model(message, request)
        request, told = settled(model.pipeline, request, message["model"])
        self._say("began", job=job, total=request.batch_size, tokens=self._tokens(message))
        notes: dict[str, None] = dict.fromkeys(told)
        for place, seed in enumerate(request.seeds):
            if place not in done:
                alone = request.alone(place // request.count).replace(seed=seed)
                notes |= dict.fromkeys(self._image(message, model, alone, place))
        return list(notes)

    def _image(
        self, message: Mapping[str, Any], model: Loaded, request: GenerateRequest, place: int
    ) -> tuple[str, ...]:
        from sfumato.jobs.drawing import Shown, is_of, key_of, write
        from sfumato.metadata.carriers import image_bytes

        job, notes = message["job"], ()
        self._check(job)
        path = Path(file_name(request.prompts[0], key_of(model.pipeline, request)))
        if not is_of(path, request):
            shown = Shown(message, model, place)
            result = model.pipeline.generate(request, lambda step: self._step(shown, step))
            self._check(job)
            model.decode_seconds, notes = result.seconds.get("decode", 0.0), result.notes
            path = write(path, image_bytes(result.images[0], result.recipes[0]))
        self._say("image", job=job, place=place, path=str(path))
        return notes

    def _step(self, shown: Shown, step: Step) -> None:
        job = shown.message["job"]
        self._check(job)
        if report := shown.of(step):
            self._say("step", job=job, **report)
        if partial := shown.partial(step):
            self._say("partial", job=job, **partial)

    def _check(self, job: str) -> None:
        if job in self._cancelled:
            raise Cancelled

    def _model(self, message: Mapping[str, Any], request: GenerateRequest | None = None) -> Loaded:
        """Return the model that a message names, loading it unless it is in memory."""
        from sfumato.jobs.drawing import Loaded, load_model

        refiner = None if request is None else request.refiner
        options = message["options"]
        wanted = (message["model"], refiner, options.get("compute_unit"), options.get("lean", False))
        if self._loaded is None or self._loaded.wanted != wanted:
            self._loaded = None
            self._say("loading", job=message.get("job"), model=message["name"])
            pipeline = load_model(message, request if refiner else None, self._device, self._dtype)
            self._loaded = Loaded(wanted, pipeline)
        return self._loaded

    def _answer(self) -> None:
        """Answer requests for estimates while a job is running."""
        from sfumato.jobs.drawing import planned

        while True:
            message = self._asked.get()
            try:
                told = planned(message, self._device, self._dtype) | {"tokens": self._tokens(message)}
                self._say("plan", id=message["id"], plan=told)
            except Exception as error:
                self._say("plan", id=message["id"], **failure(error))

    def _tokens(self, message: Mapping[str, Any]) -> dict[str, int] | None:
        """Count the tokens of the prompts; None if their model is not in memory."""
        loaded = self._loaded
        if loaded is None or loaded.wanted[0] != message["model"]:
            return None
        tokenizer, request = loaded.pipeline.tokenizer, message["request"]
        texts = {name: request.get(name) or "" for name in ("prompt", "negative_prompt")}
        counts = {name: len(tokenizer.ids(str(text))) for name, text in texts.items()}
        return counts | {"limit": loaded.pipeline.parts.prompt_tokens - 2}


def failure(error: Exception) -> dict[str, Any]:
    """Describe an error by its kind and one sentence."""
    kind = "internal"
    if isinstance(error, UsageError):
        kind = "request"
    elif isinstance(error, MemoryPlanError | MemoryError) or "out of memory" in str(error):
        kind = "memory"
    elif isinstance(error, CheckpointError):
        kind = "model"
    elif isinstance(error, SfumatoError):
        kind = "drawing"
    text = str(error) if isinstance(error, SfumatoError) else f"{type(error).__name__}: {reason(error)}"
    return {"kind": kind, "message": text}


def main() -> None:
    """Run the worker. Messages go to the original standard output; all other output goes to standard error."""
    logging.getLogger("sfumato").setLevel(logging.ERROR)  # warnings are part of a job's notes
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    Worker(output).run()


if __name__ == "__main__":
    main()
