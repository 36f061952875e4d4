"""Canaries: compare a model's operations, in its shapes, on a device with float64 on the CPU.

A device that computes incorrectly raises no error, so each operation is checked before images are generated. Results
are verdicts by operation and precision ("conv bfloat16": "passed"), cached per torch version, system build, chip and
model shapes. faults.py contains the consequences.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.cache import keep, read_kept
from sfumato.errors import ConfigError
from sfumato.request import GenerateRequest
from sfumato.runtime.attention import padded, split
from sfumato.runtime.choices import Sizes, task_of
from sfumato.runtime.device import ran_out_of_memory, release_memory
from sfumato.runtime.facts import Facts
from sfumato.runtime.faults import HALF, HEAD_WIDTHS, PASSED

__all__ = ["CANARIES", "TOLERANCE", "Shapes", "checked", "kept_name", "precisions", "run_canaries", "shapes_of"]

# Increased whenever the comparisons change, which invalidates older verdicts.
COMPARED = 1
# Allowed errors, relative to the largest exact value. cuDNN multiplies float32 with eleven bits (TF32) by default.
TOLERANCE = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 3e-2}
# Seconds after which a canary counts as failed; the first one of a process also loads and compiles kernels, and the
# machine may be busy. After this many timeouts, the rest are skipped, and nothing is cached.
LIMIT, MOST_HUNG = 30.0, 2
HUNG = "took more than"
# Limit of operations per attention, so that all canaries together take about a second.
OPERATIONS = {"cpu": 5e7, "cuda": 2e10, "mps": 2e10}
ROWS, BATCH, SIDE, LONG = 8, 4, 16, 36_864
MOST_TOKENS = 4096  # per attention; longer sums have a separate canary


@dataclass(frozen=True)
class Shapes:
    """The shapes of a model's operations: (width, queries, keys) of its heads, and the U-Net's channels."""

    heads: tuple[tuple[int, int, int], ...]
    channels: tuple[int, ...]
    latent: int
    groups: int


@dataclass(frozen=True, eq=False)
class _Case:
    """The inputs of an operation, the operation, and the exact result for a part of the output."""

    inputs: tuple[Tensor, ...]
    work: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    part: Callable[[Tensor], Tensor] = lambda whole: whole


@dataclass(frozen=True)
class _Draw:
    """Generates inputs for a device, dtype and set of shapes."""

    shapes: Shapes
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(self.dtype)


def shapes_of(sizes: Sizes) -> Shapes:
    """Return a checkpoint's shapes at its own image size: per head width, the longest of each kind of attention."""
    task = task_of(sizes, GenerateRequest(prompt=""))
    longest: dict[tuple[int, bool], tuple[int, int, int]] = {}
    for layer in (*task.unet_layers, *task.decoder_layers):
        if (shape := layer.attention) is not None:
            own = (layer.head_width, shape.queries, shape.keys)
            kind = (layer.head_width, shape.queries == shape.keys)
            longest[kind] = max(own, longest.get(kind, own))
    config = sizes.unet_config
    channels = config.block_out_channels[0], config.block_out_channels[-1]
    return Shapes(tuple(longest.values()), channels, config.in_channels, math.gcd(32, channels[0]))


def _attentions(draw: _Draw, work: Callable[..., Tensor], most: int = HEAD_WIDTHS[-1]) -> Iterator[_Case]:
    """Yield attention for several heads, as views like those of the layers, and for few queries (separate kernels)."""
    heads = [shape for shape in draw.shapes.heads if shape[0] <= most]
    if heads:
        heads.append((heads[0][0], 4, 77))
    for width, queries, keys in heads:
        count, keys = 2 if width <= HEAD_WIDTHS[-1] else 1, min(keys, MOST_TOKENS)
        at_once = OPERATIONS[draw.device.type] / (4 * count**2 * width * keys)
        queries = max(1, min(queries, MOST_TOKENS, int(at_once)))
        q, k, v = (draw(count, length, count * width) for length in (queries, keys, keys))
        heads_of = partial(_as_heads, heads=count)
        rows = _spread(queries)
        yield _Case(
            (2 * q, k, v),  # scores that differ enough to tell one key from another
            lambda *all_, seen=heads_of: work(*map(seen, all_)),
            lambda q, k, v, rows=rows, seen=heads_of: _exact(seen(q)[:, :, rows], seen(k), seen(v)),
            lambda whole, rows=rows: whole[:, :, rows],
        )


def _as_heads(x: Tensor, heads: int = 2) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ v


def _spread(count: int) -> list[int]:
    """Return rows spread from the first to the last."""
    return sorted({round(i * (count - 1) / (ROWS - 1)) for i in range(ROWS)})


def _fused(draw: _Draw) -> Iterator[_Case]:
    plain = F.scaled_dot_product_attention
    yield from _attentions(draw, padded(HEAD_WIDTHS, plain) if draw.device.type == "mps" else plain)


