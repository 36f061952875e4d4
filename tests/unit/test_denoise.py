"""The loop is a generator: its caller sees, edits and ends it."""

from __future__ import annotations

import torch

from sfumato.pipelines.denoise import denoise
from sfumato.schedulers.noise import GaussianNoise
from sfumato.schedulers.rows import Row

X = torch.ones(1, 4, 2, 2)
ROWS = [Row(t=t, original=(1.0, -1.0), x=0.5, out=1.0) for t in (3.0, 2.0, 1.0)]


def run(loop, edit=None):
    steps, sent = [], None
    while True:
        try:
            step = loop.send(sent)
        except StopIteration as end:
            return steps, end.value
        steps.append(step)
        sent = None if edit is None else edit(step)


def test_each_step_is_seen_with_its_place():
    seen = []
    steps, last = run(denoise(lambda x, t: seen.append(t) or x * 0, ROWS, X, GaussianNoise(X.shape)))
    assert seen == [3.0, 2.0, 1.0]
    assert [(step.index, step.total) for step in steps] == [(0, 3), (1, 3), (2, 3)]
    assert torch.equal(last, X / 8)
    assert torch.equal(steps[-1].latents, last)
    assert torch.equal(steps[1].before, X / 2)


def test_latents_sent_back_replace_those_of_the_step():
    _, last = run(denoise(lambda x, t: x * 0, ROWS, X, GaussianNoise(X.shape)), lambda step: torch.full_like(X, 8.0) if step.index == 1 else None)  # fmt: skip
    assert torch.equal(last, torch.full_like(X, 4.0))


def test_a_preview_is_the_clean_picture_of_the_step():
    steps, _ = run(denoise(lambda x, t: x * 0 + 0.25, ROWS, X, GaussianNoise(X.shape)))
    assert torch.equal(steps[0].original(), X - 0.25)


def test_a_closed_loop_does_no_more_work():
    calls = []
    loop = denoise(lambda x, t: calls.append(t) or x, ROWS, X, GaussianNoise(X.shape))
    next(loop)
    loop.close()
    assert calls == [3.0]


def test_inputs_are_scaled_where_the_scheduler_says_so():
    rows = [Row(t=1.0, c_in=0.25, original=(1.0, 0.0), x=0.0, out=1.0)]
    _, last = run(denoise(lambda x, t: x, rows, X, GaussianNoise(X.shape)))
    assert torch.equal(last, X / 4)
