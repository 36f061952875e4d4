"""Weight files: which ones a folder offers, how they get into a model, and how they are written.

Weights are mapped from disk, not read: a tensor kept in its stored precision is never copied. Where another precision
is asked for, tensors are cast one by one, and what was mapped for it is let go every few megabytes.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.errors import CheckpointError, OutputError
from sfumato.files import inside, read_json, replacing, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

__all__ = [
    "Rule",
    "TensorHeader",
    "check",
    "find_weights",
    "load_into",
    "pick_weights",
    "read_headers",
    "save",
    "without_weights",
]

# How much may be mapped for casting before the mapping is renewed: a small part of the file, so that the peak stays
# near the size of the result, but not so small a part that opening the file again costs time.
CAST_WINDOW = 4 * 2**20
CAST_PARTS = 64
_PICKLED_NAMES = {"model": "pytorch_model"}


@dataclass(frozen=True)
class Rule:
    """A regular expression that renames the keys of another layout; an empty replacement drops the key."""

    pattern: str
    replacement: str


_RANDOM = (Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)


class _Unfilled(TorchFunctionMode):
    """Leaves new parameters unfilled: on the meta device, random filling does nothing but import half a compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (args or (kwargs["tensor"],))[0] if func in _RANDOM else func(*args, **kwargs)


@contextmanager
def without_weights() -> Iterator[None]:
    """Models built inside have shapes and no weights, and cost no memory."""
    with torch.device("meta"), _Unfilled():
        yield


def pick_weights(
    names: Collection[str], weights_name: str, *, variant: str | None = None, use_safetensors: bool | None = None
) -> str | None:
    """The name of the weight file, or of the index of its shards, that a folder with these files offers.

    The variant goes before the plain file; safetensors is the only format, unless `use_safetensors=False` asks for
    pickled weights in so many words. None where there is nothing to pick.
    """
    stems = [f".{variant}", ""] if variant else [""]
    if use_safetensors is False:
        pickled = _PICKLED_NAMES.get(weights_name, weights_name)
        candidates = [
            name
            for stem in stems
            for name in (f"{pickled}{stem}.bin", f"{pickled}.bin.index{stem}.json", f"{pickled}{stem}.ckpt")
        ]
    else:
        candidates = [
            name
            for stem in stems
            for name in (f"{weights_name}{stem}.safetensors", f"{weights_name}.safetensors.index{stem}.json")
        ]
    return next((name for name in candidates if name in names), None)


def find_weights(
    folder: Path, weights_name: str, *, variant: str | None = None, use_safetensors: bool | None = None
) -> list[Path]:
    """The weight files of a folder, shards in order. Raises `CheckpointError` saying what is missing."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    picked = pick_weights(names, weights_name, variant=variant, use_safetensors=use_safetensors)
    if picked is None:
        wanted = f"{weights_name}.safetensors" if use_safetensors is not False else f"{weights_name}.bin"
        pickled = sorted(name for name in names if name.endswith((".bin", ".ckpt")))
        if pickled and use_safetensors is not False:
            raise CheckpointError(
                f"{folder} has only pickled weights ({pickled[0]}), which can run code when opened; "
                "get a safetensors version, or say use_safetensors=False if you trust its source"
            )
        if others := _variants(names, weights_name):
            raise CheckpointError(
                f"{folder} has no {wanted}, but its variant {others[0]!r}; ask for that (--variant {others[0]}, in "
                f"Python variant={others[0]!r})"
            )
        raise CheckpointError(f"{folder} has no {wanted}; the download or copy is incomplete")
    if not picked.endswith(".json"):
        return [folder / picked]
    shards = read_json(folder / picked).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{folder / picked} has no weight_map; copy or download it again")
    files = [inside(folder, name) for name in sorted(set(map(str, shards.values())))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, though {picked} lists it; the download or copy is incomplete")
    return files


def _variants(names: Collection[str], weights_name: str) -> list[str]:
    """The variants whose safetensors a folder with these files has."""
    pattern = re.compile(re.escape(weights_name) + r"\.(\w+)(-\d+-of-\d+)?\.safetensors")
    return sorted({match[1] for name in names if (match := pattern.fullmatch(name))})


def load_into(
    model: nn.Module,
    files: Sequence[Path],
    dtype: torch.dtype | None = None,
    rules: Sequence[Rule] = (),
    *,
    copy: bool = False,
) -> None:
    """Give a model built on the meta device its weights; every key must be there, fit, and be expected.

    With `copy`, weights that keep their precision are read and not mapped, for a model that is about to rearrange them.
    Raises `CheckpointError` naming the file and the key.
    """
    state = _assembled(model, files, rules, lambda file: _tensors(file, dtype, copy))
    model.load_state_dict(state, strict=True, assign=True)


def check(model: nn.Module, files: Sequence[Path], rules: Sequence[Rule] = ()) -> None:
    """Raise what `load_into` would for a key that is missing, surplus or mis-shaped, from the headers alone."""

    def described(file: Path) -> Iterator[tuple[str, Tensor]]:
        for name, header in read_headers([file]).items():
            yield name, torch.empty(header.shape, device="meta")

    if all(file.suffix == ".safetensors" for file in files):
        _assembled(model, files, rules, described)


def _assembled(
    model: nn.Module,
    files: Sequence[Path],
    rules: Sequence[Rule],
    tensors_of: Callable[[Path], Iterator[tuple[str, Tensor]]],
) -> dict[str, Tensor]:
    """Every tensor under the model's own name for it; all there, and no other."""
    expected = model.state_dict()
    state: dict[str, Tensor] = {}
    origin: dict[str, Path] = {}
    surplus: list[str] = []
    for file in files:
        for stored, tensor in tensors_of(file):
            key = _renamed(stored, rules)
            if key not in expected:
                surplus += [f"{stored!r} in {file}"] if key else []
                continue
            if tensor.shape != expected[key].shape:
                shapes = f"{tuple(tensor.shape)}, where the config asks for {tuple(expected[key].shape)}"
                raise CheckpointError(
                    f"{file}: {stored!r} has shape {shapes}; weights and config.json do not belong together"
                )
            if key in origin:
                raise CheckpointError(f"{file}: {stored!r} is there twice, first in {origin[key]}")
            state[key], origin[key] = tensor, file
    missing = sorted(expected.keys() - state.keys())
    where = files[0].parent
    if missing:
        raise CheckpointError(
            f"{where}: {_count(missing, 'weight')} missing, the first is {missing[0]!r}; "
            "the file is not of this model or damaged"
        )
    if surplus:
        raise CheckpointError(
            f"{where}: {_count(surplus, 'weight')} that the model does not have, the first is {surplus[0]}; "
            "check config.json"
        )
    return state


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"


