"""`sfumato bulk` as a user meets it: jobs from end to end, killed at random, sharded, drained, and on Ray."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.conftest import SCRIPT
from sfumato.bulk.ledger import read_ledger
from sfumato.images import open_image
from sfumato.metadata.carriers import read_recipe

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "from sfumato.cli.main import main; main()"]


def rows(folder: Path, count: int, **settings) -> Path:
    path = folder / "rows.jsonl"
    prompts = ("a red apple", "a blue car", "a cat", "a green house", "a rocket")
    lines = [{"prompt": f"{prompts[n % 5]}, {n // 5}", "steps": 1, **settings} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def hashes(folder: Path) -> dict[str, str]:
    """The bytes of all images of a job, by the keys they are named after."""
    return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("??/??/*.png")}


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*")]


@pytest.fixture(scope="module")
def quiet(sfumato, model, tmp_path_factory) -> tuple[Path, Path]:
    """A job that nobody disturbed, and its rows."""
    folder = tmp_path_factory.mktemp("bulk")
    source = rows(folder, 12)
    done = sfumato("bulk", "run", source, "--output", "job", "--model", model, "--quiet", cwd=folder).succeeded()
    assert done.out == "12 of 12 images are in job\n"
    return source, folder / "job"


def test_images_are_named_after_their_keys_and_carry_their_recipes(quiet, sfumato, model, tmp_path):
    _, job = quiet
    found = hashes(job)
    assert len(found) == 12
    table = read_ledger(job).to_pylist()
    assert {one["key"]: one["sha256"] for one in table} == found
    assert len(list((job / "manifest").iterdir())) == 1
    assert leftovers(job) == []
    one = table[3]
    assert one["path"] == f"{one['key'][:2]}/{one['key'][2:4]}/{one['key']}.png"
    recipe = read_recipe(job / one["path"])
    assert recipe["request"]["seed"] == one["seed"]
    assert recipe["model"]["name"] == str(model)
    again = sfumato("replay", job / one["path"], "--output", tmp_path / "again.png", cwd=tmp_path).succeeded()
    assert "identical to the original" in again.out
    # The same image as `generate` draws, whatever it was drawn with.
    words = ["generate", recipe["request"]["prompt"], "--steps", 1, "--seed", one["seed"], "--model", model]
    drawn = sfumato(*words, cwd=tmp_path).succeeded().paths[0]
    assert open_image(tmp_path / drawn).tobytes() == open_image(job / one["path"]).tobytes()


def test_a_second_run_draws_nothing(quiet, sfumato, model):
    source, job = quiet
    before = {path: path.stat().st_mtime_ns for path in job.rglob("*.png")}
    words = ["bulk", "run", source, "--output", job, "--model", model, "--json", "--quiet"]
    told = sfumato(*words, cwd=job.parent).succeeded().json
    assert (told["pictures"], told["before"], told["done"], told["left"]) == (12, 12, 0, 0)
    assert {path: path.stat().st_mtime_ns for path in job.rglob("*.png")} == before


def test_what_was_drawn_and_not_written_down_is_not_drawn_again(quiet, sfumato, model, tmp_path):
    import shutil

    source, job = quiet
    copy = tmp_path / "job"
    shutil.copytree(job, copy)
    shutil.rmtree(copy / "manifest")
    sfumato("bulk", "run", source, "--output", copy, "--model", model, cwd=tmp_path).succeeded()
    assert all(one["seconds"] == 0 for one in read_ledger(copy).to_pylist())
    # A file that was cut short is none.
    shutil.rmtree(copy / "manifest")
    broken = next(copy.glob("??/??/*.png"))
    broken.write_bytes(broken.read_bytes()[:-200])
    sfumato("bulk", "run", source, "--output", copy, "--model", model, cwd=tmp_path).succeeded()
    assert hashes(copy) == hashes(job)


def test_shards_are_the_same_images(quiet, sfumato, model, tmp_path):
    source, job = quiet
    for shard in ("2/2", "1/2"):
        words = ["bulk", "run", source, "--output", "job", "--model", model, "--shard", shard]
        sfumato(*words, cwd=tmp_path).succeeded()
    assert hashes(tmp_path / "job") == hashes(job)
    told = sfumato("bulk", "status", "job", "--json", cwd=tmp_path).succeeded().json
    assert (told["done"], told["left"], told["running"], told["alarms"]) == (12, 0, False, [])


def test_batches_are_the_same_images(quiet, sfumato, model, tmp_path):
    source, job = quiet
    words = ["bulk", "run", source, "--output", "job", "--model", model, "--micro-batch", 5]
    sfumato(*words, cwd=tmp_path).succeeded()
    assert hashes(tmp_path / "job") == hashes(job)


def test_plan_says_what_it_will_take_and_writes_nothing(quiet, sfumato, model, tmp_path):
    words = ["bulk", "plan", quiet[0], "--model", model, "--workers", 2, "--price", 1000]
    told = sfumato(*words, "--json", cwd=tmp_path).succeeded().json
    assert (told["rows"], told["images"], told["bad_rows"]) == (12, 12, 0)
    assert told["seconds"] == pytest.approx(told["seconds_each"] * 12 / 2)
    assert told["cost"] == pytest.approx(told["worker_hours"] * 1000)
    assert told["bytes"] > 12 * 500
    text = sfumato(*words, cwd=tmp_path).succeeded().out
    assert "12 rows (12 different images)" in text
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_are_named(sfumato, model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "stpes": 1}\n{"prompt": "a", "seed": "x"}\n')
    words = ["bulk", "run", "rows.jsonl", "--output", "job", "--model", model]
    done = sfumato(*words, cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    lines = done.err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["rows.jsonl, row 2", "rows.jsonl, row 3", "sfumato"]
    assert "did you mean 'steps'" in lines[0]
    assert "2 of 3 rows" in lines[2]
    assert not (tmp_path / "job").exists()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "steps": 1}\n{"prompt": "a", "stpes": 1}\n')
    assert "1 of 1 images" in sfumato(*words, "--skip-bad", cwd=tmp_path).succeeded().out


def test_misuse(quiet, sfumato, tmp_path):
    source, job = quiet
    for words, *said in (
        (["run", "gone.jsonl", "-o", "job"], "gone.jsonl"),
        (["run", source, "-o", "job", "--shard", "0/3"], "--shard"),
        (["run", source, "-o", "job", "--ray", "local", "--workers", "3:2"], "--workers"),
        (["run", source, "-o", job], "checkpoint"),  # the built-in model is another one
        (["status", "."], "no bulk job"),
        (["verify", "."], "no bulk job"),
        (["export", job], "--sheet"),
        (["export", job, "--sheet", "a.jpg"], ".png"),
        (["plan", source, "--probe", "0"], "--probe"),
    ):
        sfumato("bulk", *words, cwd=tmp_path).failed(2, *said)
    assert list(tmp_path.iterdir()) == []


def test_verify(quiet, sfumato, model, tmp_path):
    import shutil

    source, job = quiet
    words = ["bulk", "verify", job, "--redraw", 3, "--model", model]
    assert sfumato(*words, cwd=tmp_path).succeeded().out.count("identical") == 3
    copy = tmp_path / "job"
    shutil.copytree(job, copy)
    first, second = sorted(copy.glob("??/??/*.png"))[:2]
    first.unlink()
    second.write_bytes(b"something else")
    stray = copy / "aa" / "bb" / "stray.png"
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_bytes(b"")
    done = sfumato("bulk", "verify", copy, "--json", "--forget", cwd=tmp_path)
    assert done.code == 1
    told = done.json
    assert (told["missing"], told["changed"], told["orphans"]) == ([first.stem], [second.stem], ["aa/bb/stray.png"])
    stray.unlink()
    sfumato("bulk", "run", source, "--output", copy, "--model", model, cwd=tmp_path).succeeded()
    sfumato("bulk", "verify", copy, cwd=tmp_path).succeeded()
    assert hashes(copy) == hashes(job)


def test_export(quiet, sfumato, tmp_path):
    import tarfile

    import pyarrow.parquet

    job = quiet[1]
    words = [
        "--sheet",
        "sheet.png",
        "--count",
        9,
        "--size",
        8,
        "--webdataset",
        "shards",
        "--per-shard",
        5,
        "--parquet",
        "t.parquet",
    ]
    done = sfumato("bulk", "export", job, *words, cwd=tmp_path).succeeded()
    assert len(done.paths) == 5
    assert open_image(tmp_path / "sheet.png").size == (24, 24)
    members = []
    for path in sorted((tmp_path / "shards").iterdir()):
        with tarfile.open(path) as tar:
            members += tar.getnames()
    assert [name[:-4] for name in members if name.endswith(".png")] == sorted(hashes(job))
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert len(table) == 12
    assert all(one["thumbnail"].startswith(b"\xff\xd8") for one in table)


def test_webdataset_in_place_of_files(quiet, sfumato, model, tmp_path):
    source, job = quiet
    words = ["bulk", "run", source, "--output", "job", "--model", model, "--webdataset"]
    sfumato(*words, cwd=tmp_path).succeeded()
    found = {one["key"]: one["sha256"] for one in read_ledger(tmp_path / "job").to_pylist()}
    assert found == hashes(job)
    assert len(list((tmp_path / "job" / "shards").glob("*.tar"))) == 1
    # A shard that the ledger does not know was left by a run that died, and its images are drawn again.
    (tmp_path / "job" / "shards" / "1of1.00007-00000.tar").write_bytes(b"")
    sfumato(*words, cwd=tmp_path).succeeded()
    sfumato("bulk", "verify", "job", "--redraw", 2, "--model", model, cwd=tmp_path).succeeded()
    assert sfumato("bulk", "export", "job", "--sheet", "s.png", cwd=tmp_path).succeeded().out == "s.png\n"


def start(environment, folder: Path, *words: object, stdout=subprocess.DEVNULL) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, "bulk", "run", *map(str, words)], cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def killed_until_done(environment, folder: Path, words: list[object], kills: int, seed: int = 1) -> int:
    """Run a job again and again, with -9 at random moments, until it is done; returns how often it was killed."""
    chance, killed = random.Random(seed), 0
    while True:
        before = len(hashes(folder / "job"))
        process = start(environment, folder, *words)
        if killed < kills:
            wait_for(lambda: len(hashes(folder / "job")) > before or process.poll() is not None)  # noqa: B023
            time.sleep(chance.random() * 0.5)
            killed += process.poll() is None
            process.kill()
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err
        if process.returncode == 0:
            return killed


def settled(folder: Path, expected: dict[str, str]) -> None:
    """One row a key, every file as in a job that nobody disturbed, and nothing else."""
    table = read_ledger(folder / "job")
    assert sorted(table["key"].to_pylist()) == sorted(expected)
    assert set(table["state"].to_pylist()) == {"done"}
    assert dict(zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True)) == expected
    assert hashes(folder / "job") == expected


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_at_random_and_gone_on_with(sfumato, environment, tmp_path):
    source = rows(tmp_path, 12, width=32, height=32)
    sfumato("bulk", "run", source, "--output", "../quiet", cwd=made(tmp_path / "a")).succeeded()
    expected = hashes(tmp_path / "quiet")
    assert len(expected) == 12
    assert killed_until_done(environment, tmp_path, [source, "--output", "job"], 2) >= 1
    settled(tmp_path, expected)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_sigterm_drains_and_a_second_driver_is_refused(sfumato, environment, tmp_path):
    source = rows(tmp_path, 500)
    process = start(environment, tmp_path, source, "--output", "job")
    wait_for(lambda: len(hashes(tmp_path / "job")) > 2)
    refused = sfumato("bulk", "run", source, "--output", "job", cwd=tmp_path)
    refused.failed(2, "another run")
    assert sfumato("bulk", "status", "job", "--json", cwd=tmp_path).succeeded().json["running"]
    process.terminate()
    _, err = process.communicate(timeout=40)
    assert process.returncode == 143, err
    assert "run the same command again" in err
    assert {one["key"] for one in read_ledger(tmp_path / "job").to_pylist()} == hashes(tmp_path / "job").keys()
    assert leftovers(tmp_path / "job") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file system that can be full")
def test_a_full_disk_stops_with_a_sentence_and_goes_on(sfumato_each, quiet, model, tmp_path):
    source, job = quiet
    before = """
