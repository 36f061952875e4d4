"""Run a studio server while its worker or the server itself is killed (SIGKILL) at random moments.

    python recipes/studio_chaos.py out/chaos --kills 200

At the end every job that was accepted must have ended once, with the very images that it has when nobody disturbs; no
half file may be left, and the database must be whole.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

COMMAND = [sys.executable, "-c", "from sfumato.cli.main import main; main()", "serve", "--port", "0"]
COMMAND += ["--device", "cpu", "--dtype", "float32", "--output"]
ENDED = ("done", "failed", "cancelled")


class Server:
    """A server in its own process, which can be killed and restarted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process, self.address = folder, None, ""

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        self.process = subprocess.Popen([*COMMAND, self.folder], stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        self.address = re.search(r"http://\S+\d", line)[0]

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request and return the response, or None if the server is gone."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{method} {path}: {error.code} {error.read().decode()}") from error
        except (OSError, ValueError):
            return None

    def workers(self) -> list[psutil.Process]:
        """Return its worker processes."""
        try:
            return psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """Kill the server (SIGKILL)."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def stop(self) -> None:
        """Stop the server as Ctrl-C does."""
        self.process.terminate()
        self.process.wait(60)
        self.process.stdout.close()


def chaos(server: Server, kills: int, chance: random.Random) -> tuple[dict[str, Any], dict[str, int]]:
    """Kill worker or server, as often as asked. Return the accepted jobs in their final state, and the counts."""
    accepted, counts, drawn = dict[str, Any](), {"worker": 0, "server": 0}, -1
    server.start()
    while sum(counts.values()) < kills:
        submit(server, accepted, chance)
        if chance.random() < 0.8:  # after some more has been drawn; else at any moment, even while it starts
            drawn = wait(lambda drawn=drawn: more(server, drawn), server)
            submit(server, accepted, chance)
        time.sleep(chance.uniform(0, 0.8))
        if chance.random() < 0.6 and (workers := server.workers()):
            counts["worker"] += 1
            workers[0].kill()
        else:
            counts["server"] += 1
            server.kill()
            server.start()
        print(f"\r{sum(counts.values())} of {kills} kills, {len(accepted)} jobs", end="", file=sys.stderr, flush=True)
    jobs = {id: wait(lambda id=id: ended(server, id), server) for id in accepted}
    server.stop()
    return jobs, counts


def more(server: Server, drawn: int) -> int | None:
    """Return the number of images if it is more than `drawn`."""
    found = (server.ask("GET", "/api/images?limit=1") or {}).get("total", 0)
    return found if found > drawn else None


def submit(server: Server, accepted: dict[str, Any], chance: random.Random) -> None:
    """Keep a few jobs waiting. A job counts once the server has accepted it; until then it may be sent again."""
    waiting = server.ask("GET", "/api/jobs?state=queued&state=running") or {"jobs": []}
    for _ in range(3 - len(waiting["jobs"])):
        number = len(accepted)
        request = {
            "prompt": f"a red apple, {number}",
            "steps": 3,
            "count": chance.choice((1, 1, 2)),
            "seed": 10 * number,
        }
        new = {"request": request, "id": f"job-{number:06d}"}
        if (job := server.ask("POST", "/api/jobs", new)) is not None:
            accepted[job["id"]] = job


def ended(server: Server, id: str) -> Any:
    """Return a job that has ended, or None."""
    job = server.ask("GET", f"/api/jobs/{id}")
    return job if job is not None and job["state"] in ENDED else None


def wait(look: Any, server: Server, seconds: float = 600) -> Any:
    """Call `look` until it returns something, and return that."""
    end = time.monotonic() + seconds
    while not (found := look()):
        if server.process.poll() is not None:
            raise SystemExit(f"the server ended by itself, with {server.process.returncode}")
        if time.monotonic() > end:
            raise SystemExit("nothing happens any more")
        time.sleep(0.02)
    return found


def check(jobs: dict[str, Any], folder: Path, quiet: Server) -> None:
    """Check all promises, or exit with the one that was broken."""
    counts = {id: job["request"].get("count", 1) for id, job in jobs.items()}
    bad = [job for id, job in jobs.items() if (job["state"], len(job["images"])) != ("done", counts[id])]
    if bad:
        raise SystemExit(f"{len(bad)} of {len(jobs)} jobs are not done: {bad[0]}")
    base = sqlite3.connect(folder / ".sfumato" / "studio.db")
    whole = base.execute("PRAGMA integrity_check").fetchone()[0]
    events = [json.loads(data) for (data,) in base.execute("SELECT data FROM events WHERE type = 'job'")]
    base.close()
    ends = [event["id"] for event in events if event["state"] in ENDED]
    if whole != "ok" or len(ends) != len(set(ends)):
        raise SystemExit(f"the database is {whole}, and tells of {len(ends)} ends of {len(set(ends))} jobs")
    if halves := [path.name for path in folder.rglob("*.part")]:
        raise SystemExit(f"half files are left: {halves}")
    quiet.start()
    for job in jobs.values():
        again = quiet.ask("POST", "/api/jobs", {"request": job["request"], "id": job["id"]})
        again = wait(lambda id=again["id"]: ended(quiet, id), quiet)
        if again["images"] != job["images"]:
            raise SystemExit(f"the images of {job['id']} are {job['images']}, and undisturbed {again['images']}")
    quiet.stop()


def main() -> None:
    """Run the server, kill processes, check the results and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, folder = time.monotonic(), options.folder.absolute()
    jobs, counts = chaos(Server(folder / "chaos"), options.kills, random.Random(options.seed))
    took = time.monotonic() - began
    check(jobs, folder / "chaos", Server(folder / "quiet"))
    images = sum(len(job["images"]) for job in jobs.values())
    print(f"killed {counts} in {took:.0f} s: {len(jobs)} jobs ended once, their {images} images are bit-equal")


if __name__ == "__main__":
    main()
