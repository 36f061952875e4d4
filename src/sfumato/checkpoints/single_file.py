"""Single-file checkpoints: opening them by header and loading each part on demand.

Each weight of a model is looked up by its original name. Missing, surplus and mis-shaped weights are therefore found
from the header alone, and tensors are mapped, converted and cast one at a time.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sfumato.checkpoints import rules
from sfumato.checkpoints.detect import Detected, detect
from sfumato.checkpoints.headers import Header, Stored, read_header
from sfumato.checkpoints.locate import by_patterns, locate_folder
from sfumato.checkpoints.locate_file import PICKLED, locate_file, text_beside, vae_beside
from sfumato.checkpoints.weights import mapped_tensors, unpickled
from sfumato.configs import UNet2DConditionConfig, parse
from sfumato.errors import CheckpointError, ConfigError, UsageError
from sfumato.families import distilled, find
from sfumato.files import read_json
from sfumato.values import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from os import PathLike

    from torch import Tensor, nn

    from sfumato.checkpoints.detect import FilePart

__all__ = ["SingleFile", "file_header", "open_single_file"]

log = logging.getLogger("sfumato")

NARROW = ("F8_E4M3", "F8_E5M2")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# Tensors that are not weights of the model: schedules, counters, leftovers of training, and scales read separately.
WITHOUT_EFFECT = re.compile(
    r"(^|\.)(position_ids|logit_scale|scaled_fp8|scale_weight|weight_scale|scale_input|input_scale)$"
    r"|^text_projection(\.weight)?$|^transformer\.resblocks\.23\."
)
SCALES = (".scale_weight", ".weight_scale")


@dataclass(frozen=True)
class _Source:
    """The source of one of our weights: a stored tensor, its form, and which third of it to take."""

    name: str
    form: str
    third: int


@dataclass(frozen=True)
class SingleFile:
    """A single-file checkpoint of which only the header has been read.

    folder: a folder of configs that override the detected ones. ema: use the U-Net's EMA weights. beside: a VAE in a
    separate file next to this one. options: the arguments it was opened with.
    """

    path: Path
    header: Header
    detected: Detected
    folder: Path | None = None
    ema: bool = False
    beside: SingleFile | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def missing(self) -> dict[str, str]:
        """Return `detected.missing`, without the VAE if there is one next to the file."""
        return {role: said for role, said in self.detected.missing.items() if role != "vae" or self.beside is None}

    def config(self, role: str) -> dict[str, Any]:
        """Return the config of a part ("unet", "vae", "text_encoder", "text_encoder_2"), as in its JSON file."""
        told = self.part(role).config
        if self.folder is None:
            return dict(told)
        inside = self.folder / role / "config.json"
        return read_json(inside if inside.is_file() else self.folder / "config.json")

    def part(self, role: str) -> FilePart:
        """Return a part of the file. Raises `CheckpointError` if it is missing, and says how to supply it."""
        parts = self._holding(role).detected.parts
        if role not in parts:
            there = ", ".join(parts) or "nothing"
            sentence = self.detected.missing.get(role, f"a {self.detected.family.title} checkpoint has no {role}")
            raise CheckpointError(f"{self.path}: {sentence} (it has {there})")
        return parts[role]

    def dtype(self, role: str) -> torch.dtype:
        """Return the dtype to load a part in by default: that of most of its weights, but at least float16."""
        part = self.part(role)
        return torch.float16 if part.dtype in NARROW else DTYPES.get(part.dtype, torch.float32)

    def check(self, model: nn.Module, role: str) -> dict[str, _Source]:
        """Return the source of each weight of a model, from the header alone.

        Raises `CheckpointError` for missing, surplus or mis-shaped weights.
        """
        return self._holding(role)._sources(model, role)

    def _holding(self, role: str) -> SingleFile:
        """Return the file that contains a part."""
        return self.beside if role == "vae" and self.beside is not None else self

    def _sources(self, model: nn.Module, role: str) -> dict[str, _Source]:
        part, expected = self.part(role), model.state_dict()
        table = rules.names_for(part.naming, getattr(model, "config", None)) if part.names is None else part.names
        found = {key: self._source(key, part, table) for key in expected}
        where = f"{self.path}: {role.replace('_', ' ')}"
        missing = [key for key, source in found.items() if source is None]
        if missing:
            first = part.prefix + rules.original_name(missing[0], table)[0]
            raise CheckpointError(
                f"{where}: {_count(missing)} missing, the first is {first!r}; the file is incomplete, or not of the "
                f"family {self.detected.family.name}"
            )
        sources = {key: source for key, source in found.items() if source is not None}
        for key, source in sources.items():
            shape = _shape(self.header.tensors[source.name], source)
            if shape != tuple(expected[key].shape):
                raise CheckpointError(
                    f"{where}: {source.name!r} makes {shape}, where {self.detected.family.title} has "
                    f"{tuple(expected[key].shape)}; specify its family (family=…) or its configs (config=…)"
                )
        self._check_rest(part, {source.name for source in sources.values()}, where)
        return sources

    def fill(
        self,
        model: nn.Module,
        role: str,
        dtype: torch.dtype | None = None,
        *,
        copy: bool = False,
        made: Mapping[str, Callable[[Tensor], Any]] | None = None,
    ) -> None:
        """Load the weights of a part into a model built on the meta device.

        dtype: the dtype to cast to; by default, `self.dtype(role)`. copy: copy weights that need no cast instead of
        mapping them. made: what the model makes of some weights, by its names, instead of a cast. Raises
        `CheckpointError`, like `check`.
        """
        file, sources = self._holding(role), self.check(model, role)
        keys: dict[str, list[str]] = {}
        for key, source in sources.items():
            keys.setdefault(source.name, []).append(key)
        wanted, state, made = dtype or self.dtype(role), {}, made or {}
        whole = {name for name, ours in keys.items() if any(key in made for key in ours)}
        for name, tensor in file._read(list(keys), wanted, copy, whole):
            for key in keys[name]:
                own = _in_our_form(tensor, sources[key])
                state[key] = made[key](own) if key in made else own
        model.load_state_dict(state, strict=True, assign=True)

    def _source(self, key: str, part: FilePart, table: Sequence[rules.Names]) -> _Source | None:
        name, form, third = rules.original_name(key, table)
        for spelled, its_form in rules.respelled(name, form):
            whole = part.prefix + spelled
            if self.ema and part.prefix.endswith("diffusion_model."):
                whole = f"model_ema.diffusion_model{spelled.replace('.', '')}"
            if whole in self.header.tensors:
                return _Source(whole, its_form, third)
        return None

    def _check_rest(self, part: FilePart, used: set[str], where: str) -> None:
        """Raise `CheckpointError` for weights of a part that the model does not have."""
        begin = len(part.prefix)
        roots = {name[begin:].partition(".")[0] for name in used}
        rest = [
            name
            for name in self.header.tensors
            if name.startswith(part.prefix) and name[begin:].partition(".")[0] in roots and name not in used
            if not (self.ema or WITHOUT_EFFECT.search(name[begin:]))
        ]
        if rest:
            raise CheckpointError(
                f"{where}: {_count(rest)} that {self.detected.family.title} does not have: {', '.join(rest[:3])}; the "
                "file is mixed from several models, or of another family; specify it with family=…"
            )

    def _read(
        self, names: list[str], dtype: torch.dtype, copy: bool, whole: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors in a dtype; those in `whole` as copies in float32, about to become something smaller."""

        def convert(name: str, stored: Tensor) -> Tensor:
            wanted, scale = torch.float32 if name in whole else dtype, self._scale(name)
            if scale is not None:
                return (stored.float() * scale).to(wanted)
            return stored.to(wanted, copy=copy or name in whole)

        if self.header.loaded is None:
            yield from mapped_tensors(self.path, convert, names)
        else:
            yield from ((name, convert(name, self.header.loaded[name])) for name in names)

    def _scale(self, name: str) -> Tensor | None:
        """Return the scale of an 8-bit weight: a single value, or one per row; None if it has none."""
        if self.header.tensors[name].dtype not in NARROW:
            return None
        for suffix in SCALES:
            found = self._scales.get(name.removesuffix(".weight") + suffix)
            if found is not None:
                ones = [1] * (len(self.header.tensors[name].shape) - 1)
                return torch.tensor(found).view(-1, *ones)
        return None

    @cached_property
    def _scales(self) -> dict[str, tuple[float, ...]]:
        names = (name for name in self.header.tensors if name.endswith(SCALES))
        return {name: self.header.numbers(name) for name in names}


