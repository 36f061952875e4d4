"""Prompts that `AND` joins: one prediction each, in one batch, added up by their weights."""

from __future__ import annotations

import pytest
import torch

import sfumato
from sfumato import GenerateRequest, GuidanceInterval
from sfumato.pipelines.conditioning import Conditioning
from sfumato.pipelines.guidance import Guidance, compose, guide
from sfumato.pipelines.residuals import steered_by
from sfumato.runtime.choices import published_sizes, task_of
from sfumato.text.grammars import subprompts
from support.control import control_net
from support.pictures import picture
from support.relatives import write_relative

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


# ---- beside images and networks -------------------------------------------------------------------------------------


@pytest.fixture
def relative(once, tmp_path):
    """`relative("edit")`: a checkpoint that reads an image, and a request for it."""
    picture(16, 16).save(tmp_path / "image.png")

    def get(name):
        folder = once(f"relatives/{name}", lambda folder: write_relative(folder, name))
        return sfumato.DiffusionPipeline.from_pretrained(folder), REQUEST.replace(image=str(tmp_path / "image.png"))

    return get


def test_edits_are_guided_by_the_image_and_each_prompt(relative, monkeypatch):
    pipe, request = relative("edit")
    read, predicted, call = [], [], Guidance.__call__
    pipe.unet.register_forward_hook(lambda _, given, result: read.append((given[0], result[0])))
    monkeypatch.setattr(Guidance, "__call__", lambda *given: predicted.append(call(*given)) or predicted[-1])
    joined = request.replace(prompt="a cat :0.7 AND a dog :-0.4", image_guidance_scale=1.5, guidance_scale=6.0)
    pipe.generate(joined)
    inputs, (none, image, cat, dog) = read[0][0], read[0][1].chunk(4)
    extra = inputs[:, 4:].chunk(4)
    assert not extra[0].any()
    assert all(torch.equal(one, extra[1]) and one.any() for one in extra[2:])
    by_hand = none + 1.5 * (image - none) + 6 * (0.7 * (cat - image) - 0.4 * (dog - image))
    assert torch.allclose(predicted[0], by_hand, atol=1e-5)
    # Each branch is what it is alone.
    for prompt, own in (("a cat", cat), ("a dog", dog)):
        read.clear()
        pipe.generate(joined.replace(prompt=prompt))
        assert torch.allclose(read[0][1].chunk(3)[2], own, atol=1e-5)
    read.clear()
    predicted.clear()
    pipe.generate(joined.replace(guidance_scale=1.0))
    cat, dog = read[0][1].chunk(2)
    assert torch.allclose(predicted[0], cat, atol=1e-4)


@pytest.mark.parametrize("name", ["edit", "likeness"])
def test_joined_to_itself_it_is_that_prompt_beside_an_image(relative, name):
    pipe, request = relative(name)
    alone = latents(pipe, request)
    assert torch.allclose(latents(pipe, request, prompt="a cat :0.25 AND a cat :0.75"), alone, atol=1e-4)
    assert not torch.allclose(latents(pipe, request, prompt="a cat AND a dog"), alone, atol=1e-2)


@pytest.mark.parametrize("guess", [True, False])
@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_a_network_beside_sees_every_prompt(ours, guess, scale):
    """In guess mode it adds to each prompt's branch, and nothing to what they are guided away from."""
    pipe, net = ours(), control_net(sfumato)
    random = torch.Generator().manual_seed(1)
    x, pictures = torch.randn(2, 4, 8, 8, generator=random), torch.rand(1, 3, 16, 16, generator=random)
    u, a, b = torch.randn(3, 2, 7, pipe.unet.config.cross_attention_dim, generator=random)
    weights = [torch.full((2, 1, 1, 1), one) for one in (0.6, 1.5)]
    steered = (steered_by(net, pictures, scale=0.8, guess=guess).of(2, x),)
    told = Conditioning((u, a, b), weights=tuple(weights), steered=steered)

    def predict(prompt, added=True):
        call = {"conditioning_scale": 0.8, "guess_mode": guess, "return_dict": False}
        down, middle = net(x, 7.0, prompt, pictures.expand(2, -1, -1, -1), **call)
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle} if added else {}
        return pipe.unet(x, 7.0, prompt, return_dict=False, **more)[0]

    with torch.no_grad():
        predicted = Guidance(unet=pipe.unet, conditioning=told, scale=scale)(x, 7.0)
        none, one, other = predict(u, added=not guess), predict(a), predict(b)
    by_hand = none + 4 * (0.6 * (one - none) + 1.5 * (other - none))
    mean = (0.6 * one + 1.5 * other) / 2.1
    assert torch.allclose(predicted, by_hand if scale > 1 else mean, atol=1e-4)


@pytest.mark.parametrize("scale", [7.5, 1.0])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "edit", "likeness"])
def test_more_or_fewer_are_joined_on_the_way(ours, relative, name, scale):
    pipe, request = (ours(name), REQUEST) if name.startswith("sd") else relative(name)
    request = request.replace(guidance_scale=scale)
    changing = list(pipe.stream(request.replace(prompt="[a cat AND a dog:a cat:1]")))
    joined = list(pipe.stream(request.replace(prompt="a cat AND a dog")))
    assert torch.equal(changing[0].latents, joined[0].latents)
    assert not torch.equal(changing[1].latents, joined[1].latents)
    more, whole = (
        list(pipe.stream(request.replace(prompt=one))) for one in ("[a cat:a cat AND a dog:0]", "a cat AND a dog")
    )
    assert torch.equal(more[-1].latents, whole[-1].latents)
    grown = list(pipe.stream(request.replace(prompt="[a cat:a cat AND a cat:1]", guidance_scale=1.0)))
    alone = list(pipe.stream(request.replace(guidance_scale=1.0)))
    assert torch.allclose(grown[-1].latents, alone[-1].latents, atol=1e-4)
