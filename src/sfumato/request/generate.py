"""The one description of what to generate, shared by the command line, Python calls and replay."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

from sfumato.errors import UsageError
from sfumato.request.controls import Control, Controls, ImagePrompt, ImagePrompts
from sfumato.request.details import (
    LARGEST_SEEDS,
    AdapterFile,
    Adapters,
    EmbeddingFile,
    Embeddings,
    Framed,
    Framing,
    FreeU,
    GuidanceInterval,
    Interval,
    Noise,
    Noised,
    Reweighted,
)
from sfumato.request.fast import Fast, Hastened
from sfumato.request.hires import Hires, SecondPass, share_of
from sfumato.request.masks import Mask, Masked
from sfumato.request.records import Layers, Level, Pixels, Record, Seed, Share, Weight, check_word
from sfumato.values import Within, check_argument, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MOST_STEPS", "SPACINGS", "SYNTAXES", "GenerateRequest", "as_request"]

# Larger numbers of steps or images can only be a mistake.
MOST_STEPS = 10_000
MOST_PICTURES = 10_000

Texts = Annotated[tuple[str, ...], Within(1, MOST_PICTURES)]
Numbers = Annotated[tuple[float, ...], Within(1, MOST_STEPS + 1)]

# Noise schedules, and prompt syntaxes.
SPACINGS = ("uniform", "karras", "exponential", "sgm_uniform", "simple", "beta", "ddim_uniform")
SYNTAXES = ("plain", "a1111", "comfyui", "compel")
# Defaults if neither the request nor the checkpoint has a value.
STEPS, GUIDANCE_SCALE = 50, 7.5
STRENGTH = 0.8
# The fraction of the noise that is removed before a refiner takes over (arXiv 2307.01952, section 2.5).
REFINER_START = 0.8


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(Record):
    """What to generate. An image is a function of (checkpoint, request, seed, index).

    prompt            what the image should show: one text, or several for several images
    negative_prompt   what it should not show: one text for all, or one per prompt
    prompt_syntax     prompt grammar: "plain" is literal and truncated to the model's length; "a1111", "comfyui" and
                      "compel" have weights and any length (docs/guides/prompts.md)
    prompt_2, negative_prompt_2  prompts for a second text encoder; the first one's if None
    steps             denoising steps; the checkpoint's own number if None
    guidance_scale    how closely to follow the prompt (1 or less: no guidance, half the work); the checkpoint's if None
    guidance_rescale  0 to 1; reduces overexposure (arXiv 2305.08891, section 3.4)
    guidance_interval  the steps or noise levels with guidance (arXiv 2404.07724)
    freeu             reweights the U-Net's skip connections (arXiv 2309.11497)
    draft             a quick first look: fewer steps, and a tiny decoder where one is at hand, in place of what the
                      request leaves open
    fast              less work, with a promise of how near the image is to the exact one
    seamless          "x", "y" or "xy": make the image tile along these axes, with circular padding in all convolutions
    hires             a second pass over an enlarged image (A1111's "Hires. fix")
    seed              image i uses seed + i; None chooses one, which the result contains
    rng               random number generator: "torch", "numpy" as in Apple's Core ML runners, "cuda" as on NVIDIA GPUs
    noise             how to generate noise, to reproduce images of other programs
    count             images per prompt
    width, height     pixels; the checkpoint's own size if None
    scheduler         a name such as "dpmpp_2m_karras" or "DPM++ 2M Karras"; the checkpoint's own if None
    spacing           one of A1111's noise schedules, such as "karras"; the scheduler's own if None
    eta               noise added by DDIM and TCD, 0 (none) to 1
    clip_skip         how many of the text encoder's last layers to skip
    negative_clip_skip  the same for the negative prompt; the ecosystem's behavior for the family if None
    timesteps, sigmas a custom schedule instead of `steps`, for schedulers that accept one
    image, strength   the image file to start from, and how much to change it: 0 (not at all) to 1 (completely); if
                      None, 1 with a mask and 0.8 without
    mask              the area of that image to change; the rest stays as it is
    depth             the file of a depth map, with near areas white, for depth-to-image checkpoints
    image_guidance_scale  how closely instruction-based editing models follow the image; 1.5 if None; below 1, there is
                      no guidance at all
    noise_level       noise added to the input of upscalers (20 if None) and unCLIP (0 if None), out of 1000
    original_inference_steps  length of the schedule that few-step schedulers (LCM, TCD) take their steps from
    denoising_end     stop when this fraction of the noise is removed, so that another checkpoint can continue
    denoising_start   continue from such latents, given as `image`; replaces strength
    refiner           the checkpoint that continues there, a folder or hub id; from 0.8 if denoising_end is None
    vae               another VAE for the checkpoint: a folder, a safetensors file, or a hub id in the local cache
    vae_weights       the required hash of that VAE's weights, as recorded in recipes
    framing           size conditioning, for checkpoints that use it
    negative_framing  size conditioning of the negative prompt; fields that are None are taken from `framing`
    adapters          files that change the weights, in addition to those loaded into the pipeline
    adapter_scale     multiplies the weights of those loaded into the pipeline
    lora_dir          the folder of adapters for <lora:name:weight> in prompts, in A1111's syntax
    embeddings        textual inversion files
    controls          control images, each with a ControlNet or T2I-Adapter
    image_prompts     images to use like a prompt, each with an IP-Adapter
    """

    prompt: str | Texts = ""
    negative_prompt: str | Texts | None = None
    prompt_syntax: str = "plain"
    prompt_2: str | Texts | None = None
    negative_prompt_2: str | Texts | None = None
    steps: Annotated[int, Within(1, MOST_STEPS)] | None = None
    guidance_scale: Weight | None = None
    guidance_rescale: Share = 0.0
    guidance_interval: Interval | None = None
    freeu: Reweighted | None = None
    draft: bool = False
    fast: Hastened | None = None
    seamless: str | None = None
    hires: SecondPass | None = None
    seed: Seed | None = None
    rng: Annotated[str, "torch, numpy or cuda"] = "torch"
    noise: Noised = Noise()
    count: Annotated[int, Within(1, MOST_PICTURES)] = 1
    width: Pixels | None = None
    height: Pixels | None = None
    scheduler: str | None = None
    spacing: str | None = None
    eta: Share = 0.0
    clip_skip: Layers | None = None
    negative_clip_skip: Layers | None = None
    timesteps: Numbers | None = None
    sigmas: Numbers | None = None
    image: str | None = None
    strength: Share | None = None
    mask: Masked | None = None
    depth: str | None = None
    image_guidance_scale: Weight | None = None
    noise_level: Level | None = None
    original_inference_steps: Annotated[int, Within(1, MOST_STEPS)] | None = None
    denoising_start: Share | None = None
    denoising_end: Share | None = None
    refiner: str | None = None
    vae: Annotated[str, Within(1, 4096)] | None = None
    vae_weights: Annotated[str, Within(32, 32)] | None = None
    framing: Framed = Framing()
    negative_framing: Framed | None = None
    adapters: Adapters = ()
    adapter_scale: Weight = 1.0
    lora_dir: str | None = None
    embeddings: Embeddings = ()
    controls: Controls = ()
    image_prompts: ImagePrompts = ()
    nested = {
        "framing": Framing, "negative_framing": Framing, "noise": Noise, "adapters": AdapterFile,
        "embeddings": EmbeddingFile, "guidance_interval": GuidanceInterval, "freeu": FreeU, "hires": Hires,
        "mask": Mask, "controls": Control, "image_prompts": ImagePrompt, "fast": Fast,
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_texts()
        check_word("rng", self.rng, LARGEST_SEEDS)
        self._check_seed(self.seed)
        check_word("prompt_syntax", self.prompt_syntax, SYNTAXES)
        check_word("spacing", self.spacing or "uniform", SPACINGS)
        check_word("seamless", self.seamless or "x", ("x", "y", "xy"))
        if self.spacing is not None and (self.timesteps is not None or self.sigmas is not None):
            raise UsageError("spacing and a custom schedule cannot be combined; pass one of them")
        if self.timesteps is not None and self.sigmas is not None:
            raise UsageError("timesteps and sigmas cannot be combined; pass one of them")
        if self.denoising_start is not None and self.denoising_start >= (self.denoising_end or 1.0):
            raise UsageError(
                f"denoising_start, {self.denoising_start:g}, must be below denoising_end, {self.denoising_end or 1:g}"
            )
        self._check_second_pass()
        if self.draft and self.fast is not None:
            raise UsageError("draft and fast cannot be combined: a draft is not near the exact image; drop one of them")
        if self.mask is not None and self.image is None:
            raise UsageError("a mask needs an image to change; give the image too")
        if self.refiner is not None and self.denoising_end in (0, 1):
            raise UsageError(
                f"a refiner must take over between the first and the last step, not at {self.denoising_end:g}"
            )

    def _check_second_pass(self) -> None:
        if self.hires is None:
            return
        check_word("spacing", self.hires.spacing or "uniform", SPACINGS)
        handed_on = () if self.refiner is not None else ("denoising_end",)
        for name in ("denoising_start", *handed_on):
            if getattr(self, name) is not None:
                raise UsageError(f"hires and {name} cannot be combined; drop one of them")

    def _check_texts(self) -> None:
        for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"):
            if (value := getattr(self, name)) is None:
                continue
            for text in (value,) if isinstance(value, str) else value:
                _check_text(name, text)
            if name != "prompt" and isinstance(value, tuple) and len(value) != len(self.prompts):
                raise UsageError(
                    f"{name} must be one text, or one per prompt; got {len(value)} for "
                    f"{len(self.prompts)} prompt{'s' * (len(self.prompts) > 1)}"
                )
        if self.batch_size > MOST_PICTURES:
            raise UsageError(f"{self.batch_size} images are too many for one request; the limit is {MOST_PICTURES}")

    def _check_seed(self, seed: int | None) -> None:
        largest = LARGEST_SEEDS[self.rng]
        if seed is not None and seed > largest:
            limits = f"0 to 2**{largest.bit_length()} - 1 with rng {self.rng}"
            raise UsageError(f"seed must be a whole number from {limits}, not {seed!r}")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each image, wrapping around to 0 after the largest one; empty if no seed is set."""
        if self.seed is None:
            return ()
        return tuple((self.seed + index) % (LARGEST_SEEDS[self.rng] + 1) for index in range(self.batch_size))

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, as a tuple even if there is only one."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @property
    def negative_prompts(self) -> tuple[str, ...]:
        """One negative prompt per prompt; empty texts if none was given."""
        return self._per_prompt(self.negative_prompt or "")

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """The prompts for the first text encoder, and for the second one."""
        return self.prompts, self._per_prompt(self.prompt_2 or self.prompt)

    @property
    def negative_texts(self) -> tuple[tuple[str, ...], ...]:
        """The same for the negative prompts."""
        return self.negative_prompts, self._per_prompt(self.negative_prompt_2 or self.negative_prompts)

    @property
    def joined(self) -> int:
        """The maximum number of additional prompts that `AND` joins to a prompt."""
        if self.prompt_syntax != "a1111":
            return 0
        return max(len(re.findall(r"\bAND\b", text)) for texts in self.texts for text in texts)

    def _per_prompt(self, text: str | tuple[str, ...]) -> tuple[str, ...]:
        return (text,) * len(self.prompts) if isinstance(text, str) else text

    @property
    def batch_size(self) -> int:
        """The total number of images."""
        return len(self.prompts) * self.count

    def check_with(self, prompt: str, seed: int) -> None:
        """Raise `UsageError` unless this request, of one image, is valid with another prompt and seed.

        Much quicker than `replace` with both, which checks all fields.
        """
        check_argument("prompt", prompt, str)
        check_argument("seed", seed, Seed)
        _check_text("prompt", prompt)
        self._check_seed(seed)

    def alone(self, place: int) -> Self:
        """Return a request for a single image of one of the prompts, counted from 0."""
        names = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
        lists = {name: value for name in names if isinstance(value := getattr(self, name), tuple)}
        return self.replace(count=1, **{name: value[place] for name, value in lists.items()})

    @property
    def first_pass(self) -> Self:
        """The request for the first pass. If there is a second one (`hires`), a refiner takes over in that one."""
        return self if self.hires is None else self.replace(refiner=None, denoising_end=None)

    @property
    def second_steps(self) -> int:
        """The steps of the second pass; by default as many as in the first."""
        custom = self.timesteps or self.sigmas
        return (self.hires and self.hires.steps) or (len(custom) if custom else self.chosen_steps)

    def second_pass(self, size: tuple[int, int], unit: int) -> Self:
        """Return the request for the second pass (`hires`) over a first image of this size (width, height).

        As in A1111, it runs the requested number of steps, at the end of a schedule that is longer by a factor of
        1 / strength. A custom schedule applies only to the first pass. unit: pixels per latent pixel.
        """
        hires, steps = self.hires or Hires(), self.second_steps
        whole = min(MOST_STEPS, max(steps, int(steps / min(hires.strength, 0.999))))
        width, height = hires.sizes(*size, unit)[1]
        changes = {
            "prompt": None if hires.prompt is None else self._per_prompt(hires.prompt),
            "negative_prompt": hires.negative_prompt,
            "guidance_scale": hires.guidance_scale,
            "scheduler": hires.scheduler,
        }
        return self.replace(
            **{name: value for name, value in changes.items() if value is not None},
            **dict.fromkeys(("hires", "image", "mask", "timesteps", "sigmas", "fast")),
            width=width,
            height=height,
            steps=whole,
            strength=share_of(steps, whole),
            spacing=hires.spacing or (self.spacing if hires.scheduler is None else None),
        )

    def last_pass(self, size: tuple[int, int], unit: int) -> Self:
        """Return the request for the pass in which a refiner takes over. size: (width, height) of the first pass."""
        return self.replace(width=size[0], height=size[1]) if self.hires is None else self.second_pass(size, unit)

    @property
    def chosen_steps(self) -> int:
        """Denoising steps, 50 if not set."""
        return STEPS if self.steps is None else self.steps

    @property
    def chosen_scale(self) -> float:
        """The guidance scale, 7.5 if not set."""
        return GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale

    @property
    def chosen_strength(self) -> float:
        """How much to change the input image; if not set, 1 with a mask and 0.8 without."""
        return self.strength if self.strength is not None else STRENGTH if self.mask is None else 1.0

    @property
    def chosen_image_scale(self) -> float:
        """How closely to follow an image that is edited, 1.5 if not set."""
        return 1.5 if self.image_guidance_scale is None else self.image_guidance_scale

    @property
    def pictures(self) -> dict[str, str]:
        """The image files of the request, by field."""
        named = {"image": self.image, "mask": self.mask and self.mask.file, "depth": self.depth}
        return {name: file for name, file in named.items() if file is not None}

    def settled(self, suggested: Mapping[str, Any]) -> Self:
        """Return the request with missing values filled in, from the checkpoint's settings or general defaults."""
        left_open = {name: value for name, value in suggested.items() if getattr(self, name) is None}
        request = self.replace(**left_open)
        end = REFINER_START if self.refiner is not None and self.denoising_end is None else self.denoising_end
        return request.replace(steps=request.chosen_steps, guidance_scale=request.chosen_scale, denoising_end=end)


def _check_text(name: str, text: str) -> None:
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise UsageError(f"the {name.replace('_', ' ')} contains bytes that are not valid UTF-8; type it again")


def as_request(value: object) -> GenerateRequest:
    """Return the value if it is a request; otherwise raise `UsageError`."""
    if not isinstance(value, GenerateRequest):
        raise UsageError(f"expected a GenerateRequest, not {shown(value)}")
    return value