def open_single_file(
    name: str | PathLike[str] | Mapping[str, Tensor],
    *,
    family: str | None = None,
    prediction_type: str | None = None,
    config: str | PathLike[str] | None = None,
    subfolder: str | None = None,
    original_config: str | PathLike[str] | None = None,
    use_safetensors: bool | None = None,
    ema: bool = False,
    vae: bool = False,
    **hub: Any,
) -> SingleFile:
    """Find a file and detect what it contains, without reading any weights.

    name: a path, a hub id followed by a file name, a hub URL, or a dict of tensors. family, prediction_type: override
    what is detected. config: a folder or hub id with the configs of a similar checkpoint, in its folder `subfolder` if
    given. original_config: a YAML file of the original layout (default: the one next to the file).
    use_safetensors=False permits pickled files. ema: use the U-Net's EMA weights. vae: only a VAE is needed. Raises
    `CheckpointError` or `UsageError`.
    """
    header = file_header(name, use_safetensors, hub)
    yaml = text_beside(header.path, original_config)
    found = detect(header, family=family, prediction_type=prediction_type, yaml=yaml, vae=vae)
    for note in found.notes:
        log.warning("%s", note)
    folder = None if config is None else locate_folder(config, by_patterns("*.json"), **hub) / (subfolder or "")
    if folder is not None and (folder / "unet").is_dir():
        found = _of_folder(found, folder)
        if prediction_type is not None:
            found = dataclasses.replace(found, scheduler={**found.scheduler, "prediction_type": prediction_type})
    beside = None if vae else _vae_beside(header.path, found)
    said = {"family": family, "prediction_type": prediction_type, "ema": ema or None}
    said |= {"config": config and str(config), "original_config": original_config and str(original_config)}
    options = {key: value for key, value in said.items() if value is not None}
    return SingleFile(header.path, header, found, folder, ema, beside, options)


