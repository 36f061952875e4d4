"""The studio's own API, asked over a real socket of a real server."""

from __future__ import annotations

import base64
import time

from PIL import Image

RED = {"prompt": "a red apple, 3d", "steps": 2, "seed": 7}


def test_a_job_is_drawn_and_told_step_by_step(server):
    with server.events() as events:
        assert next(events)["event"] == "hello"
        # A seed of its own: an image that is there already is not drawn again, and has no steps.
        job = server.submit({**RED, "seed": 4711, "count": 2}, client="test")
        assert job["state"] == "queued"
        told = []
        for event in events:
            told.append(event)
            if event["event"] == "job" and event["data"]["state"] == "done":
                break
    states = [one["data"]["state"] for one in told if one["event"] == "job"]
    assert states == ["queued", "running", "done"]
    steps = [(one["data"]["place"], one["data"]["step"]) for one in told if "step" in one["data"]]
    assert steps == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert any(one["data"].get("preview", "").startswith("data:image/jpeg;base64,") for one in told)
    images = [one["data"]["key"] for one in told if one["event"] == "image"]
    assert images == server.ended(job["id"])["images"]
    assert len(images) == 2


def test_who_comes_back_misses_nothing(server):
    first = server.ended(server.submit(RED)["id"])
    with server.events() as events:
        last = next(events)["id"]
    second = server.ended(server.submit({**RED, "seed": 88})["id"])
    for resume in ({"Last_Event_ID": last}, {"path": f"/api/events?last={last}"}):
        with server.events(**resume) as events:
            told = [next(events) for _ in range(4)]
        assert [one["event"] for one in told] == ["job", "job", "image", "job"]
        assert {one["data"].get("id", second["id"]) for one in told} == {second["id"]}
        assert [int(one["id"]) for one in told] == [int(last) + place for place in range(1, 5)]
    assert first["id"] != second["id"]
    for far in ("999999", "0"):
        with server.events(Last_Event_ID=far) as events:
            assert next(events)["event"] == "reset"


def test_an_image_is_what_the_command_line_draws(server, tmp_path):
    import torch

    import sfumato
    from sfumato.metadata.carriers import image_bytes

    job = server.ended(server.submit({**RED, "scheduler": "euler"})["id"])
    pipeline = sfumato.load("built-in", device="cpu", dtype=torch.float32)
    result = pipeline.generate(sfumato.GenerateRequest(prompt=RED["prompt"], steps=2, seed=7, scheduler="euler"))
    assert server("GET", f"/api/images/{job['images'][0]}/file")[1] == image_bytes(result.images[0], result.recipes[0])


def test_a_job_is_cancelled_within_a_step(server):
    job = server.submit({**RED, "steps": 300, "count": 3})
    with server.events() as events:
        for event in events:
            if event["event"] == "progress" and event["data"].get("step", 0) > 5:
                break
        began = time.monotonic()
        assert server("DELETE", f"/api/jobs/{job['id']}")[0] == 200
        for event in events:
            if event["event"] == "job" and event["data"]["state"] == "cancelled":
                break
    assert time.monotonic() - began < 2  # a step takes a tenth of that; the bar is in docs/log.md
    assert server.ended(server.submit(RED)["id"])["state"] == "done"


def test_a_killed_worker_is_born_again(server):
    job = server.submit({**RED, "steps": 20})
    server.until(lambda: server.queue.progress.get(job["id"], {}), lambda told: told.get("step", 0) > 3)
    server.queue._process.kill()
    found = server.ended(job["id"])
    assert (found["state"], found["attempts"]) == ("done", 2)
    assert "signal 9" in found["notes"][0]


def test_what_does_not_fit_ends_with_a_sentence(server):
    found = server.ended(server.submit({**RED, "width": 16384, "height": 16384})["id"])
    assert (found["state"], found["error"]["kind"]) == ("failed", "memory")
    assert "GB" in found["error"]["message"]
    assert "less memory" in found["notes"][0]
    status, plan, _ = server("POST", "/api/plan", {"request": {"prompt": "x", "width": 16384, "height": 16384}})
    assert (status, plan["fits"]) == (200, False)


def test_a_draft_is_planned_drawn_and_noted_as_what_it_does(server):
    plan = server("POST", "/api/plan", {"request": {"prompt": "a red apple, 3d", "draft": True}})[1]
    assert (plan["steps"], plan["guidance_scale"]) == (4, 1.0)
    done = server.ended(server.submit({"prompt": "a red apple, 3d", "draft": True, "seed": 7})["id"])
    assert done["notes"][0].startswith("a draft: 4 steps of lcm with built-in/few-step")
    told = server("GET", f"/api/images/{done['images'][0]}")[1]["request"]
    assert (told["vae"], told["scheduler"], "draft" in told) == ("built-in/tiny-vae", "lcm", False)
    own = server.ended(server.submit({**RED, "vae": "built-in/tiny-vae"})["id"])
    assert own["state"] == "done"
    status, body, _ = server("POST", "/api/jobs", {"request": {"prompt": "x", "vae": "/etc/passwd"}})
    assert (status, "no model '/etc/passwd'" in body["error"]["message"]) == (400, True)


