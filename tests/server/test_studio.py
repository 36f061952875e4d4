"""The studio as a person uses it: a real browser, a real server, and images by the built-in model."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from playwright.sync_api import expect
from safetensors.numpy import save_file

from support.browser import Visit, browsing, chromium
from support.studio import serving

DATA = Path(__file__).parents[1] / "data" / "metadata"
APPLE = "a red apple, 3d"
PENGUIN = "a penguin"


@pytest.fixture(scope="module")
def browser():
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def studio(browser, tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    save_file({"lora_unet_x.lora_down.weight": np.zeros((1, 1), np.float32)}, models / "style.safetensors")
    save_file({"emb_params": np.zeros((1, 8), np.float32)}, models / "word.safetensors")
    (models / "edges").mkdir()
    (models / "edges" / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    with serving(tmp_path_factory.mktemp("studio"), page=True, models=models) as (client, queue):
        queue.models.all(look=True)
        client.until(lambda: client.get("/api/health"), lambda told: told["worker"]["state"] == "ready")
        for prompt in (APPLE, PENGUIN):
            client.ended(client.submit({"prompt": prompt, "steps": 2, "seed": 7})["id"])
        yield client


@pytest.fixture
def visit(browser, studio):
    with Visit(browser, studio.url) as found:
        yield found
        print("the page at the end:", found.page.inner_text("body"), sep="\n")  # shown if the test failed
    # What a failed test leaves behind does not hold up the next one.
    for job in studio.get("/api/jobs?state=queued&state=running")["jobs"]:
        studio("DELETE", f"/api/jobs/{job['id']}")
        studio.ended(job["id"])


def latest(studio) -> dict:
    return studio.get("/api/jobs?limit=1")["jobs"][0]


# Collects in `captions` what is said beside each preview, as soon as it is shown.
CAPTIONS_OF_PREVIEWS = """() => {
  window.captions = []
  new MutationObserver(() => {
    if (document.querySelector('.drawing img')) captions.push(document.querySelector('.drawing .caption').innerText)
  }).observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true })
}"""


def test_a_first_image(studio, visit):
    page = visit.page
    page.route("**/api/jobs?*", lambda route: route.fulfill(json={"jobs": []}))
    visit.open()
    page.get_by_text("What would you like to see?").wait_for()
    page.get_by_role("button", name=PENGUIN).click()
    expect(page.locator("#prompt")).to_have_value(re.compile(PENGUIN))
    page.get_by_role("button", name=APPLE).click()
    expect(page.locator("#prompt")).to_have_value(APPLE)
    page.get_by_text(re.compile(r"^Fits: .*[MG]B of .*, about ")).wait_for()
    page.get_by_text("6 of 22 tokens").wait_for()
    page.evaluate(CAPTIONS_OF_PREVIEWS)  # before it starts: it takes hardly longer than a look at the page
    job = visit.generate(APPLE)
    studio.until(lambda: page.evaluate("captions"), lambda found: any("of 20" in one for one in found), 20)
    job = studio.ended(job["id"])
    visit.shows(job["images"][0])
    assert (job["state"], job["request"]) == ("done", {"prompt": APPLE, "seed": job["request"]["seed"]})
    expect(page.locator(".film li")).to_have_count(1)
    assert page.title() == "Sfumato"


def test_settings_are_what_is_drawn_with(studio, visit):
    page = visit.page
    page.get_by_text("Advanced").click()
    page.get_by_role("button", name="3:2").click()
    page.get_by_label("Scheduler").select_option("euler")
    page.get_by_role("button", name="Negative prompt").click()
    page.fill("#negative_prompt", "blue")
    job = studio.ended(visit.generate(APPLE, Seed=41, Steps=3, Guidance=2.5, Images=2)["id"])
    visit.shows(job["images"][1])
    request = job["request"]
    wanted = {
        "prompt": APPLE,
        "negative_prompt": "blue",
        "steps": 3,
        "guidance_scale": 2.5,
        "scheduler": "euler",
        "seed": 41,
    }
    wanted |= {"count": 2, "width": 160, "height": 104}
    assert request | wanted == request
    # "Again" takes the seed of the image on the stage, the second of two.
    page.get_by_role("button", name="Use a random seed").click()
    expect(page.locator("#seed")).to_have_value("")
    page.wait_for_timeout(900)  # changes of one field that follow each other closely are undone together
    page.get_by_role("button", name="Use the last seed again").click()
    expect(page.locator("#seed")).to_have_value("42")
    # Each change is undone alone, and what was closed stays closed.
    page.get_by_role("button", name="Undo the last change").click()
    expect(page.locator("#seed")).to_have_value("")
    page.get_by_role("button", name="Redo the change").click()
    visit.open()
    expect(page.locator("#prompt")).to_have_value(APPLE)
    expect(page.locator("#negative_prompt")).to_have_value("blue")
    expect(page.get_by_label("Scheduler")).to_have_value("euler")
    expect(page.locator("#seed")).to_have_value("42")


def test_a_half_typed_number_stays_while_the_page_is_drawn_anew(visit):
    page = visit.page
    page.get_by_text("Advanced").click()
    steps = page.get_by_label("Steps", exact=True).first
    steps.fill("37")
    with page.expect_response("**/api/plan"):
        page.evaluate(
            """() => {
              const prompt = document.querySelector('#prompt');
              prompt.value = 'a penguin';
              prompt.dispatchEvent(new Event('input', { bubbles: true }));
            }"""
        )
    expect(steps).to_have_value("37")
    steps.press("Tab")
    expect(steps).to_have_value("37")
    # What is no number is put back, and what is too large becomes the largest.
    steps.fill("")
    steps.press("Tab")
    expect(steps).to_have_value("37")
    for _ in range(2):
        steps.fill("5000")
        steps.press("Tab")
        expect(steps).to_have_value("1000")


def test_presets_and_links(browser, studio, visit):
    page = visit.page
    page.fill("#prompt", PENGUIN)
    page.get_by_role("button", name="16:9").click()
    page.get_by_text("Presets").click()
    page.get_by_label("Name of a new preset").fill("wide")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Reset all settings").click()
    expect(page.locator("#prompt")).to_have_value("")
    page.get_by_role("button", name="wide", exact=True).click()
    expect(page.get_by_label("Width")).to_have_value("168")
    page.fill("#prompt", PENGUIN)
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")
    page.get_by_role("button", name="Link to these settings").click()
    link = page.get_by_role("dialog").get_by_role("textbox").input_value()
    assert link.startswith(f"{studio.url}/#")
    with Visit(browser, studio.url) as other:
        other.open(link.removeprefix(studio.url))
        other.page.get_by_text("The settings come from the link you opened").wait_for()
        expect(other.page.locator("#prompt")).to_have_value(PENGUIN)
        expect(other.page.get_by_label("Width")).to_have_value("168")
        assert "#" not in other.page.url


def test_cancel_and_reload_in_mid_run(studio, visit):
    page = visit.page
    page.get_by_text("Advanced").click()
    drawn = visit.generate(PENGUIN, Steps=900)
    assert drawn["request"]["steps"] == 900
    # The worker may still be loading, on a machine with other work.
    studio.until(lambda: studio.get(f"/api/jobs/{drawn['id']}"), lambda job: job["state"] == "running", 120)
    page.get_by_text(re.compile(r"Step \d+ of 900")).wait_for(timeout=60_000)
    newest = visit.generate(PENGUIN)
    page.get_by_text("1 job is waiting").wait_for()
    visit.open()
    page.get_by_text(re.compile(r"Step \d+ of 900")).wait_for()
    page.locator(".drawing img").wait_for()
    assert "%" in page.title()
    # The one that waits, then the one that is being drawn, by the key.
    page.get_by_role("button", name="Waiting").click()
    page.get_by_role("button", name="Cancel").click()
    assert studio.ended(newest["id"])["state"] == "cancelled"
    page.locator(".drawing").wait_for()
    page.keyboard.press("Escape")
    assert studio.ended(drawn["id"])["state"] == "cancelled"
    page.locator(".stage.done").wait_for()


def test_what_fails_is_said_and_tried_again(studio, visit):
    page = visit.page
    job = studio.ended(studio.submit({"prompt": PENGUIN, "steps": 2})["id"])
    failed = job | {
        "id": "failed-one",
        "state": "failed",
        "images": [],
        "error": {"kind": "memory", "message": "No room."},
    }
    failed["created"] += 1e6
    page.route("**/api/jobs?*", lambda route: route.fulfill(json={"jobs": [failed]}))
    visit.open()
    page.get_by_text("No room.").wait_for()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".film li")).not_to_have_count(1)
    again = latest(studio)
    assert again["request"] == job["request"]
    studio.ended(again["id"])


def test_gallery_search_delete_undo(studio, visit):
    page = visit.page
    total = studio.get("/api/images")["total"]
    page.get_by_role("button", name="Gallery").click()
    page.get_by_text(f"{total} images").wait_for()
    page.get_by_label("Search").fill("apple")
    found = studio.get("/api/images?q=apple")["total"]
    assert 0 < found < total
    page.get_by_text(re.compile(rf"^{found} images?$")).wait_for()
    expect(page.locator(".tile")).to_have_count(found)
    page.locator(".tiles li").first.hover()
    page.locator(".tile-delete").first.click()
    page.get_by_text(re.compile(rf"^{found - 1} images?$|^No image matches")).first.wait_for()
    assert studio.get("/api/images?q=apple")["total"] == found - 1
    page.get_by_role("button", name="Undo", exact=True).click()
    page.get_by_text(re.compile(rf"^{found} images?$")).wait_for()
    assert studio.get("/api/images?q=apple")["total"] == found
    # What somebody moves away outside of the studio goes from the page, too.
    page.get_by_label("Search").fill("nothing like this")
    page.get_by_text("No image matches.").wait_for()


def test_viewer_compares_and_uses_settings(studio, visit):
    page = visit.page
    page.get_by_role("button", name="Gallery").click()
    page.locator(".tile").nth(1).click()
    dialog = page.get_by_role("dialog")
    key = studio.get("/api/images")["images"][1]["key"]
    told = studio.get(f"/api/images/{key}")
    dialog.get_by_text(told["prompt"], exact=True).wait_for()
    dialog.get_by_label("Compare with").select_option("older")
    slider = dialog.get_by_role("slider")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".compare").evaluate("element => element.style.getPropertyValue('--share')") == "51%"
    dialog.get_by_role("button", name="Older image").click()
    expect(page.locator(".compare img").first).not_to_have_attribute("src", re.compile(key))
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    page.locator(".tile").nth(1).click()
    dialog.get_by_role("button", name="Use its settings").click()
    expect(page.locator("#prompt")).to_have_value(told["prompt"])
    expect(page.locator("#seed")).to_have_value(told["seed"])


DROP = """([data, type, name]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  for (const kind of ['dragover', 'drop'])
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""


def drop(page, path: Path, kind: str = "image/png") -> None:
    page.evaluate(DROP, [base64.b64encode(path.read_bytes()).decode(), kind, path.name])


def test_dropped_pictures(studio, visit, tmp_path):
    page = visit.page
    visit.expected.append("400 (Bad Request)")  # browsers log what is refused
    # Of another program: its settings.
    drop(page, DATA / "automatic1111.png")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("Made with").wait_for()
    status, told, _ = studio("POST", "/api/recipe", (DATA / "automatic1111.png").read_bytes(), Content_Type="image/png")
    assert status == 200
    dialog.get_by_role("button", name="Use its settings").click()
    expect(page.locator("#prompt")).to_have_value(told["request"]["prompt"])
    expect(page.locator("#seed")).to_have_value(str(told["request"]["seed"]))
    page.get_by_role("button", name="Undo", exact=True).click()
    expect(page.locator("#prompt")).to_have_value("")
    # Without any: a picture to start from.
    plain = tmp_path / "plain.png"
    Image.new("RGB", (96, 64), "teal").save(plain)
    drop(page, plain)
    page.locator(".start img").wait_for()
    visit.open()
    page.locator(".start img").wait_for()
    job = studio.ended(visit.generate(APPLE, Strength=0.4, Seed=9)["id"])
    visit.shows(job["images"][0])
    request = job["request"]
    assert request["image"]
    assert (request["strength"], request["width"], request["height"]) == (0.4, 160, 104)
    page.get_by_role("button", name="Remove the start image").click()
    # What is no picture is refused in words.
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    drop(page, text, "text/plain")
    page.get_by_text("notes.txt cannot be read as an image").wait_for()


def test_a_picture_is_extended(studio, visit, tmp_path):
    page = visit.page
    visit.expected.append("400 (Bad Request)")  # browsers log what is refused, here to say that it has no recipe
    page.get_by_text("Advanced").click()
    Image.new("RGB", (96, 64), "teal").save(tmp_path / "plain.png")
    drop(page, tmp_path / "plain.png")
    page.get_by_label("Right", exact=True).fill("96")
    page.keyboard.press("Tab")
    job = studio.ended(visit.generate(APPLE, Steps=2)["id"])
    assert (job["state"], job["request"]["mask"]) == ("done", {"extend": [0, 0, 96, 0]})
    key = job["images"][0]
    visit.shows(key)
    image = studio.get(f"/api/images/{key}")
    assert (image["width"], image["height"]) == (224, 72)  # three to one, at the model's number of pixels


def test_models_that_change_and_steer_it(studio, visit, tmp_path):
    visit.expected.append("/api/plan")  # the ControlNet is a folder without weights, which cannot be planned
    page = visit.page
    page.get_by_text("Advanced").click()
    page.get_by_label("Add a LoRA").select_option("style")
    page.get_by_label("Add an embedding").select_option("word")
    page.get_by_label("Add a ControlNet").select_option("edges")
    page.get_by_label("Preprocessor").select_option("canny")
    Image.new("RGB", (96, 64), "teal").save(tmp_path / "edges.png")
    page.locator(".worn input[type=file]").set_input_files(tmp_path / "edges.png")
    page.get_by_alt_text("edges.png").wait_for()
    page.fill("#prompt", APPLE)
    with page.expect_request("**/api/jobs") as sent:
        page.click(".generate")
    request = sent.value.post_data_json["request"]
    assert (request["adapters"], request["embeddings"]) == ([{"file": "style", "weight": 1}], [{"file": "word"}])
    (control,) = request["controls"]
    assert control.pop("image").startswith("data:image/png;base64,")
    assert control == {"model": "edges", "scale": 1, "preprocessor": "canny"}
    visit.open()
    page.get_by_alt_text("edges.png").wait_for()
    assert violations(page) == []
    page.get_by_role("button", name="Remove word").click()
    expect(page.get_by_label("Add an embedding")).to_be_visible()


def test_recipes_are_text_and_nothing_else(studio, visit, tmp_path):
    info = PngImagePlugin.PngInfo()
    evil = "<img src=x onerror=alert(1)>{{constructor}}"
    info.add_text("parameters", f"{evil}\nSteps: 2, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x64")
    Image.new("RGB", (64, 64)).save(tmp_path / "evil.png", pnginfo=info)
    drop(visit.page, tmp_path / "evil.png")
    visit.page.get_by_role("dialog").get_by_text(evil).wait_for()
    assert visit.page.locator("img[src=x]").count() == 0


def test_a_mask_by_pointer_keyboard_and_numbers(studio, visit):
    page = visit.page
    job = studio.ended(studio.submit({"prompt": PENGUIN, "steps": 2})["id"])
    sent = []

    def able(route):
        answer = route.fetch()
        route.fulfill(response=answer, json=answer.json() | {"mask": True})

    def plan(route):
        sent.append(route.request.post_data_json["request"])
        sent[-1].pop("mask", None)
        route.fulfill(
            json={"fits": True, "seconds": 1, "peak_bytes": 1, "free_bytes": 2, "reasons": [], "tokens": None}
        )

    page.route("**/api/health", able)
    page.route(
        "**/api/plan", lambda route: (sent.append(route.request.post_data_json["request"].get("mask")), plan(route))
    )
    visit.open()
    visit.shows(job["images"][0])
    page.get_by_role("button", name="Start from this image").click()
    page.get_by_role("button", name="Paint mask").click()
    canvas = page.get_by_label("Mask to paint")
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 60, steps=4)
    page.mouse.up()
    share = page.locator("dialog output")
    expect(share).not_to_have_text("0% of the image")
    by_pointer = share.inner_text()
    page.get_by_role("button", name="Clear").click()
    expect(share).to_have_text("0% of the image")
    canvas.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press(" ")
    expect(share).not_to_have_text("0% of the image")
    assert share.inner_text() != by_pointer
    page.get_by_role("button", name="Undo", exact=True).click()
    for label, value in {"Left": 0, "Top": 0, "Width": 64, "Height": 128}.items():
        page.get_by_role("dialog").get_by_label(label, exact=True).fill(str(value))
    page.get_by_role("button", name="Add", exact=True).click()
    expect(share).to_have_text("50% of the image")
    page.get_by_role("button", name="Use the mask").click()
    page.locator(".veil").wait_for()
    page.fill("#prompt", APPLE)
    page.wait_for_timeout(600)
    mask = [one for one in sent if isinstance(one, dict) and "file" in one][-1]
    assert mask["edge"] == 4
    columns = page.evaluate(COLUMNS, mask["file"])
    assert columns == [255] * 64 + [0] * 64


