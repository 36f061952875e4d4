"""Bulk jobs without a model: rows, matrices, keys, the ledger, and a run with its executor replaced."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.bulk import extras
from sfumato.bulk.job import Job, Picture, Shard, WrongCheckpoint, held
from sfumato.bulk.ledger import Entry, Ledger, conflicts, read_ledger, standing
from sfumato.bulk.painter import Painter, Work, batch_size, draw_requests, settings_of
from sfumato.bulk.planning import open_job, with_refiner
from sfumato.bulk.report import status
from sfumato.bulk.rows import digest_of, read_rows
from sfumato.bulk.run import Queue, TooManyErrors, run
from sfumato.bulk.shards import image_at, write_shard
from sfumato.errors import MissingExtra, OutputError, SfumatoError, UsageError
from sfumato.images import open_image, psnr
from sfumato.metadata.carriers import read_recipe
from sfumato.request import GenerateRequest


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def good(path: Path) -> list[dict]:
    rows = [row for _, row in read_rows(path)]
    assert all(isinstance(row, dict) for row in rows), rows
    return rows


def bad(path: Path) -> dict[int, str]:
    return {number: str(row) for number, row in read_rows(path) if isinstance(row, Exception)}


def test_the_same_rows_in_every_form(tmp_path):
    rows = [{"prompt": 'a, "b"', "steps": 3, "guidance_scale": 2.5}, {"prompt": "7", "seed": 0, "sigmas": [3.0, 0.0]}]
    lines = written(tmp_path / "a.jsonl", json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1] | {"eta": None}) + "\n")
    cells = written(
        tmp_path / "a.csv", 'prompt,steps,guidance_scale,seed,sigmas\n"a, ""b""",3,2.5,,\n7,,,0,"[3.0, 0.0]"\n'
    )
    table = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict.fromkeys(rows[1]) | rows[0], rows[1]]), table)
    assert good(lines) == good(cells) == rows
    assert good(table)[0] == rows[0]
    assert [number for number, _ in read_rows(lines)] == [1, 3]  # as an editor counts lines


def test_rows_that_are_none_are_named(tmp_path):
    lines = written(tmp_path / "a.jsonl", '{"prompt": "a"}\n{"prompt": \n[1]\n{"prompt": "b"}\n')
    assert bad(lines).keys() == {2, 3}
    cells = written(tmp_path / "a.csv", "prompt,steps\na,1\nb,1,2\nc,1\n")
    assert bad(cells).keys() == {2}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"x", ".jsonl"),
        ("a.jsonl", None, "missing"),
        ("a.parquet", b"PAR1 no", "Parquet"),
        ("a.csv", b"prompt\n\xff\xfe\n", "UTF-8"),
        ("a.toml", b"prompts = [", "TOML"),
        ("a.toml", b"seeds = 3", "prompts"),
        ("a.toml", b'prompts = ["__colour__"]', "wildcards.colour"),
        ("a.toml", b'prompts = ["a"]\nseeds = "many"', "seeds"),
        ("a.toml", b'prompts = ["a"]\nseeds = 0', "seeds"),
        ("a.toml", b'prompts = "../a.txt"', "leads out"),
        ("a.toml", b'prompts = ["a"]\nsettings = [3]', "settings"),
        ("a.toml", b'prompts = ["' + b'__x__' * 1 + b' __y__"]\nseeds = 1000000\n[wildcards]\nx = ["1", "2"]\ny = ' +
         json.dumps([str(one) for one in range(100)]).encode(), "the limit is"),
    ],
)  # fmt: skip
def test_files_that_are_none(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        list(read_rows(path))


def test_matrix(tmp_path):
    written(tmp_path / "colours.txt", "# colours\nred\n\nblue\n")
    path = written(
        tmp_path / "a.toml",
        'prompts = ["a __colour__ __thing__", "fog"]\nseeds = [1, 2]\nscheduler = "ddim"\n'
        'settings = [{steps = 3}, {steps = 4, scheduler = "euler"}]\n[wildcards]\ncolour = "colours.txt"\nthing = ["car"]\n',
    )
    rows = good(path)
    assert len(rows) == 2 * 3 * 2
    assert rows[0] == {"scheduler": "ddim", "steps": 3, "prompt": "a red car", "seed": 1}
    assert rows[-1] == {"scheduler": "euler", "steps": 4, "prompt": "fog", "seed": 2}
    before = digest_of(path)
    written(tmp_path / "colours.txt", "red\ngreen\n")
    assert digest_of(path) != before
    assert good(written(tmp_path / "b.toml", 'prompts = ["a"]\nseeds = 3\n')) == [{"prompt": "a"}] * 3


def made(folder: Path, *, pictures: int = 10) -> Job:
    """A job of rows that nobody will really draw."""
    keys = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(pictures)]
    job = Job(folder, "id", "source", "model", {}, rows=pictures, pictures=pictures)
    folder.mkdir(exist_ok=True)
    rows = [
        {"key": key, "row": n + 1, "seed": n, "request": json.dumps({"prompt": f"p{n}", "seed": n, "steps": n % 2 + 1})}
        for n, key in enumerate(keys)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), job.table)
    job.write()
    return job


