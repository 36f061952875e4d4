"""Plans how to run a request on a machine, from facts and sizes alone, before any weights are read.

`plan` is pure: the same facts, sizes, request and wishes give the same plan on any machine. The user's choices take
precedence; everything else is the fastest choice that fits. If nothing fits, the request is refused with numbers.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sfumato.errors import MemoryPlanError, UsageError
from sfumato.runtime.choices import DTYPE_BYTES, PARTS, Plan, Sizes, Task, Wishes, task_of
from sfumato.runtime.chunks import attention_chunk
from sfumato.runtime.faults import (
    SPLIT_KEYS,
    attention_for_dtypes,
    best_for,
    fault,
    half_failed,
    proved,
    told,
    unusable,
)
from sfumato.runtime.footprint import (
    decoded_together,
    footprint,
    largest_tensor,
    seconds_of,
    start_seconds,
    stored_scores,
)
from sfumato.runtime.numerics import vae_dtypes
from sfumato.runtime.quirks import release
from sfumato.runtime.reasons import gigabytes, reasons
from sfumato.runtime.speeds import COMPILE_GAIN, SECONDS_TO_COMPILE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sfumato.request import GenerateRequest
    from sfumato.runtime.facts import Facts

__all__ = ["METAL_BYTES", "METAL_NUMBERS", "Plan", "Sizes", "Wishes", "fits_beside", "largest_batch", "plan"]

# The estimate may be at most this share of free memory; it is accurate to a tenth.
USABLE = 0.9
# Metal refuses buffers of this many bytes, and some of its kernels refuse tensors of this many elements.
METAL_BYTES, METAL_NUMBERS = 2**32, 2**31
# A quarter of Metal's limit leaves room for float32 scores of float16 weights and for their softmax.
METAL_CHUNK = 2**30
SMALL_CHUNK = 2**26
LEAST_CACHE = 2**19
MOST_AT_ONCE = 16
# As many as the canary of batches proves, with two branches of guidance, from this release on (pytorch#169342).
MOST_ON_METAL, BATCHES_ON_METAL = 2, (2, 14)
MOST_SEARCHED = 1024
# A batch of images that takes more bytes is decoded one by one, which then costs no time.
TOGETHER = 2**28


def plan(facts: Facts, sizes: Sizes, request: GenerateRequest, wishes: Wishes = Wishes()) -> Plan:  # noqa: B008
    """Return the plan for a request.

    Raises `UsageError` for a size the checkpoint does not support or choices this machine does not support, and
    `MemoryPlanError` if the request does not fit, with the needed and free bytes and what would fit.
    """
    task = task_of(sizes, request)
    found = _first_that_fits(facts, task, wishes)
    if found is None:
        raise _refusal(facts, task, wishes)
    if request.seamless is None:  # seamless convolutions are not compiled (models/seamless.py)
        found = _with_compile(facts, task, wishes, found)
    found = _with_freed_kept(facts, task, wishes, found)
    whole = found.seconds + (start_seconds(facts, task, found) if wishes.once else 0.0)
    return dataclasses.replace(found, reasons=reasons(facts, task, wishes, found), seconds=whole)


def largest_batch(facts: Facts, sizes: Sizes, request: GenerateRequest, wishes: Wishes = Wishes()) -> int:  # noqa: B008
    """Return how many images of the request's size fit into one U-Net call; 0 if not even one does.

    The maximum is 1024. Raises `UsageError`, like `plan`.
    """
    task = task_of(sizes, request)

    def fits(pictures: int) -> bool:
        several = dataclasses.replace(task, pictures=pictures, prompts=min(task.prompts, pictures))
        return _first_that_fits(facts, several, dataclasses.replace(wishes, micro_batch=pictures)) is not None

    return _last_true(fits, MOST_SEARCHED)


def _first_that_fits(facts: Facts, task: Task, wishes: Wishes) -> Plan | None:
    return next((one for one in _candidates(facts, task, wishes) if _fits(facts, task, one)), None)


def _fits(facts: Facts, task: Task, one: Plan) -> bool:
    return one.peak_bytes <= USABLE * one.free_bytes and (one.kind != "mps" or _within_metal(task, one))


def fits_beside(one: Plan, other: Sizes) -> bool:
    """Return whether another checkpoint's networks fit into memory in addition to a plan's peak."""
    parts = {part: getattr(other, part).parameters * DTYPE_BYTES[one.dtype_of(part)] for part in PARTS}
    return one.peak_bytes + sum(parts.values()) <= USABLE * one.free_bytes


def _within_metal(task: Task, one: Plan) -> bool:
    """Return whether all tensors of the U-Net and the decoder are below Metal's limits."""
    size, numbers = largest_tensor(one, task)
    rows = one.micro_batch * task.rows
    for shape in {stored for layer in task.unet_layers if (stored := stored_scores(one, layer))}:
        pairs, queries = rows * shape.heads, shape.queries
        if one.attention_bytes:
            element = DTYPE_BYTES[one.unet_dtype]
            pairs, queries = attention_chunk(pairs, queries, shape.keys, element, one.attention_bytes or METAL_CHUNK)
        numbers = max(numbers, pairs * queries * shape.keys)
        size = max(size, 4 * pairs * queries * shape.keys)
    return size < METAL_BYTES and numbers < METAL_NUMBERS


