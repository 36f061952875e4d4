"""The inputs and outputs of planning: network sizes, the task, the user's settings, and the choices."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sfumato.configs import (
    AutoencoderKLConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    DPTConfig,
    T2IAdapterConfig,
    UNet2DConditionConfig,
    parse,
)
from sfumato.errors import UsageError, suggest
from sfumato.families import FAMILIES
from sfumato.runtime.chunks import tile_starts
from sfumato.runtime.clip_layers import text_layers, vision_layers
from sfumato.runtime.layers import control_layers, decoder_layers, encoder_layers, unet_layers
from sfumato.values import check_argument, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sfumato.configs import AutoencoderTinyConfig
    from sfumato.request import GenerateRequest
    from sfumato.runtime.layers import Layer

__all__ = [
    "DTYPE_BYTES",
    "NETWORKS",
    "PARTS",
    "Part",
    "Plan",
    "Sizes",
    "Task",
    "Wishes",
    "check_sides",
    "count_parameters",
    "enlarged",
    "published_sizes",
    "task_of",
]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "auto": None}
# The roles of the networks that are in memory together in each stage; a checkpoint may lack some.
NETWORKS = {
    "text_encoder": ("text_encoder", "text_encoder_2", "image_encoder", "depth_estimator"),
    "unet": ("unet",),
    "vae": ("vae",),
}
PARTS = tuple(NETWORKS)
# Training timesteps of all families.
_TRAINED = 1000


@dataclass(frozen=True)
class Part:
    """The weights of a network: number of parameters, and their stored size in bytes."""

    parameters: int
    stored_bytes: int

    def __add__(self, other: Part) -> Part:
        return Part(self.parameters + other.parameters, self.stored_bytes + other.stored_bytes)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A checkpoint without its weights: configs, and the number and size of each part's parameters.

    The part `text_encoder` covers all text encoders, with their configs in `text_encoder_configs`. The part `unet`
    includes ControlNets and T2I-Adapters, with their configs in `control_configs`. vision_configs: of image encoders,
    one for each image prompt. kept: for each part, bytes of original weights kept in memory because adapters replaced
    them. spacing: the scheduler's `timestep_spacing`.
    """

    name: str
    text_encoder_configs: tuple[CLIPTextConfig, ...]
    unet_config: UNet2DConditionConfig
    vae_config: AutoencoderKLConfig | AutoencoderTinyConfig
    text_encoder: Part
    unet: Part
    vae: Part
    tokens: int = 77
    control_configs: tuple[ControlNetConfig | T2IAdapterConfig, ...] = ()
    vision_configs: tuple[CLIPVisionConfig, ...] = ()
    kept: Mapping[str, int] = field(default_factory=dict)
    spacing: str = "leading"

    @property
    def text_encoder_config(self) -> CLIPTextConfig:
        """The config of the first text encoder."""
        return self.text_encoder_configs[0]

    @property
    def enlarges(self) -> int:
        """The factor by which a result is wider than its input image."""
        extra = self.unet_config.in_channels - self.vae_config.latent_channels
        return self.vae_config.scale_factor if extra == 3 else 2 if self.unet_config.is_k else 1

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of the checkpoint's native images, in pixels."""
        (height, width), factor = self.unet_config.latent_size, self.vae_config.scale_factor
        return width * factor, height * factor


