"""The request: what it refuses, and that it survives every way of being written down."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato import Fast, Framing, FreeU, GenerateRequest, GuidanceInterval, Reuse
from sfumato.errors import UnknownArgument, UsageError

texts = st.text(max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False)
scales = st.floats(-1000, 1000)
pairs = st.none() | st.tuples(st.integers(-(2**24), 2**24), st.integers(-(2**24), 2**24))
framings = st.builds(
    Framing,
    original_size=pairs,
    crops_coords_top_left=pairs,
    target_size=pairs,
    aesthetic_score=st.none() | finite,
)
valid = st.fixed_dictionaries(
    {},
    optional={
        "prompt": texts | st.lists(texts, min_size=1, max_size=3).map(tuple),
        "negative_prompt": st.none() | texts,
        "prompt_2": st.none() | texts,
        "negative_prompt_2": st.none() | texts,
        "steps": st.none() | st.integers(1, 10**4),
        "guidance_scale": st.none() | scales,
        "denoising_start": st.none() | st.floats(0, 0.4),
        "denoising_end": st.none() | st.floats(0.5, 1),
        "framing": framings,
        "negative_framing": st.none() | framings,
        "guidance_rescale": st.floats(0, 1),
        "guidance_interval": st.none() | st.builds(GuidanceInterval, stop=st.floats(0.1, 1)),
        "fast": st.none() | st.builds(Fast, promise=st.floats(1, 100), deep=st.none() | st.builds(Reuse)),
        "freeu": st.none() | st.builds(FreeU, b1=st.floats(0, 2), b2=st.just(1), s1=st.just(1), s2=st.just(0)),
        "seamless": st.sampled_from([None, "x", "y", "xy"]),
        "seed": st.none() | st.integers(0, 2**63 - 1),
        "count": st.integers(1, 100),
        "width": st.none() | st.integers(1, 10**5),
        "height": st.none() | st.integers(1, 10**5),
        "scheduler": st.none() | texts,
        "eta": st.floats(0, 1),
        "clip_skip": st.none() | st.integers(0, 12),
        "sigmas": st.none() | st.lists(finite, min_size=1, max_size=4).map(tuple),
        "image": st.none() | texts,
        "strength": st.floats(0, 1),
    },
)


@given(values=valid)
def test_round_trips(values):
    request = GenerateRequest(**values)
    assert GenerateRequest.from_dict(request.to_dict()) == request
    assert GenerateRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert pickle.loads(pickle.dumps(request)) == request
    assert request.batch_size == len(request.prompts) * request.count
    assert {len(texts) for texts in (*request.texts, *request.negative_texts)} == {len(request.prompts)}
    alone = request.alone(len(request.prompts) - 1)
    assert (alone.batch_size, alone.prompts) == (1, request.prompts[-1:])
    assert [texts[-1:] for texts in (*request.texts, *request.negative_texts)] == [*alone.texts, *alone.negative_texts]


@given(values=valid, steps=st.integers(1, 9), scale=scales)
def test_what_is_left_open_is_settled_once(values, steps, scale):
    request = GenerateRequest(**values)
    settled = request.settled({"steps": steps, "guidance_scale": scale})
    assert settled.steps == (steps if request.steps is None else request.steps)
    assert settled.guidance_scale == (scale if request.guidance_scale is None else request.guidance_scale)
    assert settled.settled({"steps": steps + 1}) == settled
    plain = request.settled({})
    assert (plain.steps, plain.guidance_scale) == (request.chosen_steps, request.chosen_scale)


WRONG = [
    ({"prompt": ()}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": ["a", None]}, "prompt"),
    ({"prompt": ["a", "b"], "negative_prompt": ["x"]}, "got 1 for 2 prompts"),
    ({"prompt": "a", "negative_prompt": ["x", "y"]}, "got 2 for 1 prompt"),
    ({"steps": 0}, "steps"),
    ({"steps": -3}, "steps"),
    ({"steps": 2.5}, "steps"),
    ({"steps": True}, "steps"),
    ({"count": 0}, "count"),
    ({"width": 0}, "width"),
    ({"height": -64}, "height"),
    ({"height": 64.0}, "height"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"guidance_scale": "7"}, "guidance_scale"),
    ({"guidance_rescale": 1.5}, "guidance_rescale"),
    ({"eta": -0.1}, "eta"),
    ({"strength": 1.01}, "strength"),
    ({"steps": 10**9}, "steps must be at most 10000"),
    ({"steps": 10**400}, "steps"),
    ({"count": 10**9}, "count must be at most 10000"),
    ({"prompt": ["a"] * 200, "count": 100}, "20000 images are too many"),
    ({"width": 10**12}, "width"),
    ({"guidance_scale": 10**400}, "guidance_scale"),
    ({"prompt": "\ud800"}, "the prompt contains bytes that are not valid UTF-8"),
    ({"prompt": "a", "negative_prompt": "\ud800"}, "the negative prompt contains bytes"),
    ({"scheduler": 5}, "scheduler must be text"),
    ({"rng": ["torch"]}, "rng must be"),
    ({"rng": "x"}, "rng must be torch, numpy or cuda"),
    ({"image": 5}, "image must be text"),
    ({"timesteps": ["x"]}, "timesteps must be a list of"),
    ({"timesteps": 5}, "timesteps"),
    ({"sigmas": [float("nan")]}, "sigmas"),
    ({"sigmas": [1.0] * 20_000}, "sigmas"),
    ({"clip_skip": 10**30}, "clip_skip"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.0}, "seed"),
    ({"clip_skip": -1}, "clip_skip"),
    ({"timesteps": [1], "sigmas": [1.0]}, "timesteps and sigmas"),
    ({"prompt": "a", "prompt_2": ["x", "y"]}, "got 2 for 1 prompt"),
    ({"prompt_2": "\ud800"}, "the prompt 2 contains bytes"),
    ({"denoising_start": 1}, "denoising_start, 1, must be below denoising_end, 1"),
    ({"denoising_start": 0.5, "denoising_end": 0.5}, "must be below"),
    ({"denoising_end": -0.1}, "denoising_end"),
    ({"framing": {"original_size": (1, 2)}}, "framing must be the fields of a Framing"),
    ({"framing": None}, "framing"),
]


@pytest.mark.parametrize(("values", "says"), WRONG)
def test_a_wrong_value_is_named_in_one_sentence(values, says):
    with pytest.raises(UsageError, match=says) as caught:
        GenerateRequest(**values)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_field_that_does_not_exist_is_suggested():
    with pytest.raises(UnknownArgument, match=r"'guidance'.*'guidance_scale'"):
        GenerateRequest.from_dict({"guidance": 3})
    with pytest.raises(UnknownArgument, match="no field 'crops'"):
        GenerateRequest.from_dict({"framing": {"crops": [0, 0]}})
    with pytest.raises(UsageError, match="original_size must be a list of 2 whole numbers"):
        Framing(original_size=(1,))


def test_lists_become_tuples_so_that_requests_compare_and_hash():
    request = GenerateRequest(prompt=["a", "b"], sigmas=[1.0, 0.0])
    assert request == GenerateRequest(prompt=("a", "b"), sigmas=(1.0, 0.0))
    assert len({request, GenerateRequest(prompt=("a", "b"), sigmas=(1.0, 0.0))}) == 1


def test_seed_0_is_a_seed():
    assert GenerateRequest(seed=0).to_dict() == {"seed": 0}
    assert GenerateRequest().to_dict() == {}
