"""Adapters and embeddings under the ecosystem's names: loading, weighting, fusing and removing them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sfumato.adapters.adapter import read_adapter
from sfumato.adapters.embeddings import check_fits, read_embeddings
from sfumato.adapters.files import Stored, flattened, given, read_stored
from sfumato.adapters.find import ADAPTERS, EMBEDDINGS, find_file
from sfumato.adapters.outfit import EmbeddedFile, Worn
from sfumato.checkpoints import weights
from sfumato.ecosystem import meaning
from sfumato.errors import UnknownArgument, UsageError, suggest
from sfumato.files import output_folder
from sfumato.pipelines.block_weights import weights_from
from sfumato.values import shown

if TYPE_CHECKING:
    from os import PathLike

    from sfumato.adapters.outfit import Outfit
    from sfumato.pipelines.parts import Parts
    from sfumato.pipelines.place import Place

__all__ = ["Adapting", "stored_from"]

log = logging.getLogger("sfumato")

ROLES = ("unet", "text_encoder", "text_encoder_2")
FIND = ("weight_name", "subfolder", "cache_dir", "revision", "token", "local_files_only", "force_download")
# Arguments of the ecosystem without effect here: weights are always memory-mapped, and no wrapper reads them.
HARMLESS = ("low_cpu_mem_usage", "proxies", "metadata", "prefix", "user_agent", "mean_resizing")


def _names(given: Any) -> list[str]:
    """Return a list of adapter names, given one name or several. Raises `UsageError`."""
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"adapter_names must be a name or a list of names, not {shown(given)}")
    return list(names)


class Adapting:
    """The methods of a pipeline for adapters (LoRA and its relatives) and embeddings (textual inversion).

    Adapters are merged into the weights only when the pipeline next generates. The original weights are restored bit
    for bit as soon as no adapter is active.
    """

    parts: Parts
    place: Place
    num_fused_loras: ClassVar[property]

    @property
    def _outfit(self) -> Outfit:
        return self.parts.outfit

    @_outfit.setter
    def _outfit(self, outfit: Outfit) -> None:
        self.parts = replace(self.parts, outfit=outfit)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | PathLike[str] | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        partial: bool = False,
        use_safetensors: bool | None = None,
        **keywords: Any,
    ) -> None:
        """Load an adapter of any kind and activate only this one; `set_adapters` activates several.

        Takes a file, a folder or hub id (with `weight_name`, `subfolder`), or tensors by name. adapter_name: None for
        "default_0" and so on; hotswap: replace an adapter of the same name; partial: apply the known part of a file
        with unknown modules or keys; use_safetensors: False allows a pickled file. Raises `CheckpointError` if the file
        is damaged or made for another family, and `UsageError` if the name is taken.
        """
        name = adapter_name or f"default_{len(self._outfit.adapters)}"
        if name in self._outfit.adapters and not hotswap:
            raise UsageError(f"there is already an adapter {name!r}; choose another adapter_name, or pass hotswap=True")
        stored = stored_from(
            pretrained_model_name_or_path_or_dict, ADAPTERS, use_safetensors, keywords, "load_lora_weights"
        )
        worn = Worn(read_adapter(stored, self.parts.adaptable, partial=partial))
        self._outfit = replace(self._outfit, adapters={**self._outfit.adapters, name: worn}, active=(name,))

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Activate these adapters and no others.

        adapter_weights: one for all, or one for each; a number, None for 1, or a dictionary of numbers by part and
        block: {"text_encoder": 0.5, "unet": {"down": 0.9, "up": {"block_1": [0.4, 0.8, 1.0]}}}.
        """
        names = _names(adapter_names)
        listed = isinstance(adapter_weights, (list, tuple))
        every = list(adapter_weights) if listed else [adapter_weights] * len(names)
        if len(every) != len(names):
            raise UsageError(f"got {len(names)} adapter_names and {len(every)} adapter_weights; pass one for each")
        adapters = dict(self._outfit.adapters)
        for name, value in zip(names, every, strict=True):
            weight, parts = weights_from(value)
            adapters[name] = replace(self._named(name), weight=weight, parts=parts)
        self._outfit = replace(self._outfit, adapters=adapters, active=tuple(dict.fromkeys(names)))

    def get_active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return list(self._outfit.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of all loaded adapters, by the part that they change."""
        adapters = self._outfit.adapters
        found = {role: [name for name, one in adapters.items() if one.adapter.changes.get(role)] for role in ROLES}
        return {role: names for role, names in found.items() if names}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Unload these adapters; fused ones stay in the weights."""
        names = _names(adapter_names)
        for name in names:
            self._named(name)
        adapters = {name: one for name, one in self._outfit.adapters.items() if name not in names}
        self._outfit = replace(
            self._outfit, adapters=adapters, active=tuple(one for one in self._outfit.active if one not in names)
        )
        self._shed()

    def unload_lora_weights(self, reset_to_overwritten_params: bool = False) -> None:
        """Unload all adapters. Fused ones stay in the weights until `unfuse_lora`."""
        self._outfit = replace(self._outfit, adapters={}, active=(), enabled=True)
        self._shed()

    def disable_lora(self) -> None:
        """Ignore the active adapters until `enable_lora`."""
        self._outfit = replace(self._outfit, enabled=False)
        self._shed()

    def enable_lora(self) -> None:
        """Use the active adapters again."""
        self._outfit = replace(self._outfit, enabled=True)

    def set_lora_device(self, adapter_names: Any, device: Any) -> None:
        """No effect: adapter files are memory-mapped and need no device memory between merges."""

    def fuse_lora(
        self,
        components: Sequence[str] = ROLES,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Merge the active adapters into the weights. They are saved with the model, and calls cannot rescale them.

        components: the networks to change; lora_scale: multiplies the weights of the adapters; adapter_names: the
        active ones if None. `unfuse_lora` restores the checkpoint's weights bit for bit.
        """
        unknown = [one for one in components if one not in ROLES]
        if unknown:
            raise UsageError(f"adapters change {', '.join(ROLES)}, not {shown(unknown[0])}")
        scale, _ = weights_from(lora_scale)
        names = list(self._outfit.active) if adapter_names is None else list(adapter_names)
        if not names:
            raise UsageError("no active adapter to fuse; load one with load_lora_weights")
        apart = frozenset(role for role in ROLES if role not in components)
        worn = [replace(self._named(name).scaled(scale), without=apart) for name in names]
        adapters = {
            name: replace(one, without=one.without | (frozenset(components) if name in names else frozenset()))
            for name, one in self._outfit.adapters.items()
        }
        self._outfit = replace(self._outfit, adapters=adapters, fused=(*self._outfit.fused, *worn))
        self._fit()

    def unfuse_lora(self, components: Sequence[str] = ROLES, **_: Any) -> None:
        """Remove fused adapters from the weights; those that are still loaded become active again."""
        log.info("%s", meaning("unfuse_lora"))
        apart = frozenset(components)
        fused = [replace(one, without=one.without | apart) for one in self._outfit.fused]
        adapters = {name: replace(one, without=one.without - apart) for name, one in self._outfit.adapters.items()}
        left = tuple(one for one in fused if not one.without >= set(ROLES))
        self._outfit = replace(self._outfit, adapters=adapters, fused=left)
        self._fit()

    def _shed(self) -> None:
        """Restore the weights at once if no adapter is active, for code that calls the networks directly."""
        if self._outfit.worn() == self._outfit.fused:
            self._fit()

    def _fit(self) -> None:
        """Apply the fused adapters, and no others, to the networks, as part of their own weights."""
        self.place.dress(self.parts, self._outfit.fused)

    def _named(self, name: str) -> Worn:
        adapters = self._outfit.adapters
        if name not in adapters:
            there = f"available are {', '.join(adapters)}" if adapters else "none is loaded"
            raise UsageError(f"there is no adapter {name!r}{suggest(str(name), list(adapters))}; {there}")
        return adapters[name]

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | PathLike[str],
        unet_lora_layers: Mapping[str, torch.Tensor] | None = None,
        text_encoder_lora_layers: Mapping[str, torch.Tensor] | None = None,
        text_encoder_2_lora_layers: Mapping[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_2_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write tensors as an adapter file for the ecosystem, by default "pytorch_lora_weights.safetensors".

        *_lora_layers: tensors under the names used in training (`get_peft_model_state_dict`); *_metadata: the
        settings of the peft library (r, lora_alpha, …). Always safetensors. Raises `OutputError` if it cannot be
        written.
        """
        layers = (unet_lora_layers, text_encoder_lora_layers, text_encoder_2_lora_layers)
        told = (
            unet_lora_adapter_metadata, text_encoder_lora_adapter_metadata, text_encoder_2_lora_adapter_metadata
        )  # fmt: skip
        state = {
            f"{role}.{key}": one for role, own in zip(ROLES, layers, strict=True) for key, one in (own or {}).items()
        }
        if not state or not all(isinstance(one, torch.Tensor) for one in state.values()):
            raise UsageError("nothing to save; pass tensors by name, such as unet_lora_layers")
        if save_function is not None or not safe_serialization:
            raise UsageError("adapters are written as safetensors only; omit save_function and safe_serialization")
        settings = {
            f"{role}.{key}": value for role, own in zip(ROLES, told, strict=True) for key, value in (own or {}).items()
        }
        metadata = {"lora_adapter_metadata": json.dumps(settings, sort_keys=True, default=list)} if settings else {}
        if is_main_process:
            name = weight_name or "pytorch_lora_weights.safetensors"
            weights.save_file(state, output_folder(save_directory) / name, metadata)

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        *,
        use_safetensors: bool | None = None,
        **keywords: Any,
    ) -> None:
        """Load textual inversion embeddings, to be used in prompts by their names.

        Takes a file, a folder or hub id, a tensor (n, C), tensors by name, or a list of these with a `token` for each.
        token: the name to use in prompts (default: the name in the file, or the file's own); text_encoder: the one to
        use if there are two and the file has vectors for only one; use_safetensors: False allows a pickled file. Raises
        `CheckpointError` if the file is made for another family.
        """
        one = pretrained_model_name_or_path
        every = list(one) if isinstance(one, (list, tuple)) else [one]
        names: list[Any] = list(token) if isinstance(token, (list, tuple)) else [token] * len(every)
        if len(names) != len(every) or len({*names} - {None}) < len([name for name in names if name is not None]):
            raise UsageError(f"got {len(every)} embeddings; pass as many different tokens, or None")
        encoders = self.parts.encoders if text_encoder is None else [text_encoder]
        widths = [encoder.config.hidden_size for encoder in encoders]
        files, found = [], []
        for source, name in zip(every, names, strict=True):
            tensors = {"emb_params": source} if isinstance(source, torch.Tensor) else source
            stored = stored_from(tensors, EMBEDDINGS, use_safetensors, dict(keywords), "load_textual_inversion")
            embeddings = read_embeddings(stored, name)
            check_fits(embeddings, widths, stored.where)
            found += embeddings
            if stored.path is not None:
                files.append(EmbeddedFile(stored.path, name, stored.sha256, tuple(embeddings)))
        outfit = self._outfit
        self._outfit = replace(outfit, embeddings=(*outfit.embeddings, *found), files=(*outfit.files, *files))

    def unload_textual_inversion(
        self, tokens: str | Sequence[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Unload these embeddings, or all of them. Raises `UsageError` for one that is not loaded."""
        outfit = self._outfit
        known = [name for one in outfit.embeddings for name in one.names]
        names = known if tokens is None else [tokens] if isinstance(tokens, str) else list(tokens)
        for name in names:
            if name not in known:
                raise UsageError(f"there is no embedding {name!r}{suggest(str(name), known)}")
        left = tuple(one for one in outfit.embeddings if not {*one.names} & {*names})
        files = tuple(file for file in outfit.files if {*file.embeddings} & {*left})
        self._outfit = replace(outfit, embeddings=left, files=files)


def stored_from(
    source: Any, usual: Sequence[str], use_safetensors: bool | None, keywords: dict[str, Any], function: str
) -> Stored:
    """Read the tensors of a source in any of the ecosystem's forms. Raises `UnknownArgument` and `CheckpointError`."""
    for keyword in keywords:
        if keyword not in (*FIND, *HARMLESS):
            raise UnknownArgument(f"{function} has no argument {keyword!r}{suggest(keyword, FIND)}")
    pickled = use_safetensors is False
    if isinstance(source, Mapping):
        nested = any(isinstance(one, Mapping) for one in source.values())
        return given(flattened(dict(source), "the adapter") if nested else dict(source))
    where = {key: value for key, value in keywords.items() if key in FIND and value is not None}
    return read_stored(find_file(source, usual, pickled=pickled, **where), pickled=pickled)
