"""Weight files: choosing them in a folder, loading them into a model, and saving them.

Weights are memory-mapped: a tensor that keeps its stored dtype is never copied. Otherwise tensors are cast one at a
time, and the mapping is released every few megabytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.checkpoints.headers import MOST_HEADER, Stored, read_header
from sfumato.checkpoints.locate import keep_to_itself
from sfumato.checkpoints.rules import Rule
from sfumato.errors import CheckpointError, OutputError, UsageError
from sfumato.files import check_file, inside, names_in, open_file, read_json, replacing, write_json
from sfumato.values import check_argument, reason, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

__all__ = [
    "Rule",
    "check",
    "find_weights",
    "load_into",
    "mapped_tensors",
    "pick_weights",
    "read_headers",
    "save",
    "save_file",
    "stale",
    "unpickled",
    "verify",
    "without_weights",
]

# How much to map for casting before renewing the mapping: a small fraction of the file, so that peak memory stays
# close to the size of the result, but enough that reopening the file costs no time.
CAST_WINDOW = 4 * 2**20
CAST_PARTS = 64
# The index key for the hashes of shards, and how much of each shard is hashed.
DIGESTS, DIGEST_BLOCKS, DIGEST_BYTES = "sfumato_sha256", 64, 2**18
_PICKLED_NAMES = {"model": "pytorch_model"}


_RANDOM = (Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_)


class _Unfilled(TorchFunctionMode):
    """Skip random initialization, which on the meta device does nothing but import half a compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (args or (kwargs["tensor"],))[0] if func in _RANDOM else func(*args, **kwargs)


@contextmanager
def without_weights() -> Iterator[None]:
    """Build models on the meta device inside this context: with shapes, but without weights or memory."""
    with torch.device("meta"), _Unfilled():
        yield


def pick_weights(
    names: Collection[str], weights_name: str, *, variant: str | None = None, use_safetensors: bool | None = None
) -> str | None:
    """Pick the weight file, or the index of its shards, from the file names in a folder.

    The variant is preferred to the plain file. Only safetensors is accepted, unless `use_safetensors=False` asks for
    pickled weights. Returns None if there is no such file.
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
    """Return a folder's weight files, shards in order. Raises `CheckpointError` if any is missing."""
    names = names_in(folder)
    picked = pick_weights(names, weights_name, variant=variant, use_safetensors=use_safetensors)
    if picked is None:
        wanted = f"{weights_name}.safetensors" if use_safetensors is not False else f"{weights_name}.bin"
        pickled = sorted(name for name in names if name.endswith((".bin", ".ckpt")))
        if pickled and use_safetensors is not False:
            raise CheckpointError(
                f"{folder} has only pickled weights ({pickled[0]}), which can run code when opened; "
                "get a safetensors version, or pass use_safetensors=False if you trust its source"
            )
        if others := _variants(names, weights_name):
            raise CheckpointError(
                f"{folder} has no {wanted}, but the variant {others[0]!r}; request it (--variant {others[0]}, in "
                f"Python variant={others[0]!r})"
            )
        raise CheckpointError(f"{folder} has no {wanted}; the download or copy is incomplete")
    if not picked.endswith(".json"):
        return [folder / picked]
    return _shards(folder / picked, pickled=use_safetensors is False)


def _shards(index: Path, *, pickled: bool) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no valid weight_map; copy or download it again")
    files = [inside(index.parent, name) for name in sorted(set(names.values()))]
    for file in files:
        if not (pickled or file.suffix == ".safetensors"):
            raise CheckpointError(
                f"{index} names {file.name}, which is not a safetensors file; get a safetensors version, or pass "
                "use_safetensors=False if you trust its source"
            )
        if not os.path.isfile(file):
            raise CheckpointError(
                f"{file} is missing, though {index.name} lists it; the download or copy is incomplete"
            )
    return files


