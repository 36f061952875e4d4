"""What a small model says of prompts that it knows only in part, and of sizes it was not made for."""

from __future__ import annotations

import json

import pytest

from sfumato.checkpoints.builtin import builtin_model
from sfumato.images import size_notes
from sfumato.pipelines.words import Words
from sfumato.text.embeddings import Embedding
from sfumato.text.prompt import plain_words
from sfumato.text.schedules import Timeline, at_step


@pytest.fixture(scope="module")
def words() -> Words:
    found = Words.from_folder(builtin_model())
    assert found is not None
    return found


@pytest.mark.parametrize(
    "prompt",
    [
        "a red apple, 3d",
        "two red apples on a blue background, flat style",
        "a cat left of a dog, 3d",
        "three stars on a dark blue background, flat style",
        "a small fox on a striped light green background, cartoon",
        "a rocket, line art",
        "a slice of pizza, sticker",
        "a smiling cat, flat style",
        "Two Dogs, 3D",
    ],
)
def test_nothing_is_said_of_what_is_known(words, prompt):
    assert words.notes([prompt]) == []


@pytest.mark.parametrize(
    ("prompt", "ignored"),
    [
        ("two dogs and a person riding a blue bicycle", ["riding"]),
        ("an apple in space", ["space"]),
        ("a photorealistic cat, 8k", ["photorealistic", "8k"]),
    ],
)
def test_words_that_are_ignored_are_named(words, prompt, ignored):
    (note,) = words.notes([prompt])
    assert "only in part" in note
    assert all(repr(word) in note for word in ignored)


@pytest.mark.parametrize(
    ("prompt", "syntax"),
    [
        ("two (red:1.4) apples", "a1111"),
        ("[a red:a green:0.25] apple, ((3d:1.2))", "a1111"),
        ("a red apple <lora:shiny_9:0.8> BREAK a \\(green\\) star", "a1111"),
        ("a (red:1.25) apple", "comfyui"),
        ("a red apple, my-word9 and <my-word9>", "plain"),
    ],
)
def test_syntax_and_embeddings_are_no_words(words, prompt, syntax):
    embeddings = [Embedding(("my-word9",), {})]
    texts = {at_step(prompt, step, Timeline(4)) for step in (1, 4)} if syntax == "a1111" else {prompt}
    assert words.notes([prompt], lambda _: " ".join(plain_words(text, syntax, embeddings) for text in texts)) == []
    (note,) = words.notes([f"{prompt} riding"], lambda one: plain_words(one, "plain", embeddings))
    assert "'riding'" in note


def test_a_prompt_of_syntax_alone_says_nothing(words):
    assert words.notes(["<lora:shiny:1>"], lambda one: plain_words(one, "a1111")) == []


def test_a_run_reads_its_prompt_without_syntax():
    import sfumato

    request = sfumato.GenerateRequest(prompt="two (red:1.4) apples, [3d:flat style:0.5]", steps=1, seed=1)
    pipeline = sfumato.load()
    assert pipeline.generate(request.replace(prompt_syntax="a1111")).notes == ()
    (note,) = pipeline.generate(request).notes
    assert "ignores '4'" in note or "'4'" in note


def test_nothing_known_and_nothing_asked_for(words):
    (unknown,) = words.notes(["a zebu", "", "a zebu"])
    assert unknown.startswith("the small model does not know 'a zebu', so the image is a guess")


def test_every_name_and_every_style_is_known(words):
    told = json.loads((builtin_model() / "words.json").read_text(encoding="utf-8"))
    names = [name for names in told["concepts"].values() for name in names]
    assert words.notes([f"a {name}, {style}" for name in names for style in told["styles"]]) == []


def test_sizes():
    options = {"only": False, "source": False, "chosen": True}
    assert size_notes((128, 128), (128, 128), **options) == []
    assert size_notes((2048, 2048), (512, 512), **options) == []  # asked for, and not from an image
    (note,) = size_notes((64, 64), (128, 128), **options | {"only": True})
    assert note == "this model was made for 128 × 128 images, and 64 × 64 will look bad; use 128 × 128"