def _vae_beside(path: Path, found: Detected) -> SingleFile | None:
    file = vae_beside(path)
    if file is None:
        return None
    header = read_header(file)
    log.warning("%s: using the VAE of %s next to it", path.name, file.name)
    return SingleFile(file, header, detect(header, family=found.family, vae=True))


def file_header(name: Any, use_safetensors: bool | None, hub: Mapping[str, Any]) -> Header:
    """Return the header of a file, or of a dict of tensors. Raises the same errors as `open_single_file`."""
    if hasattr(name, "keys"):
        if not all(isinstance(one, torch.Tensor) for one in name.values()):
            raise UsageError(f"from_single_file takes a path, or tensors by name, not {shown(name)}")
        return _loaded(Path("the given tensors"), name)
    path = locate_file(name, **hub)
    if path.suffix.lower() not in PICKLED:
        return read_header(path)
    if use_safetensors is not False:
        raise CheckpointError(
            f"{path} contains pickled weights, which can run code when opened; get a safetensors version or, if you "
            f"trust its source, make one with 'sfumato convert {path.name} {path.stem}.safetensors --pickle' "
            "(in Python: use_safetensors=False)"
        )
    return _loaded(path, unpickled(path))


def _loaded(path: Path, tensors: Mapping[str, Tensor]) -> Header:
    names = {dtype: name for name, dtype in DTYPES.items()}
    described = {
        name: Stored(names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), 0, tensor.nbytes)
        for name, tensor in tensors.items()
    }
    return Header(path, described, loaded=tensors)


def _of_folder(found: Detected, folder: Path) -> Detected:
    """Return `found` with the family and scheduler of a folder of configs."""
    unet, _ = parse(UNet2DConditionConfig, read_json(folder / "unet" / "config.json"))
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    there = [role for role in ("text_encoder", "text_encoder_2") if index.get(role, [None])[0] is not None]
    rows = find(unet.to_dict(), encoders=len(there) or None)
    if not rows:
        raise ConfigError(f"{folder / 'unet' / 'config.json'} belongs to no known family; omit config")
    rows = rows if unet.time_cond_proj_dim is None else list(map(distilled, rows))
    family = found.family if found.family in rows else rows[0]
    path = folder / "scheduler" / "scheduler_config.json"
    # A related checkpoint's folder does not have what this file's own name or markers revealed.
    own = family is found.family and (family.named or family.markers)
    scheduler = found.scheduler if own or not path.is_file() else read_json(path)
    return dataclasses.replace(
        found, family=family, scheduler=scheduler, reasons=(*found.reasons, f"configs of {folder}")
    )


def _shape(stored: Stored, source: _Source) -> tuple[int, ...]:
    """Return a weight's shape after conversion to our form."""
    shape = stored.shape
    match source.form:
        case "matrix":
            return shape[:2] if all(side == 1 for side in shape[2:]) else shape
        case "transposed":
            return shape[::-1]
        case "thirds":
            return (shape[0] // 3, *shape[1:])
    return shape


def _in_our_form(tensor: Tensor, source: _Source) -> Tensor:
    match source.form:
        case "matrix":
            return tensor.flatten(1) if tensor.ndim > 1 else tensor
        case "transposed":
            return tensor.t().contiguous()
        case "thirds":
            return tensor.chunk(3)[source.third]
    return tensor


def _count(names: list[str]) -> str:
    return f"{len(names)} weight{'s' if len(names) > 1 else ''}"
