"""The request: what it refuses, and that it survives every way of being written down."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato import GenerateRequest
from sfumato.errors import UnknownArgument, UsageError

texts = st.text(max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False)
valid = st.fixed_dictionaries(
    {},
    optional={
        "prompt": texts | st.lists(texts, min_size=1, max_size=3).map(tuple),
        "negative_prompt": st.none() | texts,
        "steps": st.integers(1, 10**6),
        "guidance_scale": finite,
        "guidance_rescale": st.floats(0, 1),
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
    assert len(request.negative_prompts) == len(request.prompts)


WRONG = [
    ({"prompt": ()}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": ["a", None]}, "prompt"),
    ({"prompt": ["a", "b"], "negative_prompt": ["x"]}, "2 prompts and 1 negative"),
    ({"prompt": "a", "negative_prompt": ["x", "y"]}, "1 prompts and 2 negative"),
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
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.0}, "seed"),
    ({"clip_skip": -1}, "clip_skip"),
    ({"timesteps": [1], "sigmas": [1.0]}, "timesteps and sigmas"),
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


def test_lists_become_tuples_so_that_requests_compare_and_hash():
    request = GenerateRequest(prompt=["a", "b"], sigmas=[1.0, 0.0])
    assert request == GenerateRequest(prompt=("a", "b"), sigmas=(1.0, 0.0))
    assert len({request, GenerateRequest(prompt=("a", "b"), sigmas=(1.0, 0.0))}) == 1


def test_seed_0_is_a_seed():
    assert GenerateRequest(seed=0).to_dict() == {"seed": 0}
    assert GenerateRequest().to_dict() == {}
