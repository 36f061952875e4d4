"""What every model has in common: a frozen config, and loading from and saving to a folder."""

from __future__ import annotations

import logging
import re
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from sfumato import files
from sfumato.checkpoints import weights
from sfumato.checkpoints.locate import locate_folder
from sfumato.configs import Config, parse
from sfumato.errors import CheckpointError, UnknownArgument, UsageError, suggest
from sfumato.models.attention import AttentionUser
from sfumato.models.packed import unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike
    from pathlib import Path

__all__ = ["Model", "select_model_files"]

log = logging.getLogger("sfumato")


class Model(AttentionUser):
    """A torch module built from one frozen config, with the ecosystem's parameter names."""

    config_class: ClassVar[type[Config]]
    weights_name: ClassVar[str]
    key_rules: ClassVar[tuple[weights.Rule, ...]] = ()
    config: Any
    # The precision in which a repair computes for now, whatever that of the weights (pipelines/repair.py).
    compute_dtype: torch.dtype | None = None
    # What the weights hash to (pipelines/recipe.py), kept while they are packed or away.
    fingerprint: str | None = None
    # What to do where a stage's values are not finite and float32 is no help (pipelines/finite.py).
    remedy = "check the prompt embeddings, latents or image that were given"
    _stored: Callable[..., Self] | None = None

    def __init__(self, config: Config | None = None, **values: object) -> None:
        """From a config, or from its values as keyword arguments; unknown ones raise `UnknownArgument`."""
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
    def from_config(cls, mapping: Mapping[str, Any]) -> Self:
        """A model with random weights; keys the class does not know are reported once in the log."""
        config, unknown = parse(cls.config_class, mapping)
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
        """Load a model from a folder, the hub's cache, or the hub.

        `name` is a folder or a hub id; `subfolder` a folder inside it; `torch_dtype` (or `dtype`) the precision to keep
        the weights in, theirs if None; `variant` the infix of the file names ("fp16"); `use_safetensors=False` permits
        pickled weights, read with torch's restricted unpickler. Hub keywords: `cache_dir`, `revision`, `token`,
        `local_files_only`, `force_download`. Raises `CheckpointError` naming the file or key that is wrong.
        """
        options = {"variant": variant, "use_safetensors": use_safetensors}

        def select(names: Sequence[str], strict: bool) -> list[str]:
            return select_model_files(names, subfolder or "", cls.weights_name, strict=strict, **options)

        root = locate_folder(name, select, **hub)
        return cls.from_folder(root / subfolder if subfolder else root, dtype=torch_dtype or dtype, **options)

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
    ) -> Self:
        """Load a model from a folder that is on this machine.

        copy: read all weights, map none; later: leave it on the meta device, to be filled by `reload`.
        """
        with weights.without_weights():
            model = cls.from_config(files.read_json(folder / "config.json")).eval()
        found = weights.find_weights(folder, cls.weights_name, variant=variant, use_safetensors=use_safetensors)
        model._stored = partial(cls.from_folder, folder, variant=variant, use_safetensors=use_safetensors, copy=copy)
        if later:
            weights.check(model, found, cls.key_rules)
            return model.to(dtype=dtype)
        weights.load_into(model, found, dtype, cls.key_rules, copy=copy)
        return model

    @property
    def can_reload(self) -> bool:
        """Whether the weights came from a folder, and so can be read again."""
        return self._stored is not None

    def forget(self) -> None:
        """Let go of the weights: what is left are the shapes, on the meta device, for `reload` to fill."""
        with weights.without_weights():
            self._modules = type(self)(self.config).to(self.dtype).eval()._modules

    def reload(self) -> None:
        """Fill a model that is on the meta device from the folder it came from, in the precision it has."""
        if self._stored is None:
            raise UsageError(
                f"this {type(self).__name__} did not come from a folder, so its weights cannot be read again"
            )
        self._modules = self._stored(dtype=self.dtype)._modules

    def save_pretrained(
        self, folder: str | PathLike[str], *, variant: str | None = None, max_shard_size: int | str = "10GB"
    ) -> None:
        """Write `config.json` and safetensors into a folder, in a form the ecosystem's own libraries read.

        Raises `OutputError` if it cannot be written; a file is whole or absent, never half there.
        """
        path = files.output_folder(folder)
        weights.save(self.state_dict(), path, self.weights_name, variant=variant, max_shard_size=max_shard_size)
        files.write_json(path / "config.json", self._config_json())

    def _config_json(self) -> dict[str, Any]:
        return {"_class_name": type(self).__name__, "_diffusers_version": files.LAYOUT_VERSION} | self.config.to_dict()

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As torch's; a packed model (models/packed.py) is unpacked first."""
        unpack(self)
        self.fingerprint = None
        return super().load_state_dict(*arguments, **options)

    def _apply(self, *arguments: Any, **options: Any) -> Self:
        # Moving and casting (`to`, `half`, `cpu`, …) all come through here; packed weights can do neither.
        unpack(self)
        self.fingerprint = None
        return super()._apply(*arguments, **options)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the model computes in: that of its weights, but while it is being repaired."""
        return self.compute_dtype or next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
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
    """The files of a repository that one model needs: its config and one set of weights.

    `strict` accepts only the variant asked for. Raises `CheckpointError` where the weights are not among the names.
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
        # The names themselves say how many there must be: "…-00002-of-00003.safetensors".
        if len(shards) != max(shards.values(), default=1):
            raise CheckpointError(f"{folder or 'the repository'} has only {len(shards)} of the shards {picked} lists")
        return [prefix + name for name in ("config.json", picked, *sorted(shards))]
    return [f"{prefix}config.json", prefix + picked]
