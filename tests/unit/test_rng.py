"""NumPy's stream as a source of noise: its numbers, and that it stands wherever torch's generators do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sfumato
from sfumato import GenerateRequest
from sfumato.errors import UsageError
from sfumato.pipelines.repair import saved_randomness
from sfumato.runtime.generators import NumpyGenerator, generator_for, normal
from sfumato.schedulers import BrownianNoise, GaussianNoise

PROMPT = "a photo"


def legacy(seed: int, *shape: int) -> torch.Tensor:
    """What Apple's runners do: seed NumPy, draw in float64, round."""
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape).astype(np.float32))


@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 6))
def test_one_stream_however_it_is_drawn_from(seed, cut):
    source = NumpyGenerator(seed)
    parts = [source.randn((cut, 3)), source.randn((6 - cut, 3))]
    assert torch.equal(torch.cat(parts), legacy(seed, 6, 3))
    assert parts[0].dtype == torch.float32
    assert source.initial_seed() == seed


def test_known_numbers():
    """The first numbers of seed 0, as every version of NumPy has drawn them."""
    assert NumpyGenerator(0).randn((2,)).tolist() == pytest.approx([1.764052345967664, 0.4001572083672233])


def test_states_go_back():
    source = NumpyGenerator(4)
    source.randn((3,))  # an odd number: the polar method keeps the other one of a pair
    go_back = saved_randomness([source, torch.Generator().manual_seed(1)], torch.device("cpu"))
    first = source.randn((5,))
    go_back()
    assert torch.equal(source.randn((5,)), first)
    alone = saved_randomness(source, torch.device("cpu"))
    second = source.randn((4,))
    alone()
    assert torch.equal(source.randn((4,)), second)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_it_does_not_have(seed):
    with pytest.raises(UsageError, match=r"0 to 2\*\*32 - 1"):
        NumpyGenerator(seed)


def test_noise_of_one_source_and_of_one_for_each_image():
    batch = GaussianNoise((2, 3, 2), NumpyGenerator(5))
    assert torch.equal(batch(), legacy(5, 2, 3, 2))
    several = GaussianNoise((2, 3, 2), [NumpyGenerator(5), NumpyGenerator(6)])()
    assert torch.equal(several, torch.stack([legacy(5, 3, 2), legacy(6, 3, 2)]))
    mixed = GaussianNoise((2, 3), [NumpyGenerator(5), torch.Generator().manual_seed(0)])()
    assert torch.equal(mixed[:1], legacy(5, 1, 3))
    assert torch.equal(
        normal((2,), generator_for("torch", 3), torch.device("cpu")),
        torch.randn(2, generator=torch.Generator().manual_seed(3)),
    )
    with pytest.raises(UsageError, match="2 generators for a batch of 3"):
        GaussianNoise((3, 2), [NumpyGenerator(0), NumpyGenerator(1)])


def test_brownian_paths_take_its_seed():
    scheduler = sfumato.DPMSolverSDEScheduler()
    scheduler.set_timesteps(4)
    rows = scheduler.table().rows
    ours = scheduler.noise_source((1, 4), NumpyGenerator(9))
    assert isinstance(ours, BrownianNoise)
    theirs = scheduler.noise_source((1, 4), torch.Generator().manual_seed(9))
    assert torch.equal(ours(rows[0]), theirs(rows[0]))


def test_requests():
    request = GenerateRequest(prompt="x", rng="numpy", seed=2**32 - 1, count=3)
    assert request.seeds == (2**32 - 1, 0, 1)
    assert request.replace(rng="torch").seeds == (2**32 - 1, 2**32, 2**32 + 1)
    assert GenerateRequest(seed=2**63 - 1, count=2).seeds == (2**63 - 1, 0)
    assert GenerateRequest().seeds == ()
    assert request.to_dict()["rng"] == "numpy"
    assert "rng" not in request.replace(rng="torch").to_dict()
    assert GenerateRequest.from_dict(request.to_dict()) == request
    for wrong, sentence in (
        ({"rng": "nvidia"}, "rng must be torch or numpy, not 'nvidia'"),
        ({"rng": None}, "rng must be torch or numpy"),
        ({"rng": ["numpy"]}, "rng must be torch or numpy"),
        ({"rng": "numpy", "seed": 2**32}, r"from 0 to 2\*\*32 - 1 with rng numpy"),
        ({"seed": 2**63}, r"from 0 to 2\*\*63 - 1, not"),
    ):
        with pytest.raises(UsageError, match=sentence):
            GenerateRequest(**wrong)


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a"])
def test_pictures(ours, scheduler):
    """Image i of a batch is that of its own seed; noise of the steps goes on in the same stream; recipes carry it."""
    pipe = ours()
    request = GenerateRequest(prompt=PROMPT, steps=3, seed=11, count=2, rng="numpy", scheduler=scheduler)
    both = pipe.generate(request)
    alone = pipe.generate(GenerateRequest.from_dict(both.recipes[1]["request"]))
    assert both.recipes[1]["request"]["rng"] == "numpy"
    assert both.seeds == (11, 12)
    difference = np.abs(np.asarray(both.images[1], dtype=int) - np.asarray(alone.images[0], dtype=int))
    assert difference.max() <= 1  # a batch adds in another order, which may tip a rounding
    other = pipe.generate(request.replace(rng="torch"))
    assert other.images[0].tobytes() != both.images[0].tobytes()
    assert pipe.generate(request.replace(seed=None)).seeds[0] < 2**32


def test_the_ecosystems_calls_take_it(ours):
    pipe = ours()

    def latents(generator, **call):
        return pipe(PROMPT, num_inference_steps=2, generator=generator, output_type="latent", **call).images

    given = legacy(7, 1, 4, 8, 8)
    expected = pipe(PROMPT, num_inference_steps=2, latents=given, output_type="latent").images
    assert torch.equal(latents(NumpyGenerator(7)), expected)
    two = latents([NumpyGenerator(7), NumpyGenerator(8)], num_images_per_prompt=2)
    assert torch.allclose(two[:1], expected, atol=1e-5)


def test_image_to_image(ours):
    from PIL import Image

    pipe = ours()
    start = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    redraw = sfumato.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    redraw.set_progress_bar_config(disable=True)
    draw = [
        redraw(PROMPT, start, num_inference_steps=4, generator=NumpyGenerator(seed), output_type="pt").images
        for seed in (3, 3, 4)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