def _chunks(draw: _Draw) -> Iterator[_Case]:
    def work(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys, values = (x.contiguous().flatten(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(rows, keys, values).unflatten(0, q.shape[:2])

    yield from _attentions(draw, work, 2**16)


def _split(draw: _Draw) -> Iterator[_Case]:
    """Yield two shapes, because plain products do not depend on head widths."""
    yield from islice(_attentions(draw, lambda q, k, v: split(2**26, k.shape[2] // 2 + 1)(q, k, v, None), 2**16), 2)


def _mask(draw: _Draw) -> Iterator[_Case]:
    """Yield the text encoder's causal attention."""
    q, k, v = (draw(1, 77, 128) for _ in range(3))
    mask = torch.full((77, 77), -torch.inf).triu(1)
    yield _Case(
        (2 * q, k, v, mask.to(draw.dtype)),
        lambda q, k, v, mask: F.scaled_dot_product_attention(_as_heads(q), _as_heads(k), _as_heads(v), attn_mask=mask),
        lambda q, k, v, mask: _exact(_as_heads(q), _as_heads(k), _as_heads(v), mask),
    )


def _reduction(draw: _Draw) -> Iterator[_Case]:
    inputs = draw(2, ROWS, LONG), draw(2, LONG, 32)
    yield _Case(inputs, torch.matmul, torch.matmul)
    yield _Case((inputs[0][0], inputs[1][0]), torch.matmul, torch.matmul)


def _linears(draw: _Draw, rows: int) -> Iterator[_Case]:
    for channels in draw.shapes.channels:
        few = _spread(rows)
        inputs = draw(rows, channels), draw(channels, channels, scale=channels**-0.5), draw(channels)
        yield _Case(
            inputs, F.linear, lambda x, w, b, few=few: F.linear(x[few], w, b), lambda whole, few=few: whole[few]
        )


def _convolutions(
    draw: _Draw, work: Callable[..., Tensor] | None = None, batch: int = 1, kernel: int = 3
) -> Iterator[_Case]:
    """Yield a convolution, compared on a corner of each image, without the border."""
    channels, pad = draw.shapes.channels[0], kernel // 2
    inputs = (
        draw(batch, channels, SIDE, SIDE),
        draw(channels, channels, kernel, kernel, scale=1 / (kernel * channels**0.5)),
    )
    yield _Case(
        inputs,
        work or (lambda x, w: F.conv2d(x, w, padding=pad)),
        lambda x, w: F.conv2d(x[:, :, :6, :6], w),
        lambda whole: whole[:, :, pad : 6 - pad, pad : 6 - pad],
    )


def _conv(draw: _Draw) -> Iterator[_Case]:
    yield from _convolutions(draw)
    yield from _convolutions(draw, kernel=1)


def _batch(draw: _Draw) -> Iterator[_Case]:
    """Yield a batch that is also half of a larger tensor (pytorch#169342)."""
    yield from _convolutions(draw, lambda x, w: F.conv2d(torch.cat([x, x], 1).chunk(2, 1)[0], w, padding=1), BATCH)


def _layout(draw: _Draw) -> Iterator[_Case]:
    last = {"memory_format": torch.channels_last}
    yield from _convolutions(draw, lambda x, w: F.conv2d(x.contiguous(**last), w.contiguous(**last), padding=1), 2)


def _norm(draw: _Draw) -> Iterator[_Case]:
    groups, channels = draw.shapes.groups, draw.shapes.channels[0]

    def work(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias))

    yield _Case((2 * draw(2, channels, SIDE, SIDE) + 1, draw(channels), draw(channels)), work, work)


def _geglu(draw: _Draw) -> Iterator[_Case]:
    def work(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)

    yield _Case((draw(2, 64, 8 * draw.shapes.channels[0]),), work, work)


def _upsample(draw: _Draw) -> Iterator[_Case]:
    def work(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    yield _Case((draw(2, draw.shapes.channels[0], 8, 8),), work, work)


def _sum(draw: _Draw) -> Iterator[_Case]:
    def work(*all_: Tensor) -> Tensor:
        return sum((weight * x for weight, x in zip((14.6, -0.97, 0.31), all_, strict=True)), torch.zeros_like(all_[0]))

    yield _Case(tuple(draw(2, draw.shapes.latent, SIDE, SIDE) for _ in range(3)), work, work)


# By the names of faults.py.
CANARIES: dict[str, Callable[[_Draw], Iterator[_Case]]] = {
    "fused": _fused, "chunks": _chunks, "split": _split, "mask": _mask, "reduction": _reduction,
    "linear": lambda draw: _linears(draw, 256), "row": lambda draw: _linears(draw, 1), "conv": _conv, "batch": _batch,
    "layout": _layout, "norm": _norm, "geglu": _geglu, "upsample": _upsample, "sum": _sum,
}  # fmt: skip


def run_canaries(
    device: torch.device,
    shapes: Shapes,
    dtypes: Iterable[str],
    *,
    limit: float = LIMIT,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, str]:
    """Return the verdict of each canary in each dtype: "passed", or what is wrong.

    A canary that runs out of memory has no verdict, because this does not mean that the device is wrong. limit: seconds
    for each, after which it fails and its thread is abandoned; around: a context for the device's work, for injecting
    faults in tests.
    """
    verdicts: dict[str, str] = {}
    hung = f"{HUNG} {limit:g} s"
    for name, cases in CANARIES.items():
        for dtype in ("float32",) if name == "sum" else dtypes:
            if sum(verdict == hung for verdict in verdicts.values()) >= MOST_HUNG:
                verdicts[f"{name} {dtype}"] = f"not tried after {MOST_HUNG} that {hung}"
                continue
            draw = _Draw(shapes, device, getattr(torch, dtype), torch.Generator().manual_seed(0))
            found = _within(limit, lambda cases=cases, draw=draw: _verdict(cases(draw), draw, around))
            if found != "":
                verdicts[f"{name} {dtype}"] = found or hung
    release_memory(device)
    return verdicts


def _within(limit: float, work: Callable[[], str]) -> str | None:
    """Return the result of work, or None after `limit` seconds; its thread cannot be stopped, and is abandoned."""
    answers: SimpleQueue[str] = SimpleQueue()
    Thread(target=lambda: answers.put(work()), name="canary", daemon=True).start()
    try:
        return answers.get(timeout=limit)
    except Empty:
        return None


def _verdict(cases: Iterator[_Case], draw: _Draw, around: Callable[[], AbstractContextManager[Any]]) -> str:
    try:
        error = max((_error(case, draw.device, around) for case in cases), default=0.0)
    except Exception as failure:  # any error means that the operation failed
        if ran_out_of_memory(failure):
            return ""
        return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"
    if error <= TOLERANCE[str(draw.dtype).removeprefix("torch.")]:
        return PASSED
    return f"off by {error:.1%}" if math.isfinite(error) else "NaN or infinity"


def _error(case: _Case, device: torch.device, around: Callable[[], AbstractContextManager[Any]]) -> float:
    """Return the relative error of the worse of two runs: some kernels err only in memory that was used before."""
    exact = case.exact(*(one.double() for one in case.inputs))
    worst = 0.0
    with torch.no_grad(), around():
        inputs = [one.to(device) for one in case.inputs]
        for _ in range(2):
            whole = case.work(*inputs)
            found = case.part(whole).cpu().double()
            if not bool(whole.isfinite().all()) or found.shape != exact.shape:
                return math.inf
            worst = max(worst, float((found - exact).abs().max() / exact.abs().max()))
    return worst


def precisions(facts: Facts) -> tuple[str, ...]:
    """Return the dtypes that a plan may choose by itself on this machine."""
    half = facts.accelerator != "cpu" or facts.native_bfloat16("cpu")
    return ("float32", HALF[facts.accelerator]) if half else ("float32",)


def _key(facts: Facts, shapes: Shapes) -> str:
    system = facts.system_build or facts.system_version
    chip = facts.accelerator_name or facts.processor
    known = (COMPARED, facts.libraries.get("torch"), facts.system, system, facts.accelerator, chip, asdict(shapes))
    return json.dumps([*known, precisions(facts)])


def kept_name(facts: Facts, shapes: Shapes) -> str:
    """Return the name under which the verdicts are cached."""
    return f"canaries/{hashlib.sha256(_key(facts, shapes).encode()).hexdigest()[:16]}.json"


def checked(facts: Facts, sizes: Sizes, *, run: bool | None = None, again: bool = False) -> Facts:
    """Return the facts with verdicts for a model, from the cache or new ones.

    run: whether to run canaries if no verdicts are cached; None: on accelerators only, so that no command starts more
    slowly on a CPU. again: run them in any case.
    """
    shapes = shapes_of(sizes)
    key, name = _key(facts, shapes), kept_name(facts, shapes)

    def check(values: Mapping[str, Any]) -> None:
        if values.get("of") != key or not _are_verdicts(values.get("verdicts")):
            raise ConfigError(f"{name} is from another machine, or damaged")

    kept = {} if again else read_kept(name, check)
    if kept:
        return replace(facts, canaries=kept["verdicts"])
    wanted = facts.accelerator != "cpu" if run is None else run
    if not wanted or facts.refused is not None:
        return facts
    verdicts = run_canaries(torch.device(facts.accelerator), shapes, precisions(facts))
    if _are_verdicts(verdicts) and not any(HUNG in verdict for verdict in verdicts.values()):
        keep(name, {"of": key, "verdicts": verdicts})
    return replace(facts, canaries=verdicts)


def _are_verdicts(values: Any) -> bool:
    names = {key.rpartition(" ")[0] for key in values} if isinstance(values, dict) else set()
    return names == CANARIES.keys() and all(isinstance(one, str) and one for one in values.values())
