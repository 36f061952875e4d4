"""Models are found by what they are and need, wherever they lie and whatever they are called."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sfumato.coreml.chunk import chunk
from sfumato.coreml.formats import write_compiled, write_package
from sfumato.coreml.layout import compiled_names, find_models, folder_bytes, package_names, tree
from sfumato.coreml.program import (
    Feature,
    Function,
    Interface,
    Model,
    Operation,
    Output,
    Program,
    TensorType,
    Value,
    constant,
)
from sfumato.errors import CheckpointError, UsageError


def program(inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]], **metadata: str) -> Model:
    """A model with this interface that gives constants; a chain of four operations leads to the last."""
    ins = tuple(Output(name, TensorType("fp16", shape)) for name, shape in inputs.items())
    operations = []
    for name, shape in outputs.items():
        zeros = Value(TensorType("fp16", shape), np.zeros(shape, np.float16))
        operations.append(constant(f"{name}_zero", zeros))
        at = f"{name}_zero"
        for step in range(4):
            to = Output(f"{name}_{step}" if step < 3 else name, TensorType("fp16", shape))
            operations.append(Operation("add", {"x": (at,), "y": (f"{name}_zero",)}, (to,)))
            at = to.name
    function = Function(ins, tuple(outputs), tuple(operations), "CoreML6")
    interface = Interface(
        tuple(Feature(one.name, one.type) for one in ins),
        tuple(Feature(name, TensorType("fp16", shape)) for name, shape in outputs.items()),
    )
    return Model(interface, Program({"main": function}), 7, {f"sfumato.{key}": text for key, text in metadata.items()})


def text_encoder(width: int = 24, **metadata: str) -> Model:
    return program(
        {"input_ids": (1, 7)}, {"last_hidden_state": (1, 7, width), "pooled_outputs": (1, width)}, **metadata
    )


def unet(side: int = 8, **metadata: str) -> Model:
    inputs = {"sample": (2, 4, side, side), "timestep": (2,), "encoder_hidden_states": (2, 24, 1, 7)}
    return program(inputs, {"noise_pred": (2, 4, side, side)}, **metadata)


def vae_decoder(side: int = 8, **metadata: str) -> Model:
    return program({"z": (1, 4, side, side)}, {"image": (1, 3, 8 * side, 8 * side)}, **metadata)


def vae_encoder(**metadata: str) -> Model:
    return program({"x": (1, 3, 64, 64)}, {"latent": (1, 8, 8, 8)}, **metadata)


def pieces(parts: int, **metadata: str) -> list[Model]:
    """Chunks with the interfaces that Apple's have: skip connections, and inputs that only some need."""
    shape, embeddings = (2, 4, 8, 8), {"encoder_hidden_states": (2, 24, 1, 7)}
    steps = [program({"sample": shape, "timestep": (2,)}, {"b0": shape, "skip": shape})]
    steps += [program({f"b{at}": shape} | embeddings, {f"b{at + 1}": shape}) for at in range(parts - 2)]
    steps.append(program({"skip": shape, f"b{parts - 2}": shape} | embeddings, {"noise_pred": shape}))
    return [replace(one, metadata={f"sfumato.{key}": text for key, text in metadata.items()}) for one in steps]


def write(folder: Path, models: dict[str, Model], kind: str = "packages") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in models.items():
        if kind == "packages":
            write_package(model, folder / f"{name}.mlpackage")
        else:
            write_compiled(model, folder / f"{name}.mlmodelc")
    return folder


def complete(**metadata: str) -> dict[str, Model]:
    """Under names that say nothing."""
    return {"m1": vae_decoder(**metadata), "m2": unet(**metadata), "m3": text_encoder(**metadata)}


@pytest.mark.parametrize("kind", ["packages", "compiled"])
def test_by_content_and_not_by_name(kind, tmp_path):
    suffix = {"packages": ".mlpackage", "compiled": ".mlmodelc"}[kind]
    write(tmp_path, complete() | {"unet": vae_encoder()}, kind)
    found = find_models(tmp_path)
    assert found.folder == tmp_path
    assert found.kind == kind
    assert found.text_encoder == tmp_path / f"m3{suffix}"
    assert found.unet == (tmp_path / f"m2{suffix}",)
    assert found.vae_decoder == tmp_path / f"m1{suffix}"
    assert found.vae_encoder == tmp_path / f"unet{suffix}"
    assert found.tokenizer is None
    assert found.paths("unet") == found.unet
    assert found.paths("nothing") == ()


