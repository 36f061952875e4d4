"""IP-Adapters under the ecosystem's names: loading, scaling, and encoding image prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sfumato.errors import UsageError
from sfumato.models import CLIPVisionModelWithProjection
from sfumato.models.image_encoder import clip_pixels
from sfumato.models.ip_adapter import IPAdapter
from sfumato.pipelines.adapting import stored_from
from sfumato.pipelines.block_weights import weights_from
from sfumato.pipelines.image_prompts import Carried

if TYPE_CHECKING:
    from os import PathLike

    from torch import Tensor

    from sfumato.pipelines.parts import Parts

__all__ = ["ImageAdapters"]


def _each(value: Any, count: int, name: str) -> list[Any]:
    """Return a list of `count` values, given one for each or one for all."""
    every = list(value) if isinstance(value, (list, tuple)) else [value]
    every = every * count if len(every) == 1 else every
    if len(every) != count:
        raise UsageError(f"got {len(every)} of {name} for {count} IP-Adapters; pass one, or one for each")
    return every


class ImageAdapters:
    """The methods of a pipeline for IP-Adapters. They do not change the U-Net."""

    parts: Parts

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        subfolder: str | list[str] | None = None,
        weight_name: str | list[str] | None = None,
        image_encoder_folder: str | PathLike[str] | None = "image_encoder",
        *,
        use_safetensors: bool | None = None,
        **keywords: Any,
    ) -> None:
        """Load one or several IP-Adapters and their image encoder, replacing any that are loaded.

        Takes a file, a folder or hub id (with `subfolder` and `weight_name`), tensors by name, or lists of these.
        image_encoder_folder: a folder name within the subfolder; with a slash, a path within the folder or repository;
        or the path of any folder; None for no encoder. use_safetensors: False allows pickled files. Raises
        `CheckpointError` if an adapter does not fit.
        """
        sources = pretrained_model_name_or_path_or_dict
        sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
        count = max(len(sources), len(weight_name) if isinstance(weight_name, (list, tuple)) else 1)
        sources = _each(sources, count, "pretrained_model_name_or_path_or_dict")
        folders, names = _each(subfolder, count, "subfolder"), _each(weight_name, count, "weight_name")
        carried = []
        for source, folder, name in zip(sources, folders, names, strict=True):
            where = {"subfolder": folder, "weight_name": name, **keywords}
            stored = stored_from(source, (), use_safetensors, where, "load_ip_adapter")
            adapter = IPAdapter(stored.tensors, stored.where)
            adapter.matrices(self.parts.unet)
            carried.append(Carried(adapter))
        encoder = self.parts.image_encoder
        if encoder is None and image_encoder_folder is not None:
            encoder = self._image_encoder(sources[0], folders[0], str(image_encoder_folder), keywords)
        for one in carried:
            one.adapter.check_reads(encoder)
        self.parts = replace(self.parts, image_encoder=encoder, image_adapters=tuple(carried))

    def _image_encoder(self, source: Any, folder: str | None, name: str, keywords: Mapping[str, Any]) -> Any:
        told: dict[str, Any] = {key: value for key, value in keywords.items() if value is not None}
        told["torch_dtype"] = self.parts.unet.dtype
        if os.path.isdir(name):
            source, inner = name, None
        elif isinstance(source, Mapping) or os.path.isfile(source):
            raise UsageError(
                f"there is no folder {name} with the image encoder; pass its path as image_encoder_folder, or None"
            )
        else:
            inner = name if "/" in name or not folder else f"{folder}/{name}"
        encoder = CLIPVisionModelWithProjection.from_pretrained(source, subfolder=inner, **told)
        return encoder.to(self.parts.unet.device) if self.parts.unet.device.type != "meta" else encoder

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Set the strength of image prompts: one scale for all adapters, or a list with one for each.

        A scale is a number, or numbers by block, with 0 for missing blocks: {"up": {"block_0": [0.0, 1.0, 0.0]}}. For
        images with masks it may also be a list with one scale per image.
        """
        carried = self.parts.image_adapters
        scales = _each(scale, len(carried), "scales")
        checked = [tuple(map(_scale, one)) if isinstance(one, (list, tuple)) else _scale(one) for one in scales]
        every = (replace(one, scale=value) for one, value in zip(carried, checked, strict=True))
        self.parts = replace(self.parts, image_adapters=tuple(every))

    def unload_ip_adapter(self) -> None:
        """Unload the IP-Adapters and the image encoder."""
        self.parts = replace(self.parts, image_adapters=(), image_encoder=None)

    @torch.no_grad()
    def encode_image(
        self, image: Any, device: Any, num_images_per_prompt: int = 1, output_hidden_states: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode images, and the absence of an image, as embeddings (B, D) or hidden states (B, S, C)."""
        encoder = self.parts.image_encoder
        if encoder is None:
            raise UsageError("no image encoder is loaded; load one with load_ip_adapter")
        ready = isinstance(image, torch.Tensor) and image.ndim == 4
        pixels = image if ready else clip_pixels(image, encoder.config.image_size)
        nothing, something = IPAdapter.seen(encoder, pixels, whole=bool(output_hidden_states))
        both = (one.repeat_interleave(num_images_per_prompt, dim=0).to(device) for one in (something, nothing))
        return next(both), next(both)

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any,
        ip_adapter_image_embeds: Any = None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> list[Tensor]:
        """Return embeddings for `ip_adapter_image_embeds`: per adapter, (2, n, …) for n images; (1, n, …) unguided."""
        if ip_adapter_image_embeds is not None:
            return list(ip_adapter_image_embeds)
        adapters = self.parts.image_adapters
        images = ip_adapter_image if isinstance(ip_adapter_image, (list, tuple)) else [ip_adapter_image]
        every = []
        for one, image in zip(adapters, _each(images, len(adapters), "ip_adapter_image"), strict=True):
            something, nothing = self.encode_image(image, device, 1, one.adapter.whole)
            both = (nothing, something) if do_classifier_free_guidance else (something,)
            every.append(torch.cat([row[None].repeat_interleave(num_images_per_prompt, dim=0) for row in both]))
        return every


def _scale(value: Any) -> float | dict[str, float]:
    weight, parts = weights_from({"unet": value} if isinstance(value, Mapping) else value)
    return parts if isinstance(value, Mapping) else weight
