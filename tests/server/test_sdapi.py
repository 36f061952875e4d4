"""The broadest client of A1111's API, unchanged, and payloads as others send them, against a real server."""

from __future__ import annotations

import base64
import io
import json
import threading

import pytest
import webuiapi
from PIL import Image

APPLE = "a red apple, 3d"


@pytest.fixture(scope="module")
def api(server):
    return webuiapi.WebUIApi("127.0.0.1", server.port, sampler="Euler a", steps=2)


def test_text_to_image(api):
    found = api.txt2img(prompt=APPLE, negative_prompt="blue", seed=7, width=128, height=128, batch_size=2)
    assert [image.size for image in found.images] == [(128, 128)] * 2
    assert (found.info["seed"], found.info["all_seeds"]) == (7, [7, 8])
    assert [text.startswith(APPLE) for text in found.info["infotexts"]] == [True, True]
    assert "Sampler: Euler a" in found.info["infotexts"][0]
    assert "Seed: 8" in found.info["infotexts"][1]
    assert found.parameters["steps"] == 2
    recipe = json.loads(found.images[0].text["sfumato"])["request"]
    assert (recipe["scheduler"], recipe["rng"], recipe["prompt_syntax"]) == ("euler_a", "cuda", "a1111")


def test_a_second_pass(api):
    second = {"hr_scale": 1.5, "hr_upscaler": "Latent (bicubic)", "hr_second_pass_steps": 3}
    found = api.txt2img(prompt=APPLE, seed=7, width=128, height=128, enable_hr=True, denoising_strength=0.6, **second)
    assert found.image.size == (192, 192)
    hires = json.loads(found.image.text["sfumato"])["request"]["hires"]
    assert (hires["scale"], hires["upscaler"], hires["steps"], hires["strength"]) == (1.5, "latent-bicubic", 3, 0.6)


def test_image_to_image(api):
    navy = Image.new("RGB", (128, 128), "navy")
    found = api.img2img(images=[navy], prompt=APPLE, seed=7, width=128, height=128, steps=4, denoising_strength=0.5)
    assert found.image.size == (128, 128)
    assert "Denoising strength: 0.75" in found.info["infotexts"][0]  # one step more than half of four, as A1111 has it


@pytest.mark.parametrize("invert", [0, 1])
def test_a_mask(api, invert):
    navy, mask = Image.new("RGB", (128, 128), "navy"), Image.new("L", (128, 128), 255 * invert)
    mask.paste(255 * (1 - invert), (32, 32, 96, 96))
    found = api.img2img(
        images=[navy], mask_image=mask, prompt=APPLE, seed=7, width=128, height=128, mask_blur=0,
        inpainting_mask_invert=invert, inpaint_full_res=False, denoising_strength=1.0,
    )  # fmt: skip
    made = found.image.convert("RGB")
    assert {made.getpixel(place) for place in ((5, 5), (120, 5), (20, 100))} == {(0, 0, 128)}
    assert made.getpixel((64, 64)) != (0, 0, 128)


def test_lists_and_settings(api, server):
    assert api.util_get_model_names() == ["built-in", "built-in/inpaint"]
    assert {"Euler", "Euler a", "DPM++ 2M", "DDIM"} <= set(api.util_get_sampler_names())
    assert {"automatic", "karras", "sgm_uniform"} <= set(api.util_get_scheduler_names())
    assert api.util_get_current_model() == "built-in"
    api.util_set_model("built-in")
    options = api.get_options()
    api.set_options(options | {"CLIP_stop_at_last_layers": 2, "unknown": 1})
    assert api.get_options() == options | {"CLIP_stop_at_last_layers": 2}
    api.set_options(options)
    assert server("POST", "/sdapi/v1/options", {"sd_model_checkpoint": "nothing"})[0] == 404
    assert [one["name"] for one in api.get_upscalers()] == ["None", "Lanczos"]
    assert {"name": "Latent (bicubic)"} in api.get_latent_upscale_modes()
    assert api.get_prompt_styles() == []
    assert [one["model_name"] for one in api.get_sd_vae()] == ["built-in/tiny-vae"]
    assert [one["name"] for one in api.get_loras()] == ["few-step", "sketch"]
    assert api.get_memory()["ram"]["total"] > 0
    api.refresh_checkpoints()


def test_the_setting_sd_vae_names_another_vae(server):
    asked = {"prompt": "a red apple, 3d", "steps": 1, "seed": 7, "width": 128, "height": 128}
    images = []
    for vae in ("Automatic", "built-in/tiny-vae"):
        status, told, _ = server("POST", "/sdapi/v1/txt2img", asked | {"override_settings": {"sd_vae": vae}})
        assert status == 200, told
        images.append(told["images"][0])
    assert images[0] != images[1]
    status, told, _ = server("POST", "/sdapi/v1/txt2img", asked | {"override_settings": {"sd_vae": "nothing"}})
    assert status == 400


def test_what_tells_secrets_or_ends_the_server_is_not_there(server):
    for path in ("cmd-flags", "server-kill", "server-restart", "extensions"):
        assert server("GET", f"/sdapi/v1/{path}")[0] == server("POST", f"/sdapi/v1/{path}", {})[0] == 404


def test_png_info(api, server):
    api.txt2img(prompt=APPLE, seed=7, steps=1, width=128, height=128)
    key = server.get("/api/images")["images"][0]["key"]
    data = base64.b64encode(server("GET", f"/api/images/{key}/file")[1]).decode()
    for sent in (data, f"data:image/png;base64,{data}"):
        status, told, _ = server("POST", "/sdapi/v1/png-info", {"image": sent})
        assert (status, told["info"].startswith(APPLE)) == (200, True)
        assert {"parameters", "sfumato"} <= told["items"].keys()


