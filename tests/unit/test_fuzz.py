"""Whatever a file says: it is read, or refused in one sentence; never a crash, a hang, or the memory gone.

Each test changes a good file in a way that hypothesis makes up, and reads it as the commands do.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import sfumato
from sfumato import GenerateRequest
from sfumato.adapters.about import about_adapter, is_adapter
from sfumato.adapters.adapter import read_adapter
from sfumato.adapters.files import read_stored
from sfumato.adapters.names import ENDINGS
from sfumato.adapters.outfit import Worn, wear
from sfumato.checkpoints.suggested import suggested_settings
from sfumato.checkpoints.weights import read_headers, without_weights
from sfumato.configs import (
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    CLIPTextConfig,
    UNet2DConditionConfig,
)
from sfumato.errors import SfumatoError
from sfumato.images import open_image
from sfumato.metadata.carriers import read_recipe, save_picture
from sfumato.metadata.formats import is_picture
from sfumato.metadata.remember import remember
from sfumato.pipelines.components import read_index, scheduler_from_recipe
from sfumato.pipelines.recipe import checked
from sfumato.pipelines.sizes import read_sizes
from sfumato.pipelines.words import Words
from sfumato.schedulers.configs import CONFIGS
from support.checkpoints import TEXT, UNET, VAE, randomize, write_tokenizer

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SECONDS = 5  # far more than any takes, on a busy machine too

numbers = (
    st.integers(-2, 2**20)
    | st.sampled_from([10**8, 10**12, 2**63, 10**30, 10**400, -(10**12)])
    | st.floats()
    | st.sampled_from([0.0, -0.0, 1e-30, 1e308, 0.5])
)
plain = (
    st.none()
    | st.booleans()
    | numbers
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "\x1b[2J\n", "x" * 5000, "192"])
)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def survives(read: Any, *arguments: Any) -> Any:
    """What it gives; None where it refuses, in one sentence and soon."""
    began = time.monotonic()
    said, result = "a sentence", None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = read(*arguments)
    except SfumatoError as error:
        said = str(error)
    assert said
    assert "\n" not in said
    assert time.monotonic() - began < SECONDS
    return result


def write(path: Path, value: object) -> None:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    path.write_bytes(text)


MODELS = [
    (sfumato.CLIPTextModel, CLIPTextConfig, TEXT),
    (sfumato.UNet2DConditionModel, UNet2DConditionConfig, UNET),
    (sfumato.AutoencoderKL, AutoencoderKLConfig, VAE),
    (sfumato.AutoencoderTiny, AutoencoderTinyConfig, {}),
]


@pytest.mark.parametrize(("model", "config", "good"), MODELS, ids=lambda one: getattr(one, "__name__", ""))
@FEW
@given(data=st.data())
def test_configs(model, config, good, data):
    keys = [field.name for field in dataclasses.fields(config)]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), values, min_size=1, max_size=2))

    def build() -> None:
        with without_weights():
            model.from_config(good | changes)

    survives(build)


@FEW
@given(name=st.sampled_from(sorted(CONFIGS)), data=st.data())
def test_schedulers(name, data):
    keys = sorted(
        {*CONFIGS[name], "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"}
        - {"solver_p"}
    )
    likely = st.booleans() | st.sampled_from(
        ["leading", "trailing", "heun", "zero", "scaled_linear", "epsilon", 2, 3, 50, 999]
    )
    changes = data.draw(st.dictionaries(st.sampled_from(keys), values | likely, min_size=1, max_size=3))
    steps = data.draw(st.integers(1, 60))

    def run() -> Any:
        scheduler = scheduler_from_recipe(name, changes)
        scheduler.set_timesteps(steps)
        return scheduler.table()

    table = survives(run)
    assert table is None or len(table.rows) >= 1


@FEW
@given(name=st.sampled_from(["model_index.json", "sfumato.json", "words.json"]), data=st.data())
def test_a_checkpoint_s_own_files(tmp_path, name, data):
    keys = {"model_index.json": ["_class_name", "unet", "vae", "scheduler", "safety_checker"], "sfumato.json": ["steps", "guidance_scale", "seed"], "words.json": ["concepts", "styles"]}[name]  # fmt: skip
    whole = data.draw(st.booleans())
    write(tmp_path / name, data.draw(st.dictionaries(st.sampled_from(keys), values) if whole else values))
    read = {"model_index.json": read_index, "sfumato.json": suggested_settings, "words.json": Words.from_folder}[name]
    found = survives(read, tmp_path)
    if name == "sfumato.json" and found:
        assert GenerateRequest(**found)
    if name == "words.json" and found:
        assert found.notes(["zebra"]) is not None


@FEW
@given(
    content=st.binary(max_size=60)
    | st.sampled_from([b"", b"[" * 10**5, b'{"a":' * 10**5, b"\xff", b"nul\0", b'{"a":1e999}'])
)
def test_bytes_in_place_of_json(tmp_path, content):
    for name in ("model_index.json", "sfumato.json", "words.json"):
        write(tmp_path / name, content)
    for read in (read_index, suggested_settings, Words.from_folder, read_sizes):
        survives(read, tmp_path)


@FEW
@given(data=st.data())
def test_headers(tmp_path, data):
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    changed = entry | data.draw(st.dictionaries(st.sampled_from([*entry, "more"]), values, max_size=2))
    header = data.draw(
        st.sampled_from([{"a": changed}, {"a": entry, "b": changed}, {"__metadata__": changed, "a": entry}, changed])
        | values
    )
    text = json.dumps(header).encode()
    length = data.draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(data.draw(st.integers(0, 40))))
    found = survives(read_headers, [path])
    size = os.path.getsize(path)
    assert found is None or all(one.bytes <= size for one in found.values())

    def load() -> None:
        sfumato.CLIPTextModel.from_folder(tmp_path)

    write(tmp_path / "config.json", TEXT)
    survives(load)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@FEW
@given(data=st.data())
def test_tokenizers(tokenizer_folder, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("t")
    for path in tokenizer_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    name = data.draw(
        st.sampled_from(
            ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"]
        )
    )
    if name == "merges.txt":
        lines = (folder / name).read_bytes().splitlines(keepends=True)
        lines[data.draw(st.integers(0, len(lines) - 1))] = data.draw(
            st.binary(max_size=12) | st.sampled_from([b"a b c\n", b" a\n", b"\n"])
        )
        (folder / name).write_bytes(b"".join(lines[: data.draw(st.integers(0, len(lines)))]))
    else:
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        if name == "tokenizer.json":
            (folder / "vocab.json").unlink()
        keys = {"vocab.json": st.sampled_from(sorted(vocab)) | st.text(max_size=3), "tokenizer.json": st.sampled_from(["model", "added_tokens", "normalizer"])}  # fmt: skip
        key = keys.get(
            name, st.sampled_from(["pad_token", "bos_token", "unk_token", "model_max_length", "added_tokens_decoder"])
        )
        good = {"vocab.json": vocab, "tokenizer.json": {"model": {"type": "BPE", "vocab": vocab, "merges": []}}}.get(
            name, {}
        )
        write(
            folder / name,
            data.draw(
                st.dictionaries(key, values, min_size=1, max_size=2).map(lambda changes: good | changes) | values
            ),
        )
    tokenizer = survives(sfumato.CLIPTokenizer.from_folder, folder)
    if tokenizer is not None:
        assert tokenizer.fitted("the cat").input_ids.max() <= tokenizer.largest_id


RECIPE = {
    "request": {"prompt": "a cat", "steps": 2, "seed": 0, "width": 16, "height": 16},
    "model": {"name": "built-in", "weights": "0"},
    "scheduler": {"class": "DDIMScheduler", "config": {"beta_start": 0.001}},
    "dtype": "float32",
}


@FEW
@given(data=st.data())
def test_recipes(tmp_path, data):
    part = data.draw(st.sampled_from(["request", "model", "scheduler"]))
    fields = {"request": [field.name for field in dataclasses.fields(GenerateRequest)], "model": ["name", "weights"], "scheduler": ["class", "config"]}[part]  # fmt: skip
    changes = data.draw(st.dictionaries(st.sampled_from(fields), values, max_size=2))
    told = data.draw(st.sampled_from([RECIPE | {part: RECIPE[part] | changes}, {"request": changes}, changes]) | values)
    info = PngInfo()
    info.add_itxt("sfumato", json.dumps(told), zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    recipe = survives(read_recipe, tmp_path / "a.png")
    if recipe is not None:
        survives(checked, recipe, tmp_path / "a.png")


PICTURES = {}
for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
    PICTURES[kind] = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@FEW
@given(kind=st.sampled_from(sorted(PICTURES)), data=st.data())
def test_pictures(tmp_path, kind, data):
    Image.fromarray(PICTURES[kind]).save(tmp_path / "a", format=kind)
    content = bytearray((tmp_path / "a").read_bytes())
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "a").write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    for read in (open_image, read_recipe, remember):
        survives(read, tmp_path / "a")


@FEW
@given(data=st.data())
def test_requests(data):
    fields = [field.name for field in dataclasses.fields(GenerateRequest)]
    survives(
        GenerateRequest.from_dict,
        data.draw(st.dictionaries(st.sampled_from(fields) | st.text(max_size=5), values, max_size=4)),
    )


# What is put into the texts of pictures, and what overwrites four bytes of their files.
PIECES = ["{", "}", "[", '"', "\\", ",", ":", "\n", "Steps: ", "Negative prompt: ", "9" * 400, "-1", "NaN", "1e999", "[[" * 50, "<lora:x:", "Hires upscale: 1e400, ", "Size: 99999999999x1, ", 'Lora hashes: "a: ', "\ud7ff"]  # fmt: skip
SIZES = [b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4)]


def mutated_text(dice: random.Random, text: str) -> str:
    for _ in range(dice.randint(1, 8)):
        place, kind = dice.randint(0, len(text)), dice.random()
        if kind < 0.6:
            text = text[:place] + dice.choice(PIECES) + text[place:]
        else:
            text = text[:place] + text[place + dice.randint(1, 40) :]
    return text


def mutated_bytes(dice: random.Random, data: bytearray) -> None:
    for _ in range(dice.randint(1, 12)):
        place, kind = dice.randrange(min(len(data), 3000)), dice.random()
        if kind < 0.5:
            data[place] = dice.randint(0, 255)
        elif kind < 0.7:
            data[place : place + 4] = dice.choice(SIZES)
        else:
            del data[place : place + dice.randint(1, 500)]
        data += b"" if data else b"x"


def test_thousands_of_mutated_pictures(tmp_path):
    """All that others and we write, with texts and bytes that are changed: soon, and without much memory."""
    pictures = [path for path in sorted((Path(__file__).parents[1] / "data" / "metadata").iterdir()) if is_picture(path.name)]  # fmt: skip
    recipe = {"request": {"prompt": "a fox", "seed": 1, "hires": {"scale": 2}}, "model": {"name": "m"}, "notes": ["x"]}
    for ending in ("png", "jpg", "webp"):
        pictures.append(save_picture(Image.new("RGB", (64, 48)), tmp_path / f"own.{ending}", recipe))
    texts = {}
    for path in pictures:
        with Image.open(path) as image:
            texts[path] = {key: str(value) for key, value in getattr(image, "text", {}).items()}
    began, read = peak_memory(), 0
    for number in range(2000):
        dice = random.Random(number)
        path = dice.choice(pictures)
        data = bytearray(path.read_bytes())
        if texts[path] and dice.random() < 0.6:
            info = PngInfo()
            for key, value in texts[path].items():
                info.add_itxt(key, mutated_text(dice, value[:20_000]))
            Image.new("RGB", (32, 32)).save(stream := io.BytesIO(), "PNG", pnginfo=info)
            data = bytearray(stream.getvalue())
        if dice.random() < 0.5:
            mutated_bytes(dice, data)
        (tmp_path / f"mutated{path.suffix}").write_bytes(data)
        found = survives(remember, tmp_path / f"mutated{path.suffix}")
        read += found is not None and isinstance(found.adapter_hashes, dict)
    assert read > 200
    assert peak_memory() - began < 2**28


def peak_memory() -> int:
    """The most bytes that this process has held; 0 where that is not known."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