def _candidates(facts: Facts, task: Task, wishes: Wishes) -> Iterator[Plan]:
    """Yield plans from the fastest to the leanest; requested choices are the same in all of them."""
    best = _best(facts, task, wishes)
    if best.kind == "mps" and wishes.vae_tiling is None and not _within_metal(task, best):
        best = dataclasses.replace(best, vae_tiling=True)
    seen = set()
    for changes in _steps_down(facts, best):
        free = {name: value for name, value in changes.items() if wishes.wish(name) is None}
        one = dataclasses.replace(best, **free)
        if wishes.vae_slicing is None:
            many = one.micro_batch > 1 and decoded_together(task, one) > TOGETHER
            one = dataclasses.replace(one, vae_slicing=many)
        if one in seen:
            continue
        seen.add(one)
        yield dataclasses.replace(
            one,
            peak_bytes=footprint(facts, task, one).peak,
            free_bytes=_free(facts, one.kind),
            seconds=seconds_of(facts, task, one),
        )


def _steps_down(facts: Facts, best: Plan) -> Iterator[dict[str, Any]]:
    """Yield concessions in order: batches, large chunks, float32 on Metal, keeping all networks, untiled decoding, and
    exact weights last.
    """
    at_once = best.micro_batch
    yield {}
    while at_once > 1:
        at_once = (at_once + 1) // 2
        yield {"micro_batch": at_once}
    changes: list[dict[str, Any]] = [{"micro_batch": 1}]
    if best.attention_bytes and best.kind != "cpu":
        changes.append({"attention_bytes": SMALL_CHUNK})
    if best.kind == "mps" and best.unet_dtype == "float32" and best_for(facts, "mps") == "float32":
        half = {"text_encoder_dtype": "float16", "unet_dtype": "float16"}
        if not half_failed(facts, "mps"):
            changes.append(half | ({"attention": "chunked"} if best.attention == "fused" else {}))
    changes += [{"offload": "staged"}, {"vae_tiling": True}]
    changes += [{"eight_bit": True, "vae_tiling": best.vae_tiling}, {"vae_tiling": True}]
    less: dict[str, Any] = {}
    for change in changes:
        less = less | change
        yield less


