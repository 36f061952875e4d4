"""Run a bulk job on several Ray nodes of this machine while workers, nodes and drivers are killed at random.

    python recipes/bulk_chaos.py out/chaos --pictures 20000 --kills 60 --size 16 --micro-batch 16

Beside it the same job is drawn in peace by one process. At the end every picture must be there once, with the bytes
that it has in peace, and no process may have grown. `--minutes` ends both early and compares what both have drawn;
the same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

COMMAND = [sys.executable, "-c", "from sfumato.cli.main import main; main()", "bulk", "run"]
STORE = 100 * 2**20
# Pictures after which a job's memory must stay as it is, and by how much it may differ from its median.
WARM, FLAT = 1_000, 0.05


def main() -> None:
    """Draw the job undisturbed and disturbed, and compare the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--kills", type=int, default=9)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--pause", type=float, default=4, help="seconds between two kills, at least")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    row = {"steps": options.steps, "width": options.size, "height": options.size, "guidance_scale": 1.0}
    lines = (json.dumps({"prompt": f"a red apple, {n}", **row}) for n in range(options.pictures))
    rows.write_text("\n".join(lines) + "\n")
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    words = [rows, "--micro-batch", options.micro_batch, "--quiet"]
    with (folder / "peace.log").open("a") as log:
        peace = subprocess.Popen([*COMMAND, *map(str, words), "--output", folder / "peace"], stdout=log, stderr=log)
    chaos = Chaos(folder, options, words, peace)
    try:
        chaos.run()
    finally:
        if peace.poll() is None:
            peace.terminate()
        peace.wait()
    check(folder, options.pictures)
    for name, samples in chaos.memory.items():
        flat(name, samples)
    assert chaos.spilled == 0, f"Ray spilled {chaos.spilled} bytes"
    print("0 bytes spilled by Ray")


@dataclass
class Chaos:
    """Kills something every few seconds until enough was killed, then lets the job end.

    memory: what the largest process of each kind holds, by how many pictures were there, in bytes.
    """

    folder: Path
    options: argparse.Namespace
    words: list[Any]
    peace: subprocess.Popen[bytes]
    killed: Counter[str] = field(default_factory=Counter)
    memory: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: {"peace": [], "workers": [], "driver": []})
    spilled: int = 0
    driver: subprocess.Popen[bytes] | None = None
    session: Path = Path()

    def run(self) -> None:
        """Run the job."""
        from ray.cluster_utils import Cluster

        options, chance, began = self.options, random.Random(self.options.seed), time.monotonic()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
        self.session = Path(cluster.head_node.get_session_dir_path())
        nodes = [begun(cluster) for _ in range(options.nodes)]
        self.words += ["--output", self.folder / "job", "--ray", cluster.address, "--workers", f"1:{options.nodes}"]
        kinds = chance.sample(("worker", "node", "driver"), 3)
        end, before = began + 60 * options.minutes, self.there()
        while time.monotonic() < end:
            self.driver = self.driver or self.drive()
            next_kill = time.monotonic() + chance.uniform(options.pause, 3 * options.pause)
            while time.monotonic() < next_kill and self.driver.poll() is None:
                time.sleep(min(2, options.pause / 4))
                self.watch()
            if self.driver.poll() == 0 and self.peace.poll() is not None:
                break
            assert self.driver.poll() in (None, 0), f"a driver ended with {self.driver.poll()}"
            drawn = self.there() - before
            # Evenly over the job, so that what is killed late has grown old.
            is_early = drawn * options.kills < self.killed.total() * options.pictures
            if not drawn or is_early or self.killed.total() >= options.kills or self.driver.poll() == 0:
                continue
            what = kinds[self.killed.total() % 3] if options.kills < 3 else chance.choice(kinds)
            if what == "worker" and (workers := painters()):
                chance.choice(workers).kill()
            elif what == "node":
                cluster.remove_node(nodes.pop(chance.randrange(len(nodes))), allow_graceful=False)
                nodes.append(begun(cluster))
            elif what == "driver":
                self.driver.kill()
                self.driver.wait()
                self.driver = None
            self.killed[what] += 1
            print(f"{time.monotonic() - began:.0f} s, killed: {what}; {self.there()} pictures are there", flush=True)
        if self.driver is not None and self.driver.poll() is None:
            self.driver.send_signal(signal.SIGTERM)
            self.driver.wait()
        pace = (self.there() - before) / (time.monotonic() - began)
        print(f"in chaos: {pace:.2f} pictures a second beside the quiet run; killed {dict(self.killed)}")
        cluster.shutdown()

    def drive(self) -> subprocess.Popen[bytes]:
        """Start a new driver."""
        words = [*COMMAND, *map(str, self.words), "--max-restarts", "10000"]
        with (self.folder / "job.log").open("a") as log:
            return subprocess.Popen(words, stdout=log, stderr=log)

    def there(self) -> int:
        """Return the number of images so far."""
        return len(pictures_of(self.folder / "job"))

    def watch(self) -> None:
        """Record the memory of all processes, and how much Ray has spilled in total."""
        for name, found in (
            ("peace", [psutil.Process(self.peace.pid)] if self.peace.poll() is None else []),
            ("driver", [psutil.Process(self.driver.pid)] if self.driver and self.driver.poll() is None else []),
            ("workers", painters()),
        ):
            place = self.folder / ("peace" if name == "peace" else "job")
            sizes = [size for one in found if (size := held(one))]
            if sizes:
                self.memory[name].append((len(pictures_of(place)), max(sizes)))
        for place in self.session.glob("ray_spilled_objects*/*"):
            with suppress(OSError):
                self.spilled = max(self.spilled, place.stat().st_size)


