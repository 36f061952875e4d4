"""Sources of noise beside torch's: their numbers, and that they stand wherever torch's generators do."""

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
from sfumato.request import Noise
from sfumato.runtime.generators import NumpyGenerator, PhiloxGenerator, generator_for, normal, philox, slerp
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
        ({"rng": "nvidia"}, "rng must be torch, numpy or cuda, not 'nvidia'"),
        ({"rng": None}, "rng must be torch, numpy or cuda"),
        ({"rng": ["numpy"]}, "rng must be torch, numpy or cuda"),
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


# The known answers of Random123's own tests (kat_vectors: philox4x32 10).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers_of_philox(counter, key, answer):
    found = philox([np.array([part], dtype=np.uint64) for part in counter], key)
    assert tuple(int(part[0]) for part in found) == answer


def test_known_numbers_of_cuda():
    """torch.manual_seed(0); torch.randn(3, 4, device="cuda"), as A1111's rng_philox.py has published them."""
    published = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    source = PhiloxGenerator(0)
    assert source.randn((3, 4)).numpy() == pytest.approx(np.array(published), abs=1e-6)
    again = source.randn((12,))
    assert not torch.equal(again, PhiloxGenerator(0).randn((12,)))
    # Each number is its own counter's, so a longer draw begins with the same ones.
    assert torch.equal(PhiloxGenerator(2**63 - 1).randn((5,)), PhiloxGenerator(2**63 - 1).randn((9,))[:5])


@pytest.mark.parametrize("rng", ["torch", "numpy", "cuda"])
def test_a_variation_is_between_two_seeds(rng):
    shape = (1, 4, 8, 8)
    first, other = (normal(shape, generator_for(rng, seed), torch.device("cpu")) for seed in (3, 9))

    def drawn(**noise):
        source = generator_for(rng, 3, Noise(**noise))
        return [normal(shape, source, torch.device("cpu")) for _ in range(2)]

    assert torch.equal(drawn()[0], first)
    assert torch.allclose(drawn(variation_seed=9, variation_strength=0)[0], first, atol=1e-6)
    assert torch.allclose(drawn(variation_seed=9, variation_strength=1)[0], other, atol=1e-5)
    half, following = drawn(variation_seed=9, variation_strength=0.5)
    assert torch.allclose(half, slerp(first, other, 0.5))
    assert torch.equal(following, drawn()[1])  # the steps go on with the first one's stream
    # A1111's ENSD: the steps draw from a stream of their own, of the seed and this much more.
    assert torch.equal(drawn(step_seed=6)[1], other)
    assert torch.equal(drawn(step_seed=6, variation_seed=9, variation_strength=0.5)[0], half)
    expected = normal(shape, generator_for("cuda", 3), torch.device("cpu"))
    assert torch.equal(drawn(step_rng="cuda")[1], expected)


def test_a_turned_stream_goes_back():
    source = generator_for("cuda", 1, Noise(variation_seed=2, variation_strength=0.3, step_seed=5))
    go_back = saved_randomness([source], torch.device("cpu"))
    first = [normal((1, 1, 4, 4), source, torch.device("cpu")) for _ in range(3)]
    go_back()
    again = [normal((1, 1, 4, 4), source, torch.device("cpu")) for _ in range(3)]
    assert all(map(torch.equal, first, again))
    assert source.initial_seed() == 1
