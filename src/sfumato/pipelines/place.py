"""Carries out a plan: which network is in memory when, in which layout, and how it computes."""

from __future__ import annotations

import dataclasses
import logging
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sfumato.adapters.outfit import kept_bytes, wear
from sfumato.errors import SfumatoError, UsageError
from sfumato.kernels import Kernels, kernels_for
from sfumato.models.attention import attention_for, chunked, upcast
from sfumato.models.base import Model
from sfumato.models.packed import is_packed, kernel_attention, pack, unpack
from sfumato.models.text_encoder import CLIPTextModelWithProjection
from sfumato.pipelines.fingerprint import fingerprint
from sfumato.runtime.attention import padded, split
from sfumato.runtime.canaries import checked
from sfumato.runtime.choices import DTYPE_BYTES, PARTS, Part, Plan, Sizes, Wishes, count_parameters
from sfumato.runtime.device import dtype_name, release_memory
from sfumato.runtime.facts import read_facts, refreshed
from sfumato.runtime.faults import HEAD_WIDTHS, SPLIT_KEYS
from sfumato.runtime.numerics import softmax_dtype
from sfumato.runtime.onednn import packable
from sfumato.runtime.plan import largest_batch, plan
from sfumato.runtime.reasons import EIGHT_BIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sfumato.adapters.outfit import Worn
    from sfumato.pipelines.parts import Parts
    from sfumato.request import GenerateRequest
    from sfumato.runtime.facts import Facts

__all__ = ["Place", "to_accelerator"]

log = logging.getLogger("sfumato")