COLUMNS = """async (url) => {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = document.createElement('canvas');
  Object.assign(canvas, { width: image.width, height: image.height });
  const pen = canvas.getContext('2d');
  pen.drawImage(image, 0, 0);
  return [...pen.getImageData(0, image.height - 1, image.width, 1).data].filter((_, place) => place % 4 === 0);
}"""


def test_a_grid_varies_one_thing_at_a_time(studio, visit):
    page = visit.page
    page.fill("#prompt", APPLE)
    page.get_by_role("button", name="X/Y grid").click()
    dialog = page.get_by_role("dialog")
    values = dialog.get_by_label("Values")
    values.nth(0).fill("2, 3")
    dialog.get_by_label("Rows").select_option("prompt")
    values.nth(1).fill("red, green")
    dialog.get_by_role("button", name="Generate 4 images").click()
    expect(page.locator(".cells img")).to_have_count(4, timeout=30_000)
    jobs = studio.get("/api/jobs?limit=4")["jobs"]
    made = {(job["request"]["steps"], job["request"]["prompt"]) for job in jobs}
    assert made == {(steps, f"a {colour} apple, 3d") for steps in (2, 3) for colour in ("red", "green")}
    assert len({job["request"]["seed"] for job in jobs}) == 1
    assert dialog.get_by_role("columnheader").all_inner_texts() == ["2", "3"]
    assert dialog.get_by_role("rowheader").all_inner_texts() == ["red", "green"]


