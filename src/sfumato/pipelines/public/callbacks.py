"""The ecosystem's `callback_on_step_end`: what it receives after a step and what it may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sfumato.errors import UsageError
from sfumato.values import shown

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.pipelines.denoise import DenoiseStep
    from sfumato.pipelines.run import Run

__all__ = ["Callback", "StepEnd", "older", "tensor_names"]

# Tensors that callbacks can read and change, by the ecosystem's names, and the matching fields of a `Conditioning`.
TOLD = {"prompt_embeds": "embeds", "add_text_embeds": "pooled", "add_time_ids": "sizes"}
# The same for the extra channels, by a family's own names for them.
FURTHER = {"mask": "mask", "masked image latents": "masked_image_latents", "depth": "depth_mask"}
FURTHER |= {"image latents": "image_latents"}
ONE_CHANNEL = ("mask", "depth")
# Names for the images of control networks.
PICTURES = {"image", "control_image"}
Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]


def tensor_names(callback: Callback | None, names: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    """Return the tensors that a callback reads: its own `tensor_inputs`, or else `names`.

    Raises `UsageError` for an unknown name.
    """
    if callback is not None:
        _check("callback_on_step_end", callback, "(pipeline, index, timestep, tensors) -> tensors")
    names = getattr(callback, "tensor_inputs", names)
    if not isinstance(names, (list, tuple)):
        raise UsageError(f"callback_on_step_end_tensor_inputs must be a list of names, not {shown(names)}")
    for name in names:
        if name not in known:
            raise UsageError(f"callback_on_step_end_tensor_inputs: {name!r} is not one of {', '.join(known)}")
    return names


def _check(name: str, callback: Any, form: str) -> None:
    """Raise `UsageError` unless it is callable and not a class, which would only create an object at each step."""
    if not callable(callback) or isinstance(callback, type):
        raise UsageError(f"{name} must be a function {form}, not {shown(callback)}")


def older(callback: Any, every: int) -> dict[str, Any]:
    """Return newer arguments that are equivalent to calling `callback(step, timestep, latents)` every `every` steps."""
    if callback is None:
        return {"callback_on_step_end": None, "callback_on_step_end_tensor_inputs": ()}
    _check("callback", callback, "(step, timestep, latents)")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise UsageError(f"callback_steps must be a whole number of at least 1, not {every!r}")

    def follow(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> None:
        order, calls = pipeline.scheduler.order, pipeline.num_timesteps
        steps = pipeline.scheduler.num_inference_steps
        first = 0 if steps is None else calls - steps * order  # PNDM's additional calls at the start
        if (index + 1 == calls or (index + 1 > first and (index + 1) % order == 0)) and index % every == 0:
            callback(index // order, timestep, tensors["latents"])

    return {"callback_on_step_end": follow, "callback_on_step_end_tensor_inputs": ("latents",)}


class StepEnd:
    """The callback of one call, with its tensors, which persist from step to step.

    callback(pipeline, index, timestep, tensors by name) -> the tensors it changes, or None.
    """

    def __init__(self, callback: Callback, names: Sequence[str], dtype: torch.dtype) -> None:
        """dtype: of the latents that the callback receives."""
        self.callback, self.names, self.dtype = callback, names, dtype
        self._tensors: dict[str, Any] = {}

    def __call__(self, pipeline: Any, step: DenoiseStep, timestep: Any, run: Run) -> Tensor | None:
        """Run the callback and apply its changes. Returns the latents (B, C, h, w) if they changed."""
        if step.index == 0:
            told = run.guidance.conditioning
            self._tensors = {"negative_prompt_embeds": told.embeds[0] if told.branches > 1 else None} | _own(run)
            self._tensors |= _shown(run)
        self._tensors["latents"] = step.latents.to(self.dtype)
        # Latent consistency models decode the last `denoised`, not the last latents.
        last = "denoised" in pipeline._callback_tensor_inputs and step.index + 1 == step.total
        if last or "denoised" in self.names:
            second = run.scheduler.second_output(step.row, step.before, step.output)
            self._tensors["denoised"] = second.to(self.dtype)
        result = "denoised" if last else "latents"
        before, seen = dict(self._tensors), self._tensors[result].clone()
        changes = self.callback(pipeline, step.index, timestep, {name: before.get(name) for name in self.names})
        self._tensors |= _checked(changes, before)
        own, further = _own(run), _further(run)
        # Tensors may also be changed in place. Unchanged latents stay in the loop's own precision.
        changed = {
            name
            for name in own.keys() & before.keys()
            if self._tensors[name] is not before[name]
            or (name in self.names and not torch.equal(before[name], own[name]))
        }
        if fields := {TOLD[name]: self._tensors[name].clone() for name in changed - further.keys()}:
            run.guidance.tell(**fields)
        if changed & further.keys():
            _change(run, [self._tensors[name].clone() for name in further])
        for name in PICTURES & before.keys() & {*self.names}:
            if self._tensors[name] is not before[name]:
                _show(run, self._tensors[name])
        after = self._tensors[result]
        return None if after is before[result] and torch.equal(after, seen) else after


def _checked(changes: Any, before: dict[str, Any]) -> dict[str, Tensor]:
    """Return the known tensors that a callback changed. Raises `UsageError` for invalid values."""
    if changes is not None and not isinstance(changes, Mapping):
        raise UsageError(f"callback_on_step_end must return a dict of tensors, or None, not {shown(changes)}")
    given: Mapping[str, Any] = changes or {}
    found: dict[str, Any] = {name: given[name] for name in before.keys() & given.keys()}
    for name, value in found.items():
        if value is None and (before[name] is None or name == "negative_prompt_embeds"):
            continue  # the loop reads these in prompt_embeds
        every = value if name in PICTURES and isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(one, torch.Tensor) for one in every):
            raise UsageError(f"callback_on_step_end returned {shown(value)} as {name}, which must be a tensor")
        if name in ("latents", "denoised") and isinstance(value, torch.Tensor) and value.shape != before[name].shape:
            shapes = f"{tuple(value.shape)}; keep {tuple(before[name].shape)}"
            raise UsageError(f"callback_on_step_end returned {name} with the shape {shapes}")
    return found


def _own(run: Run) -> dict[str, Tensor]:
    """Return copies of a run's conditioning, by the ecosystem's names."""
    told = run.guidance.conditioning
    return {name: told.joined(field) for name, field in TOLD.items() if getattr(told, field)} | _further(run)


def _shown(run: Run) -> dict[str, Any]:
    """Return the control images, as a list for several networks; repeated per branch unless in guess mode."""
    told = run.guidance.conditioning
    every = [one.pictures.repeat(1 if one.guess else told.branches, 1, 1, 1) for one in told.steered]
    pictures = every[0] if len(every) == 1 else every
    return {"image": pictures, "control_image": pictures} if every else {}


def _show(run: Run, pictures: Any) -> None:
    """Use other control images from here on."""
    told = run.guidance.conditioning
    every = pictures if isinstance(pictures, (list, tuple)) else [pictures]
    pairs = zip(told.steered, every, strict=True)
    run.guidance.show(tuple(replace(one, pictures=new[-one.pictures.shape[0] :].clone()) for one, new in pairs))


def _further(run: Run) -> dict[str, Tensor]:
    """Return a run's extra channels for each branch (branches · B, C, h, w), by the ecosystem's names."""
    told, kept = run.guidance.conditioning, run.beginning.after
    if not told.extra:
        return {} if kept is None else {"mask": torch.cat([kept.mask] * told.branches)}
    every = torch.cat(told.extra * (told.branches // len(told.extra)))
    widths = [1 if name in ONE_CHANNEL else 4 for name in run.parts.family.extra]
    parts = every.split([*widths[:-1], every.shape[1] - sum(widths[:-1])], dim=1)
    return {FURTHER[name]: part for name, part in zip(run.parts.family.extra, parts, strict=True) if name in FURTHER}


def _change(run: Run, parts: list[Tensor]) -> None:
    told, kept = run.guidance.conditioning, run.beginning.after
    if told.extra:
        run.guidance.tell(extra=torch.cat(parts, dim=1))
    elif kept is not None:
        kept.mask = parts[0][: told.pictures]