def test_suffixes_say_nothing_either(tmp_path):
    write(tmp_path, complete())
    for number in "123":
        (tmp_path / f"m{number}.mlpackage").rename(tmp_path / f"m{number}")
    assert find_models(tmp_path).unet == (tmp_path / "m2",)


@pytest.mark.parametrize("place", ["", "original/packages", "snapshot/split_einsum/compiled", "a/b/c"])
def test_nested_folders(place, tmp_path):
    folder = write(tmp_path / place, complete())
    (tmp_path / "README.md").write_text("words")
    assert find_models(tmp_path).folder == folder
    assert find_models(folder).folder == folder


def test_four_levels_down_is_too_far(tmp_path):
    write(tmp_path / "a/b/c/d", complete())
    with pytest.raises(CheckpointError, match=r"no Core ML models .* up to three levels"):
        find_models(tmp_path)


def test_hidden_folders_are_not_looked_into(tmp_path):
    write(tmp_path / ".cache" / "huggingface", complete())
    with pytest.raises(CheckpointError, match="no Core ML models"):
        find_models(tmp_path)


def test_what_lies_in_the_folder_itself_comes_first(tmp_path):
    write(tmp_path, complete())
    write(tmp_path / "Resources", complete(), "compiled")
    assert find_models(tmp_path).kind == "packages"
    assert find_models(tmp_path / "Resources").kind == "compiled"
    assert find_models(tmp_path, kind="compiled").folder == tmp_path / "Resources"


def test_several_sets_are_listed(tmp_path):
    one = write(tmp_path / "original" / "packages", complete())
    other = write(tmp_path / "split_einsum" / "packages", complete())
    with pytest.raises(UsageError, match="several sets") as raised:
        find_models(tmp_path)
    assert str(one) in str(raised.value)
    assert str(other) in str(raised.value)
    assert "name one of these folders" in str(raised.value)
    compiled = write(tmp_path / "original" / "compiled", complete(), "compiled")
    with pytest.raises(UsageError, match="several sets"):
        find_models(tmp_path / "original")
    assert find_models(tmp_path / "original", kind="compiled").folder == compiled
    write(one, complete(), "compiled")
    with pytest.raises(UsageError, match=r"\(compiled\) and .*\(packages\); put each set in its own folder"):
        find_models(one)
    assert find_models(one, kind="packages").kind == "packages"
    with pytest.raises(UsageError, match="not 'package'"):
        find_models(one, kind="package")


def test_an_incomplete_set_does_not_count(tmp_path):
    whole = write(tmp_path / "original" / "packages", complete())
    write(tmp_path / "split_einsum" / "packages", {"m": unet()})
    write(tmp_path / "original" / "compiled", {"m": unet()}, "compiled")
    assert find_models(tmp_path).folder == whole


@pytest.mark.parametrize("parts", [2, 3, 4, 5])
def test_chunks_in_the_order_in_which_they_run(parts, tmp_path):
    names = "qdzafk"[:parts]
    models = {"t": text_encoder(), "v": vae_decoder()}
    write(tmp_path, models | dict(zip(names, pieces(parts), strict=True)))
    assert find_models(tmp_path).unet == tuple(tmp_path / f"{name}.mlpackage" for name in names)


def test_our_own_chunks(tmp_path):
    cut = chunk(unet(chunk=""), 3)
    numbered = [replace(one, metadata={"sfumato.chunk": f"{number} of 3"}) for number, one in enumerate(cut, 1)]
    # This program's inputs are read by nothing; the real one's first chunk reads them.
    first = replace(numbered[0], interface=Interface(unet().interface.inputs, numbered[0].interface.outputs))
    function = first.program.functions["main"]
    first = first.with_functions(lambda _: replace(function, inputs=unet().program.functions["main"].inputs))
    models = dict(zip("cab", [first, *numbered[1:]], strict=True))
    write(tmp_path, models | {"t": text_encoder(), "v": vae_decoder()})
    assert [path.stem for path in find_models(tmp_path).unet] == ["c", "a", "b"]
    shutil.rmtree(tmp_path / "b.mlpackage")
    with pytest.raises(CheckpointError, match=r"a\.mlpackage is a chunk of a U-Net, but the next chunk"):
        find_models(tmp_path)


