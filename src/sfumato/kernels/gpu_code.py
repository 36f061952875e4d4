"""Triton kernels for half-precision images whose channels are contiguous; `gpu.py` calls them."""


# pyright: basic, reportMissingImports=false

import triton
import triton.language as tl

__all__ = ["biased_sum", "geglu", "group_norm"]


@triton.jit(do_not_specialize=["width", "adds", "silu"])  # few variants, as each takes a second to compile
def group_norm(
    x, added, weight, bias, out, pixels, channels, added_stride, groups, width, adds, silu, eps,
    LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per group of one image: its statistics in float32, around a mean of the first rows, then its values.

    width: channels of a group; adds, silu: 0 or 1; LANES: the power of two above width; ROWS: pixels read at a time.
    """
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    lanes, rows = tl.arange(0, LANES), tl.arange(0, ROWS)
    inside, channel = lanes < width, group * width + lanes
    gamma = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(added + image * added_stride + channel, mask=inside & (adds > 0), other=0.0).to(tl.float32)
    begin = image.to(tl.int64) * pixels * channels
    places = rows[:, None] * channels + channel[None, :]
    mask = (rows[:, None] < pixels) & inside[None, :]
    value = tl.load(x + begin + places, mask=mask, other=0.0).to(tl.float32) + shift[None, :]
    pivot = tl.sum(tl.sum(tl.where(mask, value, 0.0), 1), 0) / (tl.minimum(pixels, ROWS) * width)
    total, squares = tl.zeros([ROWS, LANES], tl.float32), tl.zeros([ROWS, LANES], tl.float32)
    for start in range(0, pixels, ROWS):
        mask = (rows[:, None] < pixels - start) & inside[None, :]
        value = tl.load(x + begin + start * channels + places, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value + shift[None, :] - pivot, 0.0)
        total += value
        squares += value * value
    count = pixels * width
    mean = tl.sum(tl.sum(total, 1), 0) / count
    variance = tl.sum(tl.sum(squares, 1), 0) / count - mean * mean
    scale = gamma / tl.sqrt(variance + eps)
    offset = beta + (shift - pivot - mean) * scale
    for start in range(0, pixels, ROWS):
        mask = (rows[:, None] < pixels - start) & inside[None, :]
        value = tl.load(x + begin + start * channels + places, mask=mask, other=0.0).to(tl.float32)
        value = value * scale[None, :] + offset[None, :]
        value = tl.where(silu > 0, value / (1.0 + tl.exp(-value)), value)
        tl.store(out + begin + start * channels + places, value, mask=mask)


@triton.jit
def geglu(x, out, numbers, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """X (N, 2 WIDTH) -> (N, WIDTH): the first half times the GELU of the second."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < numbers
    source = x + place + (place // WIDTH) * WIDTH
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(source + WIDTH, mask=mask, other=0.0).to(tl.float32)
    gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + place, value * gate, mask=mask)


@triton.jit
def biased_sum(x, y, bias, out, numbers, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """X + y + bias, where the channels (CHANNELS) are contiguous."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < numbers
    total = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(bias + place % CHANNELS, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, total, mask=mask)
