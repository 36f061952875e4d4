"""The schedulers of Stable Diffusion, as tables of rows, with the ecosystem's names and interface.

Names load on first use, so `sfumato.schedulers.names`, which the command line's help needs, imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sfumato.ecosystem import absent

_HOMES = {
    "ays": "AysSchedules",
    "timestep": "DDIMScheduler DDPMScheduler PNDMScheduler",
    "sigma": "EulerDiscreteScheduler EulerAncestralDiscreteScheduler HeunDiscreteScheduler LMSDiscreteScheduler "
    "KDPM2DiscreteScheduler KDPM2AncestralDiscreteScheduler DPMSolverSDEScheduler",
    "multistep": "DPMSolverMultistepScheduler DPMSolverSinglestepScheduler DEISMultistepScheduler "
    "UniPCMultistepScheduler",
    "consistency": "LCMScheduler LCMSchedulerOutput TCDScheduler TCDSchedulerOutput",
    "edm": "EDMDPMSolverMultistepScheduler EDMEulerScheduler",
    "base": "Scheduler SchedulerOutput Table",
    "rows": "Row State advance predict_original",
    "noise": "BrownianNoise GaussianNoise",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise absent("package", name, __name__)
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
