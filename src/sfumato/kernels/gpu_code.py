"""Triton kernels for half-precision images whose channels are contiguous; `gpu.py` calls them."""


# pyright: basic, reportMissingImports=false

import triton
import triton.language as tl

__all__ = ["add_norm", "biased_sum", "channel_moments", "geglu", "group_norm", "group_scales", "scaled"]


# Arguments that are not specialized give fewer variants, as each takes a second to compile.
@triton.jit(do_not_specialize=["width", "adds", "silu"])
def group_norm(
    x, added, weight, bias, out, pixels, channels, added_stride, groups, width, adds, silu, eps,
    LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per group of one image, which it keeps in registers.

    width: channels of a group; adds, silu: 0 or 1; LANES, ROWS: the powers of two from width and pixels on.
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
    count = pixels * width
    mean = tl.sum(tl.sum(tl.where(mask, value, 0.0), 1), 0) / count
    value = tl.where(mask, value - mean, 0.0)
    variance = tl.sum(tl.sum(value * value, 1), 0) / count
    value = value * (gamma / tl.sqrt(variance + eps))[None, :] + beta[None, :]
    value = tl.where(silu > 0, value / (1.0 + tl.exp(-value)), value)
    tl.store(out + begin + places, value, mask=mask)


@triton.jit
def channel_moments(x, moments, pixels, channels, share, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Mean and sum of squared deviations of each channel over a share of the pixels: (images, shares, 2, channels).

    One program per image, share and LANES channels. Sums begin at the first pixel's value, so that large means cancel.
    """
    image, part = tl.program_id(0), tl.program_id(1)
    rows, channel = tl.arange(0, ROWS), tl.program_id(2) * LANES + tl.arange(0, LANES)
    inside = channel < channels
    first, last = part * share, tl.minimum((part + 1) * share, pixels)
    begin = x + image.to(tl.int64) * pixels * channels + channel
    pivot = tl.load(begin + first * channels, mask=inside, other=0.0).to(tl.float32)
    total, squares = tl.zeros([ROWS, LANES], tl.float32), tl.zeros([ROWS, LANES], tl.float32)
    for start in range(0, share, ROWS):
        row = first + start + rows
        mask = (row[:, None] < last) & inside[None, :]
        value = tl.load(begin[None, :] + row[:, None] * channels, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - pivot[None, :], 0.0)
        total += value
        squares += value * value
    mean, squared = tl.sum(total, 0) / (last - first), tl.sum(squares, 0)
    place = moments + (image * tl.num_programs(1) + part) * 2 * channels + channel
    tl.store(place, mean + pivot, mask=inside)
    tl.store(place + channels, squared - mean * mean * (last - first), mask=inside)


@triton.jit(do_not_specialize=["width", "adds"])
def group_scales(
    moments, added, weight, bias, scales, pixels, channels, added_stride, groups, width, adds, shares, share, eps,
    LANES: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Factor and offset of each channel, (images, 2, channels), from `channel_moments`: one program per group."""
    image, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    lanes, parts = tl.arange(0, LANES), tl.arange(0, SHARES)
    inside, channel = lanes < width, group * width + lanes
    gamma = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(added + image * added_stride + channel, mask=inside & (adds > 0), other=0.0).to(tl.float32)
    mask = (parts[:, None] < shares) & inside[None, :]
    place = moments + (image * shares + parts[:, None]) * 2 * channels + channel[None, :]
    means = tl.load(place, mask=mask, other=0.0) + shift[None, :]
    squared = tl.load(place + channels, mask=mask, other=0.0)
    numbers = tl.minimum(pixels - parts * share, share)[:, None]  # of pixels in each share
    count = pixels * width
    mean = tl.sum(tl.sum(tl.where(mask, means * numbers, 0.0), 1), 0) / count
    apart = tl.where(mask, means - mean, 0.0)
    variance = tl.sum(tl.sum(squared + apart * apart * numbers, 1), 0) / count
    scale = gamma / tl.sqrt(variance + eps)
    place = scales + image * 2 * channels + channel
    tl.store(place, scale, mask=inside)
    tl.store(place + channels, beta + (shift - mean) * scale, mask=inside)


@triton.jit(do_not_specialize=["silu"])
def scaled(x, scales, out, pixels, channels, silu, LANES: tl.constexpr, ROWS: tl.constexpr):
    """X times the factor of its channel plus the offset, then SiLU (silu: 0 or 1)."""
    image = tl.program_id(1)
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(2) * LANES + tl.arange(0, LANES)
    inside = channel < channels
    scale = tl.load(scales + image * 2 * channels + channel, mask=inside, other=0.0)
    offset = tl.load(scales + (image * 2 + 1) * channels + channel, mask=inside, other=0.0)
    begin = image.to(tl.int64) * pixels * channels
    places = row[:, None] * channels + channel[None, :]
    mask = (row[:, None] < pixels) & inside[None, :]
    value = tl.load(x + begin + places, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
    value = tl.where(silu > 0, value / (1.0 + tl.exp(-value)), value)
    tl.store(out + begin + places, value, mask=mask)


@triton.jit
def add_norm(
    x, y, weight, bias, total, out, rows, width, eps,
    ADDS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows x + y, kept in total, and their layer normalization; without ADDS, that of x alone."""
    row, lanes = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
    inside = lanes < width
    mask = (row[:, None] < rows) & inside[None, :]
    places = row[:, None].to(tl.int64) * width + lanes[None, :]
    value = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(y + places, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + places, value, mask=mask)
    mean = tl.sum(value, 1) / width
    value = tl.where(mask, value - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / width + eps)
    gamma = tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    beta = tl.load(bias + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, value * scale[:, None] * gamma[None, :] + beta[None, :], mask=mask)


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
