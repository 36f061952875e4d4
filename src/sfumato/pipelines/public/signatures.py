"""Signatures of calls as text: the names of the arguments in the ecosystem's order, and unusual default values.

Used for pipelines whose calls only combine arguments of others, such as a mask and a ControlNet. `help`, `inspect` and
notebooks show the full signatures.
"""

from __future__ import annotations

import inspect
from ast import literal_eval
from typing import TYPE_CHECKING, Any

from sfumato.errors import UsageError
from sfumato.pipelines.arguments import refuse

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["COMMON", "CONTROLLED", "SIZED", "takes"]

# Default values of arguments, unless a signature contains another one ("strength=0.8"). All others default to None.
USUAL: dict[str, Any] = {
    "num_inference_steps": 50,
    "num_images_per_prompt": 1,
    "eta": 0.0,
    "output_type": "pil",
    "return_dict": True,
    "callback_on_step_end_tensor_inputs": ("latents",),
    "callback_steps": 1,
    "guess_mode": False,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
    "adapter_conditioning_scale": 1.0,
    "guidance_rescale": 0.0,
    "crops_coords_top_left": (0, 0),
    "negative_crops_coords_top_left": (0, 0),
    "aesthetic_score": 6.0,
    "negative_aesthetic_score": 2.5,
}
# Groups of arguments that are part of many signatures.
COMMON = "num_images_per_prompt eta generator latents prompt_embeds negative_prompt_embeds"
CONTROLLED = "guess_mode control_guidance_start control_guidance_end"
SIZED = "original_size crops_coords_top_left target_size"


def takes(words: str, draw: Callable[[Any, dict[str, Any]], Any], text: str) -> Callable[..., Any]:
    """Create a pipeline's `__call__` with this signature and docstring.

    draw(pipeline, arguments by name): runs the call and returns its output. Arguments marked with ! are required.
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters, needs = [inspect.Parameter("self", kind)], [word[:-1] for word in words.split() if word[-1] == "!"]
    for word in words.split():
        name, equals, default = word.rstrip("!").partition("=")
        value = literal_eval(default) if equals else USUAL.get(name)
        parameters.append(inspect.Parameter(name, kind, default=value))
    signature = inspect.Signature([*parameters, inspect.Parameter("unknown", inspect.Parameter.VAR_KEYWORD)])

    def __call__(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        told = dict(bound.arguments)
        refuse(told["unknown"], __call__)
        for name in needs:
            if told[name] is None:
                raise UsageError(f"{name} is missing; pass it to {type(told['self']).__name__}")
        return draw(told.pop("self"), told)

    __call__.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    __call__.__doc__ = text
    return __call__
