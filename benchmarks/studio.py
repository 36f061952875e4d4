"""Response times of the studio: start, accepted jobs, events, cancellation, overhead, and a large folder.

    python -m benchmarks.studio out/studio

Uses the built-in model, and needs an idle machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Studio", "accepted", "cancelled", "full_folder", "lag", "overhead", "ready"]

SCRIPT = Path(sys.executable).with_name("sfumato")
ROW = "| {0} | {1} | {2} |"
APPLE = {"prompt": "a red apple, 3d"}


class Studio:
    """A server, started in its own process as a user would."""

    def __init__(self, folder: Path) -> None:
        words = ["studio", "--no-browser", "--port", "0", "--output", str(folder), "--device", "cpu"]
        self.began = time.perf_counter()
        self.process = subprocess.Popen([SCRIPT, *words, "--dtype", "float32"], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(re.search(r":(\d+)[ /]", self.process.stdout.readline())[1])

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request over a new connection and return the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        found = connection.getresponse().read()
        connection.close()
        return json.loads(found) if found[:1] in b"{[" else found

    def ended(self, job: dict[str, Any]) -> dict[str, Any]:
        """Wait for a job to end, and return it."""
        while (found := self.ask("GET", f"/api/jobs/{job['id']}"))["state"] not in ("done", "failed", "cancelled"):
            time.sleep(0.05)  # asking more often would take a core from the worker
        return found

    def events(self) -> Iterator[tuple[float, str, dict[str, Any]]]:
        """Yield events, each with its time of arrival."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", "/api/events")
        name = ""
        for line in connection.getresponse():
            if line.startswith(b"event: "):
                name = line[7:].decode().strip()
            elif line.startswith(b"data: "):
                yield time.time(), name, json.loads(line[6:])

    def warm(self) -> None:
        """Wait until the worker has drawn an image."""
        self.ended(self.ask("POST", "/api/jobs", {"request": {**APPLE, "steps": 2}}))

    def end(self) -> None:
        """Stop the server."""
        self.process.terminate()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def ready(folder: Path, runs: int) -> tuple[list[float], list[float]]:
    """Return the seconds from the shell command to the server's first response, and from there to the first image."""
    answers, images = [], []
    for run in range(runs):
        studio = Studio(folder / f"ready-{run}")
        studio.ask("GET", "/")
        answers.append(time.perf_counter() - studio.began)
        began, events = time.perf_counter(), studio.events()
        next(events)
        studio.ask("POST", "/api/jobs", {"request": APPLE})
        for _, name, told in events:
            if name == "drawn":
                break
            assert told.get("state") not in ("failed", "cancelled"), told
        images.append(time.perf_counter() - began)
        studio.end()
    return answers, images


def accepted(studio: Studio, runs: int) -> list[float]:
    """Return the seconds until a job is accepted and saved; half of the jobs are sent while the worker draws."""
    times, jobs = [], []
    for number in range(runs):
        began = time.perf_counter()
        jobs.append(studio.ask("POST", "/api/jobs", {"request": {**APPLE, "steps": 10, "seed": number}}))
        times.append(time.perf_counter() - began)
    for job in jobs:
        studio.ask("DELETE", f"/api/jobs/{job['id']}")
    for job in jobs:
        studio.ended(job)
    return times


def lag(studio: Studio, steps: int) -> list[float]:
    """Return the seconds from the end of a step in the worker until a client receives its event."""
    events = studio.events()
    next(events)
    studio.ask("POST", "/api/jobs", {"request": {**APPLE, "steps": steps, "seed": 1}})
    times = []
    for when, name, told in events:
        if name == "progress" and "at" in told:
            times.append(when - told["at"])
        if name == "job" and told["state"] == "done":
            return times
    return times


def cancelled(studio: Studio, runs: int) -> tuple[list[float], float]:
    """Return the seconds from a request to cancel until the job has ended, and the seconds of a step."""
    times, steps = [], []
    for number in range(runs):
        events = studio.events()
        next(events)
        job = studio.ask("POST", "/api/jobs", {"request": {**APPLE, "steps": 300, "seed": 1000 + number}})
        last = None
        for when, name, told in events:
            if name == "progress" and told.get("step", 0) > 1:
                steps.append(when - last if last is not None else 0.0)
            last = when
            if name == "progress" and told.get("step", 0) >= 8 + number % 5:  # not every step is reported
                break
        began = time.time()
        studio.ask("DELETE", f"/api/jobs/{job['id']}")
        times.append(next(w for w, name, told in events if name == "job" and told["state"] == "cancelled") - began)
    return times, statistics.median(steps)