LAYERS = ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "unet.down_blocks.0.resnets.0.conv1")
KINDS_OF_NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn)
tensors = st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), st.lists(st.integers(0, 33), max_size=5), st.sampled_from(KINDS_OF_NUMBERS))  # fmt: skip
told = st.dictionaries(st.sampled_from(["lora_adapter_metadata", "unet", "ss_tag_frequency", "sshs_model_hash", "modelspec.architecture"]), st.sampled_from(["{", "[1]", '{"unet.r": "x", "unet.lora_alpha": []}', '{"unet.r": 0, "unet.lora_alpha": 3}', "[[" * 5000]), max_size=2)  # fmt: skip


@FEW
@given(
    parts=st.dictionaries(st.builds("{}.{}".format, st.sampled_from(LAYERS), st.sampled_from(list(ENDINGS)))
                          | st.sampled_from(["unet:3:up", "unet:99999:down", "bundle_emb.x.clip_l", "<s1>", "x"]),
                          tensors, min_size=1, max_size=5),
    metadata=told,
)  # fmt: skip
def test_any_adapter_is_worn_or_refused(parts, metadata, small, tmp_path):
    path, own = tmp_path / "a.safetensors", {name: one.clone() for name, one in small.state_dict().items()}
    save_file(parts, path, metadata)
    survives(is_adapter, path)
    survives(about_adapter, path)
    adapter = survives(lambda: read_adapter(read_stored(path), {"unet": small}, partial=True))
    for worn in ([] if adapter is None else [Worn(adapter, 0.5)], []):
        wear(small, "unet", worn)
    assert all(torch.equal(one, own[name]) for name, one in small.state_dict().items())


@pytest.fixture(scope="module")
def small():
    return randomize(sfumato.UNet2DConditionModel(**UNET))