def test_chunks_win_over_the_whole(tmp_path, caplog):
    first, second = pieces(2)
    write(tmp_path, complete() | {"one": first, "two": second})
    assert [path.stem for path in find_models(tmp_path).unet] == ["one", "two"]
    assert "the chunks are used" in caplog.text


def test_a_missing_chunk(tmp_path):
    first, second = pieces(2)
    write(tmp_path, {"t": text_encoder(), "v": vae_decoder(), "one": first})
    with pytest.raises(CheckpointError, match=r"one\.mlpackage is a chunk .* convert or download all chunks"):
        find_models(tmp_path)
    shutil.rmtree(tmp_path / "one.mlpackage")
    write(tmp_path, {"two": second})
    with pytest.raises(CheckpointError, match=r"no U-Net, only t.mlpackage, two.mlpackage, v.mlpackage"):
        find_models(tmp_path)


@pytest.mark.parametrize(
    ("surplus", "words"),
    [
        ({"other": unet()}, "m2.mlpackage and other.mlpackage, which are for the same part"),
        ({"other": vae_decoder()}, "m1.mlpackage and other.mlpackage"),
        ({"other": text_encoder()}, "m3.mlpackage and other.mlpackage.*several text encoders, are not supported"),
        (dict(zip("abcd", pieces(2) + pieces(2), strict=True)), "b.mlpackage and d.mlpackage"),
    ],
)
def test_two_for_one_place(surplus, words, tmp_path):
    write(tmp_path, complete() | surplus)
    with pytest.raises(CheckpointError, match=words):
        find_models(tmp_path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"m3": text_encoder(width=32)}, "m3.mlpackage has embeddings of width 32 and m2.mlpackage 24"),
        ({"m1": vae_decoder(side=9)}, "m1.mlpackage has latents of height 9 and m2.mlpackage 8"),
    ],
)
def test_models_that_do_not_fit_each_other(changed, words, tmp_path):
    write(tmp_path, complete() | changed)
    with pytest.raises(CheckpointError, match=words):
        find_models(tmp_path)


def test_models_of_different_checkpoints(tmp_path):
    write(tmp_path, complete(source_hash="abc"))
    assert find_models(tmp_path).vae_encoder is None
    write(tmp_path, {"m4": vae_encoder()})
    assert find_models(tmp_path).vae_encoder is not None
    write(tmp_path, {"m4": vae_encoder(source_hash="def")})
    with pytest.raises(CheckpointError, match="different checkpoints"):
        find_models(tmp_path)


def test_shapes_that_a_file_does_not_say_are_no_contradiction(tmp_path):
    models = complete()
    outputs = tuple(Feature(one.name, TensorType("fp16", ())) for one in models["m3"].interface.outputs)
    models["m3"] = replace(models["m3"], interface=Interface(models["m3"].interface.inputs, outputs))
    write(tmp_path, models)
    assert find_models(tmp_path).text_encoder.name == "m3.mlpackage"


def test_what_has_no_part_is_left_alone(tmp_path, caplog):
    shape = (2, 4, 8, 8)
    residual = program({"sample": shape, "timestep": (2,), "additional_residual_0": shape}, {"noise_pred": shape})
    control = program({"sample": shape, "timestep": (2,), "controlnet_cond": shape}, {"additional_residual_0": shape})
    checker = program({"clip_input": (1, 3, 8, 8), "adjustment": (1,)}, {"concept_scores": (1, 17)})
    write(tmp_path, complete() | {"m0": residual, "m4": control, "m5": checker})
    broken = tmp_path / "m6.mlpackage"
    shutil.copytree(tmp_path / "m5.mlpackage", broken)
    (broken / "Data/com.apple.CoreML/model.mlmodel").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    found = find_models(tmp_path)
    assert found.unet == (tmp_path / "m2.mlpackage",)
    assert "m6.mlpackage is ignored" in caplog.text