def entry(picture: Picture) -> Entry:
    digest = hashlib.sha256(picture.key.encode()).hexdigest()
    return Entry(picture.key, picture.row, picture.seed, f"{picture.key}.png", digest, 7, 0.5)


class Fake:
    """An executor that draws nothing, and fails where it is told to."""

    def __init__(self, fails=lambda batch: None, *, most: int = 10**9) -> None:
        self.fails, self.most, self.batches = fails, most, []

    def __call__(self, queue, ledger, ending):
        while not ending and len(self.batches) < self.most and (batch := queue.take()) is not None:
            self.batches.append([one.row for one in batch])
            error = self.fails(batch)
            yield batch, error or [entry(one) for one in batch]


def test_a_run_settles_every_picture_once(tmp_path):
    job, fake = made(tmp_path / "job"), Fake()
    outcome = run(job, Shard(), fake, lambda _: 3)
    assert (outcome.pictures, outcome.before, outcome.done, outcome.left) == (10, 0, 10, 0)
    # Pictures of one setting are drawn together, and no picture twice.
    assert sorted(row for batch in fake.batches for row in batch) == list(range(1, 11))
    assert all(len({row % 2 for row in batch}) == 1 and len(batch) <= 3 for batch in fake.batches)
    again = Fake()
    assert run(job, Shard(), again, lambda _: 3).before == 10
    assert again.batches == []
    assert len(list((job.folder / "manifest").glob("*.parquet"))) == 1


def test_what_stopped_goes_on_where_it_was(tmp_path):
    job = made(tmp_path / "job")
    seen = []
    for size, expected in ((2, 6), (100, 0)):
        fake = Fake(most=2)
        outcome = run(job, Shard(), fake, lambda _, size=size: size)
        seen += [row for batch in fake.batches for row in batch]
        assert outcome.left == expected
    assert sorted(seen) == list(range(1, 11))


def test_a_picture_that_fails_is_set_aside_after_three_attempts_and_the_others_are_drawn(tmp_path):
    job = made(tmp_path / "job")
    fake = Fake(lambda batch: ValueError("no\nsuch thing") if any(one.row == 3 for one in batch) else None)
    outcome = run(job, Shard(), fake, lambda _: 5)
    assert (outcome.done, outcome.left, len(outcome.set_aside)) == (9, 0, 1)
    assert fake.batches.count([3]) == 3
    told = status(job.folder)
    assert (told["done"], told["set_aside"], told["errors"]) == (9, 1, {"ValueError": 3})
    # It is left alone from now on, unless somebody asks for it.
    assert run(job, Shard(), Fake(), lambda _: 5).done == 0
    assert run(job, Shard(), Fake(), lambda _: 5, retry=True).done == 1
    told = status(job.folder)
    assert (told["done"], told["set_aside"], told["left"]) == (10, 0, 0)


