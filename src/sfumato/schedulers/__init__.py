"""The fourteen samplers of Stable Diffusion, as tables of rows, with the ecosystem's names and contract.

Names load on first use, so that `sfumato.schedulers.names`, which the command line's help reads, imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "timestep": "DDIMScheduler DDPMScheduler PNDMScheduler",
    "sigma": "EulerDiscreteScheduler EulerAncestralDiscreteScheduler HeunDiscreteScheduler LMSDiscreteScheduler "
    "KDPM2DiscreteScheduler KDPM2AncestralDiscreteScheduler DPMSolverSDEScheduler",
    "multistep": "DPMSolverMultistepScheduler DPMSolverSinglestepScheduler DEISMultistepScheduler "
    "UniPCMultistepScheduler",
    "base": "Scheduler SchedulerOutput Table",
    "rows": "Row State advance predict_original",
    "noise": "BrownianNoise GaussianNoise",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