def test_the_keyboard_alone(studio, visit):
    page = visit.page
    focused = "document.activeElement.id || document.activeElement.getAttribute('aria-label') || document.activeElement.innerText"

    def tab_to(name: str) -> None:
        seen = []
        for _ in range(200):  # the filmstrip has a stop for each image
            page.keyboard.press("Tab")
            seen.append(page.evaluate(focused).strip())
            if seen[-1] == name:
                return
        raise AssertionError(seen)

    page.evaluate("localStorage.setItem('sfumato.settings', '{\"steps\":3}')")
    visit.open()
    tab_to("prompt")
    page.keyboard.type("a sunflower")
    tab_to("Generate")
    with page.expect_response("**/api/jobs") as sent:
        page.keyboard.press("Enter")
    image = studio.ended(sent.value.json()["id"])["images"][0]
    visit.shows(image)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("?")
    page.get_by_role("heading", name="Keyboard shortcuts").wait_for()
    page.keyboard.press("Escape")
    tab_to("Details")
    page.keyboard.press("Enter")
    page.get_by_role("dialog").get_by_text("a sunflower", exact=True).wait_for()
    page.keyboard.press("Escape")
    assert page.evaluate(focused) == "Details"
    total = studio.get("/api/images")["total"]
    page.keyboard.press("Delete")
    page.get_by_role("button", name="Undo", exact=True).wait_for()  # not "Undo the last change", which is always there
    tab_to("Undo")
    assert studio.get("/api/images")["total"] == total - 1
    page.keyboard.press("Enter")
    visit.shows(image)
    page.keyboard.press("g")
    page.get_by_label("Search").wait_for()
    # Single keys can be switched off, as speech and screen readers send them, too.
    page.keyboard.press("?")
    page.get_by_label("Single-key shortcuts").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    assert page.get_by_label("Search").is_visible()