def verify(files: Sequence[Path]) -> None:
    """Raise `CheckpointError` if a shard does not match the hash in its index. Indexes without hashes are skipped."""
    for index in files[0].parent.glob("*.index*.json"):
        metadata = read_json(index).get("metadata")
        known: Any = metadata.get(DIGESTS) if isinstance(metadata, dict) else None
        for file in files if isinstance(known, dict) else ():
            if file.name in known and known[file.name] != _digest(file):
                raise CheckpointError(
                    f"{file} is not the file that {index.name} was saved with; copy or download the whole folder again"
                )


def _variants(names: Collection[str], weights_name: str) -> list[str]:
    """Return the variants for which a folder has safetensors files."""
    pattern = re.compile(re.escape(weights_name) + r"\.(\w+)(-\d+-of-\d+)?\.safetensors")
    return sorted({match[1] for name in names if (match := pattern.fullmatch(name))})


def load_into(
    model: nn.Module,
    files: Sequence[Path],
    dtype: torch.dtype | None = None,
    rules: Sequence[Rule] = (),
    *,
    copy: bool = False,
    made: Mapping[str, Callable[[Tensor], Any]] | None = None,
) -> None:
    """Load weights into a model built on the meta device. The keys must match exactly.

    copy: copy weights that need no cast instead of mapping them, for a model that is about to rearrange them. made:
    what the model makes of some stored weights instead of a cast, by its names. Raises `CheckpointError` naming the
    file and the key.
    """

    def convert(name: str, stored: Tensor) -> Any:
        make = made.get(_renamed(name, rules)) if made else None
        return _cast(stored, dtype, copy) if make is None else make(stored)

    state = _assembled(model, files, rules, lambda file: _tensors(file, convert))
    model.load_state_dict(state, strict=True, assign=True)


def check(model: nn.Module, files: Sequence[Path], rules: Sequence[Rule] = ()) -> None:
    """Raise what `load_into` would raise for a missing, surplus or mis-shaped key, reading only headers."""
    if all(file.suffix == ".safetensors" for file in files):
        _assembled(model, files, rules, lambda file: read_headers([file]).items())


def _assembled(
    model: nn.Module,
    files: Sequence[Path],
    rules: Sequence[Rule],
    tensors_of: Callable[[Path], Iterable[tuple[str, Any]]],
) -> dict[str, Any]:
    """Return all tensors, or their headers, by the model's own names. Raises `CheckpointError` if keys do not match."""
    expected = model.state_dict()
    state: dict[str, Any] = {}
    origin: dict[str, Path] = {}
    surplus: list[str] = []
    for file in files:
        for stored, tensor in tensors_of(file):
            key = _renamed(stored, rules)
            if key not in expected:
                surplus += [f"{shown(stored)} in {file}"] if key else []
                continue
            if not tensor.is_floating_point():
                raise CheckpointError(
                    f"{file}: {stored!r} is stored as {tensor.dtype}, but weights are floating-point numbers; get the "
                    "weights in float32, float16 or bfloat16"
                )
            if tensor.shape != expected[key].shape:
                shapes = f"{tuple(tensor.shape)}, where the config asks for {tuple(expected[key].shape)}"
                raise CheckpointError(f"{file}: {stored!r} has shape {shapes}; the weights do not match config.json")
            if key in origin:
                raise CheckpointError(f"{file}: {stored!r} is stored twice, first in {origin[key]}")
            state[key], origin[key] = tensor, file
    missing = sorted(expected.keys() - state.keys())
    where = files[0].parent
    if missing:
        raise CheckpointError(
            f"{where}: {_count(missing, 'weight')} missing, the first is {missing[0]!r}; "
            "the file is damaged or belongs to another model"
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


def _tensors(file: Path, convert: Callable[[str, Tensor], Any]) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".safetensors":
        yield from mapped_tensors(file, convert)
        return
    for key, value in unpickled(file).items():
        yield key, convert(key, value)


def mapped_tensors(
    file: Path, convert: Callable[[str, Tensor], Tensor], names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of a file, or those in `names`, after `convert`, releasing mapped memory along the way.

    Raises `CheckpointError` if the file is missing or damaged.
    """
    with _opened(file) as handle:
        remaining = sorted(handle.keys() if names is None else names)
    limit = max(CAST_WINDOW, file.stat().st_size // CAST_PARTS)
    while remaining:
        # A new mapping per window, so that pages that were only read to be cast do not accumulate.
        with _opened(file) as handle:
            window = 0
            while remaining and window < limit:
                key = remaining.pop(0)
                stored = handle.get_tensor(key)
                tensor = convert(key, stored)
                window += 0 if tensor is stored else stored.nbytes
                yield key, tensor
                del stored, tensor


def unpickled(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickled file, mapped if possible. Raises `CheckpointError` for any other content."""
    check_file(file)
    try:
        # weights_only: torch's restricted unpickler builds tensors and plain containers, and executes nothing.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be read as plain weights ({reason(error)}); get a safetensors version"
        ) from error
    while isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file} does not contain named tensors; get a safetensors version")
    return state


