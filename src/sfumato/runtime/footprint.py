"""The memory and time of a plan: layer counts and a few measured coefficients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from sfumato.runtime.choices import DTYPE_BYTES, PARTS
from sfumato.runtime.faults import HEAD_WIDTHS
from sfumato.runtime.layers import decoder_layers, unet_layers
from sfumato.runtime.speeds import SECONDS_TO_COMPILE, speed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sfumato.runtime.choices import Plan, Task
    from sfumato.runtime.facts import Facts
    from sfumato.runtime.layers import Attention, Layer

__all__ = [
    "Footprint",
    "decoded_layers",
    "decoded_together",
    "footprint",
    "largest_tensor",
    "seconds_of",
    "start_seconds",
    "stored_scores",
    "unet_call_seconds",
]

MIB = 2**20
# A process that has imported everything and run each kind of layer once. Device memory excludes the CUDA context.
BASELINE = {"cpu": 300 * MIB, "cuda": 0, "mps": 300 * MIB}
# Kernel workspaces, in addition to inputs and outputs. Measured on a CPU and with CUDA (docs/log.md).
WORKSPACE = {"cpu": 16 * MIB, "cuda": 480 * MIB, "mps": 128 * MIB}
# What torch.compile adds to a process.
COMPILER = 700 * MIB
# Scores and their softmax are in memory at the same time.
SCORE_BUFFERS = 2
# Latents, saved latents and past predictions of a sampler, in float32.
SAMPLER_STATES = 8
# Decoded pixels, their float32 copy, and the result clipped to [0, 1].
PIXEL_BUFFERS = 3
# When packed for oneDNN, upsampling layers store their taps twice; and during packing, the memory of earlier layers is
# only released now and then.
PACKED, UNRELEASED = 1.08, 64 * MIB
# A weight in 8 bits is widened and, where it is not packed, scaled.
WIDENED = 2
# Kept memory is not always the size that is needed next.
KEPT = 3
# Casting maps a window of the file in addition to the result: a sixty-fourth of the file.
CAST_PARTS = 64


@dataclass(frozen=True)
class Footprint:
    """Peak memory of each stage in bytes."""

    encode: int
    denoise: int
    decode: int

    @property
    def peak(self) -> int:
        """The peak over all stages."""
        return max(self.encode, self.denoise, self.decode)


def footprint(facts: Facts, task: Task, plan: Plan) -> Footprint:
    """Estimate the peak memory of a plan, stage by stage."""
    latents = 4 * task.sizes.unet_config.in_channels * task.latent_size[0] * task.latent_size[1]
    picture = 3 * task.height * task.width
    always = BASELINE[plan.kind] + WORKSPACE[plan.kind] + (COMPILER if plan.compile else 0)
    always += task.pictures * (latents + picture)
    encode = _held(facts, task, plan, "text_encoder")
    texts = task.prompts * task.rows * _live(plan, task.text_layers, "text_encoder", chunked=False)
    encode += max(texts, _live(plan, task.vision_layers, "text_encoder", chunked=False))
    denoise = _held(facts, task, plan, "unet") + SAMPLER_STATES * plan.micro_batch * latents
    denoise += _live(plan, task.unet_layers, "unet", plan.micro_batch * task.rows)
    at_once = 1 if plan.vae_slicing else plan.micro_batch
    decode = _held(facts, task, plan, "vae")
    decode += (KEPT if plan.keep_freed else 1) * _live(plan, decoded_layers(task, plan), "vae", at_once)
    decode += PIXEL_BUFFERS * 4 * picture * plan.micro_batch
    if task.from_picture:
        coding = _held(facts, task, plan, "vae") + _live(plan, task.encoder_layers, "vae")
        encode = max(encode, coding + 2 * 4 * picture)
    return Footprint(always + encode, always + denoise, always + decode)


def decoded_layers(task: Task, plan: Plan) -> list[Layer]:
    """Return the decoder's layers as planned: for a whole image or for one tile."""
    height, width = task.latent_size
    if not plan.vae_tiling:
        return task.decoder_layers
    config = task.sizes.vae_config
    size = config.sample_size if hasattr(config, "sample_size") else 512
    tile = max(1, (size if isinstance(size, int) else size[0]) // config.scale_factor)
    return decoder_layers(config, min(height, tile), min(width, tile))


def decoded_together(task: Task, plan: Plan) -> int:
    """Return the bytes of activations if a whole micro-batch is decoded together."""
    return _live(plan, decoded_layers(task, plan), "vae", plan.micro_batch)


def largest_tensor(plan: Plan, task: Task) -> tuple[int, int]:
    """Return the bytes and elements of the largest tensor in the U-Net or the decoder, excluding scores."""
    unet = plan.micro_batch * task.rows * max(layer.largest for layer in task.unet_layers)
    at_once = 1 if plan.vae_slicing else plan.micro_batch
    vae = at_once * max(layer.largest for layer in decoded_layers(task, plan))
    bytes_of = [unet * DTYPE_BYTES[plan.unet_dtype], vae * DTYPE_BYTES[plan.vae_dtype]]
    return max(bytes_of), max(unet, vae)


def _held(facts: Facts, task: Task, plan: Plan, running: str) -> int:
    """Return the size of the weights in memory while a network runs, plus the overhead of loading it."""
    present = PARTS if plan.offload == "none" else (running,)
    total = 0
    for part in present:
        total += _weights(task, plan, part)
    if plan.engine == "onednn":
        total = int(PACKED * total) + UNRELEASED
    if plan.kind != "cuda":  # with CUDA, they are kept on the host
        total += sum(task.sizes.kept.get(part, 0) // _narrower(plan, part) for part in present)
    stored = max(getattr(task.sizes, part).stored_bytes for part in present)
    return total + (stored if facts.address_limited else stored // CAST_PARTS)


def _narrower(plan: Plan, part: str) -> int:
    """Return how many times smaller than planned for its dtype a network's large weights are stored."""
    return DTYPE_BYTES[plan.dtype_of(part)] if part == "unet" and plan.eight_bit else 1


def _weights(task: Task, plan: Plan, part: str) -> int:
    """Return the size of a network's weights; of those in 8 bits, the largest is widened while it is used."""
    parameters, wide = getattr(task.sizes, part).parameters, DTYPE_BYTES[plan.dtype_of(part)]
    if part != "unet" or not plan.eight_bit:
        return parameters * wide
    large = [layer.parameters for layer in unet_layers(task.sizes.unet_config, 64, 64, 77) if layer.is_large]
    total = (parameters - sum(large)) * wide + sum(large)
    # Metal's copy is in the same memory as the host's, which does not map what is smaller than its file.
    return (2 if plan.kind == "mps" else 1) * total + WIDENED * max(large, default=0) * wide


def _live(plan: Plan, layers: Sequence[Layer], part: str, rows: int = 1, *, chunked: bool = True) -> int:
    """Return the peak size of activations, including scores that are stored."""
    size = DTYPE_BYTES[plan.dtype_of(part)]
    live = (rows * layer.live * size + (_scores(plan, layer, rows, size) if chunked else 0) for layer in layers)
    return max(live, default=0)


def _scores(plan: Plan, layer: Layer, rows: int, size: int) -> int:
    shape = stored_scores(plan, layer)
    if shape is None:
        return 0
    # On MPS, scores and softmax are float32 whatever the dtype of the weights.
    whole = rows * shape.heads * shape.queries * shape.keys * (4 if plan.kind == "mps" else size)
    return SCORE_BUFFERS * min(whole, plan.attention_bytes or whole)


def stored_scores(plan: Plan, layer: Layer) -> Attention | None:
    """Return the attention whose scores a layer stores, with the keys that it takes at a time, or None."""
    shape = layer.attention
    fused = plan.attention == "fused" and (plan.kind != "mps" or layer.head_width <= HEAD_WIDTHS[-1])
    if shape is None or fused:
        return None
    return replace(shape, keys=min(shape.keys, plan.attention_keys or shape.keys))


def unet_call_seconds(facts: Facts, task: Task, plan: Plan) -> float:
    """Estimate the time of one U-Net call for a full micro-batch, in seconds."""
    return plan.micro_batch * task.rows * _seconds(facts, plan, task.unet_layers, "unet")


def seconds_of(facts: Facts, task: Task, plan: Plan) -> float:
    """Estimate the time of all stages in seconds, including planned compilation but not loading."""
    encode = task.prompts * task.rows * _seconds(facts, plan, task.text_layers, "text_encoder")
    encode += _seconds(facts, plan, task.vision_layers, "text_encoder")
    if task.from_picture:
        encode += _seconds(facts, plan, task.encoder_layers, "vae")
    denoise = task.pictures * task.steps * task.rows * task.tiles * _seconds(facts, plan, task.unet_layers, "unet")
    decode = task.pictures * _seconds(facts, plan, task.decoder_layers, "vae")
    if task.first is not None:
        denoise += task.pictures * task.first.steps * task.rows * _seconds(facts, plan, task.first.unet_layers, "unet")
    return encode + denoise + decode + (SECONDS_TO_COMPILE[plan.kind] if plan.compile else 0)


def start_seconds(facts: Facts, task: Task, plan: Plan) -> float:
    """Estimate a command's overhead in seconds: starting Python, importing torch, reading weights, first use."""
    stored = sum(getattr(task.sizes, part).stored_bytes for part in PARTS)
    crowd = max(1.0, (facts.load + 1) / max(facts.cores, ceil(facts.load)))  # threads share the cores
    return crowd * (START_SECONDS[plan.kind] + stored / READ_BYTES_PER_SECOND)


def _seconds(facts: Facts, plan: Plan, layers: Sequence[Layer], part: str) -> float:
    total = 0.0
    for kind in ("conv", "linear", "attention"):
        operations = sum(layer.operations for layer in layers if layer.kind == kind)
        total += operations / speed(facts, plan.kind, plan.threads, kind, plan.dtype_of(part))
    return total * ELEMENTWISE


# Measured on a CPU (docs/log.md), estimated for GPUs, which also start a driver.
START_SECONDS = {"cpu": 2.2, "cuda": 5.0, "mps": 3.5}
# Reading weights from the page cache rather than a disk, and casting or packing them.
READ_BYTES_PER_SECOND = 1.0e9
# Norms, activations, additions and copies, relative to the multiplications.
ELEMENTWISE = 1.2
