"""Kernels for NVIDIA GPUs, which torch runs as several passes over memory; written in Triton, which torch brings along.

torch normalizes groups only where an image's pixels are contiguous, while its convolutions want the channels to be: it
copies before and after. These read and write channels as they lie.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["GpuKernels", "gpu_kernels", "is_plain"]

log = logging.getLogger("sfumato")

# A group of so many numbers stays in registers; larger ones are read twice, by all programs together.
RESIDENT = 2**14
LANES, ROWS = 64, 32  # channels and pixels that a program reads at a time
SHARE, SHARES = 4 * ROWS, 128  # pixels that a program sums, unless the image would have more shares
BLOCK, TOKENS = 1024, 2048  # numbers of a program
MOST_ERROR = 0.02  # of a small result, of values up to 5


class GpuKernels:
    """The kernels as functions on tensors, each equivalent to a few lines of torch."""

    def __init__(self, code: Any) -> None:
        """code: the compiled kernels (gpu_code.py)."""
        self._code = code

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels take an image (B, C, H, W): its channels contiguous, its places within 32 bits."""
        return x[0].numel() < 2**31 and x.is_contiguous(memory_format=torch.channels_last)

    def group_norm(
        self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, added: Tensor | None, *, silu: bool
    ) -> Tensor:
        """Normalize x + added, (B, C, H, W) and (B or 1, C), by groups of channels; then SiLU, if wanted."""
        batch, channels, height, width = x.shape
        pixels, own, out = height * width, channels // groups, torch.empty_like(x)
        lanes, rows = _power(own), _power(pixels)
        stride = 0 if added is None or added.shape[0] == 1 else added.stride(0)
        added = None if added is None else added if added.stride(-1) == 1 else added.contiguous()
        how = (pixels, channels, stride, groups, own, int(added is not None))
        parameters = (x if added is None else added, weight, bias)
        with torch.cuda.device_of(x):
            if lanes * rows <= RESIDENT:
                warps = 16 if lanes * rows > RESIDENT // 2 else 8 if lanes * rows > RESIDENT // 8 else 4
                self._code.group_norm[(batch * groups,)](
                    x, *parameters, out, *how, int(silu), eps, LANES=lanes, ROWS=rows, num_warps=warps
                )
                return out
            share = max(SHARE, -(-pixels // SHARES))
            shares, blocks = -(-pixels // share), -(-channels // LANES)
            moments = torch.empty(batch, shares, 2, channels, dtype=torch.float32, device=x.device)
            scales = torch.empty(batch, 2, channels, dtype=torch.float32, device=x.device)
            self._code.channel_moments[batch, shares, blocks](
                x, moments, pixels, channels, share, LANES=LANES, ROWS=ROWS
            )
            self._code.group_scales[(batch * groups,)](
                moments, *parameters, scales, *how, shares, share, eps, LANES=lanes, SHARES=_power(shares)
            )
            self._code.scaled[-(-pixels // ROWS), batch, blocks](  # only the first axis of a grid may be long
                x, scales, out, pixels, channels, int(silu), LANES=LANES, ROWS=ROWS
            )
        return out

    def add_norm(self, x: Tensor, y: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Tokens x (B, L, C) and y, if any -> x + y, and its layer normalization."""
        x = x.contiguous()
        width, out = x.shape[-1], torch.empty_like(x)
        total, lanes = x if y is None else torch.empty_like(x), _power(width)
        rows = max(1, TOKENS // lanes)
        with torch.cuda.device_of(x):
            self._code.add_norm[(-(-x.numel() // (width * rows)),)](
                *(x, x if y is None else y.contiguous(), norm.weight, norm.bias, total, out),
                *(x.numel() // width, width, norm.eps),
                ADDS=y is not None,
                LANES=lanes,
                ROWS=rows,
            )
        return total, out

    def geglu(self, x: Tensor) -> Tensor:
        """(…, 2 C) -> (…, C): the first half times the GELU of the second."""
        x = x.contiguous()
        width = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        with torch.cuda.device_of(x):
            self._code.geglu[(-(-out.numel() // BLOCK),)](x, out, out.numel(), WIDTH=width, BLOCK=BLOCK)
        return out

    def biased_sum(self, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        """Return x + y + bias, (B, C, H, W) twice and (C,)."""
        out = torch.empty_like(x)
        with torch.cuda.device_of(x):
            grid = (-(-out.numel() // BLOCK),)
            self._code.biased_sum[grid](x, y, bias, out, out.numel(), CHANNELS=x.shape[1], BLOCK=BLOCK)
        return out


def _power(number: int) -> int:
    """The least power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def gpu_kernels(x: Tensor, *layers: nn.Module | None) -> GpuKernels | None:
    """Return the kernels for a tensor; None elsewhere, in float32, while training, and while compiling.

    layers: whose weights the caller reads itself. Also None if one of them is another's, or has hooks, which then run.
    """
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return None
    return _tested(x.device) if all(layer is None or is_plain(layer) for layer in layers) else None


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is torch's own and has no hooks, so that its weights are all there is to it."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    whole = type(layer) is nn.LayerNorm and layer.bias is not None
    return whole or type(layer) in (nn.Conv2d, nn.Linear)


@cache
def _tested(device: torch.device) -> GpuKernels | None:
    """The kernels, if they run on this device: Triton needs a C compiler, and may not know the device."""
    try:
        from sfumato.kernels import gpu_code

        kernels = GpuKernels(gpu_code)
        error = max(float((ours.float() - plain).abs().max()) for ours, plain in _samples(kernels, device))
        if error < MOST_ERROR:
            return kernels
        log.warning("running without the fused GPU kernels: they are off by %.3g", error)
    except Exception as error:
        log.warning("running without the fused GPU kernels: %s", f"{type(error).__name__}: {error}".splitlines()[0])
    return None


def _samples(kernels: GpuKernels, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Small results of every kernel, each with torch's own in float32."""
    norm = nn.LayerNorm(64, device=device)
    for side in (4, 48):  # a group in registers, and one that is read twice
        values = torch.linspace(-2, 2, 2 * 64 * side * side, device=device).half()
        x = values.view(2, side, side, 64).permute(0, 3, 1, 2)
        one, added = norm.weight.half(), x[:, :, 0, 0].contiguous()
        plain = F.silu(F.group_norm((x + added[..., None, None]).float(), 8, eps=1e-5))
        yield kernels.group_norm(x, 8, one, norm.bias.half(), 1e-5, added, silu=True), plain
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        value, gate = tokens.float().chunk(2, dim=-1)
        yield kernels.geglu(tokens), value * F.gelu(gate)
        yield kernels.biased_sum(x, x, one), 2 * x.float() + 1
        plain = norm(2 * tokens.float())
        yield kernels.add_norm(tokens, tokens, norm.half())[1], plain
        yield kernels.add_norm(tokens, None, norm)[1], norm.float()(tokens.float())
