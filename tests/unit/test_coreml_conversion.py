"""Conversions: what is written, what is kept, what is refused before anything is done."""

from __future__ import annotations

import json
import logging
import os
import shutil
from types import SimpleNamespace

import pytest

from sfumato.coreml import conversion
from sfumato.coreml.conversion import ConversionOptions, convert, memory_needed
from sfumato.coreml.formats import read_model
from sfumato.coreml.layout import find_models
from sfumato.coreml.palettize import weights_of
from sfumato.coreml.roles import PARTS
from sfumato.coreml.source import open_source
from sfumato.coreml.verification import verify
from sfumato.errors import CheckpointError, ConfigError, MemoryPlanError, OutputError, UsageError


@pytest.fixture(scope="module")
def source(checkpoints):
    return open_source(checkpoints("sd15"))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """All four parts, converted once."""
    folder = tmp_path_factory.mktemp("whole") / "packages"
    return convert(source, folder)


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mlpackage")}


def test_all_parts_are_made_under_apples_names(whole, source):
    assert [part.part for part in whole.parts] == list(PARTS)
    stem = "Stable_Diffusion_version_sd15"
    assert {path.name for path in whole.folder.glob("*.mlpackage")} == {f"{stem}_{part}.mlpackage" for part in PARTS}
    assert {"vocab.json", "merges.txt"} <= {path.name for path in whole.folder.iterdir()}
    assert not any(part.kept for part in whole.parts)
    assert all(part.bytes > 0 for part in whole.parts)
    models = find_models(whole.folder)
    assert models.tokenizer == whole.folder


def test_packages_say_how_to_run_them(whole, source):
    told = {part.part: read_model(part.paths[0]) for part in whole.parts}
    assert all(model.metadata["sfumato.part"] == part for part, model in told.items())
    assert all(model.metadata["sfumato.source_hash"] == source.hash for model in told.values())
    unet = told["unet"].metadata
    assert unet["sfumato.attention"] == "split_einsum"
    assert json.loads(unet["sfumato.scheduler"])["_class_name"] == "PNDMScheduler"
    assert unet["sfumato.prediction_type"] == "epsilon"
    assert told["vae_decoder"].metadata["sfumato.scaling_factor"] == "0.18215"
    assert json.loads(told["text_encoder"].metadata["sfumato.tokenizer"])["model_max_length"] == 20
    assert told["unet"].description
    assert "Sfumato" in told["unet"].author


def test_velocity_is_told(checkpoints, tmp_path):
    made = convert(open_source(checkpoints("sd21")), tmp_path, ConversionOptions(parts=("unet",)))
    assert read_model(made.parts[0].paths[0]).metadata["sfumato.prediction_type"] == "v_prediction"


def test_what_is_there_is_an_error_before_anything_is_done(source, whole):
    before = stamps(whole.folder)
    with pytest.raises(UsageError, match=r"already exists; use --resume .* or --overwrite"):
        convert(source, whole.folder)
    assert stamps(whole.folder) == before


def test_resuming_keeps_what_is_as_it_would_be_made(source, whole, tmp_path):
    folder = tmp_path / "packages"
    shutil.copytree(whole.folder, folder)
    lost = next(folder.glob("*_unet.mlpackage"))
    shutil.rmtree(lost)
    again = convert(source, folder, resume=True)
    assert {part.part: part.kept for part in again.parts} == {part: part != "unet" for part in PARTS}
    assert lost.is_dir()


def test_resuming_with_other_options_makes_anew_what_they_change(source, whole, tmp_path):
    folder = tmp_path / "packages"
    shutil.copytree(whole.folder, folder)
    again = convert(source, folder, ConversionOptions(attention="original"), resume=True)
    assert [part.part for part in again.parts if not part.kept] == ["unet"]


