"""Prompts with weights: hand-worked cases of the grammars, chunks and arithmetic."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.text.chunks import from_empty, with_mean
from sfumato.text.grammars import BREAK, a1111, comfyui, named_adapters
from sfumato.text.prompt import alike
from sfumato.text.schedules import Timeline, at_step

A1111 = {
    "a fox": [("a fox", 1)],
    "": [("", 1)],
    "(fox)": [("fox", 1.1)],
    "a ((red)) fox": [("a ", 1), ("red", 1.21), (" fox", 1)],
    "[fox]": [("fox", 1 / 1.1)],
    "(fox:1.3)": [("fox", 1.3)],
    "((fox:1.2))": [("fox", 1.2 * 1.1)],  # the number is times the outer bracket's
    "((a:1.2) b)": [("a", 1.32), (" b", 1.1)],
    "([fox])": [("fox", 1.0)],
    r"\(fox\) \[x\] \\": [("(fox) [x] \\", 1)],
    "(fox: 1.5 )": [("fox", 1.5)],
    "(fox:-0.5)": [("fox", -0.5)],
    "(fox:.5)": [("fox", 0.5)],
    "(a:b:1.2)": [("a:b", 1.2)],
    "fox)": [("fox)", 1)],
    "fox]:": [("fox]:", 1)],
    "a:1.2)": [("a:1.2)", 1)],
    "a BREAK b": [("a", 1), BREAK, ("b", 1)],
    "(a BREAK b:1.5)": [("a", 1.5), BREAK, ("b", 1.5)],
    "aBREAKb": [("aBREAKb", 1)],
    # Never closed: plain text.
    "(fox": [("(fox", 1)],
    "((fox)": [("(", 1), ("fox", 1.1)],
    "[a (b:1.5) c": [("[a ", 1), ("b", 1.5), (" c", 1)],
    "a <lora:x:0.8>fox": [("a fox", 1)],
}
COMFYUI = {
    "a fox": [("a fox", 1)],
    "(fox)": [("fox", 1.1)],
    "((fox))": [("fox", 1.21)],
    "((fox:1.2))": [("fox", 1.2)],  # the number is all that counts
    "(a (b:1.5) c:1.2)": [("a ", 1.2), ("b", 1.5), (" c", 1.2)],
    "[fox]": [("[fox]", 1)],
    r"\(fox\)": [("(fox)", 1)],
    "(fox": [("(fox", 1)],
}


def close(spans: object, wanted: list[tuple[str, float]]) -> bool:
    texts, weights = zip(*spans, strict=True)
    expected = [weight for _, weight in wanted]
    return list(texts) == [text for text, _ in wanted] and list(weights) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("text", A1111)
def test_a1111_by_hand(text):
    assert close(a1111(text).spans, A1111[text])


@pytest.mark.parametrize("text", COMFYUI)
def test_comfyui_by_hand(text):
    assert close(comfyui(text).spans, COMFYUI[text])


def test_what_is_said_once():
    assert len(a1111("((a [b").notes) == 1
    assert "plain text" in a1111("(fox").notes[0]
    assert "<lora:x:0.8>" in a1111("<lora:x:0.8> fox").notes[0]
    assert a1111("(fox) [x] fine)").notes == ()


def test_adapters_that_a_prompt_names():
    prompt = "a <lora:fog>fox<lora:my style:0.8> <lyco:x:-.5:2><lora:y:te=1:unet=0.25>"
    named = (("fog", 1, None), ("my style", 0.8, None), ("x", 2, -0.5), ("y", 0.25, 1))
    assert named_adapters(prompt) == ("a fox ", named)
    for other in ("a <lora:fog:much>", "<hypernet:x:1>", "<lora:>", "a <fog>", "<lora:x:1:2:3>"):
        assert named_adapters(other) == (other, ())


@given(text=st.text(alphabet=list("ab ,")))
def test_without_syntax_it_is_plain(text):
    for grammar in (a1111, comfyui):
        read = grammar(text)
        assert read.plain
        assert read.spans == ((text, 1.0),)


@given(text=st.text(alphabet=list("a()[]:1.2\\ BREAK<>|\n"), max_size=60))
def test_any_text_is_read(text):
    for grammar in (a1111, comfyui):
        assert grammar(text).spans


@pytest.mark.parametrize(
    "text", ["(" * 5000 + ")" * 5000, "(" * 20000, "[(" * 5000, "(a:1.1" * 3000, "\\" * 9999, ":" * 9999]
)
def test_brackets_without_end(text):
    assert a1111(text).spans
    assert comfyui(text).spans


def test_emphasis_by_hand():
    """z' = z w; z'' = z' mean(z) / mean(z'), each chunk for itself."""
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 5.0]]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 1.5], [1.0, 1.0]], dtype=torch.float64)
    # Chunk 1: 1, 2, 4.5, 6 with mean 3.375, where it was 2.5.
    wanted = torch.tensor([1, 2, 4.5, 6], dtype=torch.float64) * 2.5 / 3.375
    found = with_mean(states, weights)
    assert torch.allclose(found[0].flatten(), wanted, atol=1e-12)
    assert torch.equal(found[1], states[1])
    empty = torch.full((1, 2, 2), 0.5, dtype=torch.float64)
    assert torch.allclose(
        from_empty(states, weights, lambda: empty)[0].flatten(), torch.tensor([1, 2, 4.25, 5.75]).double()
    )