@dataclass(frozen=True, kw_only=True)
class Task:
    """A request as far as memory and time are concerned.

    rows: the number of guidance branches, plus one for each prompt joined by `AND`. tile: the side of a tile in latent
    pixels, if the U-Net processes the latents in tiles. With a highres fix (`Hires`), this is the second, larger pass,
    and `first` is the first one.
    """

    sizes: Sizes
    width: int
    height: int
    pictures: int
    prompts: int
    steps: int
    rows: int
    from_picture: bool
    tile: int | None = None
    first: Task | None = None

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        factor = self.sizes.vae_config.scale_factor
        return self.height // factor, self.width // factor

    @cached_property
    def unet_layers(self) -> list[Layer]:
        """The layers of the U-Net and its control networks at this size, or at that of a tile."""
        height, width = (min(side, self.tile or side) for side in self.latent_size)
        size = (height, width, self.sizes.tokens)
        layers, held, beside = unet_layers(self.sizes.unet_config, *size), 0, []
        for config in self.sizes.control_configs:
            if isinstance(config, ControlNetConfig):
                own, held = control_layers(config, *size)
                beside += own
        # Residuals for the U-Net stay in memory while it, or another network that adds to it, is running.
        return [replace(layer, live=layer.live + held) for layer in layers + beside] if beside else layers

    @property
    def tiles(self) -> int:
        """The number of tiles."""
        return math.prod(len(tile_starts(side, self.tile or side)) for side in self.latent_size)

    @cached_property
    def decoder_layers(self) -> list[Layer]:
        """The VAE decoder's layers at this size."""
        return decoder_layers(self.sizes.vae_config, *self.latent_size)

    @cached_property
    def encoder_layers(self) -> list[Layer]:
        """The VAE encoder's layers at this size."""
        return encoder_layers(self.sizes.vae_config, self.height, self.width)

    @cached_property
    def text_layers(self) -> list[Layer]:
        """The layers of all text encoders."""
        configs, tokens = self.sizes.text_encoder_configs, self.sizes.tokens
        return [layer for config in configs for layer in text_layers(config, tokens)]

    @cached_property
    def vision_layers(self) -> list[Layer]:
        """The layers of the image encoders, for each image that they read."""
        return [layer for config in self.sizes.vision_configs for layer in vision_layers(config)]


def check_sides(factor: int, **sides: int | None) -> None:
    """Raise `UsageError` if a width or height is not a multiple of the VAE's factor. None means the model's default."""
    for name, value in sides.items():
        if value is not None and value % factor:
            near = sorted({max(factor, value - value % factor), value + factor - value % factor})
            raise UsageError(
                f"{name} must be divisible by {factor}, and {value} is not; try {' or '.join(map(str, near))}"
            )


def enlarged(sizes: Sizes, request: GenerateRequest) -> GenerateRequest:
    """Replace a request's size, if it is that of its input image, with the size of the result."""
    if request.image is None or request.width is None or request.height is None:
        return request
    return request.replace(width=sizes.enlarges * request.width, height=sizes.enlarges * request.height)


def task_of(sizes: Sizes, request: GenerateRequest) -> Task:
    """Return the task of a request for a checkpoint. Raises `UsageError` for a size its VAE does not support."""
    width, height = request.width or sizes.picture_size[0], request.height or sizes.picture_size[1]
    factor = sizes.vae_config.scale_factor
    check_sides(factor, width=width, height=height)
    if request.hires is not None:
        first, second = request.first_pass.replace(hires=None), request.second_pass((width, height), factor)
        task = task_of(sizes, second)
        steps = max(0, request.second_steps - (second.chosen_steps - task.steps))  # without those of a refiner
        coded = request.image is not None or not request.hires.upscaler.startswith("latent")
        return replace(task, steps=steps, from_picture=coded, first=task_of(sizes, first))
    custom = request.timesteps or request.sigmas
    steps = len(custom) if custom else request.chosen_steps
    latents = sizes.vae_config.latent_channels
    extra = sizes.unet_config.in_channels - latents
    begins = request.image is not None and extra in (0, 1, 1 + latents)  # no more, a depth map, a mask and an image
    taken = int(steps * (request.chosen_strength if begins else 1.0))
    if request.denoising_start is not None:
        taken = _left(steps, request.denoising_start, sizes.spacing)
    if request.denoising_end is not None:
        taken -= _left(steps, request.denoising_end, sizes.spacing)
    upscales, edits = extra == 3, extra == latents and not sizes.unet_config.is_k
    guided = request.chosen_scale > 1 and not sizes.unet_config.reads_guidance
    return Task(
        sizes=sizes,
        width=width,
        height=height,
        pictures=request.batch_size,
        prompts=len(request.prompts),
        steps=max(0, taken),
        rows=((3 if edits and request.chosen_image_scale >= 1 else 2) if guided else 1) + request.joined,
        from_picture=request.image is not None and not upscales,
        tile=max(sizes.unet_config.latent_size) if upscales and request.image is not None else None,
    )


