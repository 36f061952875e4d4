"""The keys of `scheduler_config.json`: a frozen dataclass per scheduler, from one table of keys and defaults."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from math import inf
from typing import Annotated, Any, ClassVar, get_type_hints

from sfumato.configs import Config, one_of
from sfumato.errors import ConfigError
from sfumato.values import Within

__all__ = ["CONFIGS", "BetaConfig", "SchedulerConfig", "config_class", "sibling_keys"]

# Groups of keys. `SPACED`: which training timesteps are used (2305.08891, table 2). `RESPACED`: sigmas respaced between
# the smallest and the largest. `THRESHOLDED`: Imagen's dynamic limit on x0 (2205.11487). `FLOW`: rectified-flow sigmas.
SPACED = {"timestep_spacing": "linspace", "steps_offset": 0}
LEADING = SPACED | {"timestep_spacing": "leading"}
RESPACED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
THRESHOLDED = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0}
ZERO_SNR = {"rescale_betas_zero_snr": False}
ALPHA_RANGE = {"beta_start": 0.00085, "beta_end": 0.012}
SIGMA_RANGE = {"sigma_min": None, "sigma_max": None}
FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential"}
DPM = RESPACED | THRESHOLDED | FLOW | {
    "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": False,
    "final_sigmas_type": "zero", "lambda_min_clipped": -float("inf"), "variance_type": None,
}  # fmt: skip

EDM = {
    "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "rho": 7.0,
    "final_sigmas_type": "zero",
}  # fmt: skip
DISTILLED = ALPHA_RANGE | LEADING | CLIPPED | THRESHOLDED | ZERO_SNR | {
    "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": True, "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": LEADING | CLIPPED | THRESHOLDED | ZERO_SNR | {"set_alpha_to_one": True},
    "DDPMScheduler": LEADING | CLIPPED | THRESHOLDED | ZERO_SNR | {"variance_type": "fixed_small"},
    "PNDMScheduler": LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "LMSDiscreteScheduler": SPACED | RESPACED,
    "EulerDiscreteScheduler": SPACED | RESPACED | SIGMA_RANGE | ZERO_SNR
    | {"interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"},
    "EulerAncestralDiscreteScheduler": SPACED | ZERO_SNR,
    "HeunDiscreteScheduler": ALPHA_RANGE | SPACED | RESPACED | CLIPPED | {"clip_sample": False},
    "KDPM2DiscreteScheduler": ALPHA_RANGE | SPACED | RESPACED,
    "KDPM2AncestralDiscreteScheduler": ALPHA_RANGE | SPACED | RESPACED,
    "DPMSolverSDEScheduler": ALPHA_RANGE | SPACED | RESPACED | {"noise_sampler_seed": None},
    "DPMSolverSinglestepScheduler": DPM,
    "DPMSolverMultistepScheduler": SPACED | DPM | ZERO_SNR
    | {"lower_order_final": True, "euler_at_final": False, "use_lu_lambdas": False},
    "DEISMultistepScheduler": SPACED | RESPACED | THRESHOLDED | FLOW
    | {"solver_order": 2, "algorithm_type": "deis", "solver_type": "logrho", "lower_order_final": True},
    "UniPCMultistepScheduler": SPACED | RESPACED | THRESHOLDED | FLOW | ZERO_SNR | SIGMA_RANGE
    | {"solver_order": 2, "predict_x0": True, "solver_type": "bh2", "lower_order_final": True, "disable_corrector": (),
       "solver_p": None, "final_sigmas_type": "zero", "shift_terminal": None},
    "EDMEulerScheduler": EDM,
    "EDMDPMSolverMultistepScheduler": EDM | THRESHOLDED
    | {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True,
       "euler_at_final": False},
    "LCMScheduler": DISTILLED,
    "TCDScheduler": DISTILLED,
}  # fmt: skip
# Schedulers that can be created from each other's config, as the ecosystem lists them; the others only from their own.
COMPATIBLE = tuple(CONFIGS)[:15]

_Share = Annotated[float, Within(0, 1)]
_Positive = Annotated[float, Within(1e-9, 1e9)]
_Step = Annotated[int, Within(0, 10**5)]
_Seed = Annotated[int, Within(0, 2**64 - 1)]


class _Kinds:
    """Type and bounds of the keys for which the default value is not enough."""

    beta_end: _Share
    beta_start: _Share
    clip_sample_range: _Positive
    disable_corrector: Annotated[tuple[_Step, ...], Within(0, 10**5)]
    dynamic_thresholding_ratio: _Share
    flow_shift: _Positive
    lambda_min_clipped: Annotated[float, Within(-inf, 1e9)] | None
    noise_sampler_seed: _Seed | tuple[_Seed, ...] | None
    original_inference_steps: Annotated[int, Within(1, 10**5)]
    rho: _Positive
    sample_max_value: _Positive
    shift_terminal: float | None
    sigma_data: _Positive
    sigma_max: _Positive | None
    sigma_min: _Positive | None
    solver_order: Annotated[int, Within(1, 10)]
    solver_p: Any
    steps_offset: _Step
    timestep_scaling: _Positive
    variance_type: str | None


KINDS = get_type_hints(_Kinds, include_extras=True)

# Supported values: of a key in every scheduler (""), then of a key in one scheduler.
BETAS, FIXED = ("linear", "scaled_linear", "squaredcos_cap_v2"), ("fixed_small", "fixed_small_log", "fixed_large")
LEARNED, ODES = ("learned", "learned_range"), ("dpmsolver", "dpmsolver++")
NO_FLOW, EPSILON_V = ("epsilon", "v_prediction", "sample"), ("epsilon", "v_prediction")
DPM_CHOICES = {
    "prediction_type": (*NO_FLOW, "flow_prediction"), "solver_order": (1, 2, 3), "solver_type": ("midpoint", "heun"),
    "algorithm_type": (*ODES, "sde-dpmsolver++"), "variance_type": (None, *LEARNED, *FIXED),
}  # fmt: skip
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {
        "beta_schedule": BETAS, "prediction_type": EPSILON_V, "timestep_spacing": ("linspace", "leading", "trailing"),
        "final_sigmas_type": ("zero", "sigma_min"), "interpolation_type": ("linear", "log_linear"),
        "timestep_type": ("discrete", "continuous"), "use_dynamic_shifting": (False,), "shift_terminal": (None,),
        "sigma_schedule": ("karras", "exponential"),
    },
    "DDIMScheduler": {"prediction_type": NO_FLOW},
    "DDPMScheduler": {
        "beta_schedule": (*BETAS, "laplace", "sigmoid"), "prediction_type": NO_FLOW,
        "variance_type": (*FIXED, "fixed_large_log", *LEARNED),
    },
    "LMSDiscreteScheduler": {"prediction_type": NO_FLOW},
    "EulerDiscreteScheduler": {"prediction_type": (*NO_FLOW, "original_sample")},
    "HeunDiscreteScheduler": {"beta_schedule": (*BETAS, "exp"), "prediction_type": NO_FLOW},
    "DPMSolverSinglestepScheduler": DPM_CHOICES,
    "DPMSolverMultistepScheduler": DPM_CHOICES | {"algorithm_type": (*ODES, "sde-dpmsolver", "sde-dpmsolver++")},
    "DEISMultistepScheduler": DPM_CHOICES | {"algorithm_type": ("deis",), "solver_type": ("logrho",)},
    "UniPCMultistepScheduler": {"prediction_type": (*NO_FLOW, "flow_prediction"), "solver_type": ("bh1", "bh2")},
    "EDMDPMSolverMultistepScheduler": DPM_CHOICES
    | {"prediction_type": EPSILON_V, "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")},
    "LCMScheduler": {"prediction_type": NO_FLOW},
    "TCDScheduler": {"prediction_type": NO_FLOW},
}  # fmt: skip

# Values that only another scheduler supports and their replacement here, so that any config can create any scheduler.
DPM_TRANSLATIONS = {"deis": "dpmsolver++", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
TRANSLATIONS = {
    "DPMSolverSinglestepScheduler": DPM_TRANSLATIONS,
    "DPMSolverMultistepScheduler": DPM_TRANSLATIONS,
    "DEISMultistepScheduler": dict.fromkeys(ODES, "deis") | dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    "UniPCMultistepScheduler": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2"),
    "EDMDPMSolverMultistepScheduler": DPM_TRANSLATIONS,
}


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """The keys every scheduler has, which describe the model's training. Subclasses are created from `CONFIGS`."""

    owner: ClassVar[str] = ""
    num_train_timesteps: Annotated[int, Within(1, 10**5)] = 1000
    prediction_type: str = "epsilon"

    def _check(self) -> None:
        for key in ("algorithm_type", "solver_type"):
            if (value := self.own(key)) in TRANSLATIONS.get(self.owner, {}):
                object.__setattr__(self, key, TRANSLATIONS[self.owner][value])
        for key, allowed in (CHOICES[""] | CHOICES.get(self.owner, {})).items():
            one_of(self.owner, key, self.own(key, allowed[0]), allowed)
        if self.own("solver_p") is not None and not hasattr(self.own("solver_p"), "set_timesteps"):
            raise ConfigError(f"{self.owner}: solver_p must be a scheduler")
        if "rho" in CONFIGS[self.owner] and not 0 < self.own("sigma_min") < self.own("sigma_max"):
            raise ConfigError(f"{self.owner}: sigma_min must be between 0 and sigma_max")
        if sum(bool(self.own(key)) for key in RESPACED) > 1:
            raise ConfigError(f"{self.owner}: only one of {', '.join(RESPACED)} can be used")
        if self.in_noise:
            one_of(self.owner, "prediction_type", self.prediction_type, NO_FLOW)
        if self.in_noise and self.own("algorithm_type"):
            one_of(self.owner, "final_sigmas_type", self.own("final_sigmas_type"), ("sigma_min",))
            orders = (1, 2) if self.own("algorithm_type").startswith("sde") else (1, 2, 3)
            one_of(self.owner, "solver_order", self.own("solver_order"), orders)

    def own(self, key: str, default: Any = None) -> Any:
        """Return the value of one of this scheduler's keys; the default for a key kept from another scheduler."""
        return getattr(self, key) if key in self.__dataclass_fields__ else default

    @property
    def respaced(self) -> str | None:
        """The name of the key that respaces the sigmas, or None."""
        return next((key for key in RESPACED if self.own(key)), None)

    @property
    def in_noise(self) -> bool:
        """Whether a DPM-Solver or UniPC extrapolates the predicted noise instead of x0."""
        return self.own("algorithm_type") in ("dpmsolver", "sde-dpmsolver") or not self.own("predict_x0", True)