def _best(facts: Facts, task: Task, wishes: Wishes) -> Plan:
    """Return the plan for unlimited memory."""
    device = _device(facts, wishes)
    kind = device.partition(":")[0]
    dtypes: dict[str, Any] = {f"{part}_dtype": _dtype(facts, kind, part, task, wishes) for part in PARTS}
    used = sorted(set(dtypes.values()))
    attention = wishes.attention or attention_for_dtypes(facts, kind, used)
    layout = kind == "mps" or any(fault(facts, kind, "layout", dtype) for dtype in used)
    long = kind == "mps" or any(fault(facts, kind, "reduction", dtype) for dtype in used)
    singly = any(fault(facts, kind, "batch", dtype) for dtype in used)
    stores = attention != "fused" or kind == "mps"
    return Plan(
        device=device,
        **dtypes,
        memory_format="contiguous" if layout else "channels_last",
        engine=_engine(facts, kind, wishes),
        attention=attention,
        attention_bytes=(wishes.attention_bytes or _chunk(facts, kind)) if stores else None,
        attention_keys=SPLIT_KEYS if long or attention == "split" else None,
        micro_batch=wishes.micro_batch
        or min(task.pictures, 1 if singly else _at_once(facts, kind, dtypes["unet_dtype"])),
        singly=singly,
        faults=told(facts) if kind == facts.accelerator or wishes.device in (None, "auto") else (),
        vae_slicing=bool(wishes.vae_slicing),
        vae_tiling=bool(wishes.vae_tiling),
        offload=wishes.offload or ("staged" if wishes.once and kind == "cpu" else "none"),
        eight_bit=bool(wishes.eight_bit),
        compile=bool(wishes.compile),
        threads=(wishes.threads or facts.free_cores) if kind == "cpu" else None,
        steps=task.steps,
    )


def _device(facts: Facts, wishes: Wishes) -> str:
    device = wishes.device if wishes.device not in (None, "auto") else facts.accelerator
    kind = device.partition(":")[0]
    if kind not in ("cpu", facts.accelerator):
        here = " and ".join(dict.fromkeys(("cpu", facts.accelerator)))
        raise UsageError(f"device {device!r} is not available on {facts.name}; available: {here}")
    if wishes.device in (None, "auto"):
        return "cpu" if facts.refused or unusable(facts, kind) else device
    if kind != "cpu" and facts.refused is not None:
        why = facts.refused
        raise UsageError(f"device {device!r} is not used on {facts.name}: {why.trouble} ({why.source}); {why.answer}")
    return device


def _at_once(facts: Facts, kind: str, dtype: str) -> int:
    """Return the maximum number of images per U-Net call, if memory allows it."""
    if kind != "mps":
        return MOST_AT_ONCE if kind == "cuda" else 1
    new = release(facts.libraries.get("torch", "")) >= BATCHES_ON_METAL
    return MOST_ON_METAL if new and proved(facts, kind, "batch", dtype) else 1


def _dtype(facts: Facts, kind: str, part: str, task: Task, wishes: Wishes) -> str:
    wished = wishes.dtype_of(part)
    if wished is not None and not (wished == "float16" and kind == "cpu" and wishes.asked(f"{part}_dtype")):
        return wished
    native = facts.native_bfloat16(kind)
    best = best_for(facts, kind)
    if part != "vae":
        return best
    return vae_dtypes(kind, best, native_bfloat16=native, force_upcast=task.sizes.vae_config.force_upcast)[0]


def _engine(facts: Facts, kind: str, wishes: Wishes) -> str:
    packs = kind == "cpu" and facts.architecture == "x86_64" and "avx2" in facts.instructions
    if wishes.engine == "onednn" and not (packs and facts.onednn):
        needs = (
            "a release of torch whose oneDNN operations work here" if packs else "an x86 CPU with AVX2 as the device"
        )
        raise UsageError(f"engine 'onednn' needs {needs}; let the plan choose the engine")
    if wishes.engine == "onednn" and wishes.compile:
        raise UsageError("torch.compile cannot compile engine 'onednn'; leave out one of the two")
    return wishes.engine or ("onednn" if packs and facts.onednn and not wishes.compile else "torch")