def _left(steps: int, share: float, spacing: str) -> int:
    """Count the steps that are left to a checkpoint which takes over after this share of the training timesteps."""
    if spacing == "leading":
        times = [i * (_TRAINED // steps) + 1 for i in range(steps)]
    elif spacing == "trailing":
        times = [round(_TRAINED * (1 - i / steps)) - 1 for i in range(steps)]
    else:
        times = [(_TRAINED - 1) * i / max(1, steps - 1) for i in range(steps)]
    return sum(t < round(_TRAINED * (1 - share)) for t in times)


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """Explicit choices of the user, which take precedence. None leaves a choice to the plan.

    dtype            of all networks (also as fp32, fp16, bf16, auto); the fields of single networks override it
    attention        "fused", "chunked" or "split"; attention_bytes is the chunk size
    threads          number of CPU threads; all other fields are as in `Plan`
    once             nothing is generated after this request, so no network is needed again
    settled          names of fields that describe a loaded pipeline rather than something the user requested
    """

    device: str | None = None
    dtype: str | None = None
    text_encoder_dtype: str | None = None
    unet_dtype: str | None = None
    vae_dtype: str | None = None
    engine: str | None = None
    attention: str | None = None
    attention_bytes: int | None = None
    micro_batch: int | None = None
    vae_slicing: bool | None = None
    vae_tiling: bool | None = None
    offload: str | None = None
    eight_bit: bool | None = None
    compile: bool | None = None
    threads: int | None = None
    once: bool = False
    settled: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        words: dict[str, tuple[str, ...]] = {"engine": ("torch", "onednn")}
        words |= {"attention": ("fused", "chunked", "split"), "offload": ("none", "staged")}
        for name in ("dtype", *(f"{part}_dtype" for part in PARTS)):
            words[name] = tuple(DTYPE_BYTES)
            object.__setattr__(self, name, DTYPE_ALIASES.get(getattr(self, name), getattr(self, name)))
        for name, allowed in words.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value in allowed):
                raise UsageError(
                    f"there is no {name} {shown(value)}{suggest(str(value), allowed)}; use one of {', '.join(allowed)}"
                )
        for name in ("compile", "eight_bit"):
            check_argument(name, getattr(self, name), bool | None)
        for name in ("attention_bytes", "micro_batch", "threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, not {value!r}")

    def dtype_of(self, part: str) -> str | None:
        """Return the requested dtype of a network, or None."""
        return getattr(self, f"{part}_dtype") or self.dtype

    def wish(self, name: str) -> Any:
        """Return the requested value for a field of `Plan`, or None."""
        value = self.dtype_of(name.removesuffix("_dtype")) if name.endswith("_dtype") else getattr(self, name)
        return None if value == "auto" else value

    def asked(self, name: str) -> bool:
        """Return whether the user requested a choice, rather than inheriting it from a loaded pipeline."""
        return self.wish(name) is not None and name not in self.settled

    def settled_as(self, choices: Mapping[str, Any]) -> Wishes:
        """Return these wishes for a pipeline that is already loaded with the given choices."""
        unasked = {name for name, value in choices.items() if value not in (self.wish(name), f"{self.wish(name)}:0")}
        return replace(self, dtype=None, settled=frozenset(unasked), **choices)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a request runs on a machine.

    memory_format   "contiguous" or "channels_last"
    engine          "torch", or "onednn": weights packed once, and our own kernels; x86 only
    attention       "fused" (torch's own), "chunked": no score matrix larger than `attention_bytes`, or "split": by
                    plain products over pieces of the keys; on Metal, heads too wide for fused kernels are chunked
    attention_keys  maximum number of keys to sum at a time; None for no limit
    micro_batch     images per call of the U-Net
    singly          convolutions take the images of a batch one at a time
    offload         "none", or "staged": unload the text encoder after encoding, and the U-Net before decoding
    eight_bit       the U-Net's large weights are stored in 8 bits, which changes the image slightly
    steps           number of steps in the schedule, as requested
    keep_freed      while the VAE decodes, keep large freed tensors for reuse
    reasons         one sentence per choice
    faults          what the device computes incorrectly, and what is done instead
    peak_bytes      estimated peak memory: of the process on a CPU, of the device otherwise
    free_bytes      free memory
    seconds         estimated time; includes the start of the command with `once`, otherwise excludes loading
    """

    device: str
    text_encoder_dtype: str
    unet_dtype: str
    vae_dtype: str
    memory_format: str
    engine: str
    attention: str
    attention_bytes: int | None
    micro_batch: int
    vae_slicing: bool
    vae_tiling: bool
    offload: str
    compile: bool
    threads: int | None
    steps: int
    eight_bit: bool = False
    keep_freed: bool = False
    attention_keys: int | None = None
    singly: bool = False
    faults: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    peak_bytes: int = 0
    free_bytes: int = 0
    seconds: float = 0.0

    @property
    def kind(self) -> str:
        """The device type: "cpu", "cuda" or "mps"."""
        return self.device.partition(":")[0]

    def dtype_of(self, part: str) -> str:
        """Return the dtype of a network."""
        return getattr(self, f"{part}_dtype")


def published_sizes(name: str) -> Sizes:
    """Return the sizes of a family's published float32 checkpoint. Raises `UsageError` if it has no prompt."""
    row = FAMILIES[name]
    if not row.encoders:
        raise UsageError(f"{row.title} does not use a prompt; give a family that does")
    texts = [parse(CLIPTextConfig, encoder.config)[0] for encoder in row.encoders]
    layers = [text_layers(text, 1, projected=one.projected) for text, one in zip(texts, row.encoders, strict=True)]
    unet, vae = parse(UNet2DConditionConfig, row.unet)[0], parse(AutoencoderKLConfig, row.vae)[0]
    return Sizes(
        name=row.title,
        text_encoder_configs=tuple(texts),
        unet_config=unet,
        vae_config=vae,
        text_encoder=_float32(sum(layer.parameters for parts in layers for layer in parts)),
        unet=_float32(count_parameters(unet)),
        vae=_float32(count_parameters(vae)),
        spacing=row.scheduler.get("timestep_spacing", "leading"),
    )


def count_parameters(
    config: CLIPTextConfig
    | CLIPVisionConfig
    | UNet2DConditionConfig
    | ControlNetConfig
    | T2IAdapterConfig
    | DPTConfig
    | AutoencoderKLConfig
    | AutoencoderTinyConfig,
    *,
    projected: bool = False,
) -> int:
    """Return the number of parameters of a network. projected: whether a text encoder has a projection."""
    if isinstance(config, CLIPTextConfig):
        layers = text_layers(config, config.max_position_embeddings, projected=projected)
    elif isinstance(config, CLIPVisionConfig):
        layers = vision_layers(config)
    elif isinstance(config, UNet2DConditionConfig):
        layers = unet_layers(config, 8, 8, 1)
    elif isinstance(config, T2IAdapterConfig):
        return _adapter_parameters(config)
    elif isinstance(config, DPTConfig):
        return config.parameters
    elif isinstance(config, ControlNetConfig):
        layers, _ = control_layers(config, 8, 8, 1)
    else:
        side = config.scale_factor
        layers = encoder_layers(config, side, side) + decoder_layers(config, 1, 1)
    return sum(layer.parameters for layer in layers)


def _adapter_parameters(config: T2IAdapterConfig) -> int:
    """Count a T2I-Adapter's parameters. Its compute is ignored: it runs once per image."""
    light, total = config.adapter_type == "light_adapter", 0
    if not light:
        total += (9 * config.in_channels * config.downscale_factor**2 + 1) * config.channels[0]
    for channels, out, _ in config.blocks:
        width = out // 4 if light else out
        total += (channels + 1) * width if light or channels != width else 0
        total += config.num_res_blocks * ((9 + (9 if light else 1)) * width**2 + 2 * width)
        total += (width + 1) * out if light else 0
    return total


def _float32(parameters: int) -> Part:
    return Part(parameters, 4 * parameters)