def test_when_everything_fails_it_stops(tmp_path):
    with pytest.raises(TooManyErrors, match="CUDA"):
        run(made(tmp_path / "job"), Shard(), Fake(lambda _: RuntimeError("CUDA is gone")), lambda _: 1, most_errors=2)


def test_a_full_disk_stops_and_loses_nothing(tmp_path):
    job = made(tmp_path / "job")

    def full(queue, ledger, ending):
        batch = queue.take()
        yield batch, [entry(one) for one in batch]
        raise OutputError("no space left")

    with pytest.raises(OutputError, match="no space"):
        run(job, Shard(), full, lambda _: 2)
    assert run(job, Shard(), Fake(), lambda _: 2).before == 2


def test_who_died_on_one_picture_three_times_has_met_a_poison(tmp_path):
    job = made(tmp_path / "job")
    for attempt in range(1, 4):
        Ledger(job, Shard()).in_flight([pyarrow.parquet.read_table(job.table)["key"][4].as_py()])
        outcome = run(job, Shard(), Fake(most=1), lambda _: 1)
        assert len(outcome.set_aside) == (attempt == 3)
    assert "Died" in status(job.folder)["errors"]
    # Of several that were drawn together, nobody knows which it was.
    Ledger(job, Shard()).in_flight(["a" * 32, "b" * 32])
    assert len(run(job, Shard(), Fake(), lambda _: 1).set_aside) == 1


def test_a_signal_drains(tmp_path):
    job = made(tmp_path / "job")

    def asked(queue, ledger, ending):
        batch = queue.take()
        os.kill(os.getpid(), signal.SIGTERM)
        yield batch, [entry(one) for one in batch]
        assert ending

    outcome = run(job, Shard(), asked, lambda _: 2)
    assert (outcome.stopped, outcome.done, outcome.left) == (signal.SIGTERM, 2, 8)
    assert len(standing(job.folder).done) == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@given(count=st.integers(1, 40), key=st.binary(min_size=16, max_size=16))
def test_a_key_is_in_one_shard(count, key):
    assert sum(Shard(index, count).has(key.hex()) for index in range(1, count + 1)) == 1


def test_shards_draw_all_between_them(tmp_path):
    job = made(tmp_path / "job", pictures=40)
    done = [run(job, Shard(index, 3), Fake(), lambda _: 4).done for index in (1, 2, 3)]
    assert sum(done) == 40
    assert min(done) > 0
    assert status(job.folder)["left"] == 0
    with pytest.raises(UsageError, match="17/16"):
        Shard.parse("17/16")


def test_two_drivers_on_one_job(tmp_path):
    job = made(tmp_path / "job")
    with held(job, Shard(1, 2)):
        assert status(job.folder)["running"]
        with held(job, Shard(2, 2)):
            pass
        for other in (Shard(1, 2), Shard()):
            with pytest.raises(UsageError, match="another run"), held(job, other):
                pass
    with held(job, Shard()):
        pass
    assert not status(job.folder)["running"]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    import errno
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held(made(tmp_path / "job"), Shard()):
        assert "without locks" in caplog.text