@dataclass(frozen=True, kw_only=True)
class BetaConfig(SchedulerConfig):
    """The keys of a model trained on a schedule of betas: all but EDM models."""

    beta_start: _Share = 0.0001
    beta_end: _Share = 0.02
    beta_schedule: str = "linear"
    trained_betas: Annotated[tuple[_Share, ...], Within(1, 10**5)] | None = None


def config_class(owner: str) -> type[SchedulerConfig]:
    """Create the frozen dataclass of one scheduler's keys."""
    fields = [(key, KINDS.get(key, type(default)), default) for key, default in CONFIGS[owner].items()]
    name = owner.replace("Scheduler", "Config")
    switches = {key for key, default in CONFIGS[owner].items() if isinstance(default, bool)}
    choices = {key for key, allowed in (CHOICES[""] | CHOICES.get(owner, {})).items() if None not in allowed}
    namespace = {
        "owner": owner,
        "defaulted": frozenset((CONFIGS[owner].keys() | choices) - switches - {"beta_start", "beta_end"}),
        "where": owner,
        "__doc__": f"`scheduler_config.json` of {owner}.",
        "__module__": __name__,
    }
    base = SchedulerConfig if "sigma_data" in CONFIGS[owner] else BetaConfig
    return make_dataclass(name, fields, bases=(base,), frozen=True, kw_only=True, namespace=namespace)


def sibling_keys() -> set[str]:
    """Return all keys that any scheduler of this package understands."""
    return {key for keys in CONFIGS.values() for key in keys} | set(BetaConfig.__dataclass_fields__)
