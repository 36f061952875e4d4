"""The reasons for a plan: one sentence per choice, with its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.runtime.faults import best_for, half_failed
from sfumato.runtime.numerics import is_emulated
from sfumato.runtime.speeds import COMPILE_GAIN, SECONDS_TO_COMPILE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sfumato.runtime.choices import Plan, Task, Wishes
    from sfumato.runtime.facts import Facts

__all__ = ["EIGHT_BIT", "REPLACED", "gigabytes", "reasons"]

# What a reason says if a dtype other than the requested one is used.
REPLACED = "instead of float16"

# How close weights in 8 bits come to exact ones: the median of 64 images by the built-in model (docs/performance.md).
EIGHT_BIT_DB = 44
EIGHT_BIT = "U-Net weights in 8 bits"

# From this many steps on, a better scheduler is worth mentioning.
MANY_STEPS = 40


def gigabytes(number: int) -> str:
    """Format bytes, such as "2.13 GB" or "871 MB", in decimal units as for files and disks."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def reasons(facts: Facts, task: Task, wishes: Wishes, plan: Plan) -> tuple[str, ...]:
    """Return one sentence for each choice."""
    sentences = [
        _device(facts, wishes, plan),
        *plan.faults,
        *_precision(facts, wishes, plan),
        *_engine(facts, wishes, plan),
        _attention(facts, wishes, plan),
        _batches(task, wishes, plan),
        *_memory(task, wishes, plan),
        _compile(facts, wishes, plan),
        *_steps(task),
    ]
    return tuple(sentences)


def _device(facts: Facts, wishes: Wishes, plan: Plan) -> str:
    if wishes.asked("device"):
        why = "as requested"
    elif "device" in wishes.settled:
        why = "where the pipeline is"
    elif plan.kind != "cpu":
        why = "the best device of this machine"
    else:
        why = "this machine has no GPU" if facts.accelerator == "cpu" else "its GPU is not used"
    name = facts.processor if plan.kind == "cpu" else facts.accelerator_name or plan.kind
    return f"device {plan.device} ({name}): {why}; {gigabytes(plan.free_bytes)} are free for this process"


def _precision(facts: Facts, wishes: Wishes, plan: Plan) -> Iterator[str]:
    native = facts.native_bfloat16(plan.kind)
    asked = {wishes.dtype_of(part) for part in ("text_encoder", "unet", "vae") if wishes.asked(f"{part}_dtype")}
    if plan.kind == "cpu" and "float16" in asked:
        yield f"{plan.unet_dtype} {REPLACED}: CPUs only emulate float16, {_slower(facts, plan)}"
    elif wishes.asked("unet_dtype"):
        yield f"U-Net in {plan.unet_dtype}: as requested"
    elif wishes.dtype_of("unet") and plan.unet_dtype != best_for(facts, plan.kind):
        yield f"U-Net in {plan.unet_dtype}: as it was loaded"
    elif plan.kind == "cpu" and plan.unet_dtype == "bfloat16":
        name = next(name for name in ("amx_bf16", "avx512_bf16", "neon_bf16") if name in facts.instructions)
        yield f"bfloat16: this CPU supports it ({name}), and it needs half the memory of float32"
    elif plan.unet_dtype == "float32" and half_failed(facts, plan.kind):
        yield "float32: half precision failed its canaries here"
    elif plan.kind == "cpu":
        yield "float32: this CPU has no bfloat16 instructions, and emulating them is slower"
    elif plan.kind == "mps" and plan.unet_dtype == "float32":
        yield "float32: it fits, is about as fast as float16 on Metal, and cannot overflow"
    elif plan.kind == "mps" and plan.unet_dtype == "bfloat16":
        yield "bfloat16: this GPU passed every canary in it, and it needs half the memory of float32"
    elif plan.kind == "mps":
        yield (
            "float16: float32 does not fit. Attention scores and softmax stay in float32, because they overflow in "
            "float16"
        )
    else:
        yield "float16 for text encoder and U-Net: fastest on this GPU"
    if plan.vae_dtype != plan.unet_dtype and not wishes.asked("vae_dtype"):
        why = "some VAEs overflow in float16" if plan.unet_dtype == "float16" else "as it was loaded"
        yield f"VAE in {plan.vae_dtype}: {why}"
    if is_emulated(plan.kind, plan.unet_dtype, native):
        yield f"{plan.unet_dtype} is emulated on this device; another precision would be faster"


def _slower(facts: Facts, plan: Plan) -> str:
    emulated, native = facts.speeds.get("linear_float16"), facts.speeds.get(f"linear_{plan.unet_dtype}")
    if emulated and native and facts.accelerator == "cpu":
        return f"which is {native / emulated:,.0f} times slower on this one"
    return "which is many times slower"


