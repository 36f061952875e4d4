"""The base of all pipelines: a checkpoint that is ready to generate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

import torch

from sfumato.ecosystem import meaning
from sfumato.errors import ConfigError, UsageError
from sfumato.harmless import asked_device, asked_dtype, say_safe
from sfumato.models.base import Model
from sfumato.pipelines.adapting import Adapting
from sfumato.pipelines.arguments import refuse_unknown_parts, split_keywords, split_places
from sfumato.pipelines.components import (
    COMPONENTS,
    FLAGS,
    ComponentFiles,
    Index,
    save_components,
    up_to_date,
)
from sfumato.pipelines.draw import draw
from sfumato.pipelines.image_adapters import ImageAdapters
from sfumato.pipelines.left_out import with_stand_ins
from sfumato.pipelines.parts import Parts, check_latents
from sfumato.pipelines.place import Place
from sfumato.pipelines.progress import Progress
from sfumato.pipelines.result import StableDiffusionPipelineOutput
from sfumato.pipelines.source import FILE_OPTIONS, load_components, open_source
from sfumato.pipelines.steering import Steering
from sfumato.pipelines.surface import Surface
from sfumato.pipelines.words import Words
from sfumato.request import as_request
from sfumato.values import shown

if TYPE_CHECKING:
    from os import PathLike

    from sfumato.image_processor import DPTImageProcessor
    from sfumato.models import (
        AutoencoderKL,
        AutoencoderTiny,
        CLIPTextModel,
        CLIPVisionModelWithProjection,
        DPTForDepthEstimation,
        StableUnCLIPImageNormalizer,
        UNet2DConditionModel,
    )
    from sfumato.pipelines.result import Result, Step
    from sfumato.pipelines.source import Source
    from sfumato.request import GenerateRequest
    from sfumato.schedulers.base import Scheduler
    from sfumato.text.tokenizer import CLIPTokenizer

__all__ = ["DiffusionPipeline"]

log = logging.getLogger("sfumato")

T = TypeVar("T")
# Control networks that a pipeline class either requires or does not accept, and their names in messages.
BESIDE = {"controlnet": "ControlNet", "adapter": "T2I-Adapter"}


class _Part(Generic[T]):
    """A field of a pipeline's `Parts`, as an attribute of the pipeline."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pipeline: DiffusionPipeline, owner: type) -> T:
        return cast("Any", None) if self.name in pipeline.parts.left_out else getattr(pipeline.parts, self.name)

    def __set__(self, pipeline: DiffusionPipeline, value: Any) -> None:
        if isinstance(getattr(value, "_orig_mod", None), Model):  # what torch.compile makes of a model
            value = value._orig_mod
            value.compile()
            log.info("%s", meaning("torch.compile"))
        pipeline.parts = pipeline.parts.having({self.name: value})


