"""A loaded checkpoint as a value. All code that generates images takes it, and knows nothing of pipelines."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from sfumato import schedulers
from sfumato.adapters.outfit import Outfit
from sfumato.checkpoints.family import known_family, settings_of
from sfumato.errors import UsageError
from sfumato.families import EMBEDDED, find
from sfumato.image_processor import DPTImageProcessor
from sfumato.models.t2i_adapter import T2IAdapter
from sfumato.models.text_encoder import CLIPTextModelWithProjection
from sfumato.pipelines.components import COMPONENTS, FLAGS, check_component
from sfumato.pipelines.multi_control import Several
from sfumato.runtime.choices import NETWORKS

if TYPE_CHECKING:
    from sfumato.families import Encoder, Family
    from sfumato.models import (
        AutoencoderKL,
        AutoencoderTiny,
        CLIPTextModel,
        CLIPVisionModelWithProjection,
        ControlNetModel,
        DPTForDepthEstimation,
        StableUnCLIPImageNormalizer,
        UNet2DConditionModel,
    )
    from sfumato.models.base import Model
    from sfumato.pipelines.image_prompts import Carried
    from sfumato.pipelines.multi_control import MultiAdapter
    from sfumato.pipelines.words import Words
    from sfumato.request import GenerateRequest
    from sfumato.schedulers.base import Scheduler
    from sfumato.text.tokenizer import CLIPTokenizer

__all__ = ["Parts", "Reader", "check_control", "check_latents"]

log = logging.getLogger("sfumato")


@dataclass(frozen=True)
class Reader:
    """A text encoder with its role, its tokenizer, and how its family uses it."""

    role: str
    tokenizer: CLIPTokenizer
    encoder: CLIPTextModel
    how: Encoder


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """The components and properties of a checkpoint.

    family: found from the configs if not given; name: where it came from, as written in recipes; suggested: its default
    settings, as keywords of a `GenerateRequest`; words: the vocabulary of a small model, None for others; options: how
    its file was opened; outfit: added adapters and embeddings; controls: the control networks, including `controlnet`
    or `adapter` if present; image_adapters: IP-Adapters; left_out: the names of missing components, which are replaced
    with empty ones (left_out.py). Raises `UsageError` for a component of the wrong type.
    """

    vae: AutoencoderKL | AutoencoderTiny
    unet: UNet2DConditionModel
    scheduler: Scheduler
    text_encoder: CLIPTextModel | None = None
    text_encoder_2: CLIPTextModel | None = None
    tokenizer: CLIPTokenizer | None = None
    tokenizer_2: CLIPTokenizer | None = None
    image_encoder: CLIPVisionModelWithProjection | None = None
    image_normalizer: StableUnCLIPImageNormalizer | None = None
    image_noising_scheduler: Scheduler | None = None
    low_res_scheduler: Scheduler | None = None
    controlnet: ControlNetModel | Several | None = None
    adapter: T2IAdapter | MultiAdapter | None = None
    depth_estimator: DPTForDepthEstimation | None = None
    feature_extractor: DPTImageProcessor | None = None
    family: Family = None  # pyright: ignore[reportAssignmentType]
    name: str = "unnamed"
    suggested: dict[str, Any] = field(default_factory=dict)
    words: Words | None = None
    options: dict[str, Any] = field(default_factory=dict)
    outfit: Outfit = field(default_factory=Outfit)
    controls: tuple[Model, ...] = ()
    image_adapters: tuple[Carried, ...] = ()
    left_out: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("controlnet", "adapter"):
            if isinstance(networks := getattr(self, name), (list, tuple)):
                object.__setattr__(self, name, Several.of(networks))
        if not isinstance(self.feature_extractor, DPTImageProcessor):  # it belongs to a network that is not here
            object.__setattr__(self, "feature_extractor", None)
        for component in COMPONENTS:
            check_component(component, getattr(self, component))
        family = self.family or known_family(
            self.unet.config.to_dict(),
            self.vae.config.to_dict(),
            self.scheduler.config.to_dict() | {"_class_name": type(self.scheduler).__name__},
            encoders=len(self.encoders) or (None if self.image_encoder is None else 0),
        )
        object.__setattr__(self, "family", self._fitting(family))
        if (beside := self.beside) is not None:
            object.__setattr__(self, "controls", tuple(beside.nets) if isinstance(beside, Several) else (beside,))
        for network in self.controls:
            check_control(self.unet, network)
        if family.labels == "noise level":  # early copies of upscalers do not name their scale, or name another
            self.vae.scale_assumed = True
        self.vae.assume_scale(family.vae)

    def having(self, components: Mapping[str, Any]) -> Parts:
        """Return the parts with these components, which are then no longer missing."""
        left_out = self.left_out - components.keys()
        family = self.family if left_out == self.left_out else None  # not the one of the placeholders
        return replace(self, **components, left_out=left_out, family=family)

    def check_whole(self) -> None:
        """Raise `UsageError` if components are missing: without them, only prompts can be encoded."""
        if self.left_out:
            raise UsageError(
                f"{' and '.join(sorted(self.left_out))} was left out (None), so only encode_prompt works; load it to "
                "generate images"
            )

    @property
    def lead(self) -> Model:
        """The network whose device and precision are the checkpoint's: the U-Net, or the first one without it."""
        return next(one for role, one in {"unet": self.unet, **self.networks}.items() if role not in self.left_out)

    @property
    def beside(self) -> Any:
        """The ControlNet or T2I-Adapter that a pipeline was created with, or several as one; None if there is none."""
        return self.controlnet or self.adapter

    def _fitting(self, family: Family) -> Family:
        """Return the family with the sizes that the U-Net expects, if the width of the pooled prompt is known."""
        config, pooled = self.unet.config, self.pooled_width
        if not family.sizes or pooled is None:
            return family
        numbers = ((config.projection_class_embeddings_input_dim or 0) - pooled) / (config.addition_time_embed_dim or 1)
        for last, wanted in EMBEDDED.items():
            if numbers == wanted:
                return replace(family, sizes=(*family.sizes[:-1], last))
        raise UsageError(
            f"this U-Net needs {config.projection_class_embeddings_input_dim} values for pooled prompts and sizes, "
            f"which no family combines with a text encoder that gives {pooled}; they belong to different checkpoints"
        )

    def told(self, flags: Mapping[str, Any]) -> Parts:
        """Return a copy with the ecosystem's flags applied to the family."""
        family = self.family
        zeros, scored = flags.get("force_zeros_for_empty_prompt"), flags.get("requires_aesthetics_score")
        if zeros is not None:
            family = replace(family, absent_negative="zeros" if zeros else "empty")
        if scored is not None and family.sizes:
            family = replace(family, sizes=(*family.sizes[:-1], "aesthetic_score" if scored else "target_size"))
        if flags.get("max_noise_level") is not None:
            family = replace(family, more=family.more | {"max_noise_level": flags["max_noise_level"]})
        parts = replace(self, family=family)
        if parts.family.sizes != family.sizes:
            does = "has no input for an" if scored else "expects an"
            log.warning(
                "requires_aesthetics_score is %s, but the U-Net %s aesthetic score; it is ignored", scored, does
            )
        return parts

    @property
    def flags(self) -> dict[str, Any]:
        """The ecosystem's flags for this family; the inverse of `told`."""
        family = self.family
        values = (family.absent_negative == "zeros", "aesthetic_score" in family.sizes, self.max_noise_level)
        return dict(zip(FLAGS, values, strict=True))

    @property
    def components(self) -> dict[str, Any]:
        """The existing networks, tokenizers and schedulers, by the names of their folders."""
        every = {component: getattr(self, component) for component in COMPONENTS}
        return {component: value for component, value in every.items() if value is not None}

    @property
    def networks(self) -> dict[str, Model]:
        """The existing networks, by role."""
        return {role: network for part in NETWORKS for role, network in self.stage(part).items()}

    def stage(self, part: str) -> dict[str, Model]:
        """Return the networks that are in memory together for a stage, by role."""
        every = {role: getattr(self, role) for role in NETWORKS[part]}
        if part == "unet":
            every |= {f"control_{i}": network for i, network in enumerate(self.controls)}
        return {role: network for role, network in every.items() if network is not None}

    @property
    def adaptable(self) -> dict[str, Model]:
        """The networks that adapters can change, by role."""
        return {role: network for role, network in self.networks.items() if role == "unet" or role.startswith("text")}

    @property
    def encoders(self) -> list[CLIPTextModel]:
        """The text encoders, in the order in which their embeddings are concatenated."""
        return [one for one in (self.text_encoder, self.text_encoder_2) if one is not None]

    @property
    def tokenizers(self) -> list[CLIPTokenizer]:
        """The tokenizers, in the same order."""
        return [one for one in (self.tokenizer, self.tokenizer_2) if one is not None]

    @property
    def readers(self) -> list[Reader]:
        """The text encoders with their tokenizers, in this order. Raises `UsageError` if the family needs others."""
        wanted, roles = self.family.encoders, [role for role in self.networks if role.startswith("text")]
        if len(roles) != len(wanted) or len(self.tokenizers) != len(roles):
            raise UsageError(
                f"{self.family.title} needs {len(wanted)} text encoders with a tokenizer each, but there are "
                f"{len(roles)} and {len(self.tokenizers)}; pass them, or embeddings in place of prompts"
            )
        every = zip(roles, self.tokenizers, self.encoders, wanted, strict=True)
        return [Reader(role, tokenizer, encoder, how) for role, tokenizer, encoder, how in every]

    @property
    def max_noise_level(self) -> int:
        """The maximum noise level of an upscaler's input, as a timestep of its scheduler."""
        return self.family.more.get("max_noise_level", 350)

    def noising(self, role: str) -> Scheduler:
        """Return the scheduler that adds noise to an input image or embedding, by its role, or the family's default."""
        config = self.family.more.get(role, {})
        found = getattr(self, role)
        return found or getattr(schedulers, config.get("_class_name", "DDPMScheduler")).from_config(config)

    @property
    def pooled_width(self) -> int | None:
        """The width of a pooled prompt; None if no text encoder produces one."""
        projecting = (one for one in self.encoders if isinstance(one, CLIPTextModelWithProjection))
        return next((one.config.projection_dim for one in projecting), None)

    @property
    def prompt_tokens(self) -> int:
        """The maximum number of tokens of a prompt, including start and end."""
        return min((one.model_max_length for one in self.tokenizers), default=77)

    @property
    def settings(self) -> dict[str, Any]:
        """The default settings for requests, as fields of a `GenerateRequest`."""
        return settings_of(self.family) | self.suggested

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel, along each side."""
        return self.vae.config.scale_factor

    @property
    def state_dtype(self) -> torch.dtype:
        """The precision of the loop's latents (docs/adr/0003): float64 if the U-Net's is, else float32."""
        return torch.float64 if self.unet.dtype == torch.float64 else torch.float32

    @property
    def distilled(self) -> bool:
        """Whether the U-Net takes the guidance scale as an input (arXiv 2310.04378), so that no guidance is needed."""
        return self.unet.config.reads_guidance

    def size_of(self, request: GenerateRequest) -> tuple[int, int]:
        """Width and height in pixels: those of the request, or else the checkpoint's own."""
        height, width = self.unet.config.latent_size
        return request.width or width * self.vae_scale_factor, request.height or height * self.vae_scale_factor


