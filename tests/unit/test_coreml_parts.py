"""What a folder of converted models says of itself, what is taken from a checkpoint instead, and what does not fit."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from sfumato.coreml.backends import Engine
from sfumato.coreml.parts import DEFAULT_VERSION, open_parts, small_files
from sfumato.coreml.pipeline import load_pipeline
from sfumato.errors import CheckpointError, ConfigError, DownloadError, SfumatoError
from sfumato.pipelines.recipe import weights_hash
from support.converted import write_converted
from support.hub import FakeHub

ENGINE = Engine("CPU_ONLY")


@pytest.fixture(scope="module")
def converted(checkpoints, tmp_path_factory):
    """`converted("sd21", described=False)`: a folder of models, written once."""
    root = tmp_path_factory.mktemp("converted")

    def get(shape: str = "sd15", **options):
        folder = root / "-".join([shape, *(f"{key}={value}" for key, value in sorted(options.items()))])
        return folder if folder.is_dir() else write_converted(checkpoints(shape), folder, **options)

    return get


def small(checkpoint: Path, target: Path) -> Path:
    """A checkpoint's folder without its weights."""
    names = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
    for name in small_files("tiny")(names, True):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkpoint / name, target / name)
    assert not list(target.rglob("*.safetensors"))
    return target


@pytest.mark.parametrize("shape", ["sd15", "sd21", "odd"])
def test_the_folder_alone_is_enough_where_the_models_say_what_they_are(converted, ours, shape, no_network):
    parts, source = open_parts(converted(shape), ENGINE), ours(shape)
    assert type(parts.scheduler) is type(source.scheduler)
    assert parts.scheduler.config.to_dict() == source.scheduler.config.to_dict()
    assert parts.vae.config.scaling_factor == source.vae.config.scaling_factor
    assert parts.unet.config.down_block_types == source.unet.config.down_block_types
    assert parts.unet.config.sample_size == parts.unet.latent_size
    assert parts.text_encoder.config.eos_token_id == source.text_encoder.config.eos_token_id
    assert parts.tokenizer.model_max_length == 20
    words = ["a photo", "the cat!", "!"]
    assert parts.tokenizer.fitted(words).input_ids.tolist() == source.tokenizer.fitted(words).input_ids.tolist()
    assert parts.suggested == {}
    assert parts.details == {
        "engine": "portable", "kind": "packages", "attention": "original", "compute_unit": "CPU_ONLY",
    }  # fmt: skip


def test_settings_and_bits_are_what_the_models_say(checkpoints, tmp_path):
    said = {"sfumato.settings": json.dumps({"steps": 7, "guidance_scale": 2.0}), "sfumato.bits": "6"}
    folder = write_converted(checkpoints(), tmp_path / "models", changes=said)
    pipe = load_pipeline(folder, compute_unit="CPU_ONLY", portable=True)
    assert pipe.suggested == {"steps": 7, "guidance_scale": 2.0}
    assert pipe.details["bits"] == "6"


def test_models_that_say_nothing_are_of_the_checkpoint_that_is_named(converted, checkpoints, ours, tmp_path, caplog):
    folder = converted("sd21", described=False)
    version = small(checkpoints("sd21"), tmp_path / "small")
    parts = open_parts(folder, ENGINE, str(version))
    assert parts.scheduler.config.prediction_type == "v_prediction"
    assert parts.vae.config.scaling_factor == ours("sd21").vae.config.scaling_factor
    assert (
        parts.tokenizer.fitted("!").input_ids.tolist() != ours("sd21").tokenizer.fitted("!").input_ids.tolist()
    )  # nobody said how to pad
    assert parts.details["model_version"] == str(version)
    assert caplog.records == []
    bare = converted("sd21", described=False, tokenizer=False)
    tokenizer = open_parts(bare, ENGINE, str(version)).tokenizer
    assert tokenizer.fitted("!").input_ids.tolist() == ours("sd21").tokenizer.fitted("!").input_ids.tolist()


