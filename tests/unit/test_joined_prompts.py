"""Prompts that `AND` joins: one prediction each, in one batch, added up by their weights."""

from __future__ import annotations

import pytest
import torch

from sfumato import GenerateRequest, GuidanceInterval
from sfumato.pipelines.guidance import compose, guide
from sfumato.runtime.choices import published_sizes, task_of
from sfumato.text.grammars import subprompts

REQUEST = GenerateRequest(
    prompt="a cat", steps=3, seed=3, prompt_syntax="a1111", scheduler="euler", width=16, height=16
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a cat AND a dog", [("a cat", 1.0), (" a dog", 1.0)]),
        ("a cat :1.2 AND a (dog:2):0.5AND", [("a cat", 1.2), (" a (dog:2):0.5AND", 1.0)]),
        ("a cat:1.2AND x", [("a cat:1.2AND x", 1.0)]),
        ("a AND b : -0.5 AND\nc:.5", [("a", 1.0), (" b", -0.5), ("\nc", 0.5)]),
        ("SAND and LAND", [("SAND and LAND", 1.0)]),
    ],
)
def test_prompts_and_their_weights(text, found):
    told = subprompts(text, "a1111")
    assert [(one.rstrip(), weight) for one, weight in told] == [(one.rstrip(), weight) for one, weight in found]
    assert subprompts(text, "comfyui") == [(text, 1.0)]


def randn(seed: int) -> torch.Tensor:
    return torch.randn((2, 4, 3, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_composing_by_its_formula():
    u, a, b = randn(0), randn(1), randn(2)
    weights = tuple(torch.tensor(w, dtype=torch.float64)[:, None, None, None] for w in ([1.0, 0.5], [-0.3, 2.0]))
    whole = guide(u, compose([u, a, b], weights), 7.0)
    for i, (v, w) in enumerate([(1.0, -0.3), (0.5, 2.0)]):
        assert torch.allclose(whole[i], u[i] + 7 * (v * (a[i] - u[i]) + w * (b[i] - u[i])))
    mean = compose([a, b], weights)
    assert torch.allclose(mean[1], 0.2 * a[1] + 0.8 * b[1])
    assert torch.allclose(mean[0], a[0], atol=1e-5)  # what is to be left out is not drawn without guidance
    assert torch.equal(compose([u, a], ()), a)


def latents(pipe, request, **changes):
    steps = []
    pipe.generate(request.replace(**changes), steps.append)
    return steps[-1].latents


def test_a_prompt_joined_to_itself_is_that_prompt(ours):
    alone = latents(ours(), REQUEST)
    assert torch.allclose(latents(ours(), REQUEST, prompt="a cat :0.25 AND a cat :0.75"), alone, atol=1e-4)
    assert torch.allclose(latents(ours(), REQUEST, prompt="a cat AND a dog :0"), alone, atol=1e-4)
    other = latents(ours(), REQUEST, prompt="a cat AND a dog")
    assert not torch.allclose(other, alone, atol=1e-2)
    # Weights and the scale of guidance multiply each other.
    twice = latents(ours(), REQUEST, prompt="a cat AND a cat", guidance_scale=3.75)
    assert torch.allclose(twice, alone, atol=1e-4)


def test_a_batch_of_joined_prompts_is_each_alone(ours):
    prompts = ("a cat AND a dog :0.7 AND a fox", "a horse")
    batch = latents(ours(), REQUEST, prompt=prompts, count=2)
    for i, prompt in enumerate(prompts):
        alone = latents(ours(), REQUEST, prompt=prompt, count=2, seed=3 + 2 * i)
        assert torch.allclose(batch[2 * i : 2 * i + 2], alone, atol=1e-4)


def test_joined_prompts_are_one_call_of_the_unet(ours):
    pipe, read = ours(), []
    handle = pipe.unet.register_forward_pre_hook(
        lambda _, given: read.append((given[0].shape[0], given[2].states.shape[0]))
    )
    try:
        interval = GuidanceInterval(start=0.5)
        pipe.generate(REQUEST.replace(prompt="a cat AND a dog", guidance_interval=interval))
    finally:
        handle.remove()
    assert read == [(1, 2), (1, 2), (1, 3)]


def test_without_guidance_it_is_their_mean(ours):
    request = REQUEST.replace(guidance_scale=1.0)
    assert torch.allclose(latents(ours(), request, prompt="a cat AND a cat"), latents(ours(), request), atol=1e-4)


def test_two_text_encoders_and_sizes(ours):
    request = REQUEST.replace(prompt="a cat AND a dog", negative_prompt="blue")
    swapped = latents(ours("sdxl"), request, prompt="a dog AND a cat")
    assert torch.allclose(latents(ours("sdxl"), request), swapped, atol=1e-4)


def test_memory_counts_every_joined_prompt():
    sizes = published_sizes("sd15")
    assert task_of(sizes, REQUEST).rows == 2
    assert task_of(sizes, REQUEST.replace(prompt="a AND b AND c")).rows == 4
    assert task_of(sizes, REQUEST.replace(prompt="a AND b AND c", prompt_syntax="plain")).rows == 2


def test_in_a_negative_prompt_it_is_a_word(ours):
    notes = ours().generate(REQUEST.replace(negative_prompt="red AND blue")).notes
    assert "AND in the negative prompt is read as a word and does not join prompts" in notes