def _cast(tensor: Tensor, dtype: torch.dtype | None, copy: bool) -> Tensor:
    return tensor.to(dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype, copy=copy)


def read_headers(files: Sequence[Path]) -> dict[str, Stored]:
    """Return dtype, shape and size of all tensors by name, without reading any weights.

    Raises `CheckpointError` for an invalid header.
    """
    return {name: stored for file in files for name, stored in read_header(file, MOST_HEADER).tensors.items()}


def _torn(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file} is truncated or not a safetensors file ({reason(error)}); download or copy it again"
    )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file with a size check of its header; tensors are mapped when requested."""
    from safetensors import SafetensorError, safe_open

    try:
        with open_file(file, None) as stream:
            if int.from_bytes(stream.read(8), "little") > MOST_HEADER:
                raise SafetensorError("its header is too long")
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise _torn(file, error) from error


def save(
    state: dict[str, Tensor], folder: Path, weights_name: str, *, variant: str | None = None, max_shard_size: int | str
) -> None:
    """Save tensors as safetensors, in shards with an index if they exceed `max_shard_size` ("10GB" or bytes)."""
    keep_to_itself()
    from huggingface_hub import split_torch_state_dict_into_shards

    stem = f"{weights_name}.{variant}" if variant else weights_name
    pattern = stem + "{suffix}.safetensors"
    try:
        if isinstance(max_shard_size, float):  # it would be truncated silently
            raise TypeError("bytes are whole")
        plan = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size=max_shard_size)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: raised by torch for a tensor
        raise UsageError(
            f'max_shard_size must be a number of bytes or a text such as "10GB", not {shown(max_shard_size)}'
        ) from error
    for filename, keys in plan.filename_to_tensors.items():
        save_file({key: state[key] for key in keys}, folder / filename)
    if plan.is_sharded:
        digests = {name: _digest(folder / name) for name in plan.filename_to_tensors}
        index = {"metadata": {**plan.metadata, DIGESTS: digests}, "weight_map": plan.tensor_to_filename}
        write_json(folder / _index_name(weights_name, variant), index)


def save_file(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file atomically. Raises `OutputError`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with replacing(path) as temporary:
            tensors = {key: one.detach().cpu().contiguous() for key, one in state.items()}
            save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        why = "no space left" if "No space left" in str(error) else reason(error)
        raise OutputError(f"{path} cannot be written ({why})") from error


def stale(weights_name: str, variant: str | None) -> Callable[[str], bool]:
    """Return a predicate for files of an earlier `save` under the same name, which loading would find instead."""
    check_argument("variant", variant, str | None)
    stem = f"{weights_name}.{variant}" if variant else weights_name
    shard = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors")
    return lambda name: name == _index_name(weights_name, variant) or shard.fullmatch(name) is not None


def _index_name(weights_name: str, variant: str | None) -> str:
    return f"{weights_name}.safetensors.index{f'.{variant}' if variant else ''}.json"


def _digest(file: Path) -> str:
    """Hash a file's size and blocks spread over it: all of a small file, and at most 16 MiB of a large one.

    This distinguishes two saves, which differ everywhere, without reading what loading only maps.
    """
    with open_file(file, None) as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for block in range(DIGEST_BLOCKS):
            stream.seek(max(size // DIGEST_BLOCKS, DIGEST_BYTES) * block)
            digest.update(stream.read(DIGEST_BYTES))
    return digest.hexdigest()
