"""Weights: strict about every key, gentle on memory, deaf to code in pickles."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.checkpoints.weights import find_weights, pick_weights, read_headers
from sfumato.errors import CheckpointError, ConfigError, OutputError, UsageError
from support.checkpoints import TEXT, UNET, VAE, randomize

NAME = "diffusion_pytorch_model"
load = sfumato.AutoencoderKL.from_pretrained


@pytest.fixture
def folder(tmp_path) -> Path:
    randomize(sfumato.AutoencoderKL(**VAE)).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def file(folder) -> Path:
    return folder / f"{NAME}.safetensors"


def fails(folder: Path, *says: str, **options) -> None:
    """Loading fails with one sentence that holds all of these words."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in says:
        assert word in message


def test_a_round_trip_is_exact(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "again", max_shard_size=20_000)
    again = load(tmp_path / "again")
    assert again.config.to_dict() == model.config.to_dict() | {"_class_name": "AutoencoderKL", "_diffusers_version": "0.42.1"}  # fmt: skip
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert not again.training


def test_a_missing_weight(folder, file):
    state = load_file(file)
    del state["encoder.conv_in.bias"]
    save_file(state, file)
    fails(folder, str(folder), "1 weight missing", "'encoder.conv_in.bias'")


def test_a_surplus_weight(folder, file):
    save_file(load_file(file) | {"encoder.extra.weight": torch.zeros(1)}, file)
    fails(folder, "1 weight that the model does not have", "'encoder.extra.weight'", str(file))


def test_a_wrong_shape(folder, file):
    save_file(load_file(file) | {"encoder.conv_in.bias": torch.zeros(3)}, file)
    fails(folder, str(file), "'encoder.conv_in.bias'", "(3,)", "(8,)")


@pytest.mark.parametrize("keep", [0, 5, 300, -100])
def test_a_truncated_file(folder, file, keep):
    file.write_bytes(file.read_bytes()[:keep])
    fails(folder, str(file), "truncated")
    if keep >= 0:
        with pytest.raises(CheckpointError, match="truncated"):
            read_headers([file])


def test_a_missing_file(folder, file):
    file.unlink()
    fails(folder, str(folder), f"no {NAME}.safetensors")


@pytest.mark.parametrize(("content", "says"), [("", "JSON"), ("[1]", "JSON object"), ('{"a": ', "JSON"), ("\xff", "JSON")])  # fmt: skip
def test_an_unreadable_config(folder, content, says):
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    fails(folder, "config.json", says)


def test_a_missing_config(folder):
    (folder / "config.json").unlink()
    fails(folder, "config.json is missing")


def test_a_config_value_we_do_not_support(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"act_fn": "snake"}))
    with pytest.raises(ConfigError, match=r"act_fn = 'snake'"):
        load(folder)


def shard(folder: Path) -> Path:
    load(folder).save_pretrained(folder, max_shard_size=10_000)
    return folder / f"{NAME}.safetensors.index.json"


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "a/../../evil.safetensors", "C:\\evil", "..\\evil", ""])  # fmt: skip
def test_an_index_that_leads_out_of_the_folder(folder, name):
    (folder.parent / "evil.safetensors").write_bytes((folder / f"{NAME}.safetensors").read_bytes())
    index = shard(folder)
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = name
    index.write_text(json.dumps(content))
    fails(folder, repr(name), "leads out of the folder")


def test_a_shard_that_is_missing(folder):
    index = shard(folder)
    victim = sorted(folder.glob("*-of-*.safetensors"))[1]
    victim.unlink()
    fails(folder, str(victim), "is missing", index.name)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": [1]}])
def test_an_index_without_a_map(folder, content):
    index = shard(folder)
    index.write_text(json.dumps(content))
    fails(folder, str(index), "weight_map")


def test_shards_of_another_save(folder):
    """An interrupted copy over an older one: the old index, and some shards of the new save."""
    shard(folder)
    other = folder.parent / "other"
    randomize(sfumato.AutoencoderKL(**VAE), seed=1).save_pretrained(other, max_shard_size=10_000)
    name = sorted(path.name for path in folder.glob("*-of-*.safetensors"))[3]
    (folder / name).write_bytes((other / name).read_bytes())
    fails(folder, str(folder / name), "is not the file that", "index.json was saved with")
    (folder / name).unlink()
    load(other)


def test_an_index_of_others_says_nothing_of_its_shards(folder):
    index = shard(folder)
    content = json.loads(index.read_text())
    for metadata in ({"total_size": 1}, {}, None, 5, {"sfumato_sha256": [1]}):
        index.write_text(json.dumps(content | {"metadata": metadata}))
        load(folder)