def test_nothing_named_means_what_apples_runner_means(converted, checkpoints, tmp_path, monkeypatch, caplog):
    import huggingface_hub.constants

    hub = FakeHub(monkeypatch, tmp_path / "hub", {DEFAULT_VERSION: checkpoints()})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with caplog.at_level(logging.WARNING, "sfumato"):
        parts = open_parts(converted(described=False), ENGINE)
        assert type(parts.scheduler).__name__ == "PNDMScheduler"
        assert parts.unet.config.in_channels == 4
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert f"assuming {DEFAULT_VERSION}" in told[0]
    assert "--model-version" in told[0]
    fetched = [names for what, _, names in hub.asked if what == "download"]
    assert len(fetched) == 1
    assert all(name.endswith((".json", ".txt")) for name in fetched[0])
    # From then on it is in the cache.
    open_parts(converted(described=False), ENGINE, DEFAULT_VERSION).scheduler  # noqa: B018
    assert [what for what, *_ in hub.asked].count("download") == 1


def test_nothing_is_fetched_because_a_model_says_so(checkpoints, tmp_path, monkeypatch):
    import huggingface_hub.constants

    hub = FakeHub(monkeypatch, tmp_path / "hub", {"nobody/nothing": checkpoints()})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    models = write_converted(
        checkpoints(), tmp_path / "models", described=False, changes={"sfumato.source": "nobody/nothing"}
    )
    with pytest.raises(CheckpointError, match=r"is not on this machine; .*--model-version nobody/nothing"):
        open_parts(models, ENGINE).scheduler  # noqa: B018
    with pytest.raises(DownloadError, match="not completely in the local cache"):
        open_parts(models, ENGINE, "nobody/nothing", local_files_only=True).scheduler  # noqa: B018
    assert hub.asked == []
    # Who names it asks for it, and from then on it is here.
    assert open_parts(models, ENGINE, "nobody/nothing").scheduler.config.to_dict()
    assert open_parts(models, ENGINE).scheduler.config.to_dict()
    assert [what for what, *_ in hub.asked].count("download") == 1


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]"])
def test_metadata_that_is_no_json(checkpoints, tmp_path, text):
    models = write_converted(checkpoints(), tmp_path / "models", changes={"sfumato.scheduler": text})
    with pytest.raises(
        CheckpointError, match=r"its metadata 'sfumato.scheduler' (is invalid JSON|must be a JSON object)"
    ):
        open_parts(models, ENGINE).scheduler  # noqa: B018


def test_a_checkpoint_that_cannot_be_had(converted, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="there is no folder"):
        open_parts(converted(described=False), ENGINE, str(tmp_path / "gone")).scheduler  # noqa: B018
    hub = FakeHub(monkeypatch, tmp_path / "hub", {"owner/other": converted()})
    with pytest.raises(CheckpointError, match=r"owner/other has no scheduler/scheduler_config\.json"):
        open_parts(converted(described=False), ENGINE, "owner/other").scheduler  # noqa: B018
    assert [what for what, *_ in hub.asked] == ["list"]
    hub.error = OSError("no route to host")
    with pytest.raises(DownloadError, match="the hub cannot be reached"):
        open_parts(converted(described=False), ENGINE, "owner/other").scheduler  # noqa: B018


def test_a_wrong_checkpoint_does_not_fit(converted, checkpoints, tmp_path):
    version = small(checkpoints(), tmp_path / "small")
    config = version / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 32}))
    parts = open_parts(converted(described=False), ENGINE, str(version))
    with pytest.raises(
        CheckpointError, match=r"has 24 values per token, but its checkpoint.s config says 32; .*--model-version"
    ):
        parts.unet  # noqa: B018
    config = version / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 8}))
    with pytest.raises(CheckpointError, match=r"has 4 latent channels, but its checkpoint.s config says 8"):
        parts.vae  # noqa: B018