def begun(cluster: Any) -> Any:
    """Start a new node. On a busy machine, Ray gives up on some before they have started."""
    while True:
        try:
            return cluster.add_node(num_cpus=1, object_store_memory=STORE)
        except Exception as error:
            print(f"once more, as a node did not start: {str(error)[:80]}", flush=True)


def pictures_of(job: Path) -> list[Path]:
    """Return the images of a job."""
    return list(job.glob("??/??/*.png"))


def painters() -> list[psutil.Process]:
    """Return the processes of our actors."""
    found = []
    for one in psutil.Process().children(recursive=True):
        try:
            if "ray::Painter" in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:
            continue
    return found


def held(process: psutil.Process) -> int:
    """Return the private memory of a process in bytes, without file pages, or 0 if it is still loading or has ended."""
    try:
        found = process.memory_info()
        return found.rss - found.shared if time.time() - process.create_time() > 120 else 0
    except psutil.Error:
        return 0


def flat(name: str, samples: list[tuple[int, int]]) -> None:
    """Print whether memory stayed constant."""
    sizes = sorted(size for pictures, size in samples if pictures >= WARM)
    if not sizes:
        print(f"memory of {name}: too few pictures to tell")
        return
    middle = sizes[len(sizes) // 2]
    low, high = sizes[0] / middle - 1, sizes[-1] / middle - 1
    print(f"memory of {name} from picture {WARM} on: {middle / 1e6:.0f} MB, {low:+.1%} to {high:+.1%}")
    assert name == "driver" or max(-low, high) <= FLAT


def check(folder: Path, pictures: int) -> None:
    """Check that there is one row per key, with the same bytes as in the undisturbed run."""
    from sfumato.bulk.ledger import read_ledger

    table = read_ledger(folder / "job")
    keys, states = table["key"].to_pylist(), set(table["state"].to_pylist())
    peace, job = (
        {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures_of(folder / name)}
        for name in ("peace", "job")
    )
    both = peace.keys() & job.keys()
    differ = [key for key in both if peace[key] != job[key]]
    print(
        f"{len(job)} pictures, {len(peace)} in peace, {len(both)} in both, of which {len(differ)} differ {differ[:5]}"
    )
    assert len(keys) == len(set(keys)), f"{len(keys) - len(set(keys))} keys have two rows"
    assert states == {"done"}, states
    assert not differ
    told = dict(zip(keys, table["sha256"].to_pylist(), strict=True))
    # A job that was ended early has files of workers that died before they could tell; the next run finds them.
    assert told.items() <= job.items(), "files and ledger differ"
    assert len(job) < pictures or job == told, f"{len(job) - len(told)} files are not in the ledger"
    if len(both) == pictures == len(job):
        print(f"{pictures} pictures: one row a key, and every byte as in peace")


if __name__ == "__main__":
    main()
