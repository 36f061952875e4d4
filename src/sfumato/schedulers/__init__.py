"""The fourteen samplers of Stable Diffusion, as tables of rows, with the ecosystem's names and contract.

Names load on first use, so that `sfumato.schedulers.names`, which the command line's help reads, imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "sfumato.schedulers.timestep": ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler"),
    "sfumato.schedulers.sigma": (
        "DPMSolverSDEScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
    ),
    "sfumato.schedulers.multistep": (
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
    ),
    "sfumato.schedulers.base": ("Scheduler", "SchedulerOutput", "Table"),
    "sfumato.schedulers.rows": ("Row", "State", "advance", "predict_original"),
    "sfumato.schedulers.noise": ("BrownianNoise", "GaussianNoise"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
