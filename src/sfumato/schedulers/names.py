"""Short names of samplers for the command line: name -> class, config preset, one line about it. No torch here."""

from __future__ import annotations

from typing import Any, NamedTuple

from sfumato.errors import UnknownArgument, suggest

__all__ = ["NAMES", "Alias", "resolve"]


class Alias(NamedTuple):
    """What a short name stands for."""

    class_name: str
    preset: dict[str, Any]
    about: str


MULTI, SINGLE, UNIPC = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"
SDE = {"algorithm_type": "sde-dpmsolver++"}
# name: class, preset, description; and whether the sampler also comes with Karras sigmas, as `<name>_karras`.
_SAMPLERS: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "ddim": ("DDIMScheduler", {}, "deterministic and steady; the classic for image-to-image", False),
    "ddpm": ("DDPMScheduler", {}, "the original ancestral sampler; wants hundreds of steps", False),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, "linear multistep; Stable Diffusion 1's default", False),
    "lms": ("LMSDiscreteScheduler", {}, "linear multistep of order 4 in sigma", True),
    "euler": ("EulerDiscreteScheduler", {}, "first order, plain and fast", True),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, "Euler with fresh noise; lively, never settles", False),
    "heun": ("HeunDiscreteScheduler", {}, "second order, two model calls a step", True),
    "dpm2": ("KDPM2DiscreteScheduler", {}, "DPM-Solver-2, two model calls a step", True),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}, "DPM-Solver-2 with fresh noise, two model calls a step", True),
    "dpmpp_2m": (MULTI, {"solver_order": 2}, "DPM-Solver++ order 2; the usual choice for 20 steps", True),
    "dpmpp_3m": (MULTI, {"solver_order": 3}, "DPM-Solver++ order 3; for weak guidance", True),
    "dpmpp_2m_sde": (MULTI, SDE | {"solver_order": 2}, "DPM-Solver++ order 2 with noise; more detail", True),
    "dpmpp_3m_sde": (MULTI, SDE | {"solver_order": 3}, "DPM-Solver++ order 3 with noise", True),
    "dpmpp_2s": (SINGLE, {"solver_order": 2}, "DPM-Solver++ order 2 in pairs of steps", True),
    "dpmpp_3s": (SINGLE, {"solver_order": 3}, "DPM-Solver++ order 3 in runs of three steps", True),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}, "DPM-Solver++ SDE on one Brownian path, two model calls a step", True),
    "deis": ("DEISMultistepScheduler", {}, "exponential integrator; good below 15 steps", True),
    "unipc": (UNIPC, {"solver_order": 2}, "predictor and corrector in one; good below 10 steps", True),
    "unipc_3": (UNIPC, {"solver_order": 3}, "UniPC of order 3; for weak guidance", True),
}  # fmt: skip
_DPM_ALGORITHM = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
_UNSPACED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}


def _aliases() -> dict[str, Alias]:
    aliases = {}
    for name, (class_name, preset, about, karras) in _SAMPLERS.items():
        # A preset says all it means, so that it holds over any checkpoint's own config.
        lu = {"use_lu_lambdas": False} if class_name == MULTI else {}
        full = (_DPM_ALGORITHM if class_name in (MULTI, SINGLE) else {}) | (_UNSPACED | lu if karras else {}) | preset
        aliases[name] = Alias(class_name, full, about)
        if karras:
            spaced = full | {"use_karras_sigmas": True}
            aliases[f"{name}_karras"] = Alias(class_name, spaced, f"{about}; Karras sigmas")
    return aliases


NAMES: dict[str, Alias] = _aliases()


def resolve(name: str) -> tuple[str, dict[str, Any]]:
    """Class name and config preset of a short name ("dpmpp_2m_karras") or of a class's own name.

    Raises `UnknownArgument` with the nearest name that exists.
    """
    classes = {alias.class_name for alias in NAMES.values()}
    if name in classes:
        return name, {}
    key = name.lower().replace("-", "_").replace("++", "pp")
    if key not in NAMES:
        raise UnknownArgument(f"no scheduler is called {name!r}{suggest(key, NAMES)}; `sfumato schedulers` lists them")
    return NAMES[key].class_name, dict(NAMES[key].preset)