class DiffusionPipeline(Surface, Adapting, ImageAdapters):
    """A Stable Diffusion checkpoint that is ready to generate images.

    Its components are attributes that can be replaced by assignment: `vae`, `text_encoder`, `tokenizer`, `unet`,
    `scheduler` and, in families with two text encoders, `text_encoder_2` and `tokenizer_2`; None for those it lacks.
    `suggested` contains the checkpoint's own default settings, as keywords of a `GenerateRequest`; `words` the
    vocabulary of a small model, None for others. `parts` is all of them as one value, `place` how they are placed on
    this machine. `refiner` is the pipeline that takes over if a request asks for one.
    """

    refiner: DiffusionPipeline | None

    vae: _Part[AutoencoderKL | AutoencoderTiny] = _Part()
    text_encoder: _Part[CLIPTextModel] = _Part()
    text_encoder_2: _Part[CLIPTextModel | None] = _Part()
    tokenizer: _Part[CLIPTokenizer] = _Part()
    tokenizer_2: _Part[CLIPTokenizer | None] = _Part()
    unet: _Part[UNet2DConditionModel] = _Part()
    scheduler: _Part[Scheduler] = _Part()
    image_encoder: _Part[CLIPVisionModelWithProjection | None] = _Part()
    image_normalizer: _Part[StableUnCLIPImageNormalizer | None] = _Part()
    image_noising_scheduler: _Part[Scheduler | None] = _Part()
    low_res_scheduler: _Part[Scheduler | None] = _Part()
    depth_estimator: _Part[DPTForDepthEstimation | None] = _Part()
    feature_extractor: _Part[DPTImageProcessor | None] = _Part()
    name: _Part[str] = _Part()
    suggested: _Part[dict[str, Any]] = _Part()
    words: _Part[Words | None] = _Part()
    index: ClassVar[Index] = Index("StableDiffusionPipeline")
    output: ClassVar[type[Any]] = StableDiffusionPipelineOutput
    _corrects_scheduler: ClassVar[bool] = True
    # Whether strength shortens a few-step schedule in image-to-image, if the class decides this and not the family.
    _shortens: ClassVar[bool | None] = None

    def __init__(
        self,
        *,
        vae: AutoencoderKL | AutoencoderTiny,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        text_encoder: CLIPTextModel | None = None,
        text_encoder_2: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        controlnet: Any = None,
        adapter: Any = None,
        safety_checker: None = None,
        feature_extractor: Any = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        image_normalizer: StableUnCLIPImageNormalizer | None = None,
        image_noising_scheduler: Scheduler | None = None,
        low_res_scheduler: Scheduler | None = None,
        depth_estimator: DPTForDepthEstimation | None = None,
        watermarker: None = None,
        requires_safety_checker: bool = False,
        force_zeros_for_empty_prompt: bool | None = None,
        requires_aesthetics_score: bool | None = None,
        max_noise_level: int | None = None,
        add_watermarker: bool | None = None,
    ) -> None:
        """Create a pipeline from its parts.

        There is no safety checker and no watermark; requesting one raises `UsageError`. force_zeros_for_empty_prompt:
        whether a missing negative prompt means zeros instead of an empty text; if None, zeros for pipelines that have
        this flag, as in the ecosystem. requires_aesthetics_score: whether the U-Net expects one; if None, inferred from
        its shapes. controlnet, adapter: one or a list of them, for pipelines that use them.
        """
        given = {part: value for part, value in locals().items() if part in COMPONENTS}
        refuse_unknown_parts(
            {"safety_checker": safety_checker, "watermarker": watermarker, "add_watermarker": add_watermarker}
        )
        parts = Parts(**with_stand_ins(given, sized="text_encoder_2" in self.index.parts))
        if force_zeros_for_empty_prompt is None and "force_zeros_for_empty_prompt" in self.index.flags:
            force_zeros_for_empty_prompt = True
        flags = (force_zeros_for_empty_prompt, requires_aesthetics_score, max_noise_level)
        self._begin(parts.told(dict(zip(FLAGS, flags, strict=True))))

    def _begin(self, parts: Parts, place: Place | None = None) -> None:
        family, ours = parts.family, "text_encoder_2" in self.index.parts
        if bool(family.sizes) != ours:
            raise UsageError(f"{type(self).__name__} does not support {family.title}; use {family.pipeline}")
        for name, title in BESIDE.items():
            there = getattr(parts, name) is not None
            if parts.left_out and not there and name in self.index.parts:
                parts = replace(parts, left_out=parts.left_out | {name})
            elif there != (name in self.index.parts):
                lacks = f"takes no {title}" if there else f"needs a {title}; pass {name}=…"
                raise UsageError(f"{type(self).__name__} {lacks}")
        if self._shortens is not None:
            parts = replace(parts, family=replace(family, shortens=self._shortens))
        self.parts = replace(parts, scheduler=up_to_date(parts.scheduler)) if self._corrects_scheduler else parts
        self.place = place or Place()
        self.refiner = None
        self.progress = Progress()
        self._steering = Steering()

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        *,
        torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        **keywords: Any,
    ) -> DiffusionPipeline:
        """Load a checkpoint from a folder, the hub's cache or the hub, onto the CPU.

        torch_dtype (or dtype): precision of the weights, one for all or one per component; float32 if None. variant:
        infix of the file names ("fp16"). use_safetensors: False allows pickled weights. Any component (`vae=…`,
        `scheduler=…`) replaces the stored one. Hub keywords: cache_dir, revision, token, local_files_only,
        force_download. device_map: the device to move it to, "auto" for the best one available. Raises
        `CheckpointError` naming the wrong file or key, and `UnknownArgument` for a keyword that does not exist.
        """
        dtypes, device = asked_dtype(torch_dtype, dtype, each=True), asked_device(keywords)
        given, hub = split_keywords(keywords)
        source = open_source(name, ComponentFiles(variant, use_safetensors), hub, given=given)
        pipeline = cls.from_source(source, dtypes, given)
        return pipeline if device is None else pipeline.to(device)

    @classmethod
    def from_single_file(
        cls,
        name: str | PathLike[str],
        *,
        torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        use_safetensors: bool | None = None,
        disable_mmap: bool = False,
        **keywords: Any,
    ) -> DiffusionPipeline:
        """Load a checkpoint in a single file, in the original layout, onto the CPU.

        Sfumato detects what it is from its weights.

        name: a path, a hub id with a file name, or a hub URL. These override what is detected: `family` (families.py),
        `prediction_type`, `config` (a similar checkpoint that supplies configs and missing components),
        `original_config` (a YAML file). ema: use the averaged weights of the U-Net; use_safetensors: False allows
        pickled weights; disable_mmap: read the weights instead of mapping them. Otherwise like `from_pretrained`.
        """
        dtypes, device = asked_dtype(torch_dtype, dtype, each=True), asked_device(keywords)
        options = {key: keywords.pop(key) for key in FILE_OPTIONS if key in keywords}
        given, hub = split_keywords(keywords, "from_single_file")
        files = ComponentFiles(use_safetensors=use_safetensors, copy=disable_mmap)
        source = open_source(name, files, hub, given=given, options=options)
        pipeline = cls.from_source(source, dtypes, given)
        return pipeline if device is None else pipeline.to(device)

    @classmethod
    def from_source(
        cls,
        source: Source,
        dtypes: torch.dtype | Mapping[str, torch.dtype] | None,
        given: Mapping[str, Any],
    ) -> DiffusionPipeline:
        """Load a checkpoint that `from_pretrained` or `from_single_file` has found."""
        target = cls._for_index(source.class_name, str(source.where))
        components = load_components(source, dtypes or torch.float32, given)
        if source.has_safety_checker and given.get("safety_checker", True) is not None:
            log.warning("the safety checker of this checkpoint is not loaded; Sfumato returns every image")
        refuse_unknown_parts(given)
        known = {"suggested": source.suggested, "words": source.words, "options": source.options, "name": source.name}
        sized = "text_encoder_2" in target.index.parts
        components = {"family": source.family} | with_stand_ins(components, source.family, sized=sized)
        parts = Parts(**components, **known)
        return target._over(parts.told({flag: given.get(flag, source.flags[flag]) for flag in FLAGS}))

    @classmethod
    def _over(cls, parts: Parts, place: Place | None = None) -> Self:
        """Create a pipeline from loaded parts, optionally in another pipeline's place."""
        pipeline = cls.__new__(cls)
        pipeline._begin(parts, place)
        return pipeline

    @classmethod
    def _for_index(cls, class_name: str, where: str) -> type[DiffusionPipeline]:
        # The direct subclasses have the ecosystem's names; the modules in `public` define them.
        known = {one.__name__: one for one in DiffusionPipeline.__subclasses__()}
        if class_name not in known:
            raise ConfigError(f"{where}: {class_name} is not supported; supported are {', '.join(known)}")
        return known[class_name] if cls is DiffusionPipeline else cls

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> Self:
        """Create a pipeline of this class from another one's components, which are shared, not copied.

        Raises `UsageError` for anything but a pipeline, and for a family that this class does not support.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise UsageError(f"from_pipe takes a pipeline from sfumato, not {shown(pipeline)}")
        given, _ = split_keywords(components, "from_pipe")
        refuse_unknown_parts(given)
        given = {name: None for name in BESIDE if name not in cls.index.parts} | given
        parts = pipeline.parts.having(
            {"controls": ()} | {part: value for part, value in given.items() if part in COMPONENTS}
        )
        return cls._over(parts.told({flag: given.get(flag) for flag in FLAGS}), pipeline.place)

    def save_pretrained(
        self,
        folder: str | PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write the pipeline into a folder that the ecosystem's libraries can read.

        Raises `OutputError`. Only fused adapters are saved, as part of the weights.
        """
        self._fit()
        say_safe(safe_serialization=safe_serialization)
        flags = self.parts.flags | {"requires_safety_checker": False}
        save_components(self.components, folder, self.index, flags, variant=variant, max_shard_size=max_shard_size)

    @property
    def device(self) -> torch.device:
        """The device that generates images: where the U-Net is, or will be for its stage."""
        return self.place.device_of(self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the U-Net's weights."""
        return self.parts.lead.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return self.parts.vae_scale_factor

    def size_of(self, request: GenerateRequest) -> tuple[int, int]:
        """Width and height in pixels: those of the request, or else the checkpoint's own."""
        return self.parts.size_of(request)

    def to(self, *places: str | torch.device | torch.dtype | None, **named: Any) -> Self:
        """Move the models to a device, a precision, or both. Returns the pipeline.

        Takes `device` and `dtype` in any order or by name. Raises `UsageError` for a device that is not available.
        """
        device, dtype = split_places(places, named)
        self.place.move(self.parts, device, dtype)
        self._fit()
        if self.device.type == "cpu" and self.dtype == torch.float16:
            log.warning("float16 is very slow on a CPU; bfloat16 or float32 gives the same image faster")
        return self

    def largest_batch(self, request: GenerateRequest) -> int:
        """Return how many images of a request's size fit in one batch with the memory free now. Generates nothing."""
        return self.place.largest_batch(self.parts, as_request(request))

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Compute attention in slices of "auto" (half the heads), "max" (one), or a number. Does not change images."""
        self.place.slice_attention(self.parts, slice_size)

    def disable_attention_slicing(self) -> None:
        """Compute attention in the best way for the device."""
        self.place.slice_attention(self.parts, None)

    def set_progress_bar_config(self, **config: Any) -> None:
        """Configure the progress bar of calls with arguments of `tqdm`: `disable=True`, `desc="…"`, `leave=False`."""
        self.progress = Progress(config)

    def stream(self, request: GenerateRequest) -> Generator[Step, None, Result]:
        """Generate a request step by step: yields each finished `Step` and returns the `Result`.

        Image i uses seed + i, whatever the batch, so each image can be generated again alone. Raises `UsageError` if a
        request needs a refiner and this pipeline has none, or one for other latents.
        """
        if as_request(request).refiner is None:
            return draw(self.parts, self.place, request)
        if self.refiner is None:
            raise UsageError(
                "the request needs a refiner, which is not loaded; load it and assign it to pipeline.refiner"
            )
        check_latents(self.parts, self.refiner.parts)
        return draw(self.parts, self.place, request, (self.refiner.parts, self.refiner.place))

    def generate(self, request: GenerateRequest, on_step: Callable[[Step], None] | None = None) -> Result:
        """Generate a request. `on_step` is called after each step, for progress and previews."""
        steps = self.stream(request)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return end.value
            if on_step is not None:
                on_step(step)