def test_rows_twice_in_the_ledger_do_not_show_and_different_pictures_alarm(tmp_path):
    job = made(tmp_path / "job", pictures=2)
    picture = Picture("0" * 32, 1, 1, "{}")
    for name in ("one", "two"):  # two workers that drew the same, or a merge that was interrupted
        ledger = Ledger(job, Shard())
        ledger.add([entry(picture), replace(entry(picture), state="failed", sha256="")])
        ledger.flush()
        assert conflicts(read_ledger(job.folder)) == [], name
    told = status(job.folder)
    assert (told["done"], told["alarms"], told["set_aside"]) == (1, [], 0)
    ledger = Ledger(job, Shard())
    ledger.compact()
    assert read_ledger(job.folder).num_rows == 1
    ledger.add([replace(entry(picture), sha256="f" * 64)])
    ledger.flush()
    ledger.compact()  # which must not hide it
    assert status(job.folder)["alarms"] == [picture.key]
    ledger.forget([picture.key])
    assert read_ledger(job.folder).num_rows == 0


def test_a_failure_before_an_image_in_one_file_goes_too(tmp_path):
    job = made(tmp_path / "job", pictures=1)
    ledger, [picture] = Ledger(job, Shard()), list(job.pictures_in_order())
    ledger.add([replace(entry(picture), state="failed", sha256="", error="Died"), entry(picture)])
    ledger.flush()
    ledger.compact()
    assert read_ledger(job.folder)["state"].to_pylist() == ["done"]


def test_a_damaged_ledger_file_is_named(tmp_path):
    job = made(tmp_path / "job")
    run(job, Shard(), Fake(), lambda _: 2)
    [part] = (job.folder / "manifest").glob("*.parquet")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(OutputError, match=part.name):
        status(job.folder)


def test_many_files_are_merged_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setattr("sfumato.bulk.ledger.PERIOD", -1.0)
    monkeypatch.setattr("sfumato.bulk.ledger.MOST_FILES", 5)
    job = made(tmp_path / "job", pictures=33)
    run(job, Shard(), Fake(most=27), lambda _: 1)
    assert len(standing(job.folder).done) == 27


def test_a_clock_that_jumps_changes_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: -1e9)
    job = made(tmp_path / "job")
    run(job, Shard(), Fake(), lambda _: 1)
    told = status(job.folder, price=7200)
    assert told["images_per_second"] > 0
    assert told["seconds_each"] == {"p50": 0.5, "p95": 0.5}
    assert told["cost"] == pytest.approx(10 * 0.5 / 3600 * 7200)


def test_waiting_pictures_are_bounded():
    pictures = [Picture(f"{n:032x}", n, n, json.dumps({"prompt": "", "steps": n + 1, "seed": n})) for n in range(5000)]
    queue, seen = Queue(iter(pictures), {}, lambda _: 8), 0
    while (batch := queue.take()) is not None:
        seen += len(batch)
        assert sum(map(len, queue._waiting.values())) < 2048
    assert seen == 5000


def test_pictures_are_drawn_together_where_only_words_and_seeds_differ():
    first = {"prompt": "a", "seed": 1, "steps": 3}
    alone = [first | {"steps": 4}, first | {"negative_prompt": "b"}, first | {"framing": {"aesthetic_score": 6}}]
    settings = [settings_of(Picture("", 0, 0, json.dumps(one))) for one in [first, *alone]]
    assert len(set(settings)) == 4
    assert settings_of(Picture("", 0, 0, json.dumps({"seed": 9, "steps": 3, "prompt": "z"}))) == settings[0]


def test_images_are_read_from_shards_by_where_they_begin(tmp_path):
    files = [(f"k{number}", json.dumps({"prompt": "x" * number}), b"png" * (number + 200)) for number in range(3)]
    offsets = write_shard(tmp_path / "s" / "a.tar", files)
    for key, _, data in files:
        assert image_at(tmp_path, f"s/a.tar#{key}.png", offsets[key], len(data)) == data
    with tarfile.open(tmp_path / "s" / "a.tar") as tar:
        assert tar.getnames()[:2] == ["k0.png", "k0.json"]
    assert image_at(tmp_path, "s/gone.tar#k0.png", 512, 3) is None


