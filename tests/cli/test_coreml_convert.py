"""`sfumato coreml convert` and `verify`: Apple's options, exit codes, and what is refused in a sentence."""

from __future__ import annotations

import json
import shutil

import pytest

CONVERT = ["coreml", "convert"]
VERIFY = ["coreml", "verify"]


@pytest.fixture(scope="module")
def converted(sfumato, model, tmp_path_factory):
    """Packages and compiled models by Apple's own words."""
    folder = tmp_path_factory.mktemp("coreml")
    outcome = sfumato(
        *CONVERT, "--model-version", model, "-o", "out", "--attention-implementation", "SPLIT_EINSUM_V2",
        "--convert-unet", "--convert-text-encoder", "--convert-vae-decoder", "--convert-vae-encoder", "--chunk-unet",
        "--quantize-nbits", 6, "--compute-unit", "CPU_AND_NE", "--min-deployment-target", "iOS17",
        "--bundle-resources-for-swift-cli", "--check-output-correctness", cwd=folder,
    )  # fmt: skip
    return folder, outcome


def test_apples_options(converted):
    folder, outcome = converted
    outcome.succeeded()
    assert outcome.out.splitlines()[-2:] == ["out", "out/Resources"]
    stem = "Stable_Diffusion_version_sd15_"
    names = {path.name.removeprefix(stem) for path in (folder / "out").glob("*.mlpackage")}
    assert names == {
        f"{part}.mlpackage" for part in ("text_encoder", "unet_chunk1", "unet_chunk2", "vae_decoder", "vae_encoder")
    }
    compiled = {path.name for path in (folder / "out" / "Resources").glob("*.mlmodelc")}
    assert compiled == {
        f"{name}.mlmodelc" for name in ("TextEncoder", "UnetChunk1", "UnetChunk2", "VAEDecoder", "VAEEncoder")
    }
    assert "compressed weights" in outcome.out
    assert "WRONG" not in outcome.out
    assert "experimental" in outcome.err


def test_verifying_from_the_command_line(sfumato, sfumato_each, converted, model, tmp_path):
    folder, _ = converted
    plain, quick, told, nothing = sfumato_each(
        [
            [*VERIFY, folder / "out", "--against", model, "--no-picture"],
            [*VERIFY, folder / "out" / "Resources", "--steps", 1, "--json"],
            [*VERIFY, folder / "out" / "Resources", "--no-picture", "--json", "-q"],
            [*VERIFY, tmp_path / "nothing"],
        ],
        cwd=tmp_path,
    )
    assert "unet" in plain.succeeded().out
    assert quick.succeeded().json["checks"][-1]["part"] == "picture"
    assert all(check["passed"] for check in told.succeeded().json["checks"])
    nothing.failed(1, "there is no folder")


def test_a_failed_proof_exits_with_1(sfumato, converted, model, tmp_path):
    folder, _ = converted
    copy = tmp_path / "copy"
    shutil.copytree(folder / "out", copy)
    weights = next(copy.glob("*_vae_decoder.mlpackage")) / "Data/com.apple.CoreML/weights/weight.bin"
    content = bytearray(weights.read_bytes())
    half = len(content) // 2
    content[half : half + 4096] = bytes(4096)
    weights.write_bytes(bytes(content))
    outcome = sfumato(*VERIFY, copy, "--no-picture", cwd=tmp_path)
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "WRONG" in outcome.out or "weight.bin" in outcome.err


def test_json_of_a_conversion(sfumato, model, tmp_path):
    made = sfumato(*CONVERT, model, "--convert-vae-decoder", "-o", "out", "--json", cwd=tmp_path).succeeded().json
    assert made["folders"] == ["out"]
    assert [part["part"] for part in made["parts"]] == ["vae_decoder"]
    assert made["verifications"][0]["passed"]
    assert json.dumps(made)


def test_without_o_the_folders_are_the_hubs(sfumato, model, tmp_path):
    out = sfumato(*CONVERT, model, "--convert-vae-decoder", "--no-verify", "-q", cwd=tmp_path).succeeded().out
    assert out.strip() == "coreml-sd15/split_einsum/packages"
    assert (tmp_path / out.strip()).is_dir()


def test_misuse_is_one_sentence(sfumato_each, model, tmp_path):
    cases = [
        ([model, "--attention-implementation", "FLASH"], 2, "there is no attention 'flash'"),
        ([model, "--min-deployment-target", "macOS12"], 2, "macOS12"),
        ([model, "--quantize-nbits", 3], 2, "not 3"),
        ([model, "--quantize-nbits", 6, "--quantize-to-db", 40], 2, "cannot be combined"),
        ([model, "--compute-unit", "GPU"], 2, "there is no compute unit 'GPU'"),
        ([model, "--chunks", 99], 2, "1 to 8 chunks"),
        ([model, "--quantize-recipe", tmp_path / "none.json"], 2, "there is no recipe"),
        ([model, "--model-version", "other/model"], 2, "given twice"),
        ([model, "--latent-h", 2], 2, "too small"),
        ([model, "--latent-h", 1000000000], 2, "height must be 1 to 512"),
        ([tmp_path / "nothing"], 1, "there is no folder"),
        (["nobody/nothing"], 1, "hub cannot be reached"),
    ]
    outcomes = sfumato_each([[*CONVERT, *map(str, words)] for words, _, _ in cases], cwd=tmp_path)
    for (_, code, part), outcome in zip(cases, outcomes, strict=True):
        outcome.failed(code, part)
    assert list(tmp_path.iterdir()) == []


def test_converting_twice_and_resuming(sfumato_each, model, tmp_path):
    words = [*CONVERT, str(model), "--convert-vae-decoder", "--no-verify", "-o", "out"]
    first, again, resumed, replaced = sfumato_each(
        [words, words, [*words, "--resume"], [*words, "--overwrite"]], cwd=tmp_path
    )
    first.succeeded()
    again.failed(2, "already exists", "--resume", "--overwrite")
    assert "kept" in resumed.succeeded().err
    assert "kept" not in replaced.succeeded().err