STATES = {
    "desktop": {},
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
    "arabic": {"locale": "ar"},
}


def violations(page) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": tags}, "resultTypes": ["violations"]})
    return [f"{one['id']}: {node['html'][:200]}" for one in found.response["violations"] for node in one["nodes"]]


@pytest.mark.parametrize("state", STATES)
def test_everybody_can_use_it(browser, studio, state):
    with Visit(browser, studio.url, reduced_motion="reduce", **STATES[state]) as visit:
        page = visit.page
        page.locator(".stage img").wait_for()
        page.evaluate(
            'localStorage.setItem(\'sfumato.preferences\', \'{"advanced":true,"presets":true,"negative":true}\')'
        )
        visit.open()
        page.locator(".stage img").wait_for()
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert (page.evaluate("document.dir") == "rtl") == (state == "arabic")
        if state == "phone":
            button = page.locator(".generate").bounding_box()
            assert button["y"] + button["height"] <= 844
            assert page.locator(".stage img").bounding_box()["y"] < button["y"]
            page.locator(".dock .only-small").click()
            assert violations(page) == []
            page.keyboard.press("Escape")
        page.locator("nav button").nth(1).click()
        page.locator(".tile img").first.wait_for()
        assert violations(page) == []
        page.locator(".tile").first.click()
        page.locator("dialog dl").wait_for()
        assert violations(page) == []
        page.keyboard.press("Escape")
        if state == "desktop":
            page.locator("nav button").nth(0).click()
            for name in ("Keyboard shortcuts", "Preferences", "X/Y grid"):
                page.get_by_role("button", name=name).click()
                page.locator("dialog[open]").wait_for()
                assert violations(page) == []
                page.keyboard.press("Escape")
                page.locator("dialog[open]").wait_for(state="detached")


