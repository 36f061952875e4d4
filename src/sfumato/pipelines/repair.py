"""Repairs a stage whose values exceed their precision's range, by computing in float32.

A small file in the cache records where this helped.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfumato.cache import keep, read_kept
from sfumato.errors import ConfigError
from sfumato.models.packed import unpack
from sfumato.pipelines.fingerprint import fingerprint
from sfumato.runtime.device import dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sfumato.models.base import Model
    from sfumato.schedulers.noise import Generators

__all__ = ["computed_in_float32", "recall", "remember", "saved_randomness"]

# The cache file that lists which components of which checkpoints need float32.
MEMORY = "float32.json"


@contextmanager
def computed_in_float32(model: Model) -> Iterator[None]:
    """Make a model compute in float32 within the block. Its weights are unpacked, but otherwise do not change.

    Each layer casts its weights for each call, so that only one layer at a time needs memory for float32 copies. A
    compiled model runs eagerly, because compiled code reads the stored weights.
    """
    unpack(model)
    layers = [layer for layer in model.modules() if layer._parameters or layer._buffers]
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    model.compute_dtype = torch.float32
    try:
        for layer in layers:
            layer.forward = partial(_forward_in_float32, layer)
        yield
    finally:
        model.compute_dtype, model._compiled_call_impl = None, compiled
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _forward_in_float32(layer: nn.Module, *arguments: Any, **named: Any) -> Any:
    wide = copy.copy(layer)
    wide._parameters = {name: _widened(p) for name, p in layer._parameters.items()}
    wide._buffers = {name: _widened(buffer) for name, buffer in layer._buffers.items()}  # scales of 8-bit weights
    named = {name: _widened(value) for name, value in named.items()}
    return type(layer).forward(wide, *map(_widened, arguments), **named)


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def saved_randomness(generators: Generators, device: torch.device) -> Callable[[], None]:
    """Save the state of the generators. Calling the result restores it.

    Without generators, applies to torch's global ones, of the CPU and of the device.
    """
    saved: list[tuple[Callable[[Any], Any], Any]] = []
    if generators is None:
        saved.append((torch.set_rng_state, torch.get_rng_state()))
        if device.type == "cuda":
            saved.append((partial(torch.cuda.set_rng_state, device=device), torch.cuda.get_rng_state(device)))
        if device.type == "mps":
            saved.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    else:
        each = generators if isinstance(generators, Sequence) else [generators]
        saved += [(generator.set_state, generator.get_state()) for generator in each]

    def go_back() -> None:
        for set_state, state in saved:
            set_state(state)

    return go_back


def recall(component: str, model: Model) -> bool:
    """Return whether this component needed float32 before, on this type of device and in this precision."""
    known = _read().get(_place(component, model))
    return bool(known) and fingerprint(model) in known


def remember(component: str, model: Model) -> None:
    """Record for later runs that this component needs float32 here."""
    values, place = _read(), _place(component, model)
    values[place] = sorted({*values.get(place, ()), fingerprint(model)})
    keep(MEMORY, values)


def _place(component: str, model: Model) -> str:
    return f"{component} on {model.device.type} in {dtype_name(model.dtype)}"


def _read() -> dict[str, list[str]]:
    return read_kept(MEMORY, _check)


def _check(values: dict[str, Any]) -> None:
    for hashes in values.values():
        if not isinstance(hashes, list) or not all(isinstance(one, str) for one in hashes):
            raise ConfigError("a component needs a list of hashes")
