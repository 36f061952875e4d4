"""Matching an adapter to the networks it changes: every key must be known, and every shape must fit."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch

from sfumato.adapters.embeddings import bundled
from sfumato.adapters.families import made_for, name_of_checkpoint, prompt_width
from sfumato.adapters.kinds import Change, bias_change, is_product, kind_of, rank_of, weight_change
from sfumato.adapters.names import Place, flat, places_of, split_key, walked
from sfumato.errors import CheckpointError, UsageError
from sfumato.files import read_json
from sfumato.models.overlay import weight_shapes
from sfumato.values import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sfumato.adapters.files import Stored
    from sfumato.text.embeddings import Embedding

__all__ = ["PARTS", "Adapter", "grouped", "read_adapter"]

# Names of the networks in messages.
PARTS = {"unet": "U-Net", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}


@dataclass(frozen=True, eq=False)
class Adapter:
    """The changes that a file makes to the networks of a checkpoint.

    changes: by role and module path; total: number of modules in the file, including those that the checkpoint lacks;
    unknown: keys that are not recognized; both only if the user allowed it (`partial`); embeddings: bundled ones.
    """

    stored: Stored
    changes: dict[str, dict[str, Change]]
    total: int
    unknown: tuple[str, ...] = ()
    embeddings: tuple[Embedding, ...] = field(default=())

    @property
    def report(self) -> str:
        """The number of applied modules, in total and by part."""
        parts = [f"{PARTS[role]} {len(paths)}" for role, paths in self.changes.items() if paths]
        applied = sum(map(len, self.changes.values()))
        unknown = f"; unknown keys ignored: {len(self.unknown)}" if self.unknown else ""
        return f"applied {applied} of {self.total} ({', '.join(parts)}){unknown}"


def read_adapter(stored: Stored, networks: Mapping[str, Any], *, partial: bool = False) -> Adapter:
    """Match a file to networks, given by role.

    partial: apply the modules that match and ignore the rest. Raises `CheckpointError` if nothing matches (naming the
    family the file is made for), if keys are unknown, and for NaN or wrong shapes.
    """
    shapes = {role: weight_shapes(network) for role, network in networks.items()}
    if not any(shapes.values()):
        raise UsageError(
            "the weights of converted models cannot be changed; use --lora with 'sfumato coreml convert' instead"
        )
    _check_family(stored, networks)
    embeddings, used = bundled(stored)
    modules, unknown = grouped(stored, used, shapes)
    places = places_of(networks, shapes)
    changes: dict[str, dict[str, Change]] = {role: {} for role in networks}
    absent = []
    for module, parts in modules.items():
        place = places.get(flat(module))
        if place is None or f"{place.path}.weight" not in shapes[place.role]:
            absent.append(module)
            continue
        if place.path in changes[place.role]:
            raise CheckpointError(f"{stored.where} changes {place.name} twice, once as {module}; get another copy")
        changes[place.role][place.path] = _change(stored, module, place, parts, shapes[place.role])
    _check_applied(stored, changes, absent, unknown, partial)
    return Adapter(stored, changes, len(modules), tuple(unknown), tuple(embeddings))


def grouped(
    stored: Stored, used: set[str], shapes: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return the parts of each module in a file, by the file's own names, and the unknown keys.

    shapes: of the networks' weights; the first files of this kind number layers in their order.
    """
    if any(key.endswith((":up", ":down")) for key in stored.tensors):
        return _numbered(stored, used, shapes or {})
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in stored.tensors.items():
        if key in used:
            continue
        found = split_key(key)
        if found is None:
            unknown.append(key)
        else:
            modules.setdefault(found[0], {})[found[1]] = tensor
    for module in [module for module, parts in modules.items() if not kind_of(parts)]:
        unknown += [f"{module} ({', '.join(sorted(modules.pop(module)))})"]
    return modules, unknown