class Place:
    """Where the networks of a checkpoint are on this machine, and the user's preferences.

    home: the device that each network is moved to for its own stage, None if networks stay where they are; sliced:
    whether the user chose attention slicing for the U-Net; kept: control networks of the last request; vae: its VAE, if
    not the checkpoint's own, after what identifies it.
    """

    def __init__(
        self,
        wishes: Wishes | None = None,
        facts: Facts | None = None,
        *,
        may_reload: bool = False,
        home: torch.device | None = None,
        faults: tuple[str, ...] = (),
    ) -> None:
        """may_reload: networks may be removed from the host's memory and read from their files again.

        faults: reasons why the machine's best device is not used, if it computes incorrectly.
        """
        self.wishes = wishes or Wishes()
        self.may_reload = may_reload
        self.facts = facts
        self.home, self.faults = home, faults
        self.sliced = False
        self._device_chosen = facts is not None and not self.wishes.asked("device")
        self._said: set[str] = set()
        self.kept: dict[Any, Model] = {}
        self.vae: tuple[Any, Any] | None = None
        self._hosts: dict[Model, dict[Tensor, Tensor]] = {}

    def device_of(self, parts: Parts) -> torch.device:
        """Return the device that generates images: where the U-Net is, or will be for its stage."""
        return self.home or parts.lead.device

    def move(self, parts: Parts, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Move the networks to a device, a precision, or both."""
        for model in parts.networks.values():
            away = self.home is not None or model.device.type == "meta"
            model.to(device=None if away else device, dtype=dtype)
            if device is not None and not (self.sliced and model is parts.unet):
                model.set_attention(attention_for(device))
        if self.home is not None:
            self.home = device or self.home

    def take_turns(self, parts: Parts, device: torch.device) -> None:
        """Keep each network on a device only for its own stage; on a CPU, in memory, if it can be read again."""
        if device.type == "cpu" and not self.may_reload:
            return
        self.move(parts, torch.device("cpu"), None)
        self.home = device
        self.wishes = dataclasses.replace(self.wishes, offload="staged")

    def slice_attention(self, parts: Parts, slice_size: str | int | None) -> None:
        """Make the U-Net compute attention in slices of this size; None for the device's best way."""
        if slice_size is None:
            parts.unet.set_attention(attention_for(self.device_of(parts)))
        else:
            parts.unet.set_attention_slice(slice_size)
        self.sliced = slice_size is not None

    def fitted(self, parts: Parts, image: Any) -> Any:
        """Return the input image in a size that this place supports; here, unchanged, as any size is supported."""
        return image

    def plan(self, parts: Parts, request: GenerateRequest, worn: Sequence[Worn] = ()) -> Plan | None:
        """Plan a run with the current device and precisions; None in float64, which cannot be planned.

        worn: the active adapters. Raises `MemoryPlanError` if the request does not fit.
        """
        known = self._known(parts, worn)
        if known is None:
            return None
        found = plan(known[0], known[1], request, known[2])
        others = tuple(one for one in self.faults if one not in found.faults)
        return dataclasses.replace(found, faults=found.faults + others, reasons=found.reasons + others)

    def largest_batch(self, parts: Parts, request: GenerateRequest) -> int:
        """Return how many images of a request's size fit into one U-Net call with the memory free now."""
        known = self._known(parts)
        if known is None:
            raise UsageError("float64 cannot be planned; move the pipeline to float32, float16 or bfloat16")
        return largest_batch(known[0], known[1], request, known[2])

    def _known(self, parts: Parts, worn: Sequence[Worn] = ()) -> tuple[Facts, Sizes, Wishes] | None:
        """Return the inputs of a plan."""
        dtypes = {part: dtype_name(next(iter(stage.values())).dtype) for part in PARTS if (stage := parts.stage(part))}
        if not {dtype_name(network.dtype) for network in parts.networks.values()} <= DTYPE_BYTES.keys():
            return None
        device = self.device_of(parts)
        sizes = _sizes(parts, worn)
        if self.facts is None or self.facts.accelerator != device.type:
            self.facts, self._device_chosen = checked(read_facts(str(device)), sizes), False
        else:
            self.facts = refreshed(self.facts)
        as_they_are: dict[str, Any] = {f"{part}_dtype": dtype for part, dtype in dtypes.items()}
        if not self._device_chosen or device.index:
            as_they_are["device"] = str(device)
        if any(network.device.type == "meta" for network in parts.networks.values()):
            as_they_are["offload"] = "staged"
        elif device.type == "cpu" and not self.may_reload:
            as_they_are["offload"] = "none"
        if parts.lead.device.type != "meta" and not (self.may_reload and parts.lead.can_reload):
            as_they_are["eight_bit"] = parts.lead.eight_bit
        wishes = self.wishes.settled_as(as_they_are)
        if parts.vae.use_tiling:
            wishes = dataclasses.replace(wishes, vae_tiling=True)
        return self.facts, sizes, wishes

    def bring(self, parts: Parts, part: str, plan: Plan | None, notes: list[str], worn: Sequence[Worn] = ()) -> None:
        """Load the networks of a stage, apply the adapters, and set them up for speed.

        Reasons why a faster setup is not possible are added to `notes`.
        """
        light = () if plan is None or part != "unet" else (one for one in plan.reasons if one.startswith(EIGHT_BIT))
        for sentence in (*(() if plan is None else plan.faults), *light):
            self._say(sentence, notes)
        for role in parts.stage(part):
            self._load(parts, role, plan, worn)
            self._make_ready(parts, role, plan, notes)
        if plan is not None and part == "text_encoder":  # adapters read what the image encoder gives
            for one in parts.image_adapters:
                one.adapter.set_attention(_attention(parts.unet.dtype, plan, None))

    def dress(self, parts: Parts, fused: Sequence[Worn]) -> None:
        """Apply fused adapters, and no others, to the networks in memory."""
        for role, model in parts.adaptable.items():
            if model.device.type != "meta":
                wear(model, role, fused, fused=bool(fused))

    def leave(self, parts: Parts, part: str, plan: Plan | None) -> None:
        """Remove the networks of a stage from memory after it, if planned.

        They return from an accelerator to the host's memory, or from the host's memory to their file.
        """
        if plan is None or plan.offload != "staged":
            return
        for model in parts.stage(part).values():
            if model in self._hosts:
                for tensor, host in self._hosts.pop(model).items():
                    tensor.data = host  # back to the host's copy, which frees the accelerator's
            elif self.may_reload and model.can_reload:
                model.fingerprint = fingerprint(model)
                model.forget()
                release_memory(torch.device("cpu"))

    def _load(self, parts: Parts, role: str, plan: Plan | None, worn: Sequence[Worn]) -> None:
        model, device = parts.networks[role], self.device_of(parts)
        light = plan is not None and plan.eight_bit and role == "unet"
        if plan is not None and light != model.eight_bit and self.may_reload and model.can_reload:
            model.forget()
        if model.device.type == "meta":
            model.reload(eight_bit=light)
        staged = plan is not None and plan.offload == "staged" and model.device.type != device.type
        if (worn or model.overlay is not None) and role in parts.adaptable:
            wear(model, role, worn, fused=bool(worn) and worn == parts.outfit.fused)
        if staged:
            self._hosts[model] = to_accelerator(model, device)
        if plan is not None and plan.engine == "torch" and plan.memory_format == "channels_last":
            unpack(model)
            for weight in model.parameters():
                if weight.ndim == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def _make_ready(self, parts: Parts, role: str, plan: Plan | None, notes: list[str]) -> None:
        model = parts.networks[role]
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
                release_memory(self.device_of(parts))
            else:
                pack(model, kernels)  # weights that adapters have changed or restored
        if is_packed(model) and model._compiled_call_impl is not None:
            model._compiled_call_impl = None  # Inductor cannot lower packed layers
            self._say("torch.compile is not used: it does not speed up the onednn engine", notes)
        if not (self.sliced and role == "unet"):
            model.set_attention(_attention(model.dtype, plan, kernels))
        _convolve_singly(model, plan.singly)
        if plan.compile and role == "unet" and model._compiled_call_impl is None:
            model.compile(mode="max-autotune-no-cudagraphs", dynamic=False)

    def _kernels(self, dtype: torch.dtype, notes: list[str]) -> Kernels | None:
        try:
            return kernels_for(dtype)
        except SfumatoError as error:
            self._say(f"running without the fast kernels: {error}", notes)
            return None

    def _say(self, note: str, notes: list[str]) -> None:
        """Add a note to every result, and log it once."""
        notes += [] if note in notes else [note]
        if note not in self._said:
            log.warning("%s", note)
        self._said.add(note)


def to_accelerator(model: Model, device: torch.device) -> dict[Tensor, Tensor]:
    """Copy a model to a device. Returns its tensors' copies in the host's memory, to restore without copying.

    On CUDA they are pinned, so that the transfer is asynchronous.
    """
    hosts: dict[Tensor, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        pin = device.type == "cuda" and not tensor.is_pinned()
        hosts[tensor] = tensor.data.pin_memory() if pin else tensor.data
        tensor.data = hosts[tensor].to(device, non_blocking=True)
    return hosts


def _attention(dtype: torch.dtype, plan: Plan, kernels: Kernels | None) -> Any:
    if plan.attention == "split" and plan.attention_bytes is not None:
        return split(plan.attention_bytes, plan.attention_keys or SPLIT_KEYS)
    if kernels is not None:
        return kernel_attention(kernels)
    if plan.attention_bytes is None or (plan.kind == "cpu" and plan.attention_keys is None):
        attention = attention_for(torch.device(plan.kind))
    else:
        attention = chunked(plan.attention_bytes, plan.attention_keys)
    wide = softmax_dtype(plan.kind, dtype_name(dtype))
    attention = upcast(attention, getattr(torch, wide)) if wide != dtype_name(dtype) else attention
    # Fused kernels sum in float32 inside, so only scores that are stored need a wider precision.
    return padded(HEAD_WIDTHS, attention) if plan.kind == "mps" and plan.attention == "fused" else attention


def _convolve_singly(model: Model, singly: bool) -> None:
    """Make convolutions process the images of a batch one at a time, or all at once."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.__dict__.pop("_conv_forward", None)
            if singly:
                layer._conv_forward = MethodType(_one_by_one, layer)


def _one_by_one(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.cat([type(layer)._conv_forward(layer, row, weight, bias) for row in x.split(1)])


def _sizes(parts: Parts, worn: Sequence[Worn]) -> Sizes:
    values: dict[str, Part] = {}
    kept = {part: sum(kept_bytes(model, role, worn) for role, model in parts.stage(part).items()) for part in PARTS}
    for part in PARTS:
        values[part] = Part(0, 0)
        for model in parts.stage(part).values():
            projected = isinstance(model, CLIPTextModelWithProjection)
            numbers = count_parameters(model.config, projected=projected)  # it may be packed or on the meta device
            values[part] += Part(numbers, numbers * model.dtype.itemsize)
    return Sizes(
        name=parts.name,
        tokens=parts.prompt_tokens,
        kept={part: size for part, size in kept.items() if size and worn},
        text_encoder_configs=tuple(encoder.config for encoder in parts.encoders),
        unet_config=parts.unet.config,
        vae_config=parts.vae.config,
        control_configs=tuple(network.config for network in parts.controls),
        vision_configs=() if parts.image_encoder is None else (parts.image_encoder.config,),
        spacing=parts.scheduler.config.get("timestep_spacing", "leading"),
        **values,
    )