def check_control(unet: UNet2DConditionModel, network: Any) -> None:
    """Raise `UsageError` unless a control network was made for this kind of U-Net."""
    mine = unet.config
    if isinstance(network, T2IAdapter):
        widths = [out for _, out, _ in network.config.blocks]
        if tuple(widths[: len(mine.block_out_channels)]) != mine.block_out_channels:
            raise UsageError(
                f"this T2IAdapter has features of {widths} channels, but this checkpoint's U-Net has "
                f"{list(mine.block_out_channels)}; it was made for another family"
            )
        return
    its = network.unet_config
    for key in ("block_out_channels", "down_block_types", "layers_per_block", "addition_embed_type"):
        if getattr(mine, key) != getattr(its, key) and mine.per_block(key) != its.per_block(key):
            raise UsageError(f"{_of_another(network)}: its {key} is {getattr(its, key)}, not {getattr(mine, key)}")
    ours, theirs = mine.per_block("cross_attention_dim")[0], its.per_block("cross_attention_dim")[0]
    if ours != theirs:
        raise UsageError(f"{_of_another(network)}: it reads {theirs} values per token, not {ours}")


def _of_another(network: Any) -> str:
    family = next(iter(find(network.unet_config.to_dict())), None)
    made = "another kind of model" if family is None else family.title
    return f"this {type(network).__name__} was made for {made}, not for this checkpoint"


def check_latents(one: Parts, other: Parts) -> None:
    """Raise `UsageError` unless two checkpoints have the same kind of latents."""
    kinds = ("latent_channels", "scale_factor", "scaling_factor", "latents_mean", "latents_std")
    for kind in kinds:
        mine, theirs = (getattr(parts.vae.config, kind, None) for parts in (one, other))
        if mine != theirs:
            raise UsageError(
                f"{other.name} needs other latents than {one.name} produces ({kind} {theirs} and {mine}); use a "
                "refiner of the same kind"
            )
