"""Short names of samplers: class, config preset and a one-line description. Does not import torch."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any, NamedTuple

from sfumato.errors import UnknownArgument
from sfumato.values import shown

__all__ = ["NAMES", "Alias", "resolve"]


class Alias(NamedTuple):
    """The class, config preset and description that a short name stands for."""

    class_name: str
    preset: dict[str, Any]
    about: str


MULTI, SINGLE, UNIPC = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"
EDM = "EDMDPMSolverMultistepScheduler"
SDE = {"algorithm_type": "sde-dpmsolver++"}
# name: class, preset, description; and whether `<name>_karras`, with Karras sigmas, exists as well.
_SAMPLERS: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "ddim": ("DDIMScheduler", {}, "deterministic; the classic choice for image-to-image", False),
    "ddpm": ("DDPMScheduler", {}, "the original ancestral sampler; needs hundreds of steps", False),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, "linear multistep; Stable Diffusion 1's default", False),
    "lms": ("LMSDiscreteScheduler", {}, "linear multistep of order 4 in sigma", True),
    "euler": ("EulerDiscreteScheduler", {}, "first order, simple and fast", True),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, "Euler with added noise; varied, does not converge", False),
    "heun": ("HeunDiscreteScheduler", {}, "second order, two model calls per step", True),
    "dpm2": ("KDPM2DiscreteScheduler", {}, "DPM-Solver-2, two model calls per step", True),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}, "DPM-Solver-2 with added noise, two model calls per step", True),
    "dpmpp_2m": (MULTI, {"solver_order": 2}, "DPM-Solver++ order 2; the usual choice for 20 steps", True),
    "dpmpp_3m": (MULTI, {"solver_order": 3}, "DPM-Solver++ order 3; for weak guidance", True),
    "dpmpp_2m_sde": (MULTI, SDE | {"solver_order": 2}, "DPM-Solver++ order 2 with noise; more detail", True),
    "dpmpp_3m_sde": (MULTI, SDE | {"solver_order": 3}, "DPM-Solver++ order 3 with noise", True),
    "dpmpp_2s": (SINGLE, {"solver_order": 2}, "DPM-Solver++ order 2, single-step", True),
    "dpmpp_3s": (SINGLE, {"solver_order": 3}, "DPM-Solver++ order 3, single-step", True),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}, "DPM-Solver++ SDE on one Brownian path, two model calls per step", True),
    "deis": ("DEISMultistepScheduler", {}, "exponential integrator; good below 15 steps", True),
    "unipc": (UNIPC, {"solver_order": 2}, "predictor-corrector; good below 10 steps", True),
    "unipc_3": (UNIPC, {"solver_order": 3}, "UniPC of order 3; for weak guidance", True),
    "lcm": ("LCMScheduler", {}, "for latent consistency models and LCM LoRAs, in 1 to 8 steps", False),
    "tcd": ("TCDScheduler", {}, "for models distilled for TCD and Hyper-SD, 1 to 8 steps; --eta sets the noise", False),
    "edm_euler": ("EDMEulerScheduler", {}, "Euler only for models trained as EDM", False),
    "edm_dpmpp_2m": (EDM, {"solver_order": 2}, "DPM-Solver++ order 2 only for models trained as EDM", False),
}  # fmt: skip
_DPM_ALGORITHM = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
_UNSPACED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}


def _aliases() -> dict[str, Alias]:
    aliases = {}
    for name, (class_name, preset, about, karras) in _SAMPLERS.items():
        # A preset sets every relevant key, so that it overrides any checkpoint's config.
        lu = {"use_lu_lambdas": False} if class_name == MULTI else {}
        full = (_DPM_ALGORITHM if class_name in (MULTI, SINGLE) else {}) | (_UNSPACED | lu if karras else {}) | preset
        aliases[name] = Alias(class_name, full, about)
        if karras:
            spaced = full | {"use_karras_sigmas": True}
            aliases[f"{name}_karras"] = Alias(class_name, spaced, f"{about}; Karras sigmas")
    return aliases


NAMES: dict[str, Alias] = _aliases()


# Replacements for parts of other programs' names, after conversion to snake case: AUTOMATIC1111 and its forks
# ("DPM++ 2M Karras", "Euler a"), ComfyUI, InvokeAI and Apple.
_WORDS = (
    (r"^(k|sample)_", ""),
    (r"_scheduler$|scheduler$", ""),
    (r"_ancestral(?=_|$)", "_a"),
    (r"^dpm_(2|pp)", r"dpm\1"),
    (r"^dpmpp(2|3|sde)", r"dpmpp_\1"),
    (r"^uni_pc(_bh2)?", "unipc"),
    (r"^plms$", "pndm"),
    (r"^dpmpp(?=$|_karras|_k$)", "dpmpp_2m"),
    (r"_k$", "_karras"),
    (r"_(automatic|normal|gpu)$", ""),
)
_SPACINGS = ("karras", "exponential", "beta")


def resolve(name: str) -> tuple[str, dict[str, Any]]:
    """Return the class name and config preset of a scheduler, given any of its names.

    Accepts the names in `NAMES` ("dpmpp_2m_karras"), class names with or without "Scheduler", and the names used by
    other programs ("DPM++ 2M Karras", "Euler a", "dpm_2_ancestral"). The suffixes "exponential" and "beta" select
    those sigmas. Raises `UnknownArgument`, which suggests the closest names.
    """
    classes = {alias.class_name for alias in NAMES.values()}
    for class_name in (name, f"{name}Scheduler"):
        if class_name in classes:
            return class_name, {}
    key = _plain(name)
    sampler, _, spacing = key.rpartition("_")
    if key in NAMES:
        return NAMES[key].class_name, dict(NAMES[key].preset)
    if spacing in _SPACINGS and f"{sampler}_karras" in NAMES:
        alias = NAMES[sampler]
        return alias.class_name, alias.preset | {f"use_{spacing}_sigmas": True}
    near = get_close_matches(key, NAMES, n=3, cutoff=0.7)
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    raise UnknownArgument(f"there is no scheduler {shown(name)}{hint}; 'sfumato schedulers' lists all of them")


def _plain(name: str) -> str:
    """Convert a name to the spelling used in `NAMES`, as far as possible."""
    key = re.sub(r"[^a-z0-9]+", "_", name[:100].lower().replace("++", "pp")).strip("_")
    for pattern, plain in _WORDS:
        key = re.sub(pattern, plain, key)
    return key