def test_resuming_makes_a_damaged_package_anew(source, whole, tmp_path, caplog):
    folder = tmp_path / "packages"
    shutil.copytree(whole.folder, folder)
    decoder = next(folder.glob("*_vae_decoder.mlpackage"))
    (decoder / "Manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING, logger="sfumato"):
        again = convert(source, folder, resume=True)
    assert [part.part for part in again.parts if not part.kept] == ["vae_decoder"]
    assert "is converted again" in caplog.text


def test_chunks_of_an_earlier_conversion_do_not_stay(source, tmp_path):
    only = ("unet",)
    convert(source, tmp_path, ConversionOptions(parts=only, chunks=2))
    with pytest.raises(UsageError, match=r"_unet_chunk1\.mlpackage already exists"):
        convert(source, tmp_path, ConversionOptions(parts=only))
    convert(source, tmp_path, ConversionOptions(parts=only), overwrite=True)
    assert [path.name[-13:] for path in tmp_path.glob("*.mlpackage")] == ["unet.mlpackage"[-13:]]


def test_an_interruption_leaves_whole_packages_only(source, tmp_path, monkeypatch):
    real = conversion.write_package

    def interrupted(model, path):
        if path.name.endswith("_vae_encoder.mlpackage"):
            raise KeyboardInterrupt
        return real(model, path)

    monkeypatch.setattr(conversion, "write_package", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path)
    assert {path.name.split("_sd15_")[-1] for path in tmp_path.iterdir()} == {
        "text_encoder.mlpackage",
        "unet.mlpackage",
        "vae_decoder.mlpackage",
    }


def test_chunks_merged_into_one_package(source, tmp_path):
    """One file under the name of the whole U-Net, which is a pipeline of its pieces and computes what they do."""
    options = ConversionOptions(chunks=3, merged=True)
    made = convert(source, tmp_path, options)
    (path,) = next(part.paths for part in made.parts if part.part == "unet")
    model = read_model(path)
    assert isinstance(model.body, tuple)
    assert len(model.body) == 3
    assert find_models(tmp_path).unet == (path,)
    assert verify(tmp_path, source, picture=False).passed
    with pytest.raises(UsageError, match="there are no chunks to merge"):
        ConversionOptions(merged=True)


def test_a_recipe_sets_the_bits_of_each_weight(source, tmp_path):
    whole = convert(source, tmp_path / "a", ConversionOptions(parts=("unet",)))
    weights = weights_of(read_model(whole.parts[0].paths[0]))
    name = max(weights, key=lambda key: weights[key].type.shape[0] or 0)
    made = convert(source, tmp_path / "b", ConversionOptions(parts=("unet",), recipe={name: 4}))
    operations = read_model(made.parts[0].paths[0]).program.functions["main"].operations
    assert [op.outputs[0].name for op in operations if op.type == "constexpr_lut_to_dense"] == [name]
    with pytest.raises(UsageError, match="the recipe names 'nothing', which is not a weight"):
        convert(source, tmp_path / "c", ConversionOptions(parts=("unet",), recipe={"nothing": 4}))
    assert not (tmp_path / "c").exists()


def test_a_target_in_decibels_gives_more_bits_where_it_must(source, tmp_path):
    made = convert(source, tmp_path, ConversionOptions(parts=("unet",), target_db=20))
    operations = read_model(made.parts[0].paths[0]).program.functions["main"].operations
    tables = [op.attributes["lut"].type.shape[0] for op in operations if op.type == "constexpr_lut_to_dense"]
    assert tables
    assert set(tables) <= {2, 4, 16, 64, 256}
    assert read_model(made.parts[0].paths[0]).metadata["sfumato.bits"] == "mixed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "flash"}, "there is no attention 'flash'"),
        ({"target": "macOS12"}, "macOS12"),
        ({"bits": 3}, "1, 2, 4, 6 or 8 bits, not 3"),
        ({"bits": 6, "target_db": 40}, "cannot be combined"),
        ({"chunks": 9}, "1 to 8 chunks, not 9"),
        ({"batch": 4}, "1 or 2 prompts"),
        ({"height": 0}, "height must be 1 to 512, not 0"),
        ({"width": 10**9}, "width must be 1 to 512, not 1000000000"),
        ({"height": "8"}, "height must be a whole number, not '8'"),
        ({"width": 8.5}, "width must be a whole number, not 8.5"),
        ({"bits": True}, "bits must be a whole number, not True"),
        ({"chunks": None}, "chunks must be a whole number, not None"),
        ({"target_db": "40"}, "a positive number of dB, not '40'"),
        ({"parts": ("unett",)}, "did you mean 'unet'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UsageError, match=message):
        ConversionOptions(**options)


def test_latents_too_small_for_the_network(source, tmp_path):
    with pytest.raises(UsageError, match="latents of width 4 are too small"):
        convert(source, tmp_path, ConversionOptions(width=4))


def test_latents_that_cannot_be_halved(source, checkpoints, tmp_path):
    """With padding an odd side comes back exactly, so any will do; without it, none may be odd on the way down."""
    assert convert(source, tmp_path / "odd", ConversionOptions(parts=("unet",), height=13)).parts
    folder = tmp_path / "unpadded"
    shutil.copytree(checkpoints("sd15"), folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"downsample_padding": 0}))
    with pytest.raises(UsageError, match=r"height 12 cannot be halved 3 times, .*choose a multiple of 8"):
        convert(open_source(folder), tmp_path / "out", ConversionOptions(height=12))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("again", ["resume", "overwrite"])
