"""Less work for a promise: what is computed at which step, what is reused of it, and what is drawn exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato import Fast, GenerateRequest, Hires, Reuse, UNet2DConditionModel
from sfumato.errors import UsageError
from sfumato.models.attention import Context
from sfumato.models.blocks import Deep
from sfumato.pipelines.conditioning import Conditioning
from sfumato.pipelines.guidance import Guidance
from sfumato.pipelines.reused import Line, methods, shallow
from sfumato.schedulers import DPMSolverMultistepScheduler
from support.checkpoints import UNET, randomize

REQUEST = GenerateRequest(prompt="a photo", steps=6, seed=5, width=64, height=64, scheduler="ddim")


def unet(**changes) -> UNet2DConditionModel:
    return randomize(UNet2DConditionModel(**UNET | changes))


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(start=st.floats(0, 1), every=st.integers(1, 100), total=st.integers(1, 100))
def test_steps_up_to_the_start_compute_and_then_every_so_manyth(start, every, total):
    done = [step for step in range(total) if Reuse(start=start, every=every).computes(step, total)]
    first = int(start * total)
    assert done == [*range(min(first + 1, total)), *range(first + every, total, every)]


@pytest.mark.parametrize("layers", range(1, 7))
@pytest.mark.parametrize("branches", [1, 2])
def test_the_last_layers_give_the_whole_prediction_from_features_of_the_same_step(layers, branches):
    net, x, deep = unet(), randn(0, 2, 4, 9, 7), Deep(layers)  # odd sides: what is enlarged gets the size of its skip
    context = Context(randn(1, 2 * branches, 5, 24))
    with torch.no_grad():
        moment = net.moment(x, 7.0)
        whole = net(x, moment, context, deep=deep).sample
        assert torch.equal(whole, net(x, moment, context).sample)
        assert torch.equal(whole, shallow(net, x, moment, context, layers, deep.features))
        assert not torch.equal(whole, shallow(net, x, moment, context, layers, deep.features + 1))


def test_beyond_two_values_is_a_line_that_flattens():
    line = Line()
    assert line.at(0) is None
    for step, value in ((0, 9.0), (2, 1.0), (2, 5.0), (4, 6.0)):  # step 2 is repeated
        line.keep(step, torch.tensor(value))
    assert [float(line.at(step)) for step in (4, 5, 6, 8)] == pytest.approx([6, 6.35, 6.595, 6.88655])


def predictions(fast: Fast | None, scale: float = 3.0, micro_batch: int | None = None) -> list[torch.Tensor]:
    """Of four steps, with other latents at each."""
    told = Conditioning((randn(2, 3, 5, 24), randn(1, 3, 5, 24)))
    guidance = Guidance(unet=unet(), conditioning=told, scale=scale, fast=fast, micro_batch=micro_batch)
    results = []
    with torch.no_grad():
        for step in range(4):
            guidance.step = step, 4
            results.append(guidance(randn(3, 3, 4, 8, 8) + step / 50, 500.0 - step))
    return results


def distances(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[float]:
    return [float((one - other).pow(2).mean().sqrt()) for one, other in zip(a, b, strict=True)]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_what_computes_every_step_is_exact_to_the_last_bit(scale):
    every = Reuse(every=1)
    exact = predictions(None, scale)
    assert distances(predictions(Fast(promise=30, deep=every, guidance=every), scale), exact) == [0] * 4


@pytest.mark.parametrize(
    "fast",
    [
        Fast(promise=30, deep=Reuse(every=2)),
        Fast(promise=30, guidance=Reuse(every=2)),
        Fast(promise=30, deep=Reuse(every=2), guidance=Reuse(every=2), layers=2),
        Fast(promise=30, deep=Reuse(every=2), guidance=Reuse(start=0.25, every=2), layers=2),  # at different steps
    ],
)
def test_steps_between_are_near(fast):
    exact, near = predictions(None), predictions(fast)
    far = distances(near, exact)
    assert far[0] == 0 < far[1]
    assert max(far) < 0.25  # of numbers with a standard deviation of 1.2
    assert distances(predictions(fast, micro_batch=2), near) == pytest.approx([0] * 4, abs=1e-4)


def test_less_is_computed(ours, monkeypatch):
    pipe, whole, rows = ours(), [], []
    fast = Fast(promise=30, deep=Reuse(every=2), guidance=Reuse(start=0.5, every=3))
    left = pipe.unet.left
    monkeypatch.setattr(pipe.unet, "left", lambda x, context: rows.append(context.states.shape[0]) or left(x, context))
    handle = pipe.unet.mid_block.register_forward_hook(lambda *_: whole.append(len(rows)))
    try:
        result = pipe.generate(REQUEST.replace(fast=fast))
    finally:
        handle.remove()
        monkeypatch.undo()
    assert whole == [0, 2, 4]
    assert rows == [2, 2, 2, 2, 1, 1]
    assert result.notes == ()
    assert result.recipes[0]["request"]["fast"] == fast.to_dict()
    again = pipe.generate(GenerateRequest.from_dict(result.recipes[0]["request"]))
    assert again.images[0].tobytes() == result.images[0].tobytes() != pipe.generate(REQUEST).images[0].tobytes()


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({}, "with .*, which was not measured"),
        ({"hires": Hires(scale=1.5)}, "with hires; it was not measured"),
        ({"seamless": "x", "guidance_rescale": 0.5}, "with guidance rescale and seamless"),
        ({"prompt": "a cat AND a dog", "prompt_syntax": "a1111"}, "with AND"),
    ],
)
def test_what_cannot_be_promised_is_drawn_exactly_with_one_note(ours, changes, because):
    pipe, request = ours(), REQUEST.replace(steps=2, **changes)
    asked = pipe.generate(request.replace(fast=Fast(promise=30)))
    (note,) = (one for one in asked.notes if "drawn exactly" in one)
    assert note.startswith("drawn exactly: 30 dB cannot be promised")
    with pytest.raises(UsageError, match=because):
        methods(request.replace(fast=Fast(promise=30)), pipe.parts, pipe.scheduler)
    assert "fast" not in asked.recipes[0]["request"]
    assert asked.images[0].tobytes() == pipe.generate(request).images[0].tobytes()


def test_the_row_of_least_work_that_keeps_the_promise(ours, monkeypatch):
    parts, scheduler, request = ours().parts, DPMSolverMultistepScheduler(), REQUEST.replace(width=None, height=None)
    row = {"kind": parts.family.name, "scheduler": type(scheduler).__name__, "steps": [5, 9], "guidance_scale": [2, 8]}
    rows = [row | {"promise": dB, "methods": {"deep": {"every": n}}} for dB, n in ((40, 2), (30, 3), (20, 5))]
    monkeypatch.setattr("sfumato.pipelines.reused._table", lambda: rows)
    chosen = [methods(request.replace(fast=Fast(promise=dB)), parts, scheduler) for dB in (10, 20, 29.5, 40)]
    assert chosen == [Fast(promise=dB, deep=Reuse(every=n)) for dB, n in ((10, 5), (20, 5), (29.5, 3), (40, 2))]
    for changes, because in (
        ({"fast": Fast(promise=60)}, "60 dB cannot be promised: at most 40 dB can"),
        ({"steps": 10}, "for this size, scheduler, number of steps and guidance scale"),
        ({"guidance_scale": 1.0}, "which were not measured"),
        ({"width": 128}, "for this size"),
    ):
        with pytest.raises(UsageError, match=because):
            methods(request.replace(**{"fast": Fast(promise=30)} | changes), parts, scheduler)
