"""Pipelines that only encode prompts: components that are None are replaced with empty ones of the same family.

These have a config but no weights, so code that reads configs works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfumato import schedulers
from sfumato.checkpoints.weights import without_weights
from sfumato.families import EMBEDDED, find
from sfumato.models import CLIPTextModelWithProjection
from sfumato.pipelines.components import REQUIRED, network_class

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sfumato.families import Family

__all__ = ["with_stand_ins"]


def with_stand_ins(given: Mapping[str, Any], family: Family | None = None, *, sized: bool) -> dict[str, Any]:
    """Return a pipeline's components with placeholders, their names as `left_out`, and without a U-Net the family.

    given: the components; REQUIRED ones may be None if there is a text encoder. family: None if it is not known.
    sized: whether the pipeline's U-Nets take pooled prompts and sizes.
    """
    encoders = [one for one in (given.get("text_encoder"), given.get("text_encoder_2")) if one is not None]
    left_out = [part for part in REQUIRED if given.get(part) is None]
    if not (left_out and encoders):
        return dict(given)
    width = sum(one.config.hidden_size for one in encoders)
    if family is None or bool(family.sizes) != sized:  # without a U-Net's config, assume the most common
        like = {"addition_embed_type": "text_time" if sized else None, "cross_attention_dim": width}
        family = find(like, encoders=len(encoders))[0]
    unet = family.unet | {"cross_attention_dim": width}
    pooled = [one.config.projection_dim for one in encoders if isinstance(one, CLIPTextModelWithProjection)]
    if family.sizes and pooled:
        numbers = EMBEDDED[family.sizes[-1]] * family.unet["addition_time_embed_dim"]
        unet |= {"projection_class_embeddings_input_dim": numbers + pooled[0]}
    configs = {"unet": unet, "vae": family.vae}
    made: dict[str, Any] = {}
    for part in left_out:
        if part == "scheduler":
            made[part] = getattr(schedulers, family.scheduler["_class_name"]).from_config(family.scheduler)
            continue
        with without_weights():
            made[part] = network_class(part).from_config(configs[part]).eval().to(encoders[0].dtype)
    made |= {"left_out": frozenset(left_out)} | ({"family": family} if "unet" in left_out else {})
    return {**given, **made}
