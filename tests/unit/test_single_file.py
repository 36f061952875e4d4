"""One file as a checkpoint: its parts, precisions, what is beside it, what is wrong with it; and written again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.checkpoints.locate_file import locate_file
from sfumato.checkpoints.single_file import open_single_file
from sfumato.checkpoints.write_file import original_state, write_single_file
from sfumato.errors import CheckpointError, DownloadError, OutputError, UsageError
from sfumato.families import FAMILIES
from support.checkpoints import TEXT, VAE, randomize
from support.hub import FakeHub, cache
from support.single_files import TINY, parts_of, same_state

UNET = "model.diffusion_model."


def changed(file: Path, to: Path, change) -> Path:
    """A copy of a file whose tensors went through `change`."""
    state = load_file(file)
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    save_file({key: value.contiguous() for key, value in change(state).items()}, to, metadata)
    return to


def unet(file, folder, **options):
    return sfumato.UNet2DConditionModel.from_single_file(file, config=folder, **options)


def test_precisions(written, tmp_path):
    parts, file, folder = written()
    assert unet(file, folder).dtype == torch.float32
    for keyword in ("torch_dtype", "dtype"):
        assert unet(file, folder, **{keyword: torch.bfloat16}).dtype == torch.bfloat16
    # Halves with a few numbers in full, as merges have them: one precision, that of most.
    mixed = changed(file, tmp_path / "mixed.safetensors", lambda state: {key: value if value.ndim == 1 else value.half() for key, value in state.items()})  # fmt: skip
    model = unet(mixed, folder)
    assert {value.dtype for value in model.parameters()} == {torch.float16}
    wide = unet(mixed, folder, torch_dtype=torch.float32)
    key = "down_blocks.0.resnets.0.norm1.weight"
    assert torch.equal(wide.state_dict()[key], parts["unet"].state_dict()[key])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [None, "scale_weight", "weight_scale", "rows"])
def test_eight_bits(dtype, scale, written, tmp_path):
    _, file, folder = written()
    expected = {}

    def narrow(state):
        found = {}
        for key, value in state.items():
            if value.ndim < 2 or not key.startswith(UNET):
                found[key] = value.half()
                continue
            factor = torch.ones([])
            if scale is not None:
                factor = value.abs().amax() / 8 if scale != "rows" else value.abs().flatten(1).amax(1) / 8
            spread = factor.view(-1, *[1] * (value.ndim - 1)) if factor.ndim else factor
            found[key] = (value / spread).to(dtype)
            expected[key.removeprefix(UNET)] = found[key].float() * spread
            if scale is not None:
                found[key.removesuffix("weight") + (scale if scale != "rows" else "scale_weight")] = factor
                found[key.removesuffix("weight") + "scale_input"] = torch.ones([])
        if scale is not None:
            found[f"{UNET}scaled_fp8"] = torch.zeros(2, dtype=dtype)
        return found

    small = changed(file, tmp_path / "small.safetensors", narrow)
    model = unet(small, folder, torch_dtype=torch.float32)
    read = original_state(model, "original")
    assert expected
    assert all(torch.equal(read[key], value) for key, value in expected.items())
    assert unet(small, folder).dtype == torch.float16


def test_averaged_weights(written, tmp_path):
    _, file, folder = written()

    def with_averages(state):
        own = {key: value for key, value in state.items() if key.startswith(UNET)}
        return state | {"model_ema." + key.removeprefix("model.").replace(".", ""): value + 1 for key, value in own.items()}  # fmt: skip

    both = changed(file, tmp_path / "both.safetensors", with_averages)
    plain, averaged = unet(both, folder), unet(both, folder, ema=True)
    assert torch.equal(averaged.conv_in.weight, plain.conv_in.weight + 1)
    assert same_state(plain, written()[0]["unet"].state_dict())
    with pytest.raises(CheckpointError, match="weights missing"):
        unet(file, folder, ema=True)


def test_what_is_said_of_parts_that_are_not_there(written, tmp_path):
    _, file, folder = written("sdxl")
    bare = changed(file, tmp_path / "bare.safetensors", lambda state: {key: value for key, value in state.items() if key.startswith((UNET, "conditioner.embedders.0"))})  # fmt: skip
    assert set(open_single_file(bare).detected.missing) == {"vae", "text_encoder_2"}
    for cls, words in (
        (
            sfumato.AutoencoderKL,
            r"no VAE; pass one with vae=…, or use config=… \(--config\) with the folder of a Stable Diffusion XL",
        ),
        (sfumato.CLIPTextModelWithProjection, r"no text encoder \(OpenCLIP bigG\); pass one with text_encoder_2=…"),
    ):
        with pytest.raises(CheckpointError, match=words):
            cls.from_single_file(bare, config=folder)
    assert sfumato.CLIPTextModel.from_single_file(bare, config=folder).config.hidden_size == TEXT["hidden_size"]
    with pytest.raises(CheckpointError, match="checkpoint has no text_encoder_2"):
        sfumato.CLIPTextModelWithProjection.from_single_file(written()[1], config=written()[2])


def test_weights_that_are_missing_left_over_or_of_another_shape(written, tmp_path):
    _, file, folder = written()
    key = f"{UNET}middle_block.1.norm.bias"
    short = changed(file, tmp_path / "short.safetensors", lambda state: {k: v for k, v in state.items() if k != key})
    with pytest.raises(CheckpointError, match=rf"unet: 1 weight missing, the first is '{key}'; .* family sd15"):
        unet(short, folder)
    more = changed(file, tmp_path / "more.safetensors", lambda state: state | {f"{UNET}input_blocks.1.0.zebra": state[key] + 1})  # fmt: skip
    with pytest.raises(CheckpointError, match=r"unet: 1 weight that .* does not have: .*zebra; the file is mixed"):
        unet(more, folder)
    shape = changed(file, tmp_path / "shape.safetensors", lambda state: state | {key: torch.zeros(3)})
    with pytest.raises(CheckpointError, match=rf"'{key}' makes \(3,\), where Stable Diffusion 1.x has \(32,\)"):
        unet(shape, folder)
    # Without the configs of something so small, it is no real model.
    with pytest.raises(
        CheckpointError, match=r"text encoder: \d+ weights missing, .*; the file is incomplete, or not of"
    ):
        sfumato.CLIPTextModel.from_single_file(file)
    for name in ("cond_stage_model.transformer.text_model.embeddings.position_ids", "model_ema.decay", "betas", f"{UNET}logit_scale"):  # fmt: skip
        extra = changed(
            file, tmp_path / "extra.safetensors", lambda state, name=name: state | {name: torch.zeros(1, 20)}
        )
        assert sfumato.CLIPTextModel.from_single_file(extra, config=folder).dtype == torch.float32


def test_names_of_the_first_merges(written, tmp_path):
    parts, file, folder = written()
    old = changed(file, tmp_path / "old.safetensors", lambda state: {key.replace(".transformer.text_model.", ".transformer."): value for key, value in state.items()})  # fmt: skip
    assert same_state(sfumato.CLIPTextModel.from_single_file(old, config=folder), parts["text_encoder"].state_dict())


def test_a_projection_that_is_not_transposed(written, tmp_path):
    parts, file, folder = written("sdxl")
    name = "conditioner.embedders.1.model.text_projection"
    ported = changed(file, tmp_path / "port.safetensors", lambda state: {(f"{key}.weight" if key == name else key): (value.t() if key == name else value) for key, value in state.items()})  # fmt: skip
    model = sfumato.CLIPTextModelWithProjection.from_single_file(ported, config=folder)
    assert same_state(model, parts["text_encoder_2"].state_dict())


def test_a_model_of_a_file_is_saved_and_read_again(written, tmp_path):
    parts, file, folder = written("sdxl")
    model = sfumato.CLIPTextModelWithProjection.from_single_file(file, config=folder)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again = sfumato.CLIPTextModelWithProjection.from_pretrained(tmp_path)
    assert same_state(again, parts["text_encoder_2"].state_dict())


def test_a_model_of_a_file_can_go_and_come_back(written):
    parts, file, folder = written()
    model = unet(file, folder, torch_dtype=torch.bfloat16)
    assert model.can_reload
    model.forget()
    assert model.device.type == "meta"
    model.reload()
    assert torch.equal(model.conv_in.weight, parts["unet"].conv_in.weight.bfloat16())
    later = sfumato.UNet2DConditionModel.from_file(open_single_file(file, config=folder), later=True)
    assert (later.device.type, later.dtype) == ("meta", torch.float32)
    later.reload()
    assert same_state(later, parts["unet"].state_dict())


def test_a_vae_beside_a_checkpoint(written, tmp_path, caplog):
    parts, file, folder = written()
    (tmp_path / "tiny[1].safetensors").write_bytes(file.read_bytes())
    other = randomize(sfumato.AutoencoderKL(**VAE), seed=9)
    save_file(other.state_dict(), tmp_path / "tiny[1]-anything.vae.safetensors")
    opened = open_single_file(tmp_path / "tiny[1].safetensors", config=folder)
    assert "using the VAE of tiny[1]-anything.vae.safetensors" in caplog.text
    vae = sfumato.AutoencoderKL.from_file(opened)
    assert same_state(vae, other.state_dict())
    assert same_state(sfumato.UNet2DConditionModel.from_file(opened), parts["unet"].state_dict())
    # A VAE that is asked for is the one asked for.
    asked = sfumato.AutoencoderKL.from_single_file(tmp_path / "tiny[1].safetensors", config=folder)
    assert same_state(asked, parts["vae"].state_dict())


def test_the_scale_of_latents_is_the_familys(tmp_path):
    """Autoencoders of Stable Diffusion 1 and XL have the same shapes."""
    for name, scale in (("sd15", 0.18215), ("sdxl", 0.13025)):
        with torch.device("meta"):
            vae = sfumato.AutoencoderKL(**FAMILIES[name].vae)
        state = {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in vae.state_dict().items()}
        save_file(state, tmp_path / "vae.safetensors")
        model = sfumato.AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", family=name)
        assert model.config.scaling_factor == scale
    with pytest.raises(CheckpointError, match=r"is an autoencoder \(VAE\), not a checkpoint"):
        sfumato.UNet2DConditionModel.from_single_file(tmp_path / "vae.safetensors")


def test_the_configuration_beside_a_file(written, tmp_path):
    _, file, _ = written()
    path = tmp_path / "anime.safetensors"
    path.write_bytes(file.read_bytes())
    with safe_open(path, framework="pt") as stored:
        state = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    save_file(state, path)  # without metadata
    assert open_single_file(path).detected.scheduler.get("prediction_type", "epsilon") == "epsilon"
    (tmp_path / "v.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    given = open_single_file(path, original_config=tmp_path / "v.yaml")
    (tmp_path / "v.yaml").rename(tmp_path / "anime.yaml")
    for opened in (given, open_single_file(path)):
        assert opened.detected.scheduler["prediction_type"] == "v_prediction"
    with pytest.raises(CheckpointError, match=r"none\.yaml cannot be read"):
        open_single_file(path, original_config=tmp_path / "none.yaml")


def test_pickles_only_when_asked(written, tmp_path):
    parts, file, folder = written()
    state = load_file(file)
    for suffix, nested in ((".ckpt", {"state_dict": {"state_dict": state}}), (".pt", state)):
        path = tmp_path / f"old{suffix}"
        torch.save(nested, path)
        for options in ({}, {"use_safetensors": True}):
            with pytest.raises(CheckpointError, match=r"pickled weights.*if you trust.*use_safetensors=False"):
                unet(path, folder, **options)
        model = unet(path, folder, use_safetensors=False)
        assert same_state(model, parts["unet"].state_dict())
    (tmp_path / "bad.ckpt").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="cannot be read as plain weights"):
        unet(tmp_path / "bad.ckpt", folder, use_safetensors=False)


def test_tensors_by_name(written):
    parts, file, folder = written()
    assert same_state(unet(load_file(file), folder), parts["unet"].state_dict())


REPO = "owner/name"


@pytest.mark.parametrize(
    "name",
    [
        f"{REPO}/deep/tiny.safetensors",
        f"https://huggingface.co/{REPO}/blob/main/deep/tiny.safetensors",
        f"https://huggingface.co/{REPO}/resolve/main/deep/tiny.safetensors?download=true",
        f"huggingface.co/{REPO}/blob/main/deep/tiny.safetensors",
        f"hf.co/{REPO}/deep/tiny.safetensors",
    ],
)
def test_a_file_of_the_hub(name, written, tmp_path, monkeypatch):
    parts, file, folder = written()
    remote = tmp_path / "remote"
    (remote / "deep").mkdir(parents=True)
    (remote / "deep" / "tiny.safetensors").write_bytes(file.read_bytes())
    (remote / "deep" / "other.safetensors").write_bytes(b"large and not needed")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub = FakeHub(monkeypatch, tmp_path / "cache", {REPO: remote})
    with pytest.raises(DownloadError, match="not completely in the local cache"):
        locate_file(name, local_files_only=True)
    assert hub.asked == []
    assert same_state(unet(name, folder), parts["unet"].state_dict())
    revision = "main" if "/main/" in name else None
    assert hub.asked == [("list", REPO, revision), ("download", REPO, ("deep/tiny.safetensors",))]
    hub.asked.clear()
    assert locate_file(name, local_files_only=True).read_bytes() == file.read_bytes()
    assert hub.asked == []


def test_names_of_no_file(written, tmp_path):
    for name, error, words in (
        (tmp_path / "none.safetensors", CheckpointError, "there is no file"),
        ("./none.safetensors", CheckpointError, "there is no file"),
        ("none.safetensors", CheckpointError, "there is no file none.safetensors; give a path, or a hub id"),
        ("https://example.com/a/b/c.safetensors", UsageError, "is not a huggingface.co URL"),
    ):
        with pytest.raises(error, match=words):
            locate_file(name)
    snapshot = cache(tmp_path / "cache", REPO, written()[1].parent, ["tiny.safetensors"])
    assert locate_file(f"{REPO}/tiny.safetensors", cache_dir=tmp_path / "cache", local_files_only=True) == snapshot / "tiny.safetensors"  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_what_is_written_says_what_it_is(name, tmp_path):
    tiny = TINY[name]
    parts = parts_of(tiny)
    scheduler = tiny.scheduler
    if tiny.row.sizes:
        scheduler = scheduler | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    write_single_file(tmp_path / "new.safetensors", tiny.row, parts, scheduler)
    found = open_single_file(tmp_path / "new.safetensors").detected
    assert found.family.name == name
    for key in ("prediction_type", "rescale_betas_zero_snr"):
        assert found.scheduler.get(key) == scheduler.get(key)
    write_single_file(tmp_path / "again.safetensors", tiny.row, parts, scheduler)
    one, two = (load_file(tmp_path / file) for file in ("new.safetensors", "again.safetensors"))
    assert one.keys() == two.keys()


def test_what_cannot_be_written(tmp_path):
    tiny = TINY["sd15"]
    parts = parts_of(tiny)
    with pytest.raises(UsageError, match="cannot be written as a single file"):
        write_single_file(tmp_path / "x.safetensors", FAMILIES["x2-upscaler"], parts, {})
    with pytest.raises(OutputError):
        write_single_file(tmp_path / "none" / "x.safetensors", tiny.row, parts, tiny.scheduler)
    assert list(tmp_path.iterdir()) == []


PROBE = """
import sys, torch
from pathlib import Path
from sfumato import CLIPTextModelWithProjection as Model