def _engine(facts: Facts, wishes: Wishes, plan: Plan) -> Iterator[str]:
    if plan.kind != "cpu":
        return
    why = "as requested" if wishes.asked("engine") else "weights are packed once for the CPU's own kernels"
    if plan.engine == "torch" and not wishes.engine:
        why = "the packed kernels need an x86 CPU with AVX2"
        if facts.architecture == "x86_64" and "avx2" in facts.instructions:
            why = "this version of torch lacks working oneDNN operations"
        if facts.onednn and wishes.compile:
            why = "torch.compile cannot compile the faster onednn engine"
    yield f"engine {plan.engine}: {why}"
    if wishes.threads:
        yield f"{_threads(plan)}: as requested"
    elif facts.load >= 0.1:
        yield (
            f"{_threads(plan)}: other processes keep {facts.load:.1f} of {_cores(facts)} busy, and extra threads would "
            "only wait for them"
        )
    else:
        yield f"{_threads(plan)}: {_cores(facts)} available"


def _threads(plan: Plan) -> str:
    return "1 thread" if plan.threads == 1 else f"{plan.threads} threads"


def _cores(facts: Facts) -> str:
    return "1 core" if facts.cores == 1 else f"{facts.cores} cores"


def _attention(facts: Facts, wishes: Wishes, plan: Plan) -> str:
    if plan.attention == "fused" and plan.kind == "mps":
        size = gigabytes(plan.attention_bytes or 0)
        return (
            f"torch's fused attention, with heads padded to widths that it covers; scores of wider ones in chunks of "
            f"at most {size}{': as requested' if wishes.attention else ''}"
        )
    if plan.attention == "fused":
        return f"torch's fused attention, which stores no scores{': as requested' if wishes.attention else ''}"
    size = gigabytes(plan.attention_bytes or 0)
    if plan.attention == "split" and not wishes.attention:
        return f"attention by plain products, in pieces of at most {plan.attention_keys:,} keys and {size} of scores"
    if wishes.attention or wishes.attention_bytes:
        return f"attention scores in chunks of at most {size}: as requested"
    if plan.kind == "cpu":
        return f"attention scores in chunks of {size}: they fit into the CPU's cache"
    return f"attention scores in chunks of at most {size}: Metal stores them, and refuses buffers of 2**32 bytes"


def _batches(task: Task, wishes: Wishes, plan: Plan) -> str:
    if wishes.micro_batch:
        return f"batch size {plan.micro_batch}: as requested"
    if task.pictures == 1:
        return "batch size 1: there is only one image"
    if plan.kind == "cpu":
        return "batch size 1: larger batches are no faster on a CPU and need more memory"
    if plan.kind == "mps" and plan.micro_batch > 1:
        return f"batch size {plan.micro_batch} for {task.pictures} images: larger ones are not tested on Metal"
    if plan.singly:
        return "batch size 1: this device computes batches wrongly; the images are the same"
    if plan.kind == "mps":
        return "batch size 1: larger batches are unreliable on Metal; the images are the same"
    return f"batch size {plan.micro_batch} for {task.pictures} images: as many as fit in memory, at most 16"


def _memory(task: Task, wishes: Wishes, plan: Plan) -> Iterator[str]:
    if plan.offload == "staged":
        alone = "none is needed twice" if wishes.once and plan.kind == "cpu" else "together they do not fit"
        why = "as requested" if wishes.asked("offload") else alone
        yield f"one network in memory at a time (text encoder, then U-Net, then VAE): {why}"
    if plan.vae_slicing and plan.micro_batch > 1:
        yield "the VAE decodes one image at a time: equally fast, with much less memory"
    if plan.vae_tiling:
        why = "as requested" if wishes.vae_tiling else f"{task.width} × {task.height} pixels at once are too many"
        yield f"the VAE decodes in overlapping tiles, which slightly changes the image at the seams: {why}"
    if plan.eight_bit:
        why = "as it was loaded" if "eight_bit" in wishes.settled else "as requested" if wishes.eight_bit else ""
        yield f"{EIGHT_BIT}, about {EIGHT_BIT_DB} dB from the exact image: {why or 'exact ones do not fit'}"


def _compile(facts: Facts, wishes: Wishes, plan: Plan) -> str:
    if wishes.compile is not None:
        return f"torch.compile {'on' if plan.compile else 'off'}: as requested"
    cost, gain = SECONDS_TO_COMPILE[plan.kind], COMPILE_GAIN[plan.kind]
    if plan.compile:
        return f"torch.compile on: this run is long enough to make up for {cost:.0f} s of compiling"
    if plan.engine != "torch":
        return f"torch.compile off: it does not speed up the {plan.engine} engine"
    if plan.kind == "mps":
        return "torch.compile off: it is not faster on Metal yet"
    if plan.kind == "cpu" and facts.compiler is None:
        return "torch.compile off: there is no C compiler"
    saved = gain * plan.seconds
    return f"torch.compile off: it would take {cost:.0f} s to save {saved:.1f} s"


def _steps(task: Task) -> Iterator[str]:
    if task.steps >= MANY_STEPS:
        yield f"{task.steps} steps: 20 with --scheduler dpmpp_2m_karras look much the same"