def _renamed(key: str, rules: Sequence[Rule]) -> str:
    for rule in rules:
        if re.search(rule.pattern, key):
            if not rule.replacement:
                return ""
            key = re.sub(rule.pattern, rule.replacement, key)
    return key


def _tensors(file: Path, dtype: torch.dtype | None, copy: bool) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        yield from _mapped_tensors(file, dtype, copy)
        return
    for key, value in _unpickled(file).items():
        yield key, _cast(value, dtype, copy)


def _mapped_tensors(file: Path, dtype: torch.dtype | None, copy: bool) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        limit = max(CAST_WINDOW, file.stat().st_size // CAST_PARTS)
        remaining = list(safe_open(file, framework="pt").keys())
        remaining.sort()
        while remaining:
            # A new mapping per window: pages that were only read to be cast do not pile up.
            handle, window = safe_open(file, framework="pt"), 0
            while remaining and window < limit:
                key = remaining.pop(0)
                stored = handle.get_tensor(key)
                tensor = _cast(stored, dtype, copy)
                window += 0 if tensor is stored else stored.nbytes
                yield key, tensor
                del stored, tensor
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; the download or copy is incomplete") from error
    except (SafetensorError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({error}); download or copy it again"
        ) from error


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        # weights_only: torch's restricted reader builds tensors and plain containers, and runs nothing.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{file} cannot be read as plain weights ({reason[:160]}); get a safetensors version"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file} holds something else than named tensors; get a safetensors version")
    return state


def _cast(tensor: Tensor, dtype: torch.dtype | None, copy: bool) -> Tensor:
    return tensor.to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype, copy=copy)


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def count(self) -> int:
        """Numbers in the tensor."""
        return prod(self.shape)


def read_headers(files: Sequence[Path]) -> dict[str, TensorHeader]:
    """Names, precisions, shapes and sizes of all tensors, without reading any weight."""
    headers: dict[str, TensorHeader] = {}
    for file in files:
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > file.stat().st_size - 8:
                    raise ValueError("the header is longer than the file")
                entries = json.loads(stream.read(length))
            for name, entry in entries.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    if end > file.stat().st_size - 8 - length:
                        raise ValueError(f"{name!r} ends beyond the file")
                    headers[name] = TensorHeader(entry["dtype"], tuple(entry["shape"]), end - start)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file} is truncated or not a safetensors file ({error}); download or copy it again"
            ) from error
    return headers


def save(
    state: dict[str, Tensor], folder: Path, weights_name: str, *, variant: str | None = None, max_shard_size: int | str
) -> None:
    """Write tensors as safetensors, in shards with an index where they exceed `max_shard_size` ("10GB" or bytes)."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stem = f"{weights_name}.{variant}" if variant else weights_name
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for filename, keys in plan.filename_to_tensors.items():
        try:
            with replacing(folder / filename) as temporary:
                part = {key: state[key].detach().cpu().contiguous() for key in keys}
                save_file(part, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            reason = "no space left" if "No space left" in str(error) else str(error)
            raise OutputError(f"{folder / filename} cannot be written ({reason})") from error
    index = folder / f"{weights_name}.safetensors.index{f'.{variant}' if variant else ''}.json"
    if plan.is_sharded:
        write_json(index, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    _remove_stale(folder, stem, index, keep={*plan.filename_to_tensors, index.name if plan.is_sharded else ""})


def _remove_stale(folder: Path, stem: str, index: Path, keep: set[str]) -> None:
    """Weights of an earlier save under the same name would otherwise be found in place of the new ones."""
    shard = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors")
    for path in folder.iterdir():
        if path.name not in keep and (path == index or shard.fullmatch(path.name)):
            with suppress(OSError):
                path.unlink()
