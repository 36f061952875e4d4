"""One check of values: what an annotation allows, in words a person can act on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import ConfigError, UsageError
from sfumato.values import Within, check_value, shown

Layers = Annotated[int, Within(1, 1000)]

RIGHT = [
    (5, int), (5, float), (5.5, float), (True, bool), ("x", str), (None, str | None), (10**300, float),
    ([1, 2], tuple[int, ...]), ((1, 2), tuple[int, int]), ([True, [1]], tuple[bool, tuple[int, ...]]),
    (7, int | tuple[int, ...]), ([7], int | tuple[int, ...]), ({"a": 1}, dict[str, int]), ("a", Literal["a", "b"]),
    (1000, Layers), (1, Layers), (object(), Any),
]  # fmt: skip

WRONG = [
    ("192", int, "a whole number, not '192'"),
    (True, int, "a whole number, not True"),
    (1.0, int, "a whole number, not 1.0"),
    (2**70, int, "at most 9223372036854775807"),
    (None, int | None, None),
    (0, Layers, "a whole number of at least 1, not 0"),
    (10**8, Layers, "at most 1000, not 100000000"),
    ("x", Layers | None, "a whole number from 1 to 1000"),
    (float("nan"), float, "a number, not nan"),
    (10**400, float, "a number"),
    (5, str, "text, not 5"),
    ("x" * 2**21, str, "text, not 'xxx"),
    ([1, "2"], tuple[int, ...], "whole numbers, not [1, '2']"),
    ([1], tuple[int, int], "a list of 2 whole numbers"),
    ([[1]], tuple[float, ...], "a list of 0 to 100000 numbers"),
    ([], Annotated[tuple[str, ...], Within(1, 4)], "a list of 1 to 4 strings"),
    ({"a": "b"}, dict[str, int], "an object of whole numbers"),
    ({1: 1}, dict[str, int], "an object of whole numbers"),
    ("c", Literal["a", "b"], "'a' or 'b', not 'c'"),
    (1, Literal[True], "True, not 1"),
    (2, Annotated[float, Within(0, 1)], "a number from 0 to 1, not 2"),
    (0, Annotated[int, Within(1, 9), "a positive number of pixels"], "a positive number of pixels, not 0"),
]


@pytest.mark.parametrize(("value", "kind"), RIGHT)
def test_what_fits(value, kind):
    check_value("file.json", "key", value, kind)


@pytest.mark.parametrize(("value", "kind", "says"), WRONG)
def test_what_does_not_fit_is_named_with_what_it_must_be(value, kind, says):
    if says is None:
        check_value("file.json", "key", value, kind)
        return
    with pytest.raises(ConfigError) as caught:
        check_value("file.json", "key", value, kind)
    message = str(caught.value)
    assert message.startswith("file.json: key must be ")
    assert says in message
    assert len(message) < 300
    assert "\n" not in message


def test_a_caller_may_ask_for_another_error():
    with pytest.raises(UsageError, match=r"^steps must be at most 10"):
        check_value("", "steps", 11, Annotated[int, Within(1, 10)], error=UsageError)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
kinds = st.sampled_from([kind for _, kind in RIGHT] + [kind for _, kind, _ in WRONG])


@given(value=anything, kind=kinds)
def test_every_value_fits_or_is_one_error(value, kind):
    said = ""
    try:
        check_value("file.json", "key", value, kind)
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 500


@given(value=anything)
def test_a_value_is_shown_in_a_line(value):
    assert "\n" not in shown(value)
    assert len(shown(value)) < 2000