def test_a_shard_that_is_a_pickle_is_not_opened(folder, file, tmp_path):
    """SPEC D3: the index chooses the names, and so must not choose the reader."""
    state = load_file(file)
    file.unlink()
    (folder / "weights.bin").write_bytes(pickle.dumps(Payload(tmp_path / "loud")))
    (folder / f"{NAME}.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(state, "weights.bin")})
    )
    for allowed in (None, True):
        fails(folder, "weights.bin", "not a safetensors file", "use_safetensors=False", use_safetensors=allowed)
    assert not (tmp_path / "loud").exists()


HEADERS = [
    {"shape": "abc"}, {"shape": [-8]}, {"shape": [[8]]}, {"shape": ["8"]}, {"shape": None}, {"shape": [8.0]}, {"shape": [2**62]},
    {"dtype": None}, {"dtype": 5}, {"dtype": "X99"}, {"dtype": "f32"}, {"data_offsets": None}, {"data_offsets": [8, 0]},
    {"data_offsets": [-8, 24]}, {"data_offsets": [0, 2**70]}, {"data_offsets": [0]}, {"data_offsets": [0, 4]},
]  # fmt: skip


def rewrite(file: Path, change) -> None:
    """The same file with another header."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize("change", HEADERS)
def test_a_header_that_cannot_be(folder, file, change):
    key = "encoder.conv_in.bias"
    rewrite(file, lambda header: header | {key: header[key] | change})
    fails(folder, str(file), "safetensors")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_headers([file])


@pytest.mark.parametrize(
    "header", [b"[]", b"{", b"5", b'{"a":' * 100_000, b'{"a":[]}', b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"]
)
def test_a_header_that_is_none(folder, file, header):
    rewrite(file, lambda _: header)
    fails(folder, str(file))
    with pytest.raises(CheckpointError):
        read_headers([file])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers(folder, file, dtype):
    save_file(load_file(file) | {"encoder.conv_in.bias": torch.zeros(8, dtype=dtype)}, file)
    fails(folder, str(file), "'encoder.conv_in.bias'", "floating-point")


@pytest.mark.skipif(os.name == "nt", reason="needs pipes and devices")
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_that_are_a_pipe_or_a_device(folder, file, suffix):
    file.unlink()
    path = folder / f"{NAME}.{suffix}"
    allowed = None if suffix == "safetensors" else False
    os.mkfifo(path)
    fails(folder, str(path), "not a regular file", use_safetensors=allowed)
    path.unlink()
    path.symlink_to("/dev/zero")
    fails(folder, str(path), "not a regular file", use_safetensors=allowed)


@pytest.mark.parametrize("size", ["x", None, [1], 1.5])
def test_a_size_of_shards_that_is_none(folder, tmp_path, size):
    with pytest.raises(UsageError, match="max_shard_size"):
        load(folder).save_pretrained(tmp_path / "again", max_shard_size=size)
    assert load(folder)


@pytest.mark.parametrize("dtype", ["float16", torch.int8, 5])
def test_a_dtype_that_is_none(folder, dtype):
    with pytest.raises(UsageError, match="dtype must be a precision"):
        load(folder, torch_dtype=dtype)


def test_a_key_in_two_shards(folder):
    shard(folder)
    first, second = sorted(folder.glob("*-of-*.safetensors"))[:2]
    stolen = dict(list(load_file(first).items())[:1])
    save_file(load_file(second) | stolen, second)
    fails(folder, repr(next(iter(stolen))), "twice")


class Payload:
    """Unpickles by running a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [f"{NAME}.bin", f"{NAME}.ckpt"])
def test_a_pickle_never_runs_code(folder, file, tmp_path, name):
    """SPEC D3. That the payload would run is shown first, so that its silence means something."""
    state = load_file(file)
    file.unlink()
    torch.save(state | {"evil": Payload(tmp_path / "loud")}, folder / name)
    torch.load(folder / name, weights_only=False)
    assert (tmp_path / "loud").is_dir()
    (tmp_path / "loud").rmdir()
    for allowed in (None, True):
        fails(folder, "pickled weights", name, "use_safetensors=False", use_safetensors=allowed)
    fails(folder, name, "safetensors version", use_safetensors=False)
    assert not (tmp_path / "loud").exists()
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "loud")))
    fails(folder, name, use_safetensors=False)
    assert not (tmp_path / "loud").exists()


def test_a_harmless_pickle_is_read_when_asked_for(folder, file):
    state = load_file(file)
    file.unlink()
    torch.save({"state_dict": state}, folder / f"{NAME}.bin")
    assert torch.equal(load(folder, use_safetensors=False).state_dict()["encoder.conv_in.bias"], state["encoder.conv_in.bias"])  # fmt: skip
    torch.save({"step": 3}, folder / f"{NAME}.bin")
    fails(folder, "does not contain named tensors", use_safetensors=False)


