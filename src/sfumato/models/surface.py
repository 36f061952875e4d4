"""The model interface of diffusers, apart from loading and the forward pass."""

from __future__ import annotations

import logging
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from sfumato.checkpoints.locate import by_patterns, locate_folder
from sfumato.ecosystem import meaning
from sfumato.errors import UsageError
from sfumato.files import output_folder, read_json, write_json
from sfumato.models.attention import AttentionUser
from sfumato.models.attention_processor import AttnProcessor, AttnProcessor2_0, check_processor
from sfumato.models.packed import is_packed, unpack
from sfumato.models.recomputed import Recomputed
from sfumato.runtime.choices import count_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

__all__ = ["ModelSurface"]

log = logging.getLogger("sfumato")


class ModelSurface(AttentionUser):
    """The methods of diffusers' `ModelMixin` that do not concern loading weights."""

    config_name = "config.json"
    config: Any
    _processors: Mapping[str, Any] = MappingProxyType({})

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters, optionally only of trainable ones, or without embedding tables."""
        if is_packed(self):
            if not only_trainable and not exclude_embeddings:
                return count_parameters(self.config, projected=hasattr(self, "text_projection"))
            unpack(self)
        tables = (module.weight for module in self.modules() if isinstance(module, nn.Embedding))
        left_out = {id(weight) for weight in tables} if exclude_embeddings else set()
        kept = (p for p in self.parameters() if id(p) not in left_out and (p.requires_grad or not only_trainable))
        return sum(parameter.numel() for parameter in kept)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return any(layer.recompute for layer in self.modules() if isinstance(layer, Recomputed))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute layers in the backward pass: training takes less memory and more time, with the same results."""
        self._set_recompute(recompute=True)

    def disable_gradient_checkpointing(self) -> None:
        """Store the results of layers until the backward pass."""
        self._set_recompute(recompute=False)

    def _set_recompute(self, *, recompute: bool) -> None:
        for layer in self.modules():
            if isinstance(layer, Recomputed):
                layer.recompute = recompute

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The processor last set for each attention layer, by diffusers' names."""
        layers = set(self.attention_modules())
        names = (f"{name}.processor" for name, module in self.named_modules() if module in layers)
        return {name: self._processors.get(name, AttnProcessor2_0()) for name in names}

    def set_attn_processor(self, processor: Any) -> None:
        """Accept a default processor, or a dict of them; the plan still selects the attention.

        Raises `UsageError` for any other processor.
        """
        names = self.attn_processors
        asked = dict(processor) if isinstance(processor, dict) else dict.fromkeys(names, processor)
        if asked.keys() != names.keys():
            raise UsageError(f"got {len(asked)} processors for {len(names)} attention layers; pass one for each")
        for one in asked.values():
            check_processor(one)
        self._processors = asked
        log.info("%s", meaning("set_attn_processor"))

    def set_default_attn_processor(self) -> None:
        """Set the default processor in every layer."""
        self.set_attn_processor(AttnProcessor())

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """No effect: the plan selects attention that fits in memory."""
        log.info("%s", meaning("enable_xformers_memory_efficient_attention"))

    def disable_xformers_memory_efficient_attention(self) -> None:
        """No effect: xFormers is not used."""
        log.info("%s", meaning("disable_xformers_memory_efficient_attention"))

    def fuse_qkv_projections(self) -> None:
        """No effect: the plan decides how layers are computed."""
        log.info("%s", meaning("fuse_qkv_projections"))

    def unfuse_qkv_projections(self) -> None:
        """No effect: the plan decides how layers are computed."""
        log.info("%s", meaning("unfuse_qkv_projections"))

    @classmethod
    def load_config(
        cls,
        name: str | PathLike[str],
        return_unused_kwargs: bool = False,
        subfolder: str | None = None,
        **hub: Any,
    ) -> dict[str, Any]:
        """Load the `config.json` that `from_pretrained` reads, for `from_config`."""
        wanted = f"{subfolder}/{cls.config_name}" if subfolder else cls.config_name
        config = read_json(locate_folder(name, by_patterns(wanted), **hub) / wanted)
        return cast("Any", (config, {})) if return_unused_kwargs else config

    def save_config(self, folder: str | PathLike[str]) -> None:
        """Write only `config.json` into a folder. Raises `OutputError`."""
        write_json(output_folder(folder) / self.config_name, self._config_json())

    def _config_json(self) -> dict[str, Any]:
        """Return the contents of `config.json`."""
        raise NotImplementedError
