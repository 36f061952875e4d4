"""A plan's choices in plain words, each with its why and its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato.runtime.numerics import is_emulated
from sfumato.runtime.speeds import COMPILE_GAIN, SECONDS_TO_COMPILE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sfumato.runtime.choices import Plan, Task, Wishes
    from sfumato.runtime.facts import Facts

__all__ = ["gigabytes", "reasons"]

# Above this many steps a better sampler is worth naming.
MANY_STEPS = 40


def gigabytes(number: int) -> str:
    """Bytes in words: "2.13 GB", "871 MB"; powers of ten, as sizes of files and memory are sold."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def reasons(facts: Facts, task: Task, wishes: Wishes, plan: Plan) -> tuple[str, ...]:
    """One sentence for each choice."""
    sentences = [
        _device(facts, wishes, plan),
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
    why = "as asked" if wishes.device else "the best device here" if plan.kind != "cpu" else "there is no GPU"
    name = facts.processor if plan.kind == "cpu" else facts.accelerator_name or plan.kind
    return f"device {plan.device} ({name}): {why}; {gigabytes(plan.free_bytes)} are free to this process"


def _precision(facts: Facts, wishes: Wishes, plan: Plan) -> Iterator[str]:
    if plan.kind == "cpu" and "float16" in [wishes.dtype_of(part) for part in ("text_encoder", "unet", "vae")]:
        yield f"float16 was asked for and became {plan.unet_dtype}: a CPU emulates float16, {_slower(facts, plan)}"
    elif wishes.dtype_of("unet"):
        yield f"U-Net in {plan.unet_dtype}: as asked"
    elif plan.kind == "cpu" and plan.unet_dtype == "bfloat16":
        native = next(name for name in ("amx_bf16", "avx512_bf16", "neon_bf16") if name in facts.instructions)
        yield f"bfloat16: this processor multiplies in it ({native}), at half the memory of float32"
    elif plan.kind == "cpu":
        yield "float32: this processor has no bfloat16 instructions, and emulating them is slower"
    elif plan.kind == "mps" and plan.unet_dtype == "float32":
        yield "float32: it fits, and on Metal it is about as fast as float16 and cannot overflow"
    elif plan.kind == "mps":
        yield "float16 weights, as float32 does not fit; scores and softmax, which overflow in it, stay in float32"
    else:
        yield "float16 for text encoder and U-Net: the fastest on this card"
    if plan.vae_dtype != plan.unet_dtype and not wishes.dtype_of("vae"):
        yield f"VAE in {plan.vae_dtype}: some VAEs overflow in float16"
    if is_emulated(plan.kind, plan.unet_dtype, facts.native_bfloat16(plan.kind)):
        yield f"{plan.unet_dtype} is emulated on this device, so another precision would be faster"


def _slower(facts: Facts, plan: Plan) -> str:
    emulated, native = facts.speeds.get("linear_float16"), facts.speeds.get(f"linear_{plan.unet_dtype}")
    if emulated and native and facts.accelerator == "cpu":
        return f"{native / emulated:,.0f} times slower here"
    return "many times slower"


def _engine(facts: Facts, wishes: Wishes, plan: Plan) -> Iterator[str]:
    if plan.kind != "cpu":
        return
    why = "as asked" if wishes.engine else "weights are packed once for the processor's own kernels"
    if plan.engine == "torch" and not wishes.engine:
        why = "our packed kernels are for x86 with AVX2"
    yield f"engine {plan.engine}: {why}"
    if wishes.threads:
        yield f"{_threads(plan)}: as asked"
    else:
        busy = f", of which others keep {facts.load:.1f} busy" if facts.load >= 0.1 else ""
        yield f"{_threads(plan)}: {facts.cores} cores are ours{busy}; threads that wait for a core slow all down"


def _threads(plan: Plan) -> str:
    return "one thread" if plan.threads == 1 else f"{plan.threads} threads"


def _attention(facts: Facts, wishes: Wishes, plan: Plan) -> str:
    if plan.attention == "fused":
        return f"attention {'as asked: ' if wishes.attention else ''}by torch's fused kernel, which holds no scores"
    size = gigabytes(plan.attention_bytes or 0)
    if wishes.attention or wishes.attention_bytes:
        return f"attention in chunks of at most {size} of scores: as asked"
    if plan.kind == "cpu":
        return f"attention in chunks of {size} of scores, which stay in the processor's cache"
    return f"attention in chunks of at most {size} of scores: Metal holds them, and refuses buffers of 2**32 bytes"


def _batches(task: Task, wishes: Wishes, plan: Plan) -> str:
    if wishes.micro_batch:
        return f"{plan.micro_batch} at a time: as asked"
    if task.pictures == 1:
        return "one picture, so one at a time"
    if plan.kind == "cpu":
        return "one picture at a time: larger batches gain nothing on a CPU and cost memory"
    if plan.kind == "mps":
        return "one picture at a time: batches are not reliable on Metal; the pictures are the same"
    return f"{plan.micro_batch} pictures at a time, of {task.pictures}: as many as fit, and no more than 16"


def _memory(task: Task, wishes: Wishes, plan: Plan) -> Iterator[str]:
    if plan.offload == "staged":
        alone = "none is needed twice" if wishes.once and plan.kind == "cpu" else "all three together do not fit"
        why = "as asked" if wishes.offload else alone
        yield f"networks take turns in memory (text encoder until it has encoded, U-Net until the VAE decodes): {why}"
    if plan.vae_slicing and plan.micro_batch > 1:
        yield "the VAE decodes one picture at a time: as fast, at a fraction of the memory"
    if plan.vae_tiling:
        why = "as asked" if wishes.vae_tiling else f"{task.width} × {task.height} pixels at once are too many"
        yield f"the VAE decodes in overlapping tiles, which changes pictures a little at the seams: {why}"


def _compile(facts: Facts, wishes: Wishes, plan: Plan) -> str:
    if wishes.compile is not None:
        return f"torch.compile {'on' if plan.compile else 'off'}: as asked"
    cost, gain = SECONDS_TO_COMPILE[plan.kind], COMPILE_GAIN[plan.kind]
    if plan.compile:
        return f"torch.compile on: this run is long enough to repay the {cost:.0f} s that compiling takes"
    if plan.engine != "torch":
        return f"torch.compile off: the {plan.engine} engine has nothing left to compile"
    if plan.kind == "mps":
        return "torch.compile off: it gains nothing on Metal yet"
    if plan.kind == "cpu" and facts.compiler is None:
        return "torch.compile off: there is no C compiler"
    saved = gain * plan.seconds
    return f"torch.compile off: it would save {saved:.1f} s of this run and take {cost:.0f} s"


def _steps(task: Task) -> Iterator[str]:
    if task.steps >= MANY_STEPS:
        yield f"{task.steps} steps as asked; 20 with --scheduler dpmpp_2m_karras look much the same"
