"""Loading a checkpoint as a plan says: the device, the precisions, and what is in memory when."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import torch

from sfumato.checkpoints.builtin import BUILT_IN
from sfumato.checkpoints.locate import locate_folder
from sfumato.pipelines.arguments import split_keywords
from sfumato.pipelines.components import ComponentFiles
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.place import Place
from sfumato.pipelines.sizes import read_sizes
from sfumato.request import GenerateRequest
from sfumato.runtime.choices import PARTS, Wishes
from sfumato.runtime.device import default_dtype, dtype_name, parse_device
from sfumato.runtime.facts import read_facts
from sfumato.runtime.plan import plan

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

    from sfumato.runtime.plan import Plan

__all__ = ["load"]

log = logging.getLogger("sfumato")

WISHES = ("engine", "offload", "compile", "micro_batch", "once")


def load(
    name: str | PathLike[str] = BUILT_IN,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    request: GenerateRequest | None = None,
    **keywords: Any,
) -> DiffusionPipeline:
    """Load a checkpoint, or the built-in one, for the best device present, in the fastest precision safe there.

    device, dtype: override that. request: what is about to be drawn, if that is known; what does not fit is then
    refused before a weight is read. Other choices of the plan by name: engine, offload ("none", "staged"), compile,
    micro_batch; and once: nothing is drawn after this, so that on a CPU each network is in memory for its own stage
    only. Other keywords are those of `DiffusionPipeline.from_pretrained`. Raises `MemoryPlanError` if the request does
    not fit.
    """
    wished = {key: keywords.pop(key) for key in WISHES if key in keywords}
    planned_for = None if dtype is None or dtype == torch.float64 else dtype_name(dtype)
    wishes = Wishes(device=device, dtype=planned_for, **wished)
    variant, use_safetensors = keywords.pop("variant", None), keywords.pop("use_safetensors", None)
    given, hub = split_keywords(keywords)
    files = ComponentFiles(variant, use_safetensors)
    folder = locate_folder(name, lambda names, strict: files.select(names, strict, tuple(given)), **hub)
    facts = read_facts(device)
    if dtype == torch.float64 or given.keys() & set(PARTS):
        pipeline = DiffusionPipeline.from_files(folder, files, dtype or default_dtype(parse_device(device)), given, {})
        pipeline.to(parse_device(device))
    else:
        sizes = read_sizes(folder, variant, use_safetensors=use_safetensors)
        # Without a request, all that can be known is what does for the smallest picture.
        planned = plan(facts, sizes, request or GenerateRequest(prompt="", width=64, height=64), wishes)
        pipeline = _placed(folder, files, given, planned)
    pipeline.name = str(name)
    pipeline.place = Place(wishes, facts, may_reload=True)
    return pipeline


def _placed(folder: Path, files: ComponentFiles, given: dict[str, Any], planned: Plan) -> DiffusionPipeline:
    dtypes = {part: getattr(torch, planned.dtype_of(part)) for part in PARTS}
    staged = planned.offload == "staged"
    on_cpu = planned.kind == "cpu"
    files = dataclasses.replace(files, copy=planned.engine == "onednn", later=staged and on_cpu)
    pipeline = DiffusionPipeline.from_files(folder, files, dtypes, given, {})
    if staged:
        pipeline.stay_home(torch.device(planned.device))
    else:
        pipeline.to(planned.device)
    for reason in planned.reasons:
        if "was asked for and became" in reason:
            log.warning("%s", reason)
    return pipeline