def test_progress_and_interrupt(api, server):
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(api.txt2img(prompt=APPLE, steps=150, n_iter=3, width=128, height=128))
    )
    asking.start()
    told = server.until(api.get_progress, lambda told: told["state"]["sampling_step"] > 3)
    assert 0 < told["progress"] < 1
    assert (told["state"]["sampling_steps"], told["state"]["job_count"]) == (150, 3)
    assert told["eta_relative"] > 0
    seen = server.until(api.get_progress, lambda told: told["current_image"] is not None)
    Image.open(io.BytesIO(base64.b64decode(seen["current_image"]))).verify()
    others = server.submit({"prompt": APPLE, "steps": 1, "seed": 1})
    assert api.interrupt() == {}
    asking.join(20)
    assert len(answers[0].images) < 3
    assert server.ended(others["id"])["state"] == "done"
    server.until(api.get_progress, lambda told: told["progress"] == 0 and told["state"]["job_count"] == 0)


# As these programs send them (Open WebUI's routers/images.py, SillyTavern's stable-diffusion endpoints, LibreChat's tool).
PAYLOADS = {
    "open-webui": {"prompt": APPLE, "batch_size": 1, "width": 128, "height": 128, "steps": 1, "negative_prompt": ""},
    "librechat": {
        "prompt": APPLE, "negative_prompt": "ugly", "cfg_scale": 4.5, "steps": 1, "width": 128, "height": 128,
    },
    "sillytavern": {
        "prompt": APPLE, "negative_prompt": "", "sampler_name": "DPM++ 2M Karras", "scheduler": "Automatic", "steps": 2,
        "cfg_scale": 7, "width": 128, "height": 128, "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent",
        "hr_scale": 2, "hr_additional_steps": 0, "denoising_strength": 0.7, "hr_second_pass_steps": 0, "seed": -1,
        "override_settings": {"CLIP_stop_at_last_layers": 1}, "override_settings_restore_afterwards": True,
        "clip_skip": 1, "save_images": True, "send_images": True, "do_not_save_grid": False,
        "do_not_save_samples": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_payloads_of_other_clients(server, payload):
    status, told, _ = server("POST", "/sdapi/v1/txt2img", payload)
    assert status == 200, told
    assert Image.open(io.BytesIO(base64.b64decode(told["images"][0]))).size == (128, 128)
    assert json.loads(told["info"])["infotexts"][0].startswith(APPLE)


def test_sillytavern_from_the_first_ping_to_the_image(server):
    """Its image extension's requests in its order: connect, fill the menus, change the model, generate."""
    every = {"Authorization": "Basic Og=="}  # of an empty user and password

    def asked(method, path, body=None):
        status, told, _ = server(method, f"/sdapi/v1/{path}", body, **every)
        assert status == 200, (path, told)
        return told

    assert asked("GET", "options")["sd_model_checkpoint"] == "built-in"
    upscalers = [one["name"] for one in asked("GET", "upscalers")]
    upscalers[1:1] = [one["name"] for one in asked("GET", "latent-upscale-modes")]
    assert {"None", "Latent", "Lanczos"} <= set(upscalers)
    assert [one["model_name"] for one in asked("GET", "sd-vae")] == ["built-in/tiny-vae"]
    assert asked("GET", "sd-modules") == []
    samplers = [one["name"] for one in asked("GET", "samplers")]
    schedulers = [one["name"] for one in asked("GET", "schedulers")]
    assert {"automatic", "karras"} <= set(schedulers)
    models = [{"value": one["title"], "text": one["title"]} for one in asked("GET", "sd-models")]
    asked("POST", "options", {"sd_model_checkpoint": models[0]["value"]})
    idle = asked("GET", "progress")
    assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)
    chosen = {"sampler_name": samplers[0], "scheduler": "karras", "sd_model_checkpoint": models[0]["value"]}
    sent = {**PAYLOADS["sillytavern"], **chosen, "enable_hr": True, "hr_upscaler": upscalers[1], "hr_scale": 1.5}
    told = asked("POST", "txt2img", sent)
    assert Image.open(io.BytesIO(base64.b64decode(told["images"][0]))).size == (192, 192)
    assert asked("POST", "interrupt") == {}  # sent when a chat is closed, whether or not anything is drawn


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"alwayson_scripts": {"ControlNet": {"args": [{"enabled": True}]}}}, "scripts"),
        ({"script_name": "X/Y/Z plot"}, "scripts"),
        ({"enable_hr": True, "hr_scale": 17}, "hr_scale"),
        ({"prompt": "<lora:nothing:1>"}, "no model"),
        ({"steps": 0}, "steps"),
    ],
    ids=str,
)
def test_what_would_be_another_image_is_refused(server, field, words):
    status, told, _ = server("POST", "/sdapi/v1/txt2img", {"prompt": APPLE, "width": 128, "height": 128, **field})
    assert status in (400, 422)
    assert words in told["error"]["message"]


def test_what_has_no_effect_is_said(server):
    payload = {
        "prompt": APPLE,
        "steps": 1,
        "width": 128,
        "height": 128,
        "styles": ["x"],
        "new_thing": 1,
        "restore_faces": True,
    }
    status, told, _ = server("POST", "/sdapi/v1/txt2img", payload)
    assert status == 200
    warnings = "\n".join(told["warnings"])
    assert all(word in warnings for word in ("styles", "new_thing", "Face restoration"))