def test_missing_packages_say_what_to_type(monkeypatch):
    monkeypatch.setattr(extras, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(MissingExtra, match=r"pip install 'sfumato\[bulk\]'"):
        extras.arrow()
    with pytest.raises(MissingExtra, match=r"pip install 'sfumato\[ray\]'"):
        extras.ray()


@pytest.fixture(scope="module")
def pipeline(checkpoints):
    import torch

    import sfumato

    return sfumato.load(checkpoints("sd15"), device="cpu", dtype=torch.float32)


def planned(pipeline, folder: Path, rows: list[dict], **options) -> tuple[list[Picture], dict[int, str], Job]:
    source = written(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found, wrong = [], {}
    job = open_job(
        folder / "job", source, pipeline, on_bad=lambda number, error: wrong.__setitem__(number, str(error)),
        on_pictures=found.extend, **options,
    )  # fmt: skip
    return found, wrong, job


def test_keys_and_seeds_are_the_same_in_every_run(pipeline, tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b", "seed": 5}, {"seed": 5, "prompt": "b", "eta": 0.0}]
    found, _, job = planned(pipeline, tmp_path, rows)
    assert (job.rows, job.pictures, len(found)) == (4, 3, 3)  # equal rows are drawn once
    assert found[0].seed != found[1].seed
    assert [one.row for one in found] == [1, 2, 3]
    assert json.loads(found[0].request) == {
        "prompt": "a", "seed": found[0].seed, "steps": 50, "guidance_scale": 7.5, "width": 16, "height": 16,
    }  # fmt: skip
    assert planned(pipeline, tmp_path, rows)[0] == found
    other = planned(pipeline, tmp_path, rows, name="another")[0]
    assert other[0].seed != found[0].seed
    assert other[2] == found[2]


def test_a_row_is_drawn_as_its_request_is(pipeline):
    first = {
        "prompt": "a (cat:1.3)", "prompt_syntax": "a1111", "rng": "cuda", "seed": 5, "steps": 2,
        "noise": {"variation_seed": 3, "variation_strength": 0.5},
    }  # fmt: skip
    images, _, _ = draw_requests(pipeline, [first, first | {"prompt": "a [horse]", "seed": 6}])
    alone = pipeline.generate(GenerateRequest.from_dict(first))
    assert psnr(images[0], alone.images[0]) > 50


def test_rows_that_share_settings_are_as_if_each_were_alone(pipeline, tmp_path):
    """Only the first of them is checked whole; what differs must be checked, and give the same keys, all the same."""
    settings = {"steps": 3, "negative_prompt": "fog", "rng": "numpy"}
    given = [
        {"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 1}, {"prompt": "b \u00e9", "seed": 2**32 - 1},
        {"prompt": "b", "seed": 2**32}, {"prompt": "b", "seed": True}, {"prompt": "b", "seed": 1.0},
        {"prompt": "\ud800", "seed": 1}, {"prompt": 3, "seed": 1}, {"prompt": ["c", "d"], "seed": 1}, {"prompt": "", "seed": 1},
        {"prompt": "b", "seed": 1, "steps": 4}, {"prompt": "b", "seed": 1, "steps": True},
        {"prompt": "<lora:gone:1> b", "seed": 1, "lora_dir": str(tmp_path), "prompt_syntax": "a1111"},
    ]  # fmt: skip
    rows = [settings | one for one in given]
    together, wrong, _ = planned(pipeline, tmp_path, rows, skip_bad=True)
    apart, refused = [], {}
    for number, row in enumerate(rows, start=1):
        found, error, _ = planned(pipeline, tmp_path, [{"prompt": "a", "seed": 7}, row], skip_bad=True)
        apart += [one._replace(row=number) for one in found[1:]]
        refused |= dict.fromkeys([number] * len(error), error.get(2))
    assert together == apart
    assert wrong == refused
    assert (len(together), len(wrong)) == (6, 8)


def test_a_worker_never_rounds_weights_for_want_of_memory(checkpoints, pipeline, tmp_path):
    """Two workers with different memory would draw different images for one key."""
    work = Work(str(tmp_path), str(checkpoints("sd15")), "sd15", device="cpu", dtype="float32")
    assert work.load().place.wishes.eight_bit is False
    with_refiner(pipeline, str(checkpoints("sd15")), {})
    assert pipeline.refiner.place.wishes.eight_bit is False
    pipeline.refiner = None


def test_a_row_of_several_pictures(pipeline, tmp_path):
    found, _, job = planned(pipeline, tmp_path, [{"prompt": ["a", "b"], "count": 2, "seed": 3}])
    requests = [json.loads(one.request) for one in found]
    assert [(one["prompt"], one["seed"]) for one in requests] == [("a", 3), ("a", 4), ("b", 5), ("b", 6)]
    assert all("count" not in one for one in requests)
    assert (job.rows, job.pictures) == (1, 4)


def test_every_bad_row_is_named_and_nothing_is_written(pipeline, tmp_path):
    rows = [
        {"prompt": "a"}, {"prompt": "a", "stpes": 3}, {"prompt": "a", "width": 33}, {"prompt": "a", "scheduler": "eulr"},
        {"prompt": ""}, {"prompt": "a", "seed": -1}, {"prompt": "a", "image": "gone.png"}, {"prompt": "a", "width": 2**22, "height": 2**22},
    ]  # fmt: skip
    source = written(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    wrong: dict[int, str] = {}
    with pytest.raises(UsageError, match="7 of 8 rows"):
        open_job(tmp_path / "job", source, pipeline, on_bad=lambda n, error: wrong.__setitem__(n, str(error)))
    assert not (tmp_path / "job").exists()
    for number, word in enumerate(["steps", "33", "euler", "prompt", "seed", "gone.png", "needs"], start=2):
        assert word in wrong[number], wrong
    job = open_job(tmp_path / "job", source, pipeline, skip_bad=True, on_bad=lambda *_: None)
    assert (job.rows, job.bad, job.pictures) == (1, 7, 1)
    with pytest.raises(UsageError, match="no valid rows"):
        open_job(tmp_path / "none", written(tmp_path / "none.jsonl", "\n"), pipeline, on_bad=lambda *_: None)


def test_a_job_stays_what_it_is(pipeline, tmp_path):
    source = written(tmp_path / "rows.jsonl", '{"prompt": "a"}\n')
    job = open_job(tmp_path / "job", source, pipeline, on_bad=lambda *_: None)
    assert open_job(tmp_path / "job", source, pipeline, on_bad=lambda *_: None) == job
    pairs = {"model": "checkpoint", "numerics": "--dtype", "source": "rows"}
    for name, word in pairs.items():
        other = {"numerics": {"version": 1, "device": "cuda", "dtype": "float16"}}.get(name, "other")
        replace(job, **{name: other}).write()
        with pytest.raises(UsageError, match=word):
            open_job(tmp_path / "job", source, pipeline, on_bad=lambda *_: None)
    with pytest.raises(UsageError, match="no bulk job"):
        Job.read(tmp_path)


def painted(pipeline, job: Job, pictures: list[Picture]) -> list[Path]:
    """The files of pictures drawn together by a worker."""
    work = Work(str(job.folder), "m", "m")
    return [job.folder / one.path for one in Painter(work, pipeline).draw(pictures)]


def test_rows_with_a_second_pass_and_a_refiner_are_the_images_of_generate(checkpoints, tmp_path):
    import torch

    import sfumato

    names = {name: str(checkpoints(name)) for name in ("sdxl", "refiner")}
    base = sfumato.load(names["sdxl"], device="cpu", dtype=torch.float32)
    both = [{"refiner": names["refiner"]}, {"hires": {"scale": 2.0, "steps": 2, "prompt": "a closer fox"}}]
    rows = [{"prompt": word, "steps": 5, **one} for one in both for word in ("a fox", "a hen")]
    source = written(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    job = open_job(tmp_path / "job", source, base, on_bad=print)
    assert Job.read(job.folder) == job
    assert job.refiners.keys() == {names["refiner"]}
    pictures = list(job.pictures_in_order())
    drawn = [*painted(base, job, pictures[:2]), *painted(base, job, pictures[2:])]
    for picture, file in zip(pictures, drawn, strict=True):
        request = GenerateRequest.from_dict(json.loads(picture.request))
        assert psnr(open_image(file), base.generate(request).images[0]) > 50
    told = read_recipe(drawn[0])
    assert told["request"]["denoising_end"] == 0.8
    assert told["refiner"]["weights"]
    assert open_image(drawn[2]).size == tuple(2 * side for side in base.size_of(GenerateRequest()))
    # Another refiner under the old name is refused, by whoever loads it.
    replace(job, refiners={names["refiner"]: "another"}).write()
    base.refiner = None
    drawn[0].unlink()
    with pytest.raises(WrongCheckpoint, match="refiner"):
        painted(base, job, pictures[:1])


def test_refiners_that_are_none_are_named(pipeline, tmp_path):
    rows = [{"prompt": "a", "refiner": str(tmp_path / "none")}, {"prompt": "a", "hires": {"scale": 900}}]
    _, wrong, _ = planned(pipeline, tmp_path, [{"prompt": "b"}, *rows], skip_bad=True)
    assert "none" in wrong[2]
    assert "scale" in wrong[3]


def test_rows_with_another_vae_are_told_apart_by_its_weights(pipeline, tmp_path):
    from sfumato import AutoencoderKL
    from support.checkpoints import VAE, XL_VAE, randomize

    keys, row = [], {"prompt": "a", "steps": 1, "vae": str(tmp_path / "vae")}
    for seed in (1, 2):
        randomize(AutoencoderKL(**VAE), seed).save_pretrained(tmp_path / "vae")
        (picture,) = planned(pipeline, tmp_path, [row])[0]
        keys.append(picture.key)
    assert keys[0] != keys[1]
    told = json.loads(picture.request)
    assert draw_requests(pipeline, [told])[1][0]["request"] == told
    with pytest.raises(UsageError, match="differ from the recipe's"):
        draw_requests(pipeline, [told | {"vae_weights": "0" * 32}])
    AutoencoderKL(**XL_VAE).save_pretrained(tmp_path / "xl")
    rows = [{"prompt": "a"}, row | {"vae": str(tmp_path / "xl")}, row | {"vae": "./nowhere"}]
    _, wrong, _ = planned(pipeline, tmp_path, rows, skip_bad=True)
    assert "latents of scale" in wrong[2]
    assert "there is no folder ./nowhere" in wrong[3]


def test_rows_that_are_drafts_are_stored_as_what_they_do(pipeline, tmp_path):
    import sfumato

    pictures, _, _ = planned(
        pipeline, tmp_path, [{"prompt": "a", "draft": True}, {"prompt": "a", "draft": True, "steps": 3}]
    )
    told = [json.loads(one.request) for one in pictures]
    assert [(one["steps"], one["scheduler"], "draft" in one) for one in told] == [
        (10, "unipc", False),
        (3, "unipc", False),
    ]
    assert told[0]["guidance_scale"] == 7.5
    own = sfumato.load(device="cpu")
    ((picture,), _, _) = planned(own, tmp_path, [{"prompt": "a house", "draft": True}])
    told = json.loads(picture.request)
    assert (told["steps"], told["vae"], len(told["vae_weights"])) == (4, "built-in/tiny-vae", 32)
    assert draw_requests(own, [told])[0][0].size == (128, 128)


def test_another_image_of_a_control_is_another_key(pipeline, tmp_path):
    from PIL import Image

    keys = []
    for color in ("red", "blue"):
        Image.new("RGB", (16, 16), color).save(tmp_path / "pose.png")
        control = {"model": "m", "image": str(tmp_path / "pose.png")}
        keys += [planned(pipeline, tmp_path, [{"prompt": "a", "controls": [control]}])[0][0].key]
    assert keys[0] != keys[1]


def test_what_is_there_is_not_drawn_again_with_the_others_of_its_batch(pipeline, tmp_path, monkeypatch):
    source = written(tmp_path / "rows.jsonl", "".join(json.dumps({"prompt": p, "steps": 1}) + "\n" for p in "abc"))
    job = open_job(tmp_path / "job", source, pipeline, on_bad=print)
    pictures = list(job.pictures_in_order())
    first = painted(pipeline, job, pictures[1:2])[0].stat().st_mtime_ns
    entries = Painter(Work(str(job.folder), "m", "m"), pipeline).draw(pictures)
    assert {one.key for one in entries} == {one.key for one in pictures}
    assert [one.row for one in entries if not one.seconds] == [2]
    assert job.path_of(pictures[1].key).stat().st_mtime_ns == first


@pytest.mark.parametrize(
    ("micro", "seconds", "wanted"), [(1, 640.0, 1), (1, 64.0, 4), (1, 6.4, 40), (8, 64.0, 8), (64, 1.0, 64)]
)
def test_quick_images_share_a_batch(micro, seconds, wanted):
    asked = []

    def plan(parts, request):
        asked.append(request.count)
        return SimpleNamespace(micro_batch=micro, seconds=seconds)

    pipeline = SimpleNamespace(parts=None, place=SimpleNamespace(plan=plan))
    picture = Picture("0" * 32, 1, 1, json.dumps({"prompt": "a star", "seed": 1}))
    assert batch_size(pipeline, picture, seconds=4.0) == wanted
    assert batch_size(pipeline, picture) == micro
    assert asked == [64, 64]


def test_long_notes_of_a_batch_are_cut(pipeline, tmp_path, monkeypatch):
    """The ledger holds them once per image."""

    def noted(*arguments):
        images, recipes, _ = draw_requests(*arguments)
        return images, recipes, ("word " * 500,)

    monkeypatch.setattr("sfumato.bulk.painter.draw_requests", noted)
    source = written(tmp_path / "rows.jsonl", json.dumps({"prompt": "a", "steps": 1}) + "\n")
    job = open_job(tmp_path / "job", source, pipeline, on_bad=print)
    (entry,) = Painter(Work(str(job.folder), "m", "m"), pipeline).draw(list(job.pictures_in_order()))
    assert entry.notes.startswith("word word")
    assert entry.notes.endswith("word …")
    assert len(entry.notes) <= 200


def test_a_ray_worker_that_cannot_begin_ends_the_run(tmp_path, monkeypatch):
    from sfumato.bulk.cluster import Pool

    class RayActorError(Exception):
        actor_init_failed = True

    class RayTaskError(Exception):
        pass

    class Ray:
        """An actor class whose actors die of an error of their own."""

        class exceptions:
            pass

        exceptions.RayActorError, exceptions.RayTaskError = RayActorError, RayTaskError
        begun = 0

        def remote(self, *_):
            Ray.begun += 1
            return self

        @property
        def draw(self):
            return self

        def options(self, **_):
            return self

        def wait(self, refs, **_):
            return refs[:1], refs[1:]

        def get(self, ref):
            raise RayActorError("Traceback\nUsageError: this is not the checkpoint\n")

        def __hash__(self):
            return 1

    monkeypatch.setattr(extras, "ray", Ray)
    pool = Pool(Work(str(tmp_path), "m", "m"), 1, 1)
    with pytest.raises(SfumatoError, match="could not start: UsageError: this is not the checkpoint"):
        run(made(tmp_path / "job"), Shard(), pool, lambda _: 1)
    assert Ray.begun < 5
