"""Which files of a repository of converted models are fetched."""

from __future__ import annotations

import pytest

from sfumato.coreml.download import download, variants
from sfumato.errors import DownloadError
from support.hub import FakeHub

REPO = "owner/converted"
PACKAGE = "Stable_Diffusion_version_x_unet.mlpackage"
APPLES = [
    ".gitattributes",
    "README.md",
    f"original/packages/{PACKAGE}/Manifest.json",
    f"original/packages/{PACKAGE}/Data/com.apple.CoreML/weights/weight.bin",
    "original/compiled/Unet.mlmodelc/model.mil",
    "original/compiled/Unet.mlmodelc/weights/weight.bin",
    "original/compiled/vocab.json",
    "original/compiled/merges.txt",
    "split_einsum/packages/x_unet.mlpackage/Manifest.json",
    "split_einsum/compiled/Unet.mlmodelc/model.mil",
    "split_einsum/compiled/controlnet/Canny.mlmodelc/model.mil",
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """`hub(names)` makes a repository of these files and a hub that has it."""

    def make(names: list[str]) -> FakeHub:
        for name in names:
            path = tmp_path / "repository" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        return FakeHub(monkeypatch, tmp_path / "cache", {REPO: tmp_path / "repository"})

    return make


def fetched(fake: FakeHub) -> set[str]:
    (_, _, patterns), *more = [call for call in fake.asked if call[0] == "download"]
    assert more == []
    return set(patterns)


def test_the_variants_of_a_repository():
    assert variants(APPLES) == [
        "original/compiled",
        "original/packages",
        "split_einsum/compiled",
        "split_einsum/compiled/controlnet",
        "split_einsum/packages",
    ]
    assert variants(["a.mlpackage/Manifest.json", "README.md"]) == ["."]
    assert variants(["README.md"]) == []


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (None, {name for name in APPLES if name.startswith("original/packages/")}),
        ("original/packages", {name for name in APPLES if name.startswith("original/packages/")}),
        ("/original/compiled/", {name for name in APPLES if name.startswith("original/compiled/")}),
        ("split_einsum/compiled", {"split_einsum/compiled/Unet.mlmodelc/model.mil"}),
    ],
)
def test_only_one_variant_travels(variant, expected, hub, tmp_path):
    fake = hub(APPLES)
    folder = download(REPO, variant)
    assert fetched(fake) == expected
    assert folder.as_posix().endswith((variant or "original/packages").strip("/"))
    assert {path.name for path in folder.iterdir()} <= {PACKAGE, "Unet.mlmodelc", "vocab.json", "merges.txt"}


def test_a_tokenizer_above_or_beside_comes_along(hub):
    tokenizers = ["tokenizer/vocab.json", "tokenizer/merges.txt", "original/tokenizer_config.json", "other/vocab.json"]
    fake = hub([*APPLES, *tokenizers])
    download(REPO, "original/packages")
    assert fetched(fake) - set(APPLES) == set(tokenizers[:3])


def test_what_is_taken_where_the_usual_one_is_missing(hub, caplog):
    fake = hub([name for name in APPLES if not name.startswith("original/packages")])
    assert download(REPO).as_posix().endswith("split_einsum/packages")
    assert fetched(fake) == {"split_einsum/packages/x_unet.mlpackage/Manifest.json"}
    assert "has no original/packages; fetching split_einsum/packages" in caplog.text


def test_models_at_the_top_of_a_repository(hub, caplog):
    fake = hub(["a.mlmodelc/model.mil", "vocab.json", "merges.txt", "README.md"])
    folder = download(REPO)
    assert fetched(fake) == {"a.mlmodelc/model.mil", "vocab.json", "merges.txt"}
    assert (folder / "a.mlmodelc").is_dir()
    assert caplog.text == ""


def test_what_is_not_there(hub):
    hub(APPLES)
    with pytest.raises(DownloadError, match=r"no variant 'original/package' \(did you mean 'original/packages'\?\); it has original/compiled, original/packages, split"):  # fmt: skip
        download(REPO, "original/package")
    with pytest.raises(DownloadError, match="no variant ''"):
        download(REPO, "")


def test_a_checkpoint_is_to_be_converted(hub):
    hub(["model_index.json", "unet/config.json"])
    with pytest.raises(
        DownloadError, match="no Core ML models; for a checkpoint: sfumato coreml convert owner/converted"
    ):
        download(REPO)