def overhead(studio: Studio, folder: Path, runs: int) -> tuple[list[float], list[float]]:
    """Return the seconds of an image in the studio (with previews for a connected page) and in a separate process."""
    import torch

    from sfumato import GenerateRequest, load
    from sfumato.metadata.carriers import save_picture

    pipeline = load("built-in", device="cpu", dtype=torch.float32)
    torch.set_num_threads(pipeline.place.facts.free_cores)
    pipeline.generate(GenerateRequest(prompt="a red apple, 3d", steps=2))
    ours, alone = [], []
    events = studio.events()
    next(events)
    for number in range(runs):
        request = GenerateRequest(**APPLE, steps=20, seed=2000 + number)
        job = studio.ask("POST", "/api/jobs", {"request": request.to_dict()})
        while (told := next(events))[1] != "job" or told[2]["id"] != job["id"] or told[2]["state"] != "done":
            pass
        ours.append(told[2]["finished"] - told[2]["started"])
        began = time.perf_counter()
        result = pipeline.generate(request)
        save_picture(result.images[0], folder / f"alone-{number}.png", result.recipes[0])
        alone.append(time.perf_counter() - began)
    return ours, alone


def full_folder(folder: Path, count: int) -> dict[str, float]:
    """Return the seconds for a folder of this many images: indexing, opening it again, first rows, a search."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    for number in range(count):
        info = PngInfo()
        recipe = {"request": {"prompt": f"a red apple on table {number}, 3d", "seed": number}, "model": {"name": "x"}}
        info.add_itxt("sfumato", json.dumps(recipe), zip=True)
        place = folder / f"{number % 20:02d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (number % 256, number // 256, 9)).save(place / f"{number}.png", pnginfo=info)
    times = {}
    studio, began = Studio(folder), time.perf_counter()
    while studio.ask("GET", "/api/images?limit=1")["total"] < count:
        time.sleep(0.2)
    times["indexed at first"] = time.perf_counter() - began
    studio.end()
    studio = Studio(folder)
    times["shell to first rows"] = -studio.began
    assert len(studio.ask("GET", "/api/images?limit=60")["images"]) == 60
    times["shell to first rows"] += time.perf_counter()
    studio.warm()
    for name, path in (("first rows", "?limit=60"), ("search, 1 hit", "?q=table+4711"), ("search, all", "?q=apple")):
        found = []
        for _ in range(11):
            began = time.perf_counter()
            studio.ask("GET", f"/api/images{path}")
            found.append(time.perf_counter() - began)
        times[name] = statistics.median(found)
    studio.end()
    return times


def p95(times: list[float]) -> float:
    """Return the 95th percentile."""
    return sorted(times)[int(0.95 * (len(times) - 1))]


def main() -> None:
    """Run all measurements and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--only", default="ready,live,folder")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    if "ready" in options.only:
        answers, images = ready(options.folder, max(3, options.runs // 2))
        print(ROW.format("shell to the page", f"{statistics.median(answers):.2f} s", "≤ 1.0 s"), flush=True)
        print(ROW.format("from there to the first image", f"{statistics.median(images):.2f} s", "≤ 4 s"), flush=True)
    if "live" in options.only:
        studio = Studio(options.folder / "live")
        studio.warm()
        print(ROW.format("accepted, p95", f"{1000 * p95(accepted(studio, 4 * options.runs)):.0f} ms", "≤ 50 ms"))
        print(ROW.format("event lag, p95", f"{1000 * p95(lag(studio, 20 * options.runs)):.0f} ms", "≤ 100 ms"))
        times, step = cancelled(studio, options.runs)
        print(
            ROW.format("cancelled, p95", f"{1000 * p95(times):.0f} ms", f"≤ {1000 * (step + 0.1):.0f} ms"), flush=True
        )
        ours, alone = overhead(studio, options.folder, options.runs)
        more = statistics.median(a / b for a, b in zip(ours, alone, strict=True)) - 1
        print(ROW.format("studio against a process alone", f"{100 * more:+.1f} %", "≤ +2 %"), flush=True)
        studio.end()
    if "folder" in options.only:
        bars = {"first rows": "≤ 300 ms", "search, 1 hit": "≤ 100 ms", "search, all": "≤ 100 ms"}
        for name, took in full_folder(options.folder / "full", options.images).items():
            told = f"{1000 * took:.0f} ms" if took < 1 else f"{took:.1f} s"
            print(ROW.format(f"{options.images:,} images: {name}", told, bars.get(name, "")), flush=True)


if __name__ == "__main__":
    main()
