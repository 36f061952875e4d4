"""OpenAI's own client, unchanged, against a real server."""

from __future__ import annotations

import base64
import io
import time

import openai
import pytest
from PIL import Image, ImageChops

APPLE = "a red apple, 3d"
QUICK = {"num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_generate_several(client, server):
    found = client.images.generate(prompt=APPLE, model="gpt-image-1", n=2, quality="low", extra_body={"seed": 7})
    assert len(found.data) == 2
    images = [opened(one.b64_json) for one in found.data]
    assert [image.size for image in images] == [(128, 128)] * 2
    assert (found.size, found.output_format, found.background) == ("128x128", "png", "opaque")
    assert found.usage.input_tokens == found.usage.input_tokens_details.text_tokens > 3
    assert '"seed": 8' in images[1].text["sfumato"]
    assert '"steps": 10' in images[0].text["sfumato"]  # half of the model's own
    key = server.get("/api/images")["images"][0]["key"]
    assert server("GET", f"/api/images/{key}/file")[1] in [base64.b64decode(one.b64_json) for one in found.data]


def test_other_formats_carry_the_recipe_and_addresses_work(client, server):
    extra = QUICK | {"guidance_scale": 2.0, "scheduler": "euler", "negative_prompt": "blue"}
    found = client.images.generate(prompt=APPLE, output_format="jpeg", output_compression=80, extra_body=extra)
    image = opened(found.data[0].b64_json)
    assert image.format == "JPEG"
    assert "euler" in str(image.info["xmp"])
    again = client.images.generate(prompt=APPLE, response_format="url", extra_body=extra)
    status, data, _ = server("GET", again.data[0].url.removeprefix(server.url))
    assert (status, data[:4]) == (200, b"\x89PNG")


def test_partial_images_are_streamed(client):
    extra = {"num_inference_steps": 8, "seed": 7}
    events = list(client.images.generate(prompt=APPLE, stream=True, partial_images=3, extra_body=extra))
    assert [one.type for one in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [one.partial_image_index for one in events[:3]] == [0, 1, 2]
    assert {opened(one.b64_json).size for one in events} == {(128, 128)}
    assert events[-1].usage.total_tokens > 0


def test_a_streamed_error_has_its_class(client, server):
    extra = {"num_inference_steps": 300, "seed": 9}
    events = iter(client.images.generate(prompt=APPLE, stream=True, partial_images=3, extra_body=extra))
    next(events)  # the job runs
    server("DELETE", f"/api/jobs/{server.get('/api/jobs')['jobs'][0]['id']}")
    with pytest.raises(openai.APIError, match="cancelled") as caught:
        list(events)
    assert caught.value.body["type"] == "invalid_request_error"


def test_edit_without_a_mask(client):
    image = Image.new("RGB", (160, 80), "navy")
    image.save(stream := io.BytesIO(), "PNG")
    found = client.images.edit(
        image=("it.png", stream.getvalue(), "image/png"), prompt=APPLE, input_fidelity="high", extra_body=QUICK
    )
    made = opened(found.data[0].b64_json)
    assert made.size == (184, 88)  # of the model's number of pixels, in the image's shape
    assert '"strength": 0.5' in made.text["sfumato"]


def test_an_edit_may_be_json(server):
    Image.new("RGB", (128, 128), "navy").save(stream := io.BytesIO(), "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    body = {"prompt": APPLE, "images": [{"image_url": url}], "num_inference_steps": 2, "size": "128x128"}
    status, found, _ = server("POST", "/v1/images/edits", body)
    assert (status, opened(found["data"][0]["b64_json"]).size) == (200, (128, 128))
    body["images"] = [{"image_url": "https://evil.test/a.png"}]
    assert server("POST", "/v1/images/edits", body)[0] == 400


def png(image: Image.Image) -> bytes:
    image.save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def test_edit_with_a_mask(client):
    """Transparent pixels are painted, and the others stay bit for bit."""
    image, mask = Image.new("RGB", (128, 128), "navy"), Image.new("RGBA", (128, 128), "black")
    mask.paste((0, 0, 0, 0), (32, 32, 96, 96))
    found = client.images.edit(image=png(image), mask=png(mask), prompt=APPLE, extra_body=QUICK | {"seed": 3})
    made = opened(found.data[0].b64_json).convert("RGB")
    assert made.size == (128, 128)
    outside = Image.new("L", (128, 128), 255)
    outside.paste(0, (32, 32, 96, 96))
    assert ImageChops.multiply(ImageChops.difference(made, image), outside.convert("RGB")).getbbox() is None
    assert made.crop((40, 40, 90, 90)).getcolors() != [(2500, (0, 0, 128))]


@pytest.mark.parametrize(
    ("mask", "words"), [((64, 64, 0), "of the image's size"), ((128, 128, 255), "no transparent pixels")]
)
def test_masks_that_say_nothing_are_refused(client, mask, words):
    image = png(Image.new("RGB", (128, 128), "navy"))
    mask = png(Image.new("RGBA", mask[:2], (0, 0, 0, mask[2])))
    with pytest.raises(openai.BadRequestError, match=words):
        client.images.edit(image=image, mask=mask, prompt=APPLE)


def test_models(client):
    assert [one.id for one in client.models.list()] == ["built-in", "built-in/inpaint"]
    assert client.models.retrieve("gpt-image-1").id == "built-in"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


@pytest.mark.parametrize(
    ("error", "param", "fields"),
    [
        (openai.NotFoundError, "model", {"model": "sdxl-of-my-dreams"}),
        (openai.BadRequestError, "size", {"size": "100x100"}),
        (openai.BadRequestError, "size", {"size": "large"}),
        (openai.BadRequestError, "n", {"n": 11}),
        (openai.BadRequestError, "background", {"background": "transparent"}),
        (openai.BadRequestError, None, {"extra_body": {"scheduler": "nonsense", "num_inference_steps": 1}}),
    ],
)
def test_errors_have_their_classes(client, error, param, fields):
    with pytest.raises(error) as caught:
        client.images.generate(prompt=APPLE, **fields)
    assert caught.value.param == param
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.request_id


def test_a_clients_time_out_does_not_draw_twice(server, monkeypatch):
    """The first answer takes longer than the client waits: it asks again, and is given the job that it began."""
    monkeypatch.setattr("sfumato.server.waiting.GRACE", 120.0)  # however busy the machine is that tests
    before = {job["id"] for job in server.get("/api/jobs")["jobs"]}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=0.5, max_retries=20) as impatient:
        found = impatient.images.generate(prompt=APPLE, extra_body={"num_inference_steps": 25})
    made = [job for job in server.get("/api/jobs")["jobs"] if job["id"] not in before]
    assert len(made) == 1
    assert found.data[0].b64_json
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as patient:
        patient.images.generate(prompt=APPLE, extra_body={"num_inference_steps": 25})  # the same words, asked anew
    assert len(server.get("/api/jobs")["jobs"]) == len(before) + 2


def test_a_client_that_leaves_is_not_drawn_for(server, monkeypatch):
    monkeypatch.setattr("sfumato.server.waiting.GRACE", 0.1)
    leaving = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=0.3, max_retries=0)
    with leaving, pytest.raises(openai.APITimeoutError):
        leaving.images.generate(prompt=APPLE, n=10, extra_body={"num_inference_steps": 100})
    job = server.get("/api/jobs")["jobs"][0]
    began = time.monotonic()
    assert server.ended(job["id"])["state"] == "cancelled"
    assert time.monotonic() - began < 5


def test_ignored_fields_are_named_and_anybody_may_ping(server):
    body = {"prompt": APPLE, "style": "vivid", "whatever": 1, "a\r\nb": 1, "num_inference_steps": 1}
    status, _, told = server("POST", "/v1/images/generations", body)
    assert (status, told["x-sfumato-ignored"]) == (200, "a%0D%0Ab, style, whatever")
    assert server("OPTIONS", "/v1/images/generations")[0] == 204