def _numbered(
    stored: Stored, used: set[str], shapes: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Read a file of cloneofsimo's library, where "unet:7:up" is layer 7 (from 0) of the classes in the metadata."""
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    paths = {
        role: [name.rpartition(".")[0] for name in shapes.get(role, ()) if name.endswith(".weight")] for role in PARTS
    }
    order = {role: walked(paths[role], _classes(stored, role)) for role in PARTS}
    for key, tensor in stored.tensors.items():
        found = re.fullmatch(r"(unet|text_encoder):(\d{1,5}):(up|down)", key)
        if found is None:
            unknown += [] if key in used else [key]
            continue
        role, number = found[1], int(found[2])
        path = order[role][number] if number < len(order[role]) else f"layer {number}"
        modules.setdefault(f"{role}.{path}", {})[found[3]] = tensor
    return modules, unknown


def _classes(stored: Stored, role: str) -> list[str]:
    default = ["CrossAttention", "Attention", "GEGLU"] if role == "unet" else ["CLIPAttention"]
    try:
        told = json.loads(stored.metadata.get(role) or "null")
    except (ValueError, RecursionError):
        return default
    return [one for one in told if isinstance(one, str)] if isinstance(told, list) else default


def _change(stored: Stored, module: str, place: Place, parts: dict[str, Tensor], shapes: Mapping[str, Any]) -> Change:
    """Create a module's change after checking that its values are finite and its shapes fit."""
    for part, tensor in parts.items():
        if not tensor.numel():
            raise CheckpointError(f"{stored.where}: {module} has rank 0 ({part} is empty); get another copy")
        if part not in ("alpha", "on_input") and not (tensor.is_floating_point() and _all_finite(tensor)):
            raise CheckpointError(
                f"{stored.where}: {part} of {module} contains NaN, infinity or integers; get another copy"
            )
    rest = {part: tensor for part, tensor in parts.items() if part != "alpha"}
    alpha = float(parts["alpha"].float().flatten()[0]) if "alpha" in parts else None
    if alpha is not None and not abs(alpha) < 1e30:
        raise CheckpointError(f"{stored.where}: alpha of {module} is {alpha}; get another copy")
    change = Change(rest, alpha, _peft_scale(stored, module, place, rest))
    weight = torch.empty(shapes[f"{place.path}.weight"], device="meta")
    if not _fits(change, weight, shapes.get(f"{place.path}.bias")):
        sizes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in rest.items())
        raise CheckpointError(
            f"{stored.where}: {module} ({sizes}) does not fit {place.name}, which is {tuple(weight.shape)} here; it is "
            f"made for {made_for(stored) or 'another checkpoint'}"
        )
    return change


def _all_finite(tensor: Tensor) -> bool:
    """Check the sum first: NaN and infinity carry over to it. As it may also overflow, then check each value."""
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def _fits(change: Change, weight: Tensor, bias: Any) -> bool:
    """Return whether a change fits the shapes of a weight (on the meta device) and a bias."""
    more = bias_change(change, 1.0)
    if more is not None and (bias is None or more.numel() != bias.numel()):
        return False
    if is_product(change):  # avoids a product on the meta device, which imports much of torch's compiler
        up, down = (change.parts[part].flatten(1).shape for part in ("up", "down"))
        return up[1] == down[0] and (up[0], down[1]) == tuple(weight.flatten(1).shape)
    try:
        added = weight_change(change, weight, 1.0)
    except (RuntimeError, ValueError, IndexError):
        return False
    return added is None or added.shape == weight.shape


def _peft_scale(stored: Stored, module: str, place: Place, parts: Mapping[str, Tensor]) -> float | None:
    """Return the scale from peft's settings, in the metadata or in `adapter_config.json` next to the file."""
    told, prefix = stored.told("lora_adapter_metadata"), f"{place.role}."
    if not told and stored.path is not None and stored.path.name.startswith("adapter_model."):
        beside = stored.path.with_name("adapter_config.json")
        told, prefix = (read_json(beside) if beside.is_file() else {}), ""
    settings = {key.removeprefix(prefix): value for key, value in told.items() if key.startswith(prefix)}
    rank, patterns = rank_of(parts) or settings.get("r"), settings.get("alpha_pattern")
    alpha = next((settings[key] for key in ("lora_alpha", "alpha") if key in settings), None)
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = value
    if not isinstance(alpha, (int, float)) or not isinstance(rank, int) or rank < 1:
        return None
    return float(alpha) / (sqrt(rank) if settings.get("use_rslora") else rank)


def _check_family(stored: Stored, networks: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` if the file is made for a U-Net with a different prompt width."""
    width, unet = prompt_width(stored.tensors), networks.get("unet")
    own = None if unet is None else unet.config.cross_attention_dim
    own = max(own) if isinstance(own, (list, tuple)) else own
    if width is not None and own is not None and width != own:
        raise CheckpointError(
            f"{stored.where} is made for {made_for(stored) or f'U-Nets that read {width} values per token'}, but this "
            f"checkpoint is {name_of_checkpoint(own)}; use a checkpoint of that family"
        )


def _check_applied(
    stored: Stored, changes: Mapping[str, dict[str, Change]], absent: list[str], unknown: list[str], partial: bool
) -> None:
    total = sum(map(len, changes.values()))
    if not total:
        what = f"none of its {len(absent)} modules exist in this checkpoint" if absent else "no known adapter is in it"
        family, first = made_for(stored), shown(next(iter(stored.tensors), ""))
        more = f"; it is made for {family}" if family else f" (its first key is {first})"
        raise CheckpointError(f"{stored.where} cannot be applied: {what}{more}")
    if (absent or unknown) and not partial:
        kinds = Counter(re.split(r"[._:]\d|\.", key)[0] for key in (*absent, *unknown))
        listed = ", ".join(f"{number} × {shown(kind)}" for kind, number in kinds.most_common(4))
        raise CheckpointError(
            f"{stored.where}: {total} of {total + len(absent)} modules exist in this checkpoint; {len(absent)} modules "
            f"and {len(unknown)} keys are unknown ({listed}); pass partial=True (--partial) to apply the rest"
        )