def test_errors_of_drawing_are_sentences(server):
    found = server.ended(server.submit({**RED, "spacing": "karras", "scheduler": "ddim"})["id"])
    assert (found["error"]["kind"], "spacing" in found["error"]["message"]) == ("request", True)
    status, body, _ = server("POST", "/api/jobs", {"request": {"prompt": "x", "stepz": 1}})
    assert (status, "did you mean 'steps'" in body["error"]["message"]) == (400, True)
    status, body, _ = server("POST", "/api/jobs", {"request": {"prompt": "x"}, "model": "sd16"})
    assert (status, "no model 'sd16'" in body["error"]["message"]) == (400, True)


def test_the_plan_is_known_before_the_run(server):
    plan = server("POST", "/api/plan", {"request": {"prompt": "a red apple, 3d", "negative_prompt": "blue"}})[1]
    assert (plan["fits"], plan["width"], plan["steps"], plan["guidance_scale"]) == (True, 128, 20, 3.0)
    assert 0 < plan["seconds"] < 100
    assert 0 < plan["peak_bytes"] < plan["free_bytes"]
    assert plan["tokens"] == {"prompt": 6, "negative_prompt": 1, "limit": 22}
    assert any("float32" in reason for reason in plan["reasons"])


def test_what_there_is(server):
    health = server.get("/api/health")
    assert (health["status"], health["worker"]["state"], health["worker"]["kind"]) == ("ok", "ready", "cpu")
    names = {one["name"] for one in server.get("/api/samplers")["samplers"]}
    assert {"euler", "dpmpp_2m_karras"} <= names
    models = server.get("/api/models?look=true")
    assert models["default"] == "built-in"
    assert "red apple" in models["models"][0]["words"]
    assert server("GET", "/api/jobs/nothing")[0] == server("DELETE", "/api/jobs/nothing")[0] == 404
    assert server("GET", f"/api/images/{'0' * 32}")[0] == 404


def test_images_are_found_shown_deleted_and_restored(server):
    job = server.ended(server.submit({**RED, "seed": 770077, "negative_prompt": "blue"})["id"])
    (key,) = job["images"]
    found = server.get("/api/images?q=770077%20apple")
    assert [one["key"] for one in found["images"]] == [key]
    image = server.get(f"/api/images/{key}")
    again = server.ended(server.submit(image["request"])["id"])
    assert again["images"] == [key]  # the recipe draws the same file, which is there already
    status, data, told = server("GET", f"/api/images/{key}/file?download=true")
    assert (status, told["content-type"], told["content-disposition"][:10]) == (200, "image/png", "attachment")
    status, recipe, _ = server("POST", "/api/recipe", data, Content_Type="image/png")
    assert (recipe["program"], recipe["request"]) == ("Sfumato", image["request"])
    assert server("GET", f"/api/images/{key}/thumb")[2]["content-type"] == "image/webp"
    assert server("DELETE", f"/api/images/{key}")[0] == 200
    assert server.get("/api/images?q=770077")["total"] == 0
    assert server("POST", f"/api/images/{key}/restore")[1]["key"] == key
    assert server("GET", f"/api/images/{key}/file")[1] == data


def test_an_image_to_start_from_is_a_data_url_or_a_key(server):
    key = server.ended(server.submit(RED)["id"])["images"][0]
    data = server("GET", f"/api/images/{key}/file")[1]
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    jobs = [server.submit({**RED, "image": image, "strength": 0.5, "steps": 4}) for image in (key, url)]
    drawn = [server.ended(job["id"])["images"] for job in jobs]
    assert drawn[0] == drawn[1]
    assert jobs[0]["request"]["image"].startswith(".sfumato/inputs/")
    recipe = server.get(f"/api/images/{drawn[0][0]}")["request"]
    assert server.ended(server.submit(recipe)["id"])["images"] == drawn[0]  # what it started from is kept


def test_files_that_others_bring_are_told_of(server):
    with server.events() as events:
        next(events)
        Image.new("RGB", (9, 9), "teal").save(server.folder / "brought.png")
        event = next(one for one in events if one["event"] == "image")
        assert (event["data"]["name"], event["data"]["program"]) == ("brought.png", "")
        (server.folder / "brought.png").unlink()
        assert next(one for one in events if one["event"] == "removed")["data"] == {"key": event["data"]["key"]}


def test_jobs_are_accepted_while_others_are_drawn(server):
    jobs = [server.submit({**RED, "seed": number}, client="many") for number in range(5)]
    found = server.get("/api/jobs?client=many&limit=3")["jobs"]
    assert [job["id"] for job in found] == [job["id"] for job in jobs[:1:-1]]
    assert [server.ended(job["id"])["state"] for job in jobs] == ["done"] * 5