def test_repeated_keys_change_nothing():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 8, generator=generator, dtype=torch.float64) for n in (5, 6, 6))
    one, other = alike([torch.cat([k, v], 2), torch.randn(1, 9, 16, dtype=torch.float64)], 3)
    assert one.shape[1] == other.shape[1] == 18
    plain, long = ((q @ k.mT).softmax(-1) @ v for k, v in ((k, v), (one[..., :8], one[..., 8:])))
    assert torch.allclose(plain, long, atol=1e-14)


SCHEDULES = {
    # Of 10 steps, what is read at the first, the fifth, the sixth and the last.
    "a [red:green:5] fox": ["a red fox", "a red fox", "a green fox", "a green fox"],
    "a [red:green:0.5] fox": ["a red fox", "a red fox", "a green fox", "a green fox"],
    "a [green:0.5] fox": ["a  fox", "a  fox", "a green fox", "a green fox"],
    "a [red::5] fox": ["a red fox", "a red fox", "a  fox", "a  fox"],
    "[cow|horse]": ["cow", "cow", "horse", "horse"],
    "[a|b|c]": ["a", "b", "c", "a"],
    "[a|]": ["a", "a", "", ""],
    "[[a|b]:c:5]": ["a", "a", "c", "c"],
    "[(a:1.2):b:5]": ["(a:1.2)", "(a:1.2)", "b", "b"],
    "([a:b:5]:1.2)": ["(a:1.2)", "(a:1.2)", "(b:1.2)", "(b:1.2)"],
    "[a:b:50]": ["a"] * 4,
    # No schedules.
    "[fox]": ["[fox]"] * 4,
    "[a:b]": ["[a:b]"] * 4,
    r"\[a:b:5\]": [r"\[a:b:5\]"] * 4,
    "[a:b:5": ["[a:b:5"] * 4,
    "a:b|c]": ["a:b|c]"] * 4,
}


@pytest.mark.parametrize("text", SCHEDULES)
def test_schedules_by_hand(text):
    assert [at_step(text, step, Timeline(10)) for step in (1, 5, 6, 10)] == SCHEDULES[text]


# The same of A1111's second pass: of 8 steps after the first pass's 10, what is read at the first, the fourth, the
# fifth and the last.
SECOND_PASS = {
    "[a:b:0.5]": ["b"] * 4,
    "[a:b:1.5]": ["a", "a", "b", "b"],
    "[a:b:1.99]": ["a", "a", "a", "b"],
    "[a:b:1.0]": ["b"] * 4,
    "[a:b:2.]": ["a"] * 4,
    "[a:b:10]": ["b"] * 4,
    "[a:b:14]": ["a", "a", "b", "b"],
    "[a:b:50]": ["a"] * 4,
    "[[a:b:0.2]:[c:d:1.9]:1.5]": ["b", "b", "c", "d"],
    "[a|b]": ["a", "b", "a", "b"],
}


@pytest.mark.parametrize("text", SECOND_PASS)
def test_schedules_of_a_second_pass_by_hand(text):
    assert [at_step(text, step, Timeline(8, before=10)) for step in (1, 4, 5, 8)] == SECOND_PASS[text]
    # And in the first pass, what is timed for the second one is not there yet.
    if "1." in text and "[[" not in text and "1.0" not in text:
        assert at_step(text, 10, Timeline(10)) == "a"


def test_another_checkpoint_counts_on():
    assert [at_step("[a:b:7]", step, Timeline(10, taken=6)) for step in (1, 2)] == ["a", "b"]
    assert [at_step("[a|b|c]", step, Timeline(10, taken=1)) for step in (1, 2, 3)] == ["b", "c", "a"]
    assert at_step("[a:b:1.5]", 2, Timeline(8, before=10, taken=2)) == "a"


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 400 + ".", "." + "9" * 5000])
def test_numbers_without_end_are_text(number):
    assert at_step(f"[a:b:{number}]", 1, Timeline(10)) == f"[a:b:{number}]"


@given(text=st.text(alphabet=list("a()[]:1.2\\|"), max_size=40), step=st.integers(1, 10))
def test_any_text_has_a_schedule(text, step):
    found = at_step(text, step, Timeline(10))
    if "[" not in text:
        assert found == text


@pytest.mark.parametrize(
    "text", ["[" * 3000 + ":1]" * 3000, "[(" * 2000, "[a|" * 2000 + "]" * 2000, "(" * 3000 + ")" * 3000]
)
def test_schedules_without_end(text):
    began = time.process_time()
    assert isinstance(at_step(text, 1, Timeline(10)), str)
    assert time.process_time() - began < 5