UNTRANSLATED = """() => {
  const exempt = (element) => element.closest('[dir=auto], [translate=no], [lang=en]:not(html)');
  const odd = (text) => /\\p{L}/u.test(text) && !text.includes('⟦');
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode())
    if (node.parentElement.tagName !== 'NOSCRIPT' && odd(node.data) && !exempt(node.parentElement)) found.push(node.data);
  for (const element of document.querySelectorAll('[aria-label], [title], [placeholder]'))
    for (const name of ['aria-label', 'title', 'placeholder'])
      if (odd(element.getAttribute(name) ?? '') && !exempt(element)) found.push(element.getAttribute(name));
  return found;
}"""


def test_no_text_stands_in_the_code(browser, studio):
    def pseudo(route):
        answer = route.fetch()
        wrap = lambda text: f"⟦{text}⟧" if isinstance(text, str) else {key: wrap(one) for key, one in text.items()}  # noqa: E731
        route.fulfill(response=answer, json=wrap(json.loads(answer.body())))

    visit = Visit(browser, studio.url)
    visit.page.route("**/locales/en.json", pseudo)
    names = {job["request"]["prompt"] for job in studio.get("/api/jobs")["jobs"]}
    with visit:
        page = visit.page
        page.evaluate(
            'localStorage.setItem(\'sfumato.preferences\', \'{"advanced":true,"presets":true,"negative":true}\')'
        )
        visit.open()
        page.locator(".stage img").wait_for()
        page.locator(".plan .link").wait_for()

        def look() -> None:
            assert set(page.evaluate(UNTRANSLATED)) <= names

        look()
        for name in ("Keyboard shortcuts", "Preferences", "X/Y grid"):
            page.get_by_role("button", name=f"⟦{name}⟧").click()
            page.locator("dialog[open]").wait_for()
            look()
            page.keyboard.press("Escape")
            page.locator("dialog[open]").wait_for(state="detached")
        page.locator("nav button").nth(1).click()
        page.locator(".tile img").first.wait_for()
        look()
        page.locator(".tile").first.click()
        page.locator("dialog dl").wait_for()
        look()


def test_languages_change_at_once_and_stay(browser, studio):
    with Visit(browser, studio.url) as visit:
        page = visit.page
        page.get_by_role("button", name="Preferences").click()
        for code, word in {"es": "Generar", "ko": "생성", "zh": "生成", "ar": "توليد"}.items():
            page.locator("dialog select").first.select_option(code)
            page.locator(f".generate:has-text('{word}')").wait_for()
            assert page.evaluate("document.documentElement.lang") == code
        page.locator("dialog select").nth(1).select_option("dark")
        visit.open()
        page.locator(".generate:has-text('توليد')").wait_for()
        assert page.evaluate("document.dir") == "rtl"
        assert page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"


def test_without_a_browser_tests_say_so(monkeypatch):
    monkeypatch.delenv("SFUMATO_CHROMIUM", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="make clients"):
        chromium()