def status(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key + ":"))
    return int(line.split()[1]) * 1024

small, large, dtype = sys.argv[1:]
dtype = getattr(torch, dtype)
Model.from_single_file(small, config=Path(small).parent / "folder", dtype=dtype)  # whatever is set up once
before, anonymous = status("VmRSS"), status("RssAnon")
model = Model.from_single_file(large, config=Path(large).parent, dtype=dtype)
peak, anonymous = status("VmHWM") - before, status("RssAnon") - anonymous
size = sum(p.nbytes for p in model.parameters())
assert all(p.dtype == dtype and float(p.flatten()[-1]) == 0.5 for p in model.parameters())
print(size, peak, anonymous)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status, which only Linux has")
@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "bfloat16"), ("float16", "float32"), ("float16", "float16")]
)
def test_memory_while_loading(stored, wanted, written, tmp_path):
    """At most 1.1 times what is loaded, fused and transposed weights included; what keeps its precision is mapped."""
    config = TEXT | {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 16, "projection_dim": 768}  # fmt: skip
    with torch.device("meta"):
        model = sfumato.CLIPTextModelWithProjection(**config)
    model = model.to_empty(device="cpu").to(getattr(torch, stored))
    for value in model.parameters():
        torch.nn.init.constant_(value, 0.5)
    _, small, folder = written("sdxl")
    state = {key: value for key, value in load_file(small).items() if "embedders.1" not in key}
    state |= original_state(model, "open_clip", "conditioner.embedders.1.model.")
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "large.safetensors")
    model.save_pretrained(tmp_path / "text_encoder_2")
    command = [sys.executable, "-c", PROBE, small, tmp_path / "large.safetensors", wanted]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    size, peak, anonymous = map(int, done.stdout.split())
    assert size > 210 * 2**20
    assert peak <= 1.1 * size
    if stored == wanted:
        assert anonymous < 0.05 * size
    assert folder.is_dir()