def test_damaged_metadata(checkpoints, tmp_path):
    def broken(key: str, text: str, part: str) -> SfumatoError:
        folder = write_converted(checkpoints(), tmp_path / f"{key}{len(text)}", changes={f"sfumato.{key}": text})
        with pytest.raises(SfumatoError) as caught:
            getattr(open_parts(folder, ENGINE), part)
        return caught.value

    assert "'sfumato.config' is invalid JSON" in str(broken("config", "{", "unet"))
    assert "must be a JSON object" in str(broken("scheduler", "[1]", "scheduler"))
    assert "there is no scheduler 'Nonsense'" in str(broken("scheduler", '{"_class_name": "Nonsense"}', "scheduler"))
    assert isinstance(broken("scheduler", "{}", "scheduler"), ConfigError)
    assert "no token 100000 to pad with" in str(broken("tokenizer", '{"pad_token_id": 100000}', "tokenizer"))


def test_fingerprints_tell_weights_apart(converted, checkpoints, tmp_path):
    def hashed(folder: Path, **options) -> str:
        return weights_hash(load_pipeline(folder, compute_unit="CPU_ONLY", portable=True, **options).parts)

    described = hashed(converted())
    assert hashed(converted(kind="compiled")) == described
    assert hashed(converted(chunks=2)) == described
    assert hashed(converted(changes=None, batch=1)) == described
    assert hashed(write_converted(checkpoints(), tmp_path / "bits", changes={"sfumato.bits": "6"})) != described
    assert hashed(converted("sd21")) != described
    # Where the models do not say it, their files do.
    version = str(small(checkpoints(), tmp_path / "small"))
    silent = hashed(converted(described=False), model_version=version)
    assert silent == hashed(converted(described=False), model_version=version)
    assert silent != described
    changed = shutil.copytree(converted(described=False), tmp_path / "changed")
    weights = next(path for path in changed.rglob("weight.bin") if "unet" in str(path))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4096] = bytes(4096)
    weights.write_bytes(content)
    assert hashed(changed, model_version=version) != silent


def test_what_is_more_than_stable_diffusion_1_or_2(converted, tmp_path):
    import dataclasses

    from sfumato.coreml.formats import read_model, write_package
    from sfumato.coreml.program import Feature, Interface, Output, TensorType

    folder = shutil.copytree(converted(), tmp_path / "models")
    path = next(folder.glob("*unet*"))
    model = read_model(path)
    kind = TensorType("fp16", (2, 6))
    interface = Interface((*model.interface.inputs, Feature("time_ids", kind)), model.interface.outputs)
    main = model.program.functions["main"]
    program = dataclasses.replace(main, inputs=(*main.inputs, Output("time_ids", kind)))
    changed = dataclasses.replace(model, interface=interface).with_functions(lambda _: program)
    write_package(changed, tmp_path / "xl.mlpackage")
    shutil.rmtree(path)
    (tmp_path / "xl.mlpackage").rename(path)
    with pytest.raises(ConfigError, match=r"also reads time_ids, like models of Stable Diffusion XL"):
        open_parts(folder, ENGINE).unet  # noqa: B018


def test_sizes_that_differ(converted, checkpoints, tmp_path):
    """An encoder for another size than the U-Net's."""
    import dataclasses

    from sfumato.coreml.converter import vae_encoder
    from sfumato.coreml.formats import read_model, write_package
    from sfumato.coreml.source import open_source

    folder = shutil.copytree(converted(), tmp_path / "models")
    path = next(folder.glob("*vae_encoder*"))
    metadata = read_model(path).metadata
    other = vae_encoder(open_source(checkpoints()).load("vae_encoder"), height=4, width=8)
    shutil.rmtree(path)
    write_package(dataclasses.replace(other, metadata=metadata), path)
    with pytest.raises(CheckpointError, match=r"vae_encoder.mlpackage has latents of height 4 and .* 8"):
        open_parts(folder, ENGINE).vae  # noqa: B018
