"""The public pipelines: the ecosystem's calls on top of the one way from a request to a picture."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from sfumato.checkpoints.suggested import suggested_settings
from sfumato.errors import ConfigError, UnknownArgument, UsageError, suggest
from sfumato.images import to_arrays, to_pixels
from sfumato.models.attention import attention_for
from sfumato.pipelines import recipe
from sfumato.pipelines.arguments import refuse, request_from, split_keywords
from sfumato.pipelines.components import (
    COMPONENTS,
    INDEX,
    ComponentFiles,
    check_component,
    choose_scheduler,
    load_components,
    save_components,
    up_to_date,
)
from sfumato.pipelines.place import Place
from sfumato.pipelines.progress import Progress
from sfumato.pipelines.result import Result, StableDiffusionPipelineOutput, Step
from sfumato.pipelines.run import Run
from sfumato.pipelines.stages import Given
from sfumato.pipelines.words import Words
from sfumato.request import GenerateRequest
from sfumato.runtime.device import parse_device
from sfumato.runtime.generators import generator_for

if TYPE_CHECKING:
    from os import PathLike

    from torch import Tensor

    from sfumato.models import AutoencoderKL, AutoencoderTiny, CLIPTextModel, UNet2DConditionModel
    from sfumato.schedulers.base import Scheduler
    from sfumato.schedulers.noise import Generators
    from sfumato.text.tokenizer import CLIPTokenizer

__all__ = ["DiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline"]

log = logging.getLogger("sfumato")

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Callback = Callable[["DiffusionPipeline", int, Any, dict[str, Any]], dict[str, Any] | None]


class DiffusionPipeline:
    """A Stable Diffusion checkpoint, ready to draw.

    Its parts are attributes and may be replaced by assignment: `vae`, `text_encoder`, `tokenizer`, `unet`, `scheduler`.
    `suggested` holds the settings its checkpoint asks for, as keywords of a `GenerateRequest`; `words` what a
    small model knows, None for others.
    """

    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler: Scheduler
    name: str
    suggested: dict[str, Any]
    words: Words | None
    _saved_as: ClassVar[str] = "StableDiffusionPipeline"

    def __init__(
        self,
        *,
        vae: AutoencoderKL | AutoencoderTiny,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        safety_checker: None = None,
        feature_extractor: Any = None,
        image_encoder: None = None,
        requires_safety_checker: bool = False,
    ) -> None:
        """From its parts. There is no safety checker; one that is passed raises `UsageError`."""
        if safety_checker is not None or image_encoder is not None:
            raise UsageError("Sfumato has no safety checker and no image encoder; leave them out or pass None")
        self.name, self.suggested, self.words = "unnamed", {}, None
        self.sliced = False
        self.place = Place()
        self._progress = Progress()
        self._home: torch.device | None = None
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.unet, self.scheduler = unet, up_to_date(scheduler)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in COMPONENTS:
            check_component(name, value)
        super().__setattr__(name, value)

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

        torch_dtype (or dtype): precision of the weights, one or one per component; float32 if None. variant: infix of
        the file names ("fp16"). use_safetensors: False allows pickled weights. Any component (`vae=…`, `scheduler=…`)
        takes the place of the stored one. Hub keywords: cache_dir, revision, token, local_files_only, force_download.
        Raises `CheckpointError` naming the file or key that is wrong, `UnknownArgument` for a keyword that does not
        exist.
        """
        given, hub = split_keywords(keywords)
        files = ComponentFiles(variant, use_safetensors)
        return cls.from_files(name, files, torch_dtype or dtype, given, hub)

    @classmethod
    def from_files(
        cls,
        name: str | PathLike[str],
        files: ComponentFiles,
        dtypes: torch.dtype | Mapping[str, torch.dtype] | None,
        given: Mapping[str, Any],
        hub: Mapping[str, Any],
    ) -> DiffusionPipeline:
        """What `from_pretrained` does once its keywords are sorted into components and options of the hub."""
        parts, folder, index = load_components(name, files, dtypes, given, hub)
        target = cls._for_index(str(index.get("_class_name")), str(folder / INDEX))
        if (index.get("safety_checker") or [None])[0] and given.get("safety_checker", True) is not None:
            log.warning("the safety checker of this checkpoint is not loaded: Sfumato shows every picture it draws")
        pipeline = target(**parts)
        pipeline.name, pipeline.suggested = str(name), suggested_settings(folder)
        pipeline.words = Words.from_folder(folder)
        return pipeline

    @classmethod
    def _for_index(cls, class_name: str, where: str) -> type[DiffusionPipeline]:
        known = {one.__name__: one for one in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline)}
        if class_name not in known:
            raise ConfigError(f"{where}: {class_name} is not supported; supported are {', '.join(known)}")
        return known[class_name] if cls is DiffusionPipeline else cls

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> Self:
        """The same parts, shared and not copied, behind another pipeline's call."""
        new = cls(**(pipeline.components | components))
        new.name, new.suggested, new.words = pipeline.name, pipeline.suggested, pipeline.words
        return new

    def save_pretrained(
        self, folder: str | PathLike[str], *, variant: str | None = None, max_shard_size: int | str = "10GB"
    ) -> None:
        """Write the pipeline into a folder that the ecosystem's own libraries read too. Raises `OutputError`."""
        save_components(self.components, folder, self._saved_as, variant=variant, max_shard_size=max_shard_size)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name."""
        return {part: getattr(self, part) for part in COMPONENTS}

    @property
    def device(self) -> torch.device:
        """Where pictures are drawn: where the U-Net is, or comes to be for its stage."""
        return self._home or self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the U-Net's weights."""
        return self.unet.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return self.vae.config.scale_factor

    def size_of(self, request: GenerateRequest) -> tuple[int, int]:
        """Width and height in pixels that a request asks for, or the checkpoint's own."""
        own = self.unet.config.sample_size or 64
        height, width = (own, own) if isinstance(own, int) else own
        return request.width or width * self.vae_scale_factor, request.height or height * self.vae_scale_factor

    def read_picture(self, image: Any, size: tuple[int, int] | None) -> Tensor:
        """What image-to-image starts from, as the autoencoder reads it; `size` (width, height) if one is asked for."""
        return to_pixels(image, self.vae_scale_factor, size)

    def to(self, *places: str | torch.device | torch.dtype | None, **named: Any) -> Self:
        """Move the models to a device, a precision, or both; returns the pipeline itself.

        Takes `device` and `dtype` in any order or by name. Raises `UsageError` for a device that is not there.
        """
        wanted = [*places, named.pop("device", None), named.pop("dtype", None) or named.pop("torch_dtype", None)]
        named.pop("silence_dtype_warnings", None)
        if named:
            raise UnknownArgument(f"to() has no argument {next(iter(named))!r}; it takes device and dtype")
        dtype = next((place for place in wanted if isinstance(place, torch.dtype)), None)
        named_device = next((place for place in wanted if isinstance(place, (str, torch.device))), None)
        device = None if named_device is None else parse_device(str(named_device))
        for model in (self.vae, self.text_encoder, self.unet):
            away = self._home is not None or model.device.type == "meta"
            model.to(device=None if away else device, dtype=dtype)
            if device is not None and not (self.sliced and model is self.unet):
                model.set_attention(attention_for(device))
        if self._home is not None:
            self._home = device or self._home
        if self.device.type == "cpu" and self.dtype == torch.float16:
            log.warning("float16 is very slow on a CPU; bfloat16 or float32 draws the same picture sooner")
        return self

    def stay_home(self, device: torch.device) -> None:
        """Leave the networks where they are; each comes to this device for its own stage, and leaves it after."""
        self._home = device

    def largest_batch(self, request: GenerateRequest) -> int:
        """How many pictures of a request's size fit into memory at once, as it is free now; nothing is drawn."""
        return self.place.largest_batch(self, request)

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Compute attention in slices: "auto" half the heads, "max" one, or a number of heads. Same picture."""
        if slice_size is None:
            return self.disable_attention_slicing()
        self.unet.set_attention_slice(slice_size)
        self.sliced = True
        return None

    def disable_attention_slicing(self) -> None:
        """Compute attention as the device does it best."""
        self.unet.set_attention(attention_for(self.device))
        self.sliced = False

    def set_progress_bar_config(self, **config: Any) -> None:
        """Settings of the progress bar of calls, as `tqdm` takes them: `disable=True`, `desc="…"`, `leave=False`."""
        self._progress = Progress(config)

    def stream(self, request: GenerateRequest) -> Generator[Step, None, Result]:
        """Draw a request step by step: yields each finished `Step`, and returns the `Result`.

        Image i is drawn with seed + i, whatever the batch, so each can be drawn again alone.
        """
        request = request.replace(seed=secrets.randbits(32) if request.seed is None else request.seed)
        width, height = self.size_of(request)
        if request.image is None:
            request = request.replace(width=width, height=height)
        seeds = request.seeds
        generators = [generator_for(request.rng, seed) for seed in seeds]
        scheduler = choose_scheduler(request.scheduler, self.scheduler)
        run = Run(self, request, Given(generators=generators), scheduler)
        loop = run.latents()
        while True:
            try:
                step = next(loop)
            except StopIteration as end:
                images = run.pictures(end.value)
                break
            yield Step(
                step.index + 1,
                step.total,
                step.row.t,
                step.latents,
                lambda s=step: run.preview(s.original()),
            )
        recipes = recipe.describe(self, run, request, seeds)
        return Result(images, request, seeds, recipes, tuple(run.notes), run.seconds, run.plan)

    def generate(self, request: GenerateRequest, on_step: Callable[[Step], None] | None = None) -> Result:
        """Draw a request; `on_step` is called after each step, for progress and previews."""
        steps = self.stream(request)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return end.value
            if on_step is not None:
                on_step(step)

    def _call(
        self,
        request: GenerateRequest,
        given: Given,
        output_type: str,
        return_dict: bool,
        callback: Callback | None,
        names: Sequence[str],
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Draw in the ecosystem's way: the caller's generators, callbacks between steps, several kinds of output."""
        if output_type not in OUTPUT_TYPES:
            raise UsageError(
                f"there is no output_type {output_type!r}{suggest(output_type, OUTPUT_TYPES)}; "
                "use pil, np, pt or latent"
            )
        for name in names:
            if name not in CALLBACK_TENSORS:
                raise UsageError(
                    f"callback_on_step_end_tensor_inputs: {name!r} is not one of {', '.join(CALLBACK_TENSORS)}"
                )
        run = Run(self, request, given, self.scheduler)
        loop = run.latents()
        edited: Tensor | None = None
        with self._progress.bar() as bar:
            while True:
                try:
                    step = loop.send(edited)
                except StopIteration as end:
                    latents = end.value
                    break
                bar.advance(step.index + 1, step.total)
                edited = None if callback is None else self._call_back(callback, run, step, names)
        if output_type == "latent":
            images: Any = latents.to(self.unet.dtype)
        else:
            draw = {"pil": run.pictures, "np": lambda x: to_arrays(run.pixels(x)), "pt": run.pixels}
            images = draw[output_type](latents)
        return StableDiffusionPipelineOutput(images, None, tuple(run.notes)) if return_dict else (images, None)

    def _call_back(self, callback: Callback, run: Run, step: Any, names: Sequence[str]) -> Tensor | None:
        guidance = run.guidance
        latents = step.latents.to(self.unet.dtype)
        embeds = (
            guidance.embeds
            if guidance.negative_embeds is None
            else torch.cat([guidance.negative_embeds, guidance.embeds])
        )
        tensors = {"latents": latents, "prompt_embeds": embeds, "negative_prompt_embeds": guidance.negative_embeds}
        timestep = run.scheduler.timesteps[step.index - step.total]
        changes = callback(self, step.index, timestep, {name: tensors[name] for name in names}) or {}
        if changes.get("prompt_embeds", embeds) is not embeds:
            guidance.replace_embeds(changes["prompt_embeds"])
        changed = changes.get("latents", latents)
        # Untouched latents stay in the loop's own precision.
        return None if changed is latents and torch.equal(latents, step.latents.to(latents.dtype)) else changed


