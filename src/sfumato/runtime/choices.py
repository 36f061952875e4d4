"""What a plan is made of: the networks' sizes, the task, the user's wishes, and the choices themselves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from sfumato.configs import AutoencoderKLConfig, CLIPTextConfig, UNet2DConditionConfig
from sfumato.errors import UsageError, suggest
from sfumato.runtime.layers import decoder_layers, encoder_layers, text_layers, unet_layers

if TYPE_CHECKING:
    from sfumato.configs import AutoencoderTinyConfig
    from sfumato.request import GenerateRequest
    from sfumato.runtime.layers import Layer

__all__ = [
    "DTYPE_BYTES",
    "PARTS",
    "Part",
    "Plan",
    "Sizes",
    "Task",
    "Wishes",
    "check_sides",
    "count_parameters",
    "stable_diffusion_15",
    "task_of",
]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "auto": None}
PARTS = ("text_encoder", "unet", "vae")


@dataclass(frozen=True)
class Part:
    """One network's weights: how many numbers, and how many bytes they take where they are stored."""

    parameters: int
    stored_bytes: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A checkpoint without its weights: configs, and the number and bytes of the parameters of each part."""

    name: str
    text_encoder_config: CLIPTextConfig
    unet_config: UNet2DConditionConfig
    vae_config: AutoencoderKLConfig | AutoencoderTinyConfig
    text_encoder: Part
    unet: Part
    vae: Part
    tokens: int = 77

    @property
    def picture_size(self) -> tuple[int, int]:
        """Width and height of the checkpoint's own pictures, in pixels."""
        size, factor = self.unet_config.sample_size or 64, self.vae_config.scale_factor
        height, width = (size, size) if isinstance(size, int) else size[:2]
        return width * factor, height * factor


@dataclass(frozen=True, kw_only=True)
class Task:
    """A request, as far as memory and time are concerned. `rows` is 2 with guidance, which runs the U-Net twice."""

    sizes: Sizes
    width: int
    height: int
    pictures: int
    prompts: int
    steps: int
    rows: int
    from_picture: bool

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        factor = self.sizes.vae_config.scale_factor
        return self.height // factor, self.width // factor

    @cached_property
    def unet_layers(self) -> list[Layer]:
        """The U-Net's layers at this size."""
        return unet_layers(self.sizes.unet_config, *self.latent_size, self.sizes.tokens)

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
        """The text encoder's layers."""
        return text_layers(self.sizes.text_encoder_config, self.sizes.tokens)


def check_sides(factor: int, **sides: int | None) -> None:
    """Raise `UsageError` for a width or height that is no multiple of the VAE's factor; None is left to the model."""
    for name, value in sides.items():
        if value is not None and value % factor:
            near = sorted({max(factor, value - value % factor), value + factor - value % factor})
            raise UsageError(
                f"{name} must be divisible by {factor}, and {value} is not; try {' or '.join(map(str, near))}"
            )


def task_of(sizes: Sizes, request: GenerateRequest) -> Task:
    """What a request asks of a checkpoint. Raises `UsageError` for a size that its VAE cannot make."""
    width, height = request.width or sizes.picture_size[0], request.height or sizes.picture_size[1]
    factor = sizes.vae_config.scale_factor
    check_sides(factor, width=width, height=height)
    custom = request.timesteps or request.sigmas
    steps = len(custom) if custom else request.steps
    guided = request.guidance_scale > 1 and sizes.unet_config.time_cond_proj_dim is None
    return Task(
        sizes=sizes,
        width=width,
        height=height,
        pictures=request.batch_size,
        prompts=len(request.prompts),
        steps=steps if request.image is None else min(steps, int(steps * request.strength)),
        rows=2 if guided else 1,
        from_picture=request.image is not None,
    )


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """Explicit choices of the user, which win; None leaves a choice to the plan.

    dtype            of all three networks (also as fp32, fp16, bf16, auto); the fields of single networks go before it
    attention        "fused" or "chunked"; attention_bytes is the size of a chunk
    threads          of the CPU; everything else as in `Plan`
    once             nothing is drawn after this request, so that no network is needed again
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
    compile: bool | None = None
    threads: int | None = None
    once: bool = False

    def __post_init__(self) -> None:
        words: dict[str, tuple[str, ...]] = {"engine": ("torch", "onednn")}
        words |= {"attention": ("fused", "chunked"), "offload": ("none", "staged")}
        for name in ("dtype", *(f"{part}_dtype" for part in PARTS)):
            words[name] = tuple(DTYPE_BYTES)
            object.__setattr__(self, name, DTYPE_ALIASES.get(getattr(self, name), getattr(self, name)))
        for name, allowed in words.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise UsageError(
                    f"there is no {name} {value!r}{suggest(str(value), allowed)}; it is one of {', '.join(allowed)}"
                )
        for name in ("attention_bytes", "micro_batch", "threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, not {value!r}")

    def dtype_of(self, part: str) -> str | None:
        """The precision wished for one of the networks."""
        return getattr(self, f"{part}_dtype") or self.dtype


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a request is carried out on a machine.

    memory_format   "contiguous" or "channels_last"
    engine          "torch", or "onednn": weights packed once, and our own kernels; x86 only
    attention       "fused" (torch's own) or "chunked": no score matrix larger than `attention_bytes`
    micro_batch     pictures per call of the U-Net
    offload         "none", or "staged": the text encoder leaves memory after encoding, the U-Net before decoding
    steps           of the schedule, as requested
    keep_freed      while the VAE decodes, large tensors that are freed stay with the process for the next one
    reasons         each choice in a sentence
    peak_bytes      estimated peak: of the process on a CPU, of the device's memory elsewhere
    free_bytes      what the device had for it
    seconds         estimated time, loading not counted
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
    keep_freed: bool = False
    reasons: tuple[str, ...] = ()
    peak_bytes: int = 0
    free_bytes: int = 0
    seconds: float = 0.0

    @property
    def kind(self) -> str:
        """The kind of device: "cpu", "cuda" or "mps"."""
        return self.device.partition(":")[0]

    def dtype_of(self, part: str) -> str:
        """The precision of one of the networks."""
        return getattr(self, f"{part}_dtype")


def stable_diffusion_15() -> Sizes:
    """The sizes of Stable Diffusion 1.5 stored in float32, from its published configs."""
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12)
    unet = UNet2DConditionConfig(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKLConfig(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
    )
    return Sizes(
        name="Stable Diffusion 1.5",
        text_encoder_config=text,
        unet_config=unet,
        vae_config=vae,
        text_encoder=_float32(text),
        unet=_float32(unet),
        vae=_float32(vae),
    )


def count_parameters(
    config: CLIPTextConfig | UNet2DConditionConfig | AutoencoderKLConfig | AutoencoderTinyConfig,
) -> int:
    """Numbers in the weights of the network that a config describes."""
    if isinstance(config, CLIPTextConfig):
        layers = text_layers(config, config.max_position_embeddings)
    elif isinstance(config, UNet2DConditionConfig):
        layers = unet_layers(config, 8, 8, 1)
    else:
        side = config.scale_factor
        layers = encoder_layers(config, side, side) + decoder_layers(config, 1, 1)
    return sum(layer.parameters for layer in layers)


def _float32(config: CLIPTextConfig | UNet2DConditionConfig | AutoencoderKLConfig) -> Part:
    parameters = count_parameters(config)
    return Part(parameters, 4 * parameters)
