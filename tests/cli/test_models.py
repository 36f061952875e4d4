"""Short names, the models in the hub's cache, and the model that is used when none is named."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import sfumato as library
from cli.conftest import SCRIPT
from sfumato.checkpoints.names import PUBLISHED
from sfumato.cli import settings
from sfumato.errors import ConfigError, DownloadError, UsageError
from sfumato.families import FAMILIES
from sfumato.metadata.carriers import read_recipe
from support.hub import cache

SD15 = PUBLISHED["sd15"]


@pytest.fixture
def home(model, tmp_path) -> dict[str, str]:
    """A hub's cache that has Stable Diffusion 1.5, a VAE, and a language model of somebody else's."""
    hub = tmp_path / "hub"
    cache(hub, SD15, model)
    cache(hub, "stabilityai/sd-vae-ft-mse", model / "vae")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "model.safetensors").write_bytes(b"no model of ours")
    cache(hub, "somebody/language-model", other)
    return {"HF_HOME": str(tmp_path)}


def test_short_names_stand_for_one_repository_each():
    assert len(set(PUBLISHED.values())) == len(PUBLISHED)
    assert set(PUBLISHED) - {"sd14"} <= set(FAMILIES)
    assert all(repo.count("/") == 1 for repo in PUBLISHED.values())


def test_list_and_remove(sfumato, sfumato_each, home, tmp_path):
    listed = sfumato("models", cwd=tmp_path, env=home).succeeded().out
    assert "sd15" in listed
    assert SD15 in listed
    assert "stabilityai/sd-vae-ft-mse" in listed
    assert "language-model" not in listed
    assert "made for built-in: built-in/edges, built-in/evening, built-in/few-step, built-in/inpaint" in listed
    assert "2 downloaded" in listed
    assert "Default model: built-in (no default is set" in listed
    told = sfumato("models", "--json", cwd=tmp_path, env=home).succeeded().json
    first = told["cached"][0] if told["cached"][0]["id"] == SD15 else told["cached"][1]
    files = [path for path in (tmp_path / "hub" / f"models--{SD15.replace('/', '--')}").rglob("*") if path.is_file()]
    assert first["name"] == "sd15"
    assert first["kind"] == "checkpoint"
    assert first["bytes"] <= sum(path.stat().st_size for path in files) < first["bytes"] + 100
    assert "sd15" not in told["not_downloaded"]
    assert told["not_downloaded"]["sdxl"] == PUBLISHED["sdxl"]
    commands = [["models", "remove", "sd51"], ["models", "remove", "sd15"], ["models", "remove", "sd15"]]
    unknown, removed, again = sfumato_each(commands, cwd=tmp_path, env=home)
    unknown.failed(2, "'sd51' is not in the cache (did you mean 'sd15'?)")
    assert removed.succeeded().out.startswith(f"removed {SD15}: ")
    again.failed(2, "'sd15' is not in the cache")
    kept = {path.name for path in (tmp_path / "hub").glob("models--*")}
    assert kept == {"models--stabilityai--sd-vae-ft-mse", "models--somebody--language-model"}
    left = sfumato("models", "--json", cwd=tmp_path, env=home).succeeded().json
    assert [one["id"] for one in left["cached"]] == ["stabilityai/sd-vae-ft-mse"]


def test_a_short_name_works_like_the_id(sfumato_each, home, tmp_path):
    commands = [
        [
            "generate",
            "horse",
            "-m",
            name,
            "--steps",
            "1",
            "-s",
            "3",
            "-W",
            "16",
            "-H",
            "16",
            "-n",
            "1",
            "-o",
            f"{at}.png",
        ]
        for at, name in enumerate(("sd15", SD15))
    ]
    commands += [["show", "sd15", "--json"], ["show", SD15, "--json"]]
    short, full, shown, same = sfumato_each(commands, cwd=tmp_path, env=home)
    first, second = (read_recipe(tmp_path / run.succeeded().out.strip()) for run in (short, full))
    assert first == second
    assert first["model"]["name"] == SD15  # means the same on every machine
    assert shown.json | {"name": ""} == same.json | {"name": ""}


def test_a_folder_goes_before_a_short_name(sfumato, model, tmp_path):
    (tmp_path / "sd15").symlink_to(model)
    shown = sfumato("show", "sd15", "--json", cwd=tmp_path).succeeded().json
    planned = sfumato("plan", "x", "-m", "sd15", "--json", cwd=tmp_path).succeeded().json
    assert shown["width"] == 16
    assert planned["model"]["name"] == "sd15"
    assert planned["model"]["unet"]["parameters"] == shown["parts"]["unet"]["parameters"]


def test_a_short_name_never_downloads(no_network, tmp_path):
    with pytest.raises(DownloadError, match="run 'sfumato download sdxl', or give the full id"):
        library.load("sdxl", cache_dir=tmp_path)
    with pytest.raises(DownloadError, match=r"sd15 \(stable-diffusion-v1-5/stable-diffusion-v1-5\) is not in the"):
        library.StableDiffusionPipeline.from_pretrained("sd15", cache_dir=tmp_path)


def test_precedence_of_the_default_model(monkeypatch, tmp_path):
    file = tmp_path / "config.toml"
    monkeypatch.setenv("SFUMATO_CONFIG", str(file))
    monkeypatch.delenv("SFUMATO_MODEL", raising=False)
    assert settings.default_model() == ("built-in", "no default is set")
    file.write_text('model = "sd15"  # the one I use\n')
    assert settings.default_model() == ("sd15", str(file))
    assert settings.chosen_model(None) == "sd15"
    monkeypatch.setenv("SFUMATO_MODEL", "./mine")
    assert settings.default_model() == ("./mine", "SFUMATO_MODEL")
    assert settings.chosen_model("sdxl") == "sdxl"
    assert settings.chosen_model("built-in") == "built-in"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model = sd15", "is not valid TOML"),
        ('modle = "sd15"', r"there is no setting 'modle' \(did you mean 'model'\?\)"),
        ("model = 15", "model must be a model's name in quotes"),
        ('model = ""', "model must be a model's name in quotes"),
        ("[" * 10**5, "is not valid TOML"),
    ],
)
def test_config_files_that_are_wrong(text, sentence, monkeypatch, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(text)
    monkeypatch.setenv("SFUMATO_CONFIG", str(file))
    monkeypatch.delenv("SFUMATO_MODEL", raising=False)
    with pytest.raises(ConfigError, match=sentence):
        settings.default_model()


def test_place_of_the_config_file(monkeypatch, tmp_path):
    monkeypatch.delenv("SFUMATO_CONFIG", raising=False)
    for name in ("HOME", "USERPROFILE", "XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.setenv(name, str(tmp_path))
    places = {
        "linux": tmp_path / "sfumato" / "config.toml",
        "darwin": tmp_path / "Library" / "Application Support" / "sfumato" / "config.toml",
        "win32": tmp_path / "sfumato" / "config.toml",
    }
    for system, place in places.items():
        monkeypatch.setattr(settings.sys, "platform", system)
        assert settings.config_file() == place


def test_commands_use_the_default_model(sfumato_each, model, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(f"model = {json.dumps(str(model))}\n")
    env = {"SFUMATO_CONFIG": str(file)}
    commands = [
        ["generate", "horse", "--steps", "1", "-o", "x.png"],
        ["show", "--json"],
        ["plan", "--json"],
        ["show", "built-in", "--json"],
        ["models", "--json"],
    ]
    drawn, shown, planned, built_in, listed = sfumato_each(commands, cwd=tmp_path, env=env)
    assert read_recipe(tmp_path / drawn.succeeded().out.strip())["model"]["name"] == str(model)
    assert shown.json["name"] == planned.json["model"]["name"] == listed.json["default"] == str(model)
    assert built_in.json["name"] == "built-in"
    named = sfumato_each([["show", "--json"]], cwd=tmp_path, env=env | {"SFUMATO_MODEL": "built-in"})[0]
    assert named.json["name"] == "built-in"


def test_download_takes_short_names(sfumato, home, tmp_path):
    outcome = sfumato("download", "sd15", cwd=tmp_path, env=home).succeeded()
    assert SD15.replace("/", "--") in outcome.out
    sfumato("download", "sdxl", cwd=tmp_path, env=home).failed(1, PUBLISHED["sdxl"], "cannot be reached")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(sfumato, shell, tmp_path):
    script = sfumato("completion", shell, cwd=tmp_path).succeeded().out
    assert f"_SFUMATO_COMPLETE=complete_{shell}" in script


def test_completion_knows_shells(sfumato, tmp_path):
    sfumato("completion", "bsh", cwd=tmp_path).failed(2, "did you mean 'bash'?")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["gen"], {"generate"}),
        (["generate", "--neg"], {"--negative-clip-skip", "--negative-prompt", "--negative-prompt-2"}),
        (["generate", "--model", "sdxl-t"], {"sdxl-turbo"}),
        (["generate", "--scheduler", "dpmpp_2m_s"], {"dpmpp_2m_sde", "dpmpp_2m_sde_karras"}),
        (["models", "r"], {"remove"}),
        (["completion", "z"], {"zsh"}),
    ],
)
def test_completions_come_from_the_parsers(environment, words, found, tmp_path):
    env = environment | {
        "_SFUMATO_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["sfumato", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run([SCRIPT], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == found, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
def test_bash_completes(environment, tmp_path):
    script = subprocess.run([SCRIPT, "completion", "bash"], env=environment, capture_output=True, text=True, check=True)
    ask = 'COMP_WORDS=(sfumato models rem); COMP_CWORD=2; _sfumato_completion sfumato; echo "${COMPREPLY[@]}"'
    env = environment | {"PATH": f"{Path(SCRIPT).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"{script.stdout}\n{ask}"], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "remove", done.stderr


def test_removing_what_is_not_there(monkeypatch, tmp_path):
    from sfumato.checkpoints import cached

    monkeypatch.setattr(cached, "_scanned", lambda: None)  # no cache at all
    assert cached.cached_models() == []
    with pytest.raises(UsageError, match="'owner/name' is not in the cache"):
        cached.remove_cached("owner/name")
