"""The ecosystem's pipeline interface apart from generating: components, switches and names."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sfumato.checkpoints.locate import locate_folder
from sfumato.configs import Config
from sfumato.ecosystem import answer, meaning
from sfumato.errors import UsageError
from sfumato.files import LAYOUT_VERSION
from sfumato.image_processor import VaeImageProcessor
from sfumato.pipelines.arguments import refuse_unknown_parts, split_keywords
from sfumato.pipelines.components import ComponentFiles, entry_of
from sfumato.pipelines.steering import Steered
from sfumato.runtime.device import parse_device
from sfumato.values import check_argument

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

    import numpy as np
    from PIL.Image import Image

    from sfumato.pipelines.components import Index
    from sfumato.pipelines.parts import Parts
    from sfumato.pipelines.place import Place
    from sfumato.pipelines.progress import Progress

__all__ = ["Surface"]

log = logging.getLogger("sfumato")


class Surface(Steered):
    """The parts of the ecosystem's `DiffusionPipeline` interface that do not generate images.

    Methods for settings that the plan decides log what they mean here. Names that Sfumato does not have raise an error
    that explains this (ecosystem.toml).
    """

    parts: Parts
    place: Place
    progress: Progress
    index: ClassVar[Index]
    cross_attention_kwargs: ClassVar[None] = None
    _optional_components: ClassVar[list[str]] = ["safety_checker", "feature_extractor", "image_encoder"]
    _image_processor: VaeImageProcessor | None = None

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name; None for optional parts that this pipeline lacks."""
        parts = {part: getattr(self.parts, part) for part in self.index.parts}
        return parts | dict.fromkeys((*self.index.absent, *self.parts.left_out))

    @property
    def config(self) -> Config:
        """The contents of `model_index.json`: the classes of the pipeline and its parts, and flags."""
        told = {"_class_name": type(self).__name__, "_diffusers_version": LAYOUT_VERSION}
        told |= {"_name_or_path": self.parts.name}
        parts = {part: entry_of(part, value) for part, value in self.components.items()}
        flags = self.parts.flags | {"requires_safety_checker": False}
        return Config(extra=told | parts | {flag: flags[flag] for flag in self.index.flags})

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.config, indent=2)}"

    @property
    def name_or_path(self) -> str:
        """Where the checkpoint came from."""
        return self.parts.name

    @property
    def safety_checker(self) -> None:
        """None: there is no safety checker, and every image is returned."""

    @safety_checker.setter
    def safety_checker(self, value: Any) -> None:
        """Accept None, or a function, which is ignored. Raises `UsageError` for a network."""
        if callable(value) and not isinstance(value, torch.nn.Module):  # the usual way to switch one off
            log.warning("%s", meaning("safety_checker"))
        else:
            refuse_unknown_parts({"safety_checker": value})

    watermarker: ClassVar[None] = None

    @property
    def image_processor(self) -> VaeImageProcessor:
        """Converts images to the autoencoder's input and back. Assign another one to replace it in calls."""
        return self._image_processor or VaeImageProcessor(vae_scale_factor=self.parts.vae_scale_factor)

    @image_processor.setter
    def image_processor(self, value: VaeImageProcessor) -> None:
        """Replace the image processor for calls."""
        self._image_processor = value

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image]:
        """An array (B, H, W, 3) in [0, 1] -> PIL images."""
        return VaeImageProcessor.numpy_to_pil(images)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current call, or else the last one, uses guidance."""
        return self.guidance_scale > 1 and not self.parts.distilled

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A progress bar with the pipeline's settings, over an iterable or of `total` steps."""
        from tqdm.auto import tqdm

        if iterable is None and total is None:
            raise UsageError("progress_bar needs an iterable or a total")
        check_argument("total", total, float | None)
        settings: dict[str, Any] = {"iterable": iterable, "total": total} | dict(self.progress.config)
        return tqdm(**settings)

    @classmethod
    def download(
        cls,
        name: str | PathLike[str],
        *,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        **keywords: Any,
    ) -> str:
        """Download what `from_pretrained` would load, without loading it; returns the folder. Same keywords."""
        given, hub = split_keywords(keywords, "download")
        files = ComponentFiles(variant, use_safetensors)
        return str(locate_folder(name, lambda names, strict: files.select(names, strict, tuple(given)), **hub))

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device | None = None) -> None:
        """Keep one network at a time on the accelerator. Default: the best one available."""
        log.info("%s", meaning("enable_model_cpu_offload"))
        named = f"cuda:{gpu_id}" if gpu_id is not None and device is None else device
        self.place.take_turns(self.parts, parse_device(None if named is None else str(named)))

    enable_sequential_cpu_offload = enable_model_cpu_offload

    def enable_vae_slicing(self) -> None:
        """Decode one image of a batch at a time."""
        log.info("%s", meaning("enable_vae_slicing"))
        self.parts.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode whole batches, if there is enough memory."""
        log.info("%s", meaning("disable_vae_slicing"))
        self.parts.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large images in overlapping tiles."""
        log.info("%s", meaning("enable_vae_tiling"))
        self.parts.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode whole images, if there is enough memory."""
        log.info("%s", meaning("disable_vae_tiling"))
        self.parts.vae.disable_tiling()

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Use FreeU (arXiv 2309.11497) from here on, unless a request has its own (`GenerateRequest.freeu`)."""
        self.parts.unet.enable_freeu(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """Stop using FreeU."""
        self.parts.unet.disable_freeu()

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """No effect: the plan selects attention that fits in memory."""
        log.info("%s", meaning("enable_xformers_memory_efficient_attention"))

    def disable_xformers_memory_efficient_attention(self) -> None:
        """No effect: xFormers is not used."""
        log.info("%s", meaning("disable_xformers_memory_efficient_attention"))

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """No effect: the plan decides how layers are computed."""
        log.info("%s", meaning("fuse_qkv_projections"))

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """No effect: the plan decides how layers are computed."""
        log.info("%s", meaning("unfuse_qkv_projections"))

    def __getattr__(self, name: str) -> Any:
        raise answer("pipeline", name, type(self).__name__)
