"""The ecosystem's `encode_prompt`: prompts as embeddings, to store, weight and mix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sfumato.errors import UsageError
from sfumato.pipelines.arguments import request_from
from sfumato.pipelines.run import Run
from sfumato.pipelines.stages import Given
from sfumato.runtime.device import parse_device
from sfumato.values import check_argument

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = ["OnePromptPipeline", "TwoPromptPipeline"]

READY = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
WORDS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "clip_skip")


def _encoded(pipeline: Any, arguments: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
    """Encode the prompts of a call: embeddings of prompt and negative prompt, then pooled embeddings of both."""
    if arguments["lora_scale"] is not None:
        raise UsageError("encode_prompt takes no lora_scale; set the weights with set_adapters(names, weights)")
    given = Given(**{name: arguments[name] for name in READY if name in arguments})
    asked = {name: arguments[name] for name in WORDS if name in arguments}
    guided = arguments["do_classifier_free_guidance"]
    check_argument("do_classifier_free_guidance", guided, bool)
    if not guided:  # the negative prompt is not read
        asked = {name: None if name.startswith("negative") else value for name, value in asked.items()}
    request = request_from(prompt_embeds=given.prompt_embeds, count=arguments["num_images_per_prompt"], **asked)
    told = Run(pipeline.parts, pipeline.place, request, given, pipeline.parts.scheduler).told(guided=guided)
    device = pipeline.device if arguments["device"] is None else parse_device(arguments["device"])
    found: list[Tensor | None] = []
    for branches, ready in ((told.embeds, READY[1]), (told.pooled, READY[3])):
        found += [branches[-1] if branches else None, branches[0] if guided and branches else arguments.get(ready)]
    return tuple(None if one is None else one.to(device) for one in found)


class OnePromptPipeline:
    """A pipeline with one text encoder."""

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        device: str | torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return embeddings (B, S, C) of the prompts and the negative prompts, one per image.

        Without guidance, the second value is `negative_prompt_embeds` as given. Raises `UsageError` like a call.
        """
        embeds, negative, *_ = _encoded(self, locals())
        return embeds, negative

    def _encode_prompt(self, *arguments: Any, **named: Any) -> Tensor:
        """Return negative and positive embeddings in one batch, for older code."""
        embeds, negative = self.encode_prompt(*arguments, **named)
        return torch.cat([one for one in (negative, embeds) if one is not None])


class TwoPromptPipeline:
    """A pipeline with one or two text encoders whose U-Net also needs pooled prompts."""

    _optional_components: ClassVar[list[str]] = [
        *("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "image_encoder", "feature_extractor")
    ]

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        prompt_2: str | Sequence[str] | None = None,
        device: str | torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Return embeddings (B, S, C) of the prompts and the negative prompts, then pooled ones (B, P), one per image.

        Without guidance, the negative ones are returned as given. Raises `UsageError` like a call.
        """
        return _encoded(self, locals())