def _chunk(facts: Facts, kind: str) -> int:
    """Return the bytes of scores per chunk: twice a core's L2 cache on CPUs, which is fastest; 1 GiB elsewhere."""
    return 2 * max(facts.cache_l2 or 2**20, LEAST_CACHE) if kind == "cpu" else METAL_CHUNK


def _with_compile(facts: Facts, task: Task, wishes: Wishes, one: Plan) -> Plan:
    """Enable compilation if the run is long enough to repay it and a compiler and enough memory are available."""
    can = one.engine == "torch" and (one.kind != "cpu" or facts.compiler is not None)
    if wishes.compile is not None or not can or COMPILE_GAIN[one.kind] * one.seconds <= SECONDS_TO_COMPILE[one.kind]:
        return one
    compiled = dataclasses.replace(one, compile=True)
    compiled = dataclasses.replace(
        compiled,
        peak_bytes=footprint(facts, task, compiled).peak,
        seconds=one.seconds * (1 - COMPILE_GAIN[one.kind]) + SECONDS_TO_COMPILE[one.kind],
    )
    return compiled if _fits(facts, task, compiled) else one


def _with_freed_kept(facts: Facts, task: Task, wishes: Wishes, one: Plan) -> Plan:
    """Keep freed memory (glibc only), which decodes a sixth faster, if it adds no peak or memory is plentiful."""
    if one.kind != "cpu" or facts.system != "linux":
        return one
    keeping = dataclasses.replace(one, keep_freed=True)
    peak = footprint(facts, task, keeping).peak
    plentiful = not wishes.once and 2 * peak <= one.free_bytes
    return dataclasses.replace(keeping, peak_bytes=peak) if plentiful or peak <= one.peak_bytes else one


def _free(facts: Facts, kind: str) -> int:
    return (facts.accelerator_memory_free or 0) if kind == "cuda" else facts.memory_free


def _last_true(test: Any, most: int) -> int:
    """Return the largest number from 0 to `most` that passes a monotonic test."""
    low, high = 0, 1
    while high <= most and test(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if test(middle) else (low, middle)
    return low


def _refusal(facts: Facts, task: Task, wishes: Wishes) -> MemoryPlanError:
    """Return the error that says why nothing fits, and what would."""
    leanest = min(_candidates(facts, task, wishes), key=lambda one: one.peak_bytes)
    wanted = f"{_pictures(task.pictures)} of {task.width} × {task.height}"
    usable = int(USABLE * leanest.free_bytes)
    if leanest.peak_bytes <= usable:
        trouble = "would exceed Metal's limit of 2**32 bytes per tensor"
    else:
        trouble = (
            f"needs at least {gigabytes(leanest.peak_bytes)}; {gigabytes(leanest.free_bytes)} are free on "
            f"{facts.name} ({leanest.device}), of which {gigabytes(usable)} can be used"
        )
    return MemoryPlanError(
        f"{wanted} {trouble}; {_what_fits(facts, task, wishes)}", needed=leanest.peak_bytes, free=leanest.free_bytes
    )


def _what_fits(facts: Facts, task: Task, wishes: Wishes) -> str:
    """Suggest the largest count at this size or, if not even one image fits, the largest size of the same shape."""

    def fits(**changes: int) -> bool:
        return _first_that_fits(facts, dataclasses.replace(task, **changes), wishes) is not None

    count = _last_true(lambda pictures: fits(pictures=pictures), task.pictures)
    if count:
        return f"{_pictures(count)} of this size would fit (--count {count})"
    unit = 8 * task.sizes.vae_config.scale_factor

    def side(whole: int, step: int) -> int:
        return max(unit, whole * step * unit // max(task.width, task.height) // unit * unit)

    most = max(task.width, task.height) // unit
    step = _last_true(lambda n: fits(width=side(task.width, n), height=side(task.height, n), pictures=1), most)
    if not step:
        return "no size fits: free memory, or use a smaller model or dtype"
    width, height = side(task.width, step), side(task.height, step)
    return f"the largest that fits is 1 image of {width} × {height} (--width {width} --height {height})"


def _pictures(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