def test_a_model_that_cannot_be_read_says_why_a_part_is_missing(tmp_path):
    write(tmp_path, complete())
    (tmp_path / "m2.mlpackage/Data/com.apple.CoreML/model.mlmodel").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    )
    with pytest.raises(CheckpointError, match=r"has no U-Net that can be read: .*LFS"):
        find_models(tmp_path)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        find_models(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no Core ML models"):
        find_models(tmp_path)
    with pytest.raises(CheckpointError, match=r"no compiled \(.mlmodelc folders\)"):
        find_models(tmp_path, kind="compiled")
    write(tmp_path, {"m": unet()})
    with pytest.raises(CheckpointError, match=r"no text encoder and no VAE decoder, only m.mlpackage; convert or"):
        find_models(tmp_path)
    found = find_models(tmp_path, required=("unet",))
    assert found.unet == (tmp_path / "m.mlpackage",)
    with pytest.raises(CheckpointError, match="no text encoder"):
        _ = found.text_encoder
    with pytest.raises(UsageError, match="is a single model; give the folder"):
        find_models(tmp_path / "m.mlpackage")


def test_no_part_is_required(tmp_path):
    write(tmp_path / "some", {"m": vae_decoder()})
    write(tmp_path / "other", {"m": program({"clip_input": (1, 3)}, {"concept_scores": (1, 17)})})
    assert find_models(tmp_path, required=()).parts == {"vae_decoder": (tmp_path / "some" / "m.mlpackage",)}
    with pytest.raises(CheckpointError, match=r"no text encoder and no U-Net .*, only m.mlpackage"):
        find_models(tmp_path / "other", required=())
    # A whole set comes before a part of one.
    whole = write(tmp_path / "third", complete())
    assert find_models(tmp_path, required=()).folder == whole
    write(tmp_path / "fourth", {"m": unet()})
    shutil.rmtree(whole)
    with pytest.raises(UsageError, match="several sets"):
        find_models(tmp_path, required=())


def test_a_checkpoint_is_to_be_converted(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="convert it first: sfumato coreml convert"):
        find_models(tmp_path)


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("tokenizer.json",)])
@pytest.mark.parametrize("place", ["", "original", "original/packages", "tokenizer", "original/packages/tokenizer"])
def test_the_nearest_tokenizer(place, names, tmp_path):
    write(tmp_path / "top" / "original/packages", complete())
    for home in (tmp_path / "top" / place, tmp_path):
        home.mkdir(exist_ok=True, parents=True)
        for name in names:
            (home / name).write_text("{}")
    assert find_models(tmp_path / "top").tokenizer == tmp_path / "top" / place
    # Nothing is taken from outside the folder that was named.
    inner = find_models(tmp_path / "top" / "original/packages").tokenizer
    assert inner == (tmp_path / "top" / place if "packages" in place else None)


def test_half_a_tokenizer_is_none(tmp_path):
    write(tmp_path, complete())
    (tmp_path / "vocab.json").write_text("{}")
    assert find_models(tmp_path).tokenizer is None


def test_names_are_apples():
    version = "CompVis/stable-diffusion-v1-4"
    start = "Stable_Diffusion_version_CompVis_stable-diffusion-v1-4_"
    assert package_names(version, "vae_decoder") == (start + "vae_decoder.mlpackage",)
    assert package_names(version, "unet", 2) == (start + "unet_chunk1.mlpackage", start + "unet_chunk2.mlpackage")
    assert package_names(r"C:\models\mine", "unet") == ("Stable_Diffusion_version_C__models_mine_unet.mlpackage",)
    assert [compiled_names(part)[0] for part in ("text_encoder", "unet", "vae_decoder", "vae_encoder")] == [
        "TextEncoder.mlmodelc",
        "Unet.mlmodelc",
        "VAEDecoder.mlmodelc",
        "VAEEncoder.mlmodelc",
    ]
    assert compiled_names("unet", 3) == ("UnetChunk1.mlmodelc", "UnetChunk2.mlmodelc", "UnetChunk3.mlmodelc")


def test_the_tree_of_a_repository(tmp_path):
    assert tree(tmp_path, "mine", "split_einsum", "packages") == tmp_path / "mine" / "split_einsum" / "packages"
    with pytest.raises(UsageError, match="'packages' or 'compiled', not 'swift'"):
        tree(tmp_path, "mine", "original", "swift")
    assert not (tmp_path / "mine").exists()


def test_bytes_of_a_folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"123")
    (tmp_path / "a" / "b" / "two").write_bytes(b"45")
    assert folder_bytes(tmp_path / "a") == 5
    assert folder_bytes(tmp_path / "a" / "one") == 3
