"""`sfumato coreml download` against a hub of our own, in processes of their own."""

from __future__ import annotations

import time

import pytest

from cli.test_download import REPO, serving


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    for name in (
        "README.md",
        "original/packages/a.mlpackage/Manifest.json",
        "original/packages/a.mlpackage/Data/weights/weight.bin",
        "split_einsum/compiled/A.mlmodelc/model.mil",
        "split_einsum/compiled/vocab.json",
        "split_einsum/compiled/merges.txt",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(folder):
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.relative_to(folder).parts
    )


def test_one_variant_into_the_cache_or_a_folder(sfumato_each, repository, tmp_path):
    with serving(repository) as hub:
        commands = [
            ["coreml", "download", REPO],
            ["coreml", "download", REPO],
            ["coreml", "download", REPO, "--variant", "split_einsum/compiled", "-o", "here"],
        ]
        first, again, there = sfumato_each(commands, cwd=tmp_path, env={"HF_HOME": str(tmp_path / "home")} | hub.env)
    (folder,) = first.succeeded().paths
    assert again.succeeded().paths == [folder]
    assert folder.parts[-2:] == ("original", "packages")
    assert names(folder) == ["a.mlpackage/Data/weights/weight.bin", "a.mlpackage/Manifest.json"]
    assert there.succeeded().out.strip().replace("\\", "/").endswith("here/split_einsum/compiled")
    assert names(tmp_path / "here") == [
        "split_einsum/compiled/A.mlmodelc/model.mil",
        "split_einsum/compiled/merges.txt",
        "split_einsum/compiled/vocab.json",
    ]
    # Nothing travelled twice, and of other variants nothing at all.
    assert sorted(hub.fetched) == sorted(set(hub.fetched))
    assert "README.md" not in hub.fetched


def test_what_the_hub_does_not_have(sfumato_each, repository, tmp_path):
    cases = [
        (
            [REPO, "--variant", "original"],
            1,
            "no variant 'original'",
            "it has original/packages, split_einsum/compiled",
        ),
        (["owner/other"], 1, "neither a local folder nor a hub repository"),
        ([REPO, "--revision", "v9"], 1, "has no revision 'v9'"),
        (["./a"], 2, "'./a' is not a hub id"),
    ]
    with serving(repository) as hub:
        env = {"HF_HOME": str(tmp_path / "home")} | hub.env
        outcomes = sfumato_each([["coreml", "download", *words] for words, *_ in cases], cwd=tmp_path, env=env)
    for outcome, (_, code, *sentence) in zip(outcomes, cases, strict=True):
        outcome.failed(code, *sentence)


def test_dead_network(sfumato, tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    began = time.monotonic()
    sfumato("coreml", "download", REPO, cwd=tmp_path, env=env).failed(
        1, "the hub cannot be reached", "check the network"
    )
    assert time.monotonic() - began < 20
