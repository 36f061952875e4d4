"""Loads a checkpoint as planned: device, precision, and which networks are in memory when."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import torch

from sfumato.checkpoints.builtin import BUILT_IN
from sfumato.pipelines.arguments import split_keywords
from sfumato.pipelines.components import ComponentFiles
from sfumato.pipelines.controlling import with_sizes
from sfumato.pipelines.drafts import drafted
from sfumato.pipelines.pipeline import DiffusionPipeline
from sfumato.pipelines.place import Place
from sfumato.pipelines.sizes import read_sizes
from sfumato.pipelines.source import FILE_OPTIONS, open_source
from sfumato.request import GenerateRequest, as_request
from sfumato.runtime.canaries import checked
from sfumato.runtime.choices import NETWORKS, Wishes, enlarged
from sfumato.runtime.device import default_dtype, dtype_name, parse_device
from sfumato.runtime.facts import read_facts
from sfumato.runtime.plan import fits_beside, plan
from sfumato.runtime.reasons import REPLACED

if TYPE_CHECKING:
    from os import PathLike

    from sfumato.pipelines.source import Source
    from sfumato.runtime.plan import Plan

__all__ = ["load"]

log = logging.getLogger("sfumato")

WISHES = ("engine", "offload", "eight_bit", "compile", "micro_batch", "once")


def load(
    name: str | PathLike[str] | Source = BUILT_IN,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    request: GenerateRequest | None = None,
    **keywords: Any,
) -> DiffusionPipeline:
    """Load a checkpoint, or the built-in one, for the best available device and the fastest precision safe there.

    name: a folder, a single file, a hub id, or a short name such as "sd15", which never downloads. device, dtype:
    override the choice. request: what will be generated, if known; a request that does not fit is then refused before
    any weights are read, and its refiner is loaded too. Other choices of the plan: engine, offload ("none", "staged"),
    eight_bit (the U-Net's large weights, by default only if nothing else fits), compile, micro_batch; and once: nothing
    else will be generated, so on a CPU each network is only in memory for its own stage. Other keywords are those of
    `DiffusionPipeline.from_pretrained` or, for a file, of `from_single_file`. Raises `MemoryPlanError` if the request
    does not fit.
    """
    wished = {key: keywords.pop(key) for key in WISHES if key in keywords}
    planned_for = None if dtype is None or dtype is torch.float64 else dtype_name(dtype)
    wishes = Wishes(device=device, dtype=planned_for, **wished)
    variant, use_safetensors = keywords.pop("variant", None), keywords.pop("use_safetensors", None)
    options = {key: keywords.pop(key) for key in FILE_OPTIONS if key in keywords}
    given, hub = split_keywords(keywords)
    source = open_source(name, ComponentFiles(variant, use_safetensors), hub, given=given, options=options)
    facts, home, faults = read_facts(device), None, ()
    if request is not None:
        request = as_request(request)
        if "vae" not in given:  # the file may have none
            request, _ = drafted(request, source)
        request = request.settled(source.settings)
    if dtype == torch.float64 or given.keys() & {role for roles in NETWORKS.values() for role in roles}:
        pipeline = DiffusionPipeline.from_source(source, dtype or default_dtype(parse_device(device)), given)
        pipeline.to(parse_device(device))
    else:
        sizes = read_sizes(source)
        facts = checked(facts, sizes)
        sizes = sizes if request is None else with_sizes(sizes, request)
        # Without a request, plan for the smallest image.
        asked = GenerateRequest(prompt="", width=64, height=64) if request is None else enlarged(sizes, request)
        planned = plan(facts, sizes, asked, wishes)
        if asked.refiner is not None and not wishes.asked("offload"):
            other = read_sizes(open_source(asked.refiner, ComponentFiles(variant, use_safetensors), hub))
            if planned.offload == "none" and not fits_beside(planned, other):
                wished["offload"] = "staged"
                wishes = dataclasses.replace(wishes, offload="staged")
                planned = plan(facts, sizes, asked, wishes)
        pipeline, faults = _placed(source, given, planned), planned.faults
        home = torch.device(planned.device) if planned.offload == "staged" else None
    pipeline.place = Place(wishes, facts, may_reload=True, home=home, faults=faults)
    if request is not None and request.refiner is not None:
        own = request.last_pass(pipeline.size_of(request), pipeline.parts.vae_scale_factor)
        own = own.replace(refiner=None, image=None, mask=None, controls=())
        pipeline.refiner = load(
            request.refiner, device=device, dtype=dtype, request=own, variant=variant, **wished, **hub
        )
    return pipeline


def _placed(source: Source, given: dict[str, Any], planned: Plan) -> DiffusionPipeline:
    dtypes = {role: getattr(torch, planned.dtype_of(part)) for part, roles in NETWORKS.items() for role in roles}
    staged = planned.offload == "staged"
    on_cpu = planned.kind == "cpu"
    files = dataclasses.replace(source.files, copy=planned.engine == "onednn", later=staged and on_cpu)
    files = dataclasses.replace(files, eight_bit=planned.eight_bit)
    pipeline = DiffusionPipeline.from_source(dataclasses.replace(source, files=files), dtypes, given)
    if not staged:
        pipeline.to(planned.device)
    for reason in planned.reasons:
        if REPLACED in reason:
            log.warning("%s", reason)
    return pipeline
