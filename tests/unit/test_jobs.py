"""Jobs without HTTP and without torch: the queue with a worker that is told what to do, the store, the gallery."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections import deque
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.errors import UsageError
from sfumato.jobs import drawing
from sfumato.jobs import queue as queues
from sfumato.jobs.events import Hub
from sfumato.jobs.gallery import Gallery
from sfumato.jobs.keys import file_name, image_key
from sfumato.jobs.models import Models
from sfumato.jobs.queue import JobQueue
from sfumato.jobs.store import ENDED, Event, Job, Store
from sfumato.request import GenerateRequest
from support.studio import Actor, finishes, until

APPLE = GenerateRequest(prompt="a red apple", seed=7)


def dies(actor, message):
    actor.die()


def lacks_memory(actor, message):
    actor.say("failed", job=message["job"], kind="memory", message="it does not fit")


def refuses(actor, message):
    actor.say("failed", job=message["job"], kind="request", message="no such scheduler")


def is_deaf(actor, message):
    pass


@pytest.fixture
def acted(tmp_path, monkeypatch):
    """`acted(scenes…)` is a running queue whose worker plays these scenes."""
    monkeypatch.setattr(queues, "Process", Actor)
    monkeypatch.setattr(Actor, "starts", [])
    monkeypatch.setattr(Actor, "ready", True)
    made = []

    def get(*scenes):
        Actor.scenes = deque(scenes)
        made.append(JobQueue(tmp_path, Models(cached=False)))
        made[-1].start()
        return made[-1]

    yield get
    for one in made:
        one.stop()


def ended(queue, job, seconds=10):
    return until(lambda: queue.store.job(job.id), lambda found: found.state in ENDED, seconds)


def ends(queue, job):
    """The ends that were told of a job, which has ended; it is told just after it is stored."""

    def told():
        of_job = [one.data for one in queue.store.events_after(0) if one.type == "job" and one.data["id"] == job.id]
        return [one["state"] for one in of_job if one["state"] in ENDED]

    return until(told, bool, 10)


def test_a_dead_worker_costs_its_job_one_attempt(acted):
    queue = acted(dies, finishes, finishes)
    first, second = queue.submit(APPLE, "built-in"), queue.submit(APPLE, "built-in")
    found = ended(queue, first)
    assert (found.state, found.attempts) == ("done", 2)
    assert found.notes == ("the worker died (signal 9), so the job was started again", "drawn")
    assert ended(queue, second).attempts == 1
    assert ends(queue, first) == ends(queue, second) == ["done"]
    assert len(Actor.starts) == 2


def test_a_job_that_kills_workers_is_given_up_and_the_next_one_drawn(acted):
    queue = acted(dies, dies, dies, finishes)
    first, second = queue.submit(APPLE, "built-in"), queue.submit(APPLE, "built-in")
    found = ended(queue, first)
    assert (found.state, found.attempts, found.error["kind"]) == ("failed", 3, "crash")
    assert "died 3 times" in found.error["message"]
    assert ended(queue, second).state == "done"
    told = [message["options"]["lean"] for one in Actor.starts for message in one.told if message["do"] == "draw"]
    assert told == [False, False, True, False]  # the last attempt is made with as little memory as can be


def test_without_memory_the_cheaper_plan_is_tried_once_and_said(acted):
    queue = acted(lacks_memory, finishes, lacks_memory, lacks_memory)
    first = ended(queue, queue.submit(APPLE, "built-in"))
    assert first.state == "done"
    assert first.notes == ("it does not fit; tried again in a way that needs less memory", "drawn")
    assert first.attempts == 2
    second = ended(queue, queue.submit(APPLE, "built-in"))
    assert (second.state, second.error) == ("failed", {"kind": "memory", "message": "it does not fit"})
    assert [one["options"]["lean"] for one in Actor.starts[0].told if one["do"] == "draw"] == [False, True, False, True]


def test_a_wrong_request_is_not_tried_again(acted):
    queue = acted(refuses)
    found = ended(queue, queue.submit(APPLE, "built-in"))
    assert (found.state, found.attempts, found.error["message"]) == ("failed", 1, "no such scheduler")


def test_a_worker_that_never_starts_is_said(acted, monkeypatch):
    monkeypatch.setattr(Actor, "ready", False)
    queue = acted()
    found = ended(queue, queue.submit(APPLE, "built-in"))
    assert "does not start (exit code 1)" in found.error["message"]
    end = time.monotonic() + 10  # a job that arrives just as it is given up has it tried again
    while (queue.worker["state"], len(Actor.starts) % 3) != ("broken", 0):
        assert time.monotonic() < end, (queue.worker, Actor.starts)
        time.sleep(0.005)
    later = ended(queue, queue.submit(APPLE, "built-in"))
    assert later.state == "failed"


def test_a_worker_that_does_not_hear_is_killed(acted, monkeypatch):
    monkeypatch.setattr(queues, "PATIENCE", 0.1)
    queue = acted(is_deaf, finishes)
    job = queue.submit(APPLE, "built-in")
    while queue.store.job(job.id).state != "running":
        time.sleep(0.005)
    next_one = queue.submit(APPLE, "built-in")
    began = time.monotonic()
    queue.cancel(job.id)
    assert ended(queue, job).state == "cancelled"
    assert time.monotonic() - began < 2
    assert Actor.starts[0].dead
    assert ended(queue, next_one).state == "done"
    assert ends(queue, job) == ["cancelled"]


def test_what_waits_is_cancelled_at_once_and_what_has_ended_stays(acted):
    queue = acted(is_deaf)
    running, waiting = queue.submit(APPLE, "built-in"), queue.submit(APPLE, "built-in")
    assert queue.cancel(waiting.id).state == "cancelled"
    assert queue.cancel(waiting.id).state == "cancelled"
    assert queue.cancel("nothing") is None
    assert ends(queue, waiting) == ["cancelled"]
    assert queue.position(queue.store.job(running.id)) in (None, 0)


def test_a_job_that_is_sent_twice_is_one(acted):
    queue = acted(finishes)
    first = queue.submit(APPLE, "built-in", client="a", id="my-own-id")
    again = queue.submit(APPLE.replace(seed=8), "built-in", client="a", id="my-own-id")
    assert (first.number, first.request) == (again.number, again.request)
    with pytest.raises(UsageError, match="another client"):
        queue.submit(APPLE, "built-in", client="b", id="my-own-id")


def test_a_seed_is_chosen_when_a_job_is_accepted(acted):
    queue = acted()
    assert isinstance(queue.submit(APPLE.replace(seed=None), "built-in").request["seed"], int)


def test_a_server_that_went_away_begins_its_jobs_again(tmp_path, monkeypatch):
    monkeypatch.setattr(queues, "Process", Actor)
    monkeypatch.setattr(Actor, "ready", True)
    folder = tmp_path / ".sfumato"
    folder.mkdir()
    store = Store(folder / "studio.db")
    for id, state in (("running", "running"), ("waiting", "queued"), ("over", "done")):
        store.add(Job(0, id, state, "built-in", APPLE.to_dict(), "", {}, time.time()))
    store.change("running", ("running",), attempts=2)
    store.change("over", ("done",), finished=1.0)
    store.close()
    half = tmp_path / ".a-red-apple-0123456789ab.png.123.0123abcd.part"
    half.write_bytes(b"half")
    other = tmp_path / ".somebody.part"
    other.write_bytes(b"theirs")
    Actor.scenes = deque([finishes, finishes])
    queue = JobQueue(tmp_path, Models(cached=False))
    queue.start()
    try:
        jobs = [ended(queue, queue.store.job(id)) for id in ("running", "waiting", "over")]
        assert [(job.state, job.restarts, job.attempts) for job in jobs] == [
            ("done", 1, 1),
            ("done", 0, 1),
            ("done", 0, 0),
        ]
        assert jobs[2].finished == 1.0
        assert (half.exists(), other.exists()) == (False, True)
    finally:
        queue.stop()


def test_one_folder_has_one_studio(acted):
    queue = acted()
    with pytest.raises(UsageError, match="another studio is using"):
        JobQueue(queue.folder, Models(cached=False))


def test_a_damaged_database_is_put_aside_and_the_folder_indexed_again(tmp_path, caplog):
    picture(tmp_path / "a.png", "a red apple")
    with gallery_of(tmp_path) as (store, gallery, _):
        gallery.scan()
        rows = gallery.find()
    for damage in (b"not a database at all" * 100, None):
        path = tmp_path / ".sfumato" / "studio.db"
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
        with gallery_of(tmp_path) as (store, gallery, _):
            gallery.scan()
            assert gallery.find() == rows
            assert store.rows("PRAGMA integrity_check")[0][0] == "ok"
    assert len(list((tmp_path / ".sfumato").glob("*.damaged-*"))) == 1
    assert "is damaged" in caplog.text


def test_events_are_numbered_kept_and_forgotten(tmp_path, monkeypatch):
    store = Store(tmp_path / "studio.db")
    assert (store.events_after(0), store.last_event) == ([], 0)
    for number in range(5):
        store.tell("job", {"number": number})
    assert [event.data["number"] for event in store.events_after(2)] == [2, 3, 4]
    assert store.events_after(5) == []
    assert store.events_after(6) is None  # of another database
    monkeypatch.setattr("sfumato.jobs.store.MOST_EVENTS", 10)
    for _ in range(996):
        store.tell("job", {})
    assert store.events_after(500) is None
    assert len(store.events_after(store.last_event - 5)) == 5
    store.close()


def test_everybody_who_listens_hears():
    hub, heard = Hub(), []
    with hub.listening(heard.append), hub.listening(heard.append):
        hub.send(Event("job", {}))
    hub.send(Event("job", {}))
    assert heard == [Event("job", {})] * 2


def test_what_is_not_committed_is_not_there(tmp_path):
    store = Store(tmp_path / "studio.db")
    with suppress(ZeroDivisionError), store.transaction() as base:
        base.execute("INSERT INTO events (type, data) VALUES ('job', '{}')")
        1 / 0  # noqa: B018
    assert store.last_event == 0
    modes = [store.rows(f"PRAGMA {name}")[0][0] for name in ("journal_mode", "synchronous")]
    assert modes == ["wal", 2]
    store.close()


def picture(path, prompt, seed=1, color="red", program="Sfumato"):
    """A file as Sfumato or A1111 writes it, small."""
    info = PngInfo()
    if program == "Sfumato":
        recipe = {"request": {"prompt": prompt, "seed": seed}, "model": {"name": "built-in"}}
        info.add_itxt("sfumato", json.dumps(recipe), zip=True)
    else:
        info.add_text("parameters", f"{prompt}\nSteps: 20, Sampler: Euler a, Seed: {seed}, Size: 8x8, Model: other")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path, pnginfo=info)


@contextmanager
def gallery_of(folder):
    """The gallery of a folder, without a queue."""
    heard = []
    (folder / ".sfumato").mkdir(exist_ok=True)
    store = Store(folder / ".sfumato" / "studio.db")
    try:
        yield store, Gallery(folder, store, lambda type, data: heard.append((type, data["key"]))), heard
    finally:
        store.close()


def test_the_folder_is_the_gallery(tmp_path):
    with gallery_of(tmp_path) as (_, gallery, heard):
        picture(tmp_path / "a.png", "a red apple", 1)
        picture(tmp_path / "more" / "b.png", "a green pear", 2, "green", "A1111")
        (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
        (tmp_path / "notes.txt").write_text("no image")
        gallery.scan()
        found = {one["name"]: one for one in gallery.find()[0]}
        assert found.keys() == {"a.png", "b.png"}
        assert [found["b.png"][name] for name in ("program", "model", "scheduler", "seed", "folder")] == [
            "AUTOMATIC1111", "other", "euler_a", "2", "more",
        ]  # fmt: skip
        keys = {name: one["key"] for name, one in found.items()}
        assert sorted(heard) == sorted([("image", keys["a.png"]), ("image", keys["b.png"])])
        heard.clear()

        (tmp_path / "a.png").rename(tmp_path / "more" / "renamed.png")
        gallery.scan()
        assert gallery.get(keys["a.png"])["name"] == "renamed.png"
        assert gallery.path_of(keys["a.png"]).is_file()
        (tmp_path / "more" / "b.png").unlink()
        gallery.scan()
        assert gallery.get(keys["b.png"]) is None
        assert heard[-1] == ("removed", keys["b.png"])
        heard.clear()
        gallery.scan()
        gallery.scan(whole=True)
        assert heard == []
        for path in (tmp_path / "more").iterdir():
            path.unlink()
        (tmp_path / "more").rmdir()
        gallery.scan()
        assert gallery.find()[0] == []


def test_a_file_that_changes_in_its_place_is_noticed(tmp_path):
    with gallery_of(tmp_path) as (_, gallery, _):
        picture(tmp_path / "a.png", "a red apple")
        gallery.scan()
        picture(tmp_path / "a.png", "a green pear", color="green")
        os.utime(tmp_path / "a.png", ns=(10**18, 10**18))
        gallery.scan(whole=True)
        assert [one["prompt"] for one in gallery.find()[0]] == ["a green pear"]


def test_a_copy_is_the_same_image(tmp_path):
    with gallery_of(tmp_path) as (_, gallery, heard):
        picture(tmp_path / "a.png", "a red apple")
        (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
        gallery.scan()
        gallery.scan(whole=True)
        key = gallery.find()[0][0]["key"]
        assert (gallery.find()[2], heard) == (1, [("image", key)])
        gallery.path_of(key).unlink()
        gallery.scan()
        gallery.scan(whole=True)
        assert gallery.path_of(key).is_file()


def test_search_and_pages(tmp_path):
    with gallery_of(tmp_path) as (_, gallery, _):
        for number in range(7):
            picture(tmp_path / f"{number}.png", f"a {'red' if number % 2 else 'blue'} apple_{number}", number)
            os.utime(tmp_path / f"{number}.png", (1000 + number // 2, 1000 + number // 2))  # pairs of the same time
        gallery.scan()
        assert [gallery.find(text)[2] for text in ("apple", "RED", "red apple", "blue 4", "apple_", "%", "none")] == [
            7, 3, 3, 1, 7, 0, 0,
        ]  # fmt: skip
        assert gallery.find(model="built-in")[2] == 7
        assert gallery.find(model="other")[2] == 0
        seen, cursor = [], ""
        while cursor is not None:
            found, cursor, total = gallery.find(cursor=cursor, most=2)
            seen += [one["name"] for one in found]
            assert total == 7
        assert len(seen) == len(set(seen)) == 7
        assert [int(name[0]) // 2 for name in seen] == [3, 2, 2, 1, 1, 0, 0]
        with pytest.raises(UsageError, match="cursor"):
            gallery.find(cursor="x-y")


def test_deleted_images_come_back(tmp_path):
    with gallery_of(tmp_path) as (_, gallery, _):
        picture(tmp_path / "more" / "a.png", "a red apple")
        gallery.scan()
        key = gallery.find()[0][0]["key"]
        assert gallery.thumbnail(key).is_file()
        assert gallery.delete(key)
        assert not (tmp_path / "more" / "a.png").exists()
        assert (gallery.get(key), gallery.path_of(key), gallery.delete(key)) == (None, None, False)
        gallery.scan(whole=True)
        assert gallery.find()[2] == 0
        picture(tmp_path / "more" / "a.png", "another", color="blue")  # somebody takes its place
        gallery.scan()
        row = gallery.restore(key)
        assert row["key"] == key
        assert row["name"] == f"a-{key[:8]}.png"
        assert gallery.restore(key) is None
        assert gallery.find()[2] == 2
        gallery.delete(key)
        gallery.empty_trash()
        assert gallery.restore(key) is not None  # not a month old
        gallery.delete(key)
        os.utime(tmp_path / ".sfumato" / "trash" / key, (0, 0))
        gallery.empty_trash()
        assert gallery.restore(key) is None
        assert list((tmp_path / ".sfumato" / "thumbs").iterdir()) == []


def test_names_and_keys():
    assert file_name("A red apple,  3D!", "0123456789abcdef") == "a-red-apple-3d-0123456789ab.png"
    assert file_name("蘋果", "0123456789abcdef") == "image-0123456789ab.png"
    assert len(file_name("a" * 500, "0" * 32)) < 80
    assert image_key("salt", "", "text") != image_key("salt", "source", "text") != image_key("salts", "", "text")


def test_models_of_a_folder(tmp_path, checkpoints):
    import shutil

    shutil.copytree(checkpoints("sd15"), tmp_path / "mine" / "tiny")
    (tmp_path / "converted" / "Unet.mlmodelc").mkdir(parents=True)
    models = Models(tmp_path, cached=False)
    assert [(one.name, one.kind) for one in models.all(look=True)] == [
        ("built-in", "checkpoint"), ("built-in/inpaint", "checkpoint"), ("mine/tiny", "checkpoint"),
        ("built-in/edges", "controlnet"), ("converted", "core-ml"), ("built-in/evening", "embedding"),
        ("built-in/few-step", "lora"), ("built-in/sketch", "lora"), ("built-in/tiny-vae", "vae"),
    ]  # fmt: skip
    assert models.path("mine/tiny") == str(tmp_path / "mine" / "tiny")
    with pytest.raises(UsageError, match="did you mean 'mine/tiny'"):
        models.get("mine/tini")
    assert "path" not in models.get("built-in").public()


def test_the_database_is_whole_after_all_this(acted):
    queue = acted(finishes)
    ended(queue, queue.submit(APPLE, "built-in"))
    with sqlite3.connect(queue.folder / ".sfumato" / "studio.db") as base:
        assert base.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    base.close()


def test_fast_steps_are_reported_ten_times_a_second(monkeypatch):
    """A page that draws every step of a fast model takes as much of the processor as the model does."""
    now = [100.0]
    monkeypatch.setattr("sfumato.jobs.drawing.time.perf_counter", lambda: now[0])
    shown = drawing.Shown({"options": {}}, SimpleNamespace(colors=None, decode_seconds=1.0), 0)
    reported = []
    for number in range(1, 41):
        now[0] += 0.03
        if report := shown.of(SimpleNamespace(number=number, total=40)):
            reported.append((number, report))
    assert [number for number, _ in reported] == [*range(1, 41, 4), 40]
    assert reported[-1][1]["seconds_left"] == pytest.approx(1.0)
    assert reported[1][1]["seconds_left"] == pytest.approx(0.03 * 35 + 1.0)


def test_an_image_of_the_same_name_is_not_lost(tmp_path):
    """Two trainings of a LoRA, under one name and with one seed."""
    path = tmp_path / "a-cat-0123456789ab.png"
    assert drawing.write(path, b"first") == path
    assert drawing.write(path, b"first") == path
    second = drawing.write(path, b"second")
    assert second != path
    assert drawing.write(path, b"second") == second
    assert (path.read_bytes(), second.read_bytes()) == (b"first", b"second")
    assert len(list(tmp_path.iterdir())) == 2