def test_what_killed_conversions_left_is_swept(source, tmp_path, again):
    options = ConversionOptions(parts=("vae_decoder",))
    (path,) = convert(source, tmp_path, options).parts[0].paths
    dead, living = 2**22 + 1, os.getppid()
    left = [tmp_path / f".{path.name}.{dead}.0123abcd.{end}" for end in ("new", "old")]
    kept = [tmp_path / f".{path.name}.{living}.4567cdef.new", tmp_path / f".notes.{dead}.new", tmp_path / ".cache"]
    for place in (*left, *kept):
        (place / "Data").mkdir(parents=True)
    convert(source, tmp_path, options, **{again: True})
    assert [place for place in left if place.exists()] == []
    assert all(place.exists() for place in kept)


def test_an_old_model_whose_new_one_never_came_is_put_back(source, tmp_path):
    """Killed between the two renames."""
    options = ConversionOptions(parts=("vae_decoder",))
    (path,) = convert(source, tmp_path, options).parts[0].paths
    path.rename(tmp_path / f".{path.name}.{2**22 + 1}.0123abcd.old")
    assert convert(source, tmp_path, options, resume=True).parts[0].kept
    assert read_model(path).metadata["sfumato.part"] == "vae_decoder"


def test_a_full_disk_and_too_little_memory_are_said_before_anything_is_written(source, tmp_path, monkeypatch):
    folder = tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(OutputError, match=r"MB free; free some"):
            convert(source, folder)
    monkeypatch.setattr(conversion, "read_facts", lambda device: SimpleNamespace(memory_free=2**20))
    with pytest.raises(MemoryPlanError, match=r"needs [\d,]+ MB of memory, but only 1 MB are free") as caught:
        convert(source, folder)
    assert caught.value.needed == memory_needed(source, ConversionOptions())
    assert not folder.exists()


def test_checkpoints_without_a_core_ml_form(checkpoints, tmp_path):
    folder = tmp_path / "inpainting"
    shutil.copytree(checkpoints("sd15"), folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"latent_channels": 9}))
    with pytest.raises(ConfigError, match="convert a text-to-image checkpoint"):
        convert(open_source(folder), tmp_path / "out")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
    with pytest.raises(ConfigError, match="AutoencoderTiny, which cannot be converted to Core ML"):
        open_source(folder)
    with pytest.raises(CheckpointError, match="there is no folder"):
        open_source(tmp_path / "nothing" / "here")