class StableDiffusionPipeline(DiffusionPipeline):
    """Text to image."""

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unknown: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Draw pictures from words; every argument means what it means in the ecosystem.

        Returns an object with `.images`, or a tuple with `return_dict=False`. Raises `UsageError` for wrong values and
        `UnknownArgument` for arguments that do not exist.
        """
        refuse(unknown, StableDiffusionPipeline.__call__)
        request = request_from(
            prompt, prompt_embeds, height=height, width=width, steps=num_inference_steps, timesteps=timesteps,
            sigmas=sigmas, guidance_scale=guidance_scale, negative_prompt=negative_prompt, count=num_images_per_prompt,
            eta=eta, guidance_rescale=guidance_rescale, clip_skip=clip_skip,
        )  # fmt: skip
        given = Given(
            generators=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        return self._call(
            request, given, output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs
        )


class StableDiffusionImg2ImgPipeline(DiffusionPipeline):
    """Image to image: the same loop, begun later, from a picture."""

    _saved_as = "StableDiffusionImg2ImgPipeline"

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unknown: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Redraw a picture by words; `strength` says how far to leave it, from 0 to 1 (wholly).

        `image` is a PIL image, an array in [0, 1], a tensor, or a list of these. Otherwise as
        `StableDiffusionPipeline`.
        """
        refuse(unknown, StableDiffusionImg2ImgPipeline.__call__)
        if image is None:
            raise UsageError(
                "image is missing: image-to-image starts from a picture; for none, use StableDiffusionPipeline"
            )
        request = request_from(
            prompt, prompt_embeds, steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas, strength=strength,
            guidance_scale=guidance_scale, negative_prompt=negative_prompt, count=num_images_per_prompt, eta=eta,
            clip_skip=clip_skip,
        )  # fmt: skip
        given = Given(
            generators=generator,
            image=image,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        return self._call(
            request, given, output_type, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
