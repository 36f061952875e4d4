"""A bulk job on several Ray nodes of this machine while workers, nodes and drivers are killed at random.

    python recipes/bulk_chaos.py out/chaos --pictures 20000 --kills 60

At the end every picture must be there once, with the bytes it has when nobody disturbs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

COMMAND = [sys.executable, "-c", "from sfumato.cli.main import main; main()", "bulk", "run"]
STORE = 100 * 2**20


def main() -> None:
    """Draw in peace, draw in chaos, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--kills", type=int, default=9)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True)
    rows = folder / "rows.jsonl"
    lines = (json.dumps({"prompt": f"a red apple, {n}", "steps": options.steps}) for n in range(options.pictures))
    rows.write_text("\n".join(lines) + "\n")
    began = time.monotonic()
    subprocess.run([*COMMAND, rows, "--output", folder / "quiet", "--quiet"], check=True)
    print(
        f"in peace: {options.pictures / (time.monotonic() - began):.2f} pictures a second, start included", flush=True
    )
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    began = time.monotonic()
    counts, memory, spilled = chaos(rows, folder, options)
    print(f"in chaos: {options.pictures / (time.monotonic() - began):.2f} pictures a second; killed {counts}")
    print(f"largest worker in MB, by quarters of the job: {memory}; bytes spilled by Ray: {spilled}")
    check(folder, options.pictures)


def chaos(rows: Path, folder: Path, options: argparse.Namespace) -> tuple[dict[str, int], list[int], int]:
    """Kill something every few seconds until enough was killed, then let the job end."""
    from ray.cluster_utils import Cluster

    chance = random.Random(options.seed)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(options.nodes)]
    words = [rows, "--output", folder / "job", "--ray", cluster.address, "--workers", f"1:{options.nodes}", "--quiet"]
    counts, memory, driver = {"worker": 0, "node": 0, "driver": 0}, [0] * 4, None
    while True:
        if driver is None:
            driver = subprocess.Popen([*COMMAND, *words, "--max-restarts", "10000"])
        next_kill = time.monotonic() + chance.uniform(4, 12)
        while time.monotonic() < next_kill and driver.poll() is None:
            time.sleep(0.2)
            watch(folder, options.pictures, memory)
        if driver.poll() is not None:
            if driver.returncode == 0:
                break
            raise SystemExit(f"a driver ended with {driver.returncode}")
        if sum(counts.values()) >= options.kills or not list(folder.glob("job/??/??/*.png")):
            continue
        what = chance.choice(list(counts))
        if what == "worker" and (workers := painters()):
            chance.choice(workers).kill()
        elif what == "node":
            cluster.remove_node(nodes.pop(chance.randrange(len(nodes))), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1, object_store_memory=STORE))
        elif what == "driver":
            driver.kill()
            driver.wait()
            driver = None
        counts[what] += 1
        print(f"killed: {what}; {len(list(folder.glob('job/??/??/*.png')))} pictures are there", flush=True)
    spilled = sum(path.stat().st_size for path in Path("/tmp/ray").glob("session_latest/ray_spilled_objects*/*"))
    cluster.shutdown()
    return counts, memory, spilled


def painters() -> list[Any]:
    """The processes of our actors."""
    found = []
    for one in psutil.Process().children(recursive=True):
        try:
            if "ray::Painter" in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:
            continue
    return found


def watch(folder: Path, pictures: int, memory: list[int]) -> None:
    """Note the largest worker's memory for the quarter of the job that is being drawn."""
    if time.monotonic() % 2 < 0.2:
        quarter = min(3, 4 * len(list(folder.glob("job/??/??/*.png"))) // pictures)
        sizes = [one.memory_info().rss // 10**6 for one in painters() if one.is_running()]
        memory[quarter] = max([memory[quarter], *sizes])


def check(folder: Path, pictures: int) -> None:
    """One row a key, and the bytes of the quiet run."""
    from sfumato.bulk.ledger import read_ledger

    table = read_ledger(folder / "job")
    keys, states = table["key"].to_pylist(), set(table["state"].to_pylist())
    assert (len(keys), len(set(keys)), states) == (pictures, pictures, {"done"}), (len(keys), len(set(keys)), states)
    hashes = [
        {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / job).glob("??/??/*.png")}
        for job in ("quiet", "job")
    ]
    assert hashes[0] == hashes[1] == dict(zip(keys, table["sha256"].to_pylist(), strict=True))
    print(f"{pictures} pictures: one row a key, and every byte as in peace")


if __name__ == "__main__":
    main()
