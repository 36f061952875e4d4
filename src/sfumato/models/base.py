"""Base of every model: a frozen config, and loading from and saving to a folder."""

from __future__ import annotations

import logging
import re
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from sfumato import files
from sfumato.checkpoints import weights
from sfumato.checkpoints.locate import locate_folder
from sfumato.checkpoints.single_file import open_single_file
from sfumato.configs import Config, Configured, parse
from sfumato.errors import CheckpointError, UnknownArgument, UsageError, suggest
from sfumato.folders import saving_into
from sfumato.harmless import asked_device, asked_dtype, say_safe, without_harmless
from sfumato.models.eight_bits import lighten
from sfumato.models.overlay import Overlay, own_weights, take_off
from sfumato.models.packed import unpack
from sfumato.models.surface import ModelSurface
from sfumato.runtime.device import check_dtype
from sfumato.values import check_argument

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike
    from pathlib import Path

    from sfumato.checkpoints.single_file import SingleFile

__all__ = ["Model", "select_model_files"]

log = logging.getLogger("sfumato")


class Model(Configured, ModelSurface):
    """A torch module built from a frozen config, with the parameter names of diffusers and transformers."""

    config_class: ClassVar[type[Config]]
    weights_name: ClassVar[str]
    key_rules: ClassVar[tuple[weights.Rule, ...]] = ()
    role: ClassVar[str]  # its folder in a checkpoint, and its part of a single file
    config: Any
    # The dtype of computations during a repair, if it differs from that of the weights (pipelines/repair.py).
    compute_dtype: torch.dtype | None = None
    # The hash of the weights (pipelines/fingerprint.py), kept while they are packed or unloaded.
    fingerprint: str | None = None
    # Weights that replace the model's own (models/overlay.py), and the cached shapes of all weights.
    overlay: Overlay | None = None
    shapes: dict[str, torch.Size] | None = None
    # Whether the large weights are stored in 8 bits (models/eight_bits.py), or were before they left memory.
    eight_bit: bool = False
    # Advice for when a stage's values are not finite even in float32 (pipelines/finite.py).
    remedy = "check the prompt embeddings, latents or image that were given"
    _stored: Callable[..., Self] | None = None

    def __init__(self, config: Config | None = None, **values: object) -> None:
        """Build from a config, or from its values as keyword arguments. Raises `UnknownArgument` for unknown ones."""
        super().__init__()
        if config is None:
            config, unknown = parse(self.config_class, values)
            if unknown:
                near = suggest(unknown[0], set(config.keys()) - set(unknown))
                raise UnknownArgument(f"{type(self).__name__} has no config key {unknown[0]!r}{near}")
        elif values:
            raise UnknownArgument(f"{type(self).__name__} takes a config or its values, not both")
        self.config = config

    @classmethod
    def from_config(cls, mapping: Mapping[str, Any], where: object = None) -> Self:
        """Build a model with random weights. Unknown keys are logged once.

        Raises `ConfigError`, naming `where`, for an invalid value.
        """
        config, unknown = parse(cls.config_class, mapping, where)
        if unknown and cls.__name__ == mapping.get("_class_name", cls.__name__):
            log.warning("%s: config keys without effect: %s", cls.__name__, ", ".join(sorted(unknown)))
        return cls(config)

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        **hub: Any,
    ) -> Self:
        """Load a model from a folder, the hub cache, or the hub.

        name: a folder or hub id. subfolder: a folder inside it. torch_dtype (or dtype): the dtype of the weights; as
        stored if None. variant: the infix of the file names, such as "fp16". use_safetensors=False permits pickled
        weights, read with torch's restricted unpickler. Hub keywords: `cache_dir`, `revision`, `token`,
        `local_files_only`, `force_download`. `device_map`: the device to move the model to; "auto" is the best one
        available. Raises `CheckpointError` naming the file or key at fault.
        """
        options = {"variant": variant, "use_safetensors": use_safetensors}
        check_argument("subfolder", subfolder, str | None)
        check_argument("variant", variant, str | None)
        precision, device = asked_dtype(torch_dtype, dtype), asked_device(hub)
        hub = without_harmless(hub)

        def select(names: Sequence[str], strict: bool) -> list[str]:
            return select_model_files(names, subfolder or "", cls.weights_name, strict=strict, **options)

        root = locate_folder(name, select, **hub)
        model = cls.from_folder(root / subfolder if subfolder else root, dtype=precision, **options)
        return model if device is None else model.to(device)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        copy: bool = False,
        later: bool = False,
        eight_bit: bool = False,
    ) -> Self:
        """Load a model from a local folder.

        copy: copy the weights instead of mapping them. later: leave them on the meta device, for `reload` to load.
        eight_bit: store large weights in 8 bits. Raises `CheckpointError`.
        """
        if dtype is not None:
            check_dtype(dtype)
        with weights.without_weights():
            model = cls.from_config(files.read_json(folder / "config.json"), folder / "config.json").eval()
        found = weights.find_weights(folder, cls.weights_name, variant=variant, use_safetensors=use_safetensors)
        model._stored = partial(cls.from_folder, folder, variant=variant, use_safetensors=use_safetensors, copy=copy)
        model.eight_bit = eight_bit
        if later:
            weights.check(model, found, cls.key_rules)
            model.to(dtype=dtype)
        else:
            made = lighten(model, dtype) if eight_bit else {}
            weights.load_into(model, found, dtype, cls.key_rules, copy=copy, made=made)
        weights.verify(found)
        return model

    @classmethod
    def from_single_file(
        cls,
        name: str | PathLike[str] | Mapping[str, torch.Tensor],
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Load a model from a single-file checkpoint, or from a file that contains only this model.

        name: a path, a hub id followed by a file name, a hub URL, or a dict of tensors. torch_dtype (or dtype): the
        dtype of the weights; as stored if None. Other keywords are those of `open_single_file`
        (checkpoints/single_file.py). Raises `CheckpointError` if the file is something else or incomplete.
        """
        precision = asked_dtype(torch_dtype, dtype)
        return cls.from_file(cls._open_file(name, **options), dtype=precision)

    @classmethod
    def _open_file(cls, name: Any, **options: Any) -> SingleFile:
        return open_single_file(name, vae=cls.role == "vae", **options)

    @classmethod
    def from_file(
        cls,
        file: SingleFile,
        *,
        dtype: torch.dtype | None = None,
        copy: bool = False,
        later: bool = False,
        eight_bit: bool = False,
    ) -> Self:
        """Load a model from its part of an opened file. For `copy`, `later` and `eight_bit`, see `from_folder`."""
        with weights.without_weights():
            model = cls.from_config(file.config(cls.role)).eval()
        model._stored = partial(cls.from_file, file, copy=copy)
        model.eight_bit = eight_bit
        if later:
            file.check(model, cls.role)
            return model.to(dtype=dtype or file.dtype(cls.role))
        made = lighten(model, dtype or file.dtype(cls.role)) if eight_bit else {}
        file.fill(model, cls.role, dtype, copy=copy, made=made)
        return model

    def __getattr__(self, name: str) -> Any:
        try:
            return torch.nn.Module.__getattr__(self, name)
        except AttributeError:
            return self._in_config(name)

    @property
    def can_reload(self) -> bool:
        """Whether the weights came from files and can be loaded again."""
        return self._stored is not None

    def forget(self) -> None:
        """Release the weights: their shapes remain, on the meta device, for `reload` to fill."""
        with weights.without_weights():
            self._modules = type(self)(self.config).to(self.dtype).eval()._modules
        self.overlay = None

    def reload(self, *, eight_bit: bool | None = None) -> None:
        """Load the weights again from where they came from, in the current dtype.

        eight_bit: whether to store large ones in 8 bits; by default, as before.
        """
        if self._stored is None:
            raise UsageError(
                f"this {type(self).__name__} did not come from a folder, so its weights cannot be read again"
            )
        self.eight_bit = self.eight_bit if eight_bit is None else eight_bit
        self._modules = self._stored(dtype=self.dtype, eight_bit=self.eight_bit)._modules

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write `config.json` and safetensors to a folder, in the format of diffusers and transformers.

        An earlier save is replaced atomically (folders.py). Raises `OutputError` if it cannot be written.
        """
        say_safe(safe_serialization=safe_serialization)
        if self.eight_bit:
            log.warning("these weights were rounded to 8 bits; to save the exact ones, load them with eight_bit=False")
        stale = weights.stale(self.weights_name, variant)
        state = self.state_dict() if self.overlay is not None and self.overlay.fused else own_weights(self)
        with saving_into(folder, last="config.json", stale=stale) as new:
            weights.save(state, new, self.weights_name, variant=variant, max_shard_size=max_shard_size)
            files.write_json(new / "config.json", self._config_json())

    def _config_json(self) -> dict[str, Any]:
        return {"_class_name": type(self).__name__, "_diffusers_version": files.LAYOUT_VERSION} | self.config.to_dict()

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """Load a state dict like torch, after unpacking the model (models/packed.py) and restoring its own weights."""
        self._plain()
        return super().load_state_dict(*arguments, **options)

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        # All moving and casting (`to`, `half`, `cpu`, …) goes through here. Packed weights support neither, and
        # replaced weights are computed again from the model's own.
        self._plain()
        return super()._apply(*arguments, **options)

    def _plain(self) -> None:
        take_off(self)
        unpack(self)
        self.fingerprint = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes: that of its weights, except during a repair."""
        return self.compute_dtype or next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device


def select_model_files(
    names: Sequence[str],
    folder: str,
    weights_name: str,
    *,
    strict: bool,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> list[str]:
    """Return the files that one model needs from a repository: its config and one set of weights.

    strict: accept only the requested variant. Raises `CheckpointError` if the weights are not among the names.
    """
    prefix = f"{folder}/" if folder else ""
    own = {name.removeprefix(prefix) for name in names if name.startswith(prefix) and "/" not in name[len(prefix) :]}
    picked = weights.pick_weights(own, weights_name, variant=variant, use_safetensors=use_safetensors)
    if picked is None or (strict and variant and f".{variant}" not in picked):
        raise CheckpointError(
            f"there are no usable weights for {folder or weights_name!r}; "
            f"its files are {', '.join(sorted(own)) or 'none'}"
        )
    if picked.endswith(".json"):
        shard = picked.removesuffix(".json").split(".index")[0].rsplit(".", 1)
        stem = f"{shard[0]}.{variant}-" if variant and f".{variant}" in picked else f"{shard[0]}-"
        pattern = re.compile(re.escape(stem) + r"\d+-of-(\d+)\." + re.escape(shard[1]))
        shards = {name: int(match[1]) for name in own if (match := pattern.fullmatch(name))}
        # The names contain the number of shards: "…-00002-of-00003.safetensors".
        if len(shards) != max(shards.values(), default=1):
            raise CheckpointError(f"{folder or 'the repository'} has only {len(shards)} of the shards {picked} lists")
        return [prefix + name for name in ("config.json", picked, *sorted(shards))]
    return [f"{prefix}config.json", prefix + picked]
