"""Graphs: a computation's launches on a device, recorded once and replayed without Python, and without waits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

__all__ = ["Capture", "capture_for"]

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records a computation. Returns what replays it, and its result, which each replay overwrites."""


def capture_for(device: torch.device) -> Capture | None:
    """Return how a device records a computation, None if it cannot."""
    return _on_cuda if device.type == "cuda" else None


def _on_cuda(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record on a stream of its own. The computation has run before, so that kernels are loaded and chosen.

    Raises whatever the computation raises, which includes waiting for the device.
    """
    graph, stream, around = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(around)
    with torch.cuda.stream(stream):
        # Another thread may use the device meanwhile, as for previews.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = compute()
        except BaseException:
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
    around.wait_stream(stream)
    return graph.replay, result