def test_safetensors_go_before_pickles(folder, file):
    torch.save({"x": torch.zeros(1)}, folder / f"{NAME}.bin")
    assert find_weights(folder, NAME) == [file]
    assert find_weights(folder, NAME, use_safetensors=False) == [folder / f"{NAME}.bin"]


@pytest.mark.parametrize(
    ("names", "variant", "picked"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None, "model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", "model.fp16.safetensors"),
        (["model.safetensors"], "fp16", "model.safetensors"),
        (["model.fp16.safetensors"], None, None),
        (["model.safetensors.index.json"], None, "model.safetensors.index.json"),
        (["model.safetensors", "model.safetensors.index.fp16.json"], "fp16", "model.safetensors.index.fp16.json"),
        (["pytorch_model.bin"], None, None),
        ([], None, None),
    ],
)
def test_which_file_is_picked(names, variant, picked):
    assert pick_weights(names, "model", variant=variant) == picked


def test_headers_tell_sizes_without_reading(file):
    headers = read_headers([file])
    state = load_file(file)
    assert headers.keys() == state.keys()
    assert all(headers[key].bytes == value.nbytes and headers[key].count == value.numel() for key, value in state.items())  # fmt: skip


def test_no_space_left_leaves_nothing_behind(tmp_path, monkeypatch):
    import errno

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    import safetensors.torch

    model = sfumato.AutoencoderKL(**VAE)

    def half_then_full(state, path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        full()

    monkeypatch.setattr(safetensors.torch, "save_file", half_then_full)
    with pytest.raises(OutputError, match="no space left") as caught:
        model.save_pretrained(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        sfumato.AutoencoderKL(**VAE).save_pretrained(tmp_path / "file" / "below")


PROBE = """
import sys, torch
from pathlib import Path
import safetensors
import sfumato
from sfumato import CLIPTextModel

def status(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":"))
    return int(line.split()[1]) * 1024

small, large, dtype = sys.argv[1:]
dtype = getattr(torch, dtype)
CLIPTextModel.from_pretrained(small, dtype=dtype)  # whatever is imported or set up once
before, anonymous = status("VmRSS"), status("RssAnon")
model = CLIPTextModel.from_pretrained(large, dtype=dtype)
peak, anonymous = status("VmHWM") - before, status("RssAnon") - anonymous
size = sum(p.nbytes for p in model.parameters())
assert all(p.dtype == dtype and float(p.flatten()[-1]) == 0.5 for p in model.parameters())
print(size, peak, anonymous)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A text encoder of 114 million parameters, in each precision."""
    root = tmp_path_factory.mktemp("large")
    sfumato.CLIPTextModel(**TEXT).save_pretrained(root / "small")
    config = TEXT | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 16}
    with torch.device("meta"):
        model = sfumato.CLIPTextModel(**config)
    model = model.to_empty(device="cpu")
    for value in model.parameters():
        torch.nn.init.constant_(value, 0.5)
    for dtype in ("float32", "float16"):
        model.to(getattr(torch, dtype)).save_pretrained(root / dtype)
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status, which only Linux has")
@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("float16", "float32"), ("float32", "bfloat16"), ("float32", "float32"), ("float16", "float16")],
)
def test_memory_while_loading(large, stored, wanted):
    """At most 1.1 times the bytes of the loaded precision; and what is kept as it is stored is not copied at all."""
    command = [sys.executable, "-c", PROBE, str(large / "small"), str(large / stored), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, peak, anonymous = map(int, done.stdout.split())
    assert size > 210 * 2**20
    assert peak <= 1.1 * size
    if stored == wanted:
        assert anonymous < 0.05 * size


def test_unet_and_text_encoder_are_as_strict(tmp_path):
    """The base class is shared; one key each shows that no model goes around it."""
    for model, key in ((sfumato.UNet2DConditionModel(**UNET), "conv_in.weight"), (sfumato.CLIPTextModel(**TEXT), "text_model.final_layer_norm.bias")):  # fmt: skip
        target = tmp_path / type(model).__name__
        model.save_pretrained(target)
        file = next(target.glob("*.safetensors"))
        state = load_file(file)
        del state[key]
        save_file(state, file)
        with pytest.raises(CheckpointError, match=key):
            type(model).from_pretrained(target)


def test_a_folder_of_variants_only_says_which(tmp_path):
    from sfumato.checkpoints.weights import find_weights

    (tmp_path / "model.fp16.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors, but the variant 'fp16'; .*--variant fp16"):
        find_weights(tmp_path, "model")
    assert find_weights(tmp_path, "model", variant="fp16") == [tmp_path / "model.fp16.safetensors"]