import errno
from pathlib import Path
write = Path.write_bytes
def full(self, data):
    if len(list(Path("job").glob("??/??/*.png"))) >= 4:
        raise OSError(errno.ENOSPC, "full")
    return write(self, data)
Path.write_bytes = full
"""
    words = ["bulk", "run", source, "--output", "job", "--model", model]
    [done] = sfumato_each([words], cwd=tmp_path, before=before)
    done.failed(1, "no space left")
    assert len(hashes(tmp_path / "job")) == 4
    assert leftovers(tmp_path / "job") == []
    sfumato_each([words], cwd=tmp_path)[0].succeeded()
    settled(tmp_path, hashes(job))


def chaos(environment, folder: Path, *words: object) -> str:
    """What the recipe says that kills workers, raylets and drivers of a job on a Ray cluster of this machine."""
    done = subprocess.run(
        [sys.executable, ROOT / "recipes" / "bulk_chaos.py", *map(str, (folder / "chaos", *words))],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    logs = [path.read_text()[-3000:] for path in folder.glob("chaos/*.log")]
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:], logs)
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by signals")
def test_ray_draws_the_same_images_though_a_raylet_and_the_driver_are_killed(environment, tmp_path):
    said = chaos(environment, tmp_path, "--pictures", 12, "--size", 32, "--kills", 2, "--pause", 0.2)
    assert "killed {'node': 1, 'driver': 1}" in said
    assert "12 pictures: one row a key, and every byte as in peace" in said
    assert "0 bytes spilled" in said


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by signals")
def test_ray_on_several_nodes_with_workers_raylets_and_drivers_killed(environment, tmp_path):
    """The middle form. SFUMATO_BULK_PICTURES makes it larger; 20,000 is the bar."""
    count = int(os.environ.get("SFUMATO_BULK_PICTURES", "60"))
    said = chaos(environment, tmp_path, "--pictures", count, "--kills", max(4, count // 333), "--pause", 2)
    assert f"{count} pictures: one row a key" in said


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed by signals")
def test_a_cluster_of_our_own_replaces_a_worker_that_is_killed(environment, tmp_path):
    import psutil

    source = rows(tmp_path, 24)
    words = [source, "--output", "job", "--ray", "local", "--workers", "1:2", "--json"]
    process = start(environment, tmp_path, *words, stdout=subprocess.PIPE)
    wait_for(lambda: len(hashes(tmp_path / "job")) > 2 or process.poll() is not None, 120)
    assert process.poll() is None, process.communicate()
    actors = [
        one for one in psutil.Process(process.pid).children(recursive=True) if "ray::Painter" in " ".join(one.cmdline())
    ]
    assert actors
    actors[0].kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["left"] == 0
    settled(tmp_path, hashes(tmp_path / "job"))


def test_help_needs_nothing(environment, tmp_path):
    for command in ("plan", "run", "status", "verify", "export"):
        done = subprocess.run(
            [SCRIPT, "bulk", command, "--help"], env=environment, capture_output=True, text=True, check=True
        )
        assert "Examples:" in done.stdout
