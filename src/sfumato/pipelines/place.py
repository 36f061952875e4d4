"""Carrying out a plan: which network is in memory when, in which layout, and how it computes."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import torch

from sfumato.errors import SfumatoError, UsageError
from sfumato.kernels import Kernels, kernels_for
from sfumato.models.attention import attention_for, chunked, upcast
from sfumato.models.base import Model
from sfumato.models.packed import is_packed, kernel_attention, pack, packable, unpack
from sfumato.pipelines.recipe import fingerprint
from sfumato.runtime.choices import DTYPE_BYTES, PARTS, Part, Plan, Sizes, Wishes, count_parameters
from sfumato.runtime.device import dtype_name, release_memory
from sfumato.runtime.facts import read_facts, refreshed
from sfumato.runtime.numerics import softmax_dtype
from sfumato.runtime.plan import largest_batch, plan

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.pipelines.pipeline import DiffusionPipeline
    from sfumato.request import GenerateRequest
    from sfumato.runtime.facts import Facts

__all__ = ["Place", "to_accelerator"]

log = logging.getLogger("sfumato")


class Place:
    """How one pipeline stands on its machine, and what its user wished for."""

    def __init__(
        self,
        wishes: Wishes | None = None,
        facts: Facts | None = None,
        *,
        may_reload: bool = False,
    ) -> None:
        """may_reload: networks may leave the host's memory, and come back as they are in their files."""
        self.wishes = wishes or Wishes()
        self.may_reload = may_reload
        self.facts = facts
        self._said: set[str] = set()
        self._hosts: dict[Model, dict[Tensor, Tensor]] = {}

    def plan(self, pipeline: DiffusionPipeline, request: GenerateRequest) -> Plan | None:
        """The plan of a run, with the device and precisions as they are; None in float64, which nobody plans for.

        Raises `MemoryPlanError` if the request does not fit.
        """
        known = self._known(pipeline)
        return None if known is None else plan(known[0], known[1], request, known[2])

    def largest_batch(self, pipeline: DiffusionPipeline, request: GenerateRequest) -> int:
        """How many pictures of a request's size fit into one call of the U-Net, as things are now."""
        known = self._known(pipeline)
        if known is None:
            raise UsageError("there is no plan for float64; move the pipeline to float32, float16 or bfloat16")
        return largest_batch(known[0], known[1], request, known[2])

    def _known(self, pipeline: DiffusionPipeline) -> tuple[Facts, Sizes, Wishes] | None:
        """What a plan is made from."""
        dtypes = {part: dtype_name(getattr(pipeline, part).dtype) for part in PARTS}
        if not set(dtypes.values()) <= DTYPE_BYTES.keys():
            return None
        device = str(pipeline.device)
        if self.facts is None or self.facts.accelerator != pipeline.device.type:
            self.facts = read_facts(device)
        else:
            self.facts = refreshed(self.facts)
        as_they_are = {f"{part}_dtype": dtype for part, dtype in dtypes.items()}
        wishes = dataclasses.replace(self.wishes, device=device, dtype=None, **as_they_are)
        if pipeline.vae.use_tiling:
            wishes = dataclasses.replace(wishes, vae_tiling=True)
        if any(getattr(pipeline, part).device.type == "meta" for part in PARTS):
            wishes = dataclasses.replace(wishes, offload="staged")
        elif pipeline.device.type == "cpu" and not self.may_reload:
            wishes = dataclasses.replace(wishes, offload="none")
        return self.facts, _sizes(pipeline), wishes

    def bring(self, pipeline: DiffusionPipeline, part: str, plan: Plan | None, notes: list[str]) -> None:
        """Have a network in memory, as fast as it gets; `notes` are told what kept it from being faster."""
        self._load(getattr(pipeline, part), pipeline.device, plan)
        self._make_ready(pipeline, part, plan, notes)

    def leave(self, pipeline: DiffusionPipeline, part: str, plan: Plan | None) -> None:
        """Let a network leave memory after its stage, where the plan says so.

        It goes from an accelerator to the host's memory, and from there back to the file it came from.
        """
        model = getattr(pipeline, part)
        if plan is None or plan.offload != "staged":
            return
        if model in self._hosts:
            for tensor, host in self._hosts.pop(model).items():
                tensor.data = host  # the copy that it came from; what is on the accelerator is let go
        elif self.may_reload and model.can_reload:
            model.fingerprint = fingerprint(model)
            model.forget()
            release_memory(torch.device("cpu"))

    def _load(self, model: Model, device: torch.device, plan: Plan | None) -> None:
        if model.device.type == "meta":
            model.reload()
        if plan is not None and plan.offload == "staged" and model.device.type != device.type:
            self._hosts[model] = to_accelerator(model, device)
        if plan is not None and plan.engine == "torch" and plan.memory_format == "channels_last":
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def _make_ready(self, pipeline: DiffusionPipeline, part: str, plan: Plan | None, notes: list[str]) -> None:
        model = getattr(pipeline, part)
        if plan is None:
            if is_packed(model):
                unpack(model)
            return
        kernels = None
        if plan.engine == "onednn" and packable(model.dtype):
            kernels = self._kernels(model.dtype, notes)
            if not is_packed(model):
                kept = fingerprint(model)
                pack(model, kernels)
                model.fingerprint = kept
                release_memory(pipeline.device)
        if not (pipeline.sliced and part == "unet"):
            model.set_attention(_attention(model, plan, kernels))
        if plan.compile and part == "unet" and model._compiled_call_impl is None:
            model.compile(mode="max-autotune-no-cudagraphs", dynamic=False)

    def _kernels(self, dtype: torch.dtype, notes: list[str]) -> Kernels | None:
        try:
            return kernels_for(dtype)
        except SfumatoError as error:
            self._say(f"slower than it could be: {error}", notes)
            return None

    def _say(self, note: str, notes: list[str]) -> None:
        """In every result, and once in the log."""
        notes.append(note)
        if note not in self._said:
            log.warning("%s", note)
        self._said.add(note)


def to_accelerator(model: Model, device: torch.device) -> dict[Tensor, Tensor]:
    """Copy a model to a device and return its tensors' copies in the host's memory, to go back to without a copy.

    On CUDA they are pinned, so that the copies run beside what the host does next.
    """
    hosts: dict[Tensor, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        pin = device.type == "cuda" and not tensor.is_pinned()
        hosts[tensor] = tensor.data.pin_memory() if pin else tensor.data
        tensor.data = hosts[tensor].to(device, non_blocking=True)
    return hosts


def _attention(model: Model, plan: Plan, kernels: Kernels | None) -> Any:
    if kernels is not None:
        return kernel_attention(kernels)
    if plan.kind == "cpu" or plan.attention_bytes is None:
        attention = attention_for(torch.device(plan.kind))
    else:
        attention = chunked(plan.attention_bytes)
    wide = softmax_dtype(plan.kind, dtype_name(model.dtype))
    return upcast(attention, getattr(torch, wide)) if wide != dtype_name(model.dtype) else attention


def _sizes(pipeline: DiffusionPipeline) -> Sizes:
    parts: dict[str, Any] = {}
    for part in PARTS:
        model = getattr(pipeline, part)
        numbers = count_parameters(model.config)  # a packed model has fewer, and one that is away none
        parts[part] = Part(numbers, numbers * model.dtype.itemsize)
        parts[f"{part}_config"] = model.config
    return Sizes(name=pipeline.name, tokens=pipeline.tokenizer.model_max_length, **parts)
