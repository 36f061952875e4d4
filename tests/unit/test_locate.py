"""Where files come from: a folder, the cache, the hub, in this order, and never further than needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.errors import CheckpointError, DownloadError, SfumatoError, UnknownArgument
from support.hub import FakeHub, cache

REPO = "owner/name"
load = sfumato.DiffusionPipeline.from_pretrained


@pytest.fixture
def with_halves(checkpoints, tmp_path) -> Path:
    folder = tmp_path / "remote"
    shutil.copytree(checkpoints(), folder)
    for file in folder.rglob("*.safetensors"):
        halves = {key: value.half() for key, value in load_file(file).items()}
        save_file(halves, file.with_suffix(".fp16.safetensors"))
    (folder / "README.md").write_text("not needed")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"large and not needed")
    (folder / "v1-5.ckpt").write_bytes(b"large and not needed")
    return folder


def test_a_local_folder_touches_no_network(checkpoints, no_network):
    assert load(checkpoints()).device.type == "cpu"
    assert load(str(checkpoints())).name == str(checkpoints())


def test_what_is_in_the_cache_is_not_asked_for(checkpoints, tmp_path, no_network):
    cache(tmp_path, REPO, checkpoints())
    assert load(REPO, cache_dir=tmp_path).name == REPO
    assert load(REPO, cache_dir=tmp_path, local_files_only=True).name == REPO
    assert sfumato.UNet2DConditionModel.from_pretrained(REPO, subfolder="unet", cache_dir=tmp_path).dtype
    assert sfumato.CLIPTokenizer.from_pretrained(REPO, subfolder="tokenizer", cache_dir=tmp_path)("a").lost == ("",)


def test_a_revision_is_looked_up_by_its_name(checkpoints, tmp_path, no_network):
    snapshot = cache(tmp_path, REPO, checkpoints())
    refs = snapshot.parents[1] / "refs"
    (refs / "main").rename(refs / "v2")
    assert load(REPO, cache_dir=tmp_path, revision="v2").name == REPO
    with pytest.raises(DownloadError, match="not completely in the local cache"):
        load(REPO, cache_dir=tmp_path, local_files_only=True)


def test_an_incomplete_cache_is_not_enough(checkpoints, tmp_path, no_network):
    snapshot = cache(tmp_path, REPO, checkpoints())
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DownloadError, match="not completely in the local cache"):
        load(REPO, cache_dir=tmp_path, local_files_only=True)


def test_a_missing_shard_makes_a_cache_incomplete(checkpoints, tmp_path, monkeypatch):
    load(checkpoints()).save_pretrained(tmp_path / "remote", max_shard_size="100KB")
    hub = FakeHub(monkeypatch, tmp_path / "hub", {REPO: tmp_path / "remote"})
    load(REPO, cache_dir=tmp_path / "hub")
    shard = next((tmp_path / "hub").rglob("*-00002-of-*.safetensors"))
    shard.unlink()
    hub.asked.clear()
    load(REPO, cache_dir=tmp_path / "hub")
    assert [ask[0] for ask in hub.asked] == ["list", "download"]
    assert shard.is_file()


def test_only_what_is_needed_is_downloaded_and_only_once(with_halves, tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch, tmp_path / "hub", {REPO: with_halves})
    load(REPO, cache_dir=tmp_path / "hub")
    (kind, _, names) = hub.asked[1]
    assert kind == "download"
    assert sorted(names) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        *(f"tokenizer/{name}" for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")),
        *(f"{part}/{name}" for part in ("unet", "vae") for name in ("config.json", "diffusion_pytorch_model.safetensors")),
    ]  # fmt: skip
    hub.asked.clear()
    load(REPO, cache_dir=tmp_path / "hub")
    assert hub.asked == []


def test_a_variant_and_a_given_part_change_what_is_downloaded(with_halves, tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch, tmp_path / "hub", {REPO: with_halves})
    vae = sfumato.AutoencoderKL.from_pretrained(with_halves / "vae")
    load(REPO, cache_dir=tmp_path / "hub", variant="fp16", vae=vae)
    names = hub.asked[1][2]
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in names
    assert "unet/diffusion_pytorch_model.safetensors" not in names
    assert not any(name.startswith("vae/") for name in names)


def test_without_a_network_a_cached_twin_serves_for_an_absent_variant(checkpoints, tmp_path, monkeypatch, caplog):
    """The U-Net is there in half precision, the rest only in full: asked for first, then used, and said."""
    snapshot = cache(tmp_path / "hub", REPO, checkpoints())
    hub = FakeHub(monkeypatch, tmp_path / "hub", {})
    hub.error = OSError("no network")
    with pytest.raises(DownloadError, match="cannot be reached"):
        load(REPO, cache_dir=tmp_path / "hub", variant="fp16")
    file = snapshot / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: value.half() for key, value in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
    hub.asked.clear()
    load(REPO, cache_dir=tmp_path / "hub", variant="fp16")
    assert [ask[0] for ask in hub.asked] == ["list"]
    assert "the hub cannot be reached" in caplog.text
    assert "text_encoder, vae; using the plain weights" in caplog.text


# The hub's exceptions carry a response of whatever HTTP client it uses; these are the parts it reads.
REPLY = SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError("name or service not known"), "cannot be reached"),
        (TimeoutError("timed out"), "cannot be reached"),
        (GatedRepoError("gated", response=REPLY), "license"),
        (RepositoryNotFoundError("404", response=REPLY), "check the name"),
        (RevisionNotFoundError("404", response=REPLY), "no revision 'v9'"),
    ],
)
def test_the_hub_refuses_in_one_sentence(error, says, tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch, tmp_path, {})
    hub.error = error
    with pytest.raises(DownloadError, match=says) as caught:
        load(REPO, cache_dir=tmp_path, revision="v9")
    assert "\n" not in str(caught.value)
    assert REPO in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "bad name/../x", "owner/na me", "~/nowhere"])  # fmt: skip
def test_a_name_that_is_nothing(name, no_network):
    with pytest.raises(SfumatoError) as caught:
        load(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load(tmp_path / "model.safetensors")


def test_an_unknown_keyword_is_suggested():
    for call, wrong, near in (
        (load, "varient", "variant"),
        (load, "cachedir", "cache_dir"),
        (sfumato.AutoencoderKL.from_pretrained, "local_file_only", "local_files_only"),
    ):
        with pytest.raises(UnknownArgument, match=f"'{wrong}'.*did you mean '{near}'"):
            call("owner/name", **{wrong: 1})


def test_a_repository_that_is_no_pipeline(checkpoints, tmp_path, monkeypatch):
    FakeHub(monkeypatch, tmp_path / "hub", {REPO: checkpoints() / "vae"})
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        load(REPO, cache_dir=tmp_path / "hub")


@pytest.mark.parametrize("name", ["", "a\0b", 5, None])
def test_what_is_no_name_of_a_model(name, no_network):
    with pytest.raises(SfumatoError) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_the_hub_s_library_is_told_to_keep_to_itself():
    code = "from sfumato.checkpoints import locate; locate.keep_to_itself(); import huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "True"


def test_a_repository_with_hostile_names(monkeypatch, tmp_path):
    """The hub's library refuses to write them, with an error of its own."""
    hub = FakeHub(monkeypatch, tmp_path / "hub", {})
    hub.error = ValueError("Invalid filename: ../../x")
    with pytest.raises(DownloadError, match=r"cannot be downloaded \(Invalid filename"):
        load(REPO, cache_dir=tmp_path)
