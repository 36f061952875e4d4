"""The ecosystem's scheduler interface over tables of rows: configuration, files, grids, `step`, `add_noise`."""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor

from sfumato.checkpoints.locate import HubOptions, by_patterns, locate_folder
from sfumato.configs import Configured, parse
from sfumato.errors import ConfigError, SfumatoError, UnknownArgument, UsageError, suggest
from sfumato.files import LAYOUT_VERSION, expanded, output_folder, read_json, write_json
from sfumato.outputs import Output
from sfumato.request import MOST_STEPS
from sfumato.runtime.device import as_device
from sfumato.schedulers.configs import COMPATIBLE, CONFIGS, KINDS, SchedulerConfig, config_class, sibling_keys
from sfumato.schedulers.grid import train_alphas_cumprod, train_betas
from sfumato.schedulers.noise import GaussianNoise, Generators, noise_for, noising
from sfumato.schedulers.rows import Clip, Noise, Row, State, advance, folded, predict_original
from sfumato.values import Within, check_argument, check_number, check_value, kinds_of, reason, shown

__all__ = ["Scheduler", "SchedulerOutput", "Stepped", "Table", "Timestep"]

CONFIG_NAME = "scheduler_config.json"
UNSAVED = {"solver_p"}  # settings that hold objects and cannot be written to JSON
HUB_KEYWORDS = {field.name for field in fields(HubOptions)}
logger = logging.getLogger("sfumato")


@dataclass(frozen=True, eq=False)
class SchedulerOutput(Output):
    """The latents for the next step and, if the scheduler computes them, the predicted clean latents."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


Stepped = SchedulerOutput | tuple[Tensor, ...]
Timestep = int | float | Tensor


@dataclass(frozen=True)
class Table:
    """Everything a denoising loop needs: one row and timestep per model call, and the scale of the initial latents."""

    rows: tuple[Row, ...]
    timesteps: Tensor  # (len(rows),), in the form passed to the model
    init_noise_sigma: float  # standard deviation of pure-noise latents
    weights: tuple[tuple[float, float], ...]  # (signal, noise) for each row

    def noised(self, original: Tensor, noise: Tensor, row: int = 0) -> Tensor:
        """Return image latents with noise added to the level of a row, in the dtype of `original`.

        Used by image-to-image and inpainting. `original` and `noise` have the same shape, (B, C, H, W).
        """
        signal, spread = self.weights[row]
        return (original.float() * signal).add_(noise.to(original.device), alpha=spread).to(original.dtype)


class Scheduler(Configured):
    """Base class of the schedulers: a frozen `config` and the current noise levels.

    `table` has no side effects; `step` keeps state and runs the same rows.
    """

    order: ClassVar[int] = 1  # model calls per step
    gives_original: ClassVar[bool] = True
    output: ClassVar[type[Any]] = SchedulerOutput  # what `step` returns
    custom_grids: ClassVar[tuple[str, ...]] = ()  # which of "timesteps" and "sigmas" set_timesteps accepts
    config_name: ClassVar[str] = CONFIG_NAME
    needs_grid: ClassVar[bool] = True  # if False, `step` works before `set_timesteps`, on the training grid
    finite_snr: ClassVar[bool] = True  # works in sigma, so a zero terminal SNR must not make it infinite
    config_class: ClassVar[type[SchedulerConfig]]
    init_noise_sigma: float | Tensor = 1.0  # standard deviation of the initial latents
    timesteps: Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__name__ in CONFIGS:
            cls.config_class = config_class(cls.__name__)
            keys = inspect.signature(cls.config_class).parameters
            cls.__signature__ = inspect.Signature([p for key, p in keys.items() if key != "extra"])

    def __init__(self, **options: Any) -> None:
        known = kinds_of(self.config_class).keys() - {"extra"}
        for key in options.keys() - known:
            raise UnknownArgument(f"{type(self).__name__} has no option {key!r}{suggest(key, known)}")
        plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in options.items()}
        # As in the ecosystem: a key left at its default lets another scheduler use its own default.
        told: dict[str, Any] = {"_class_name": type(self).__name__, "_diffusers_version": LAYOUT_VERSION}
        if defaults := sorted(known - options.keys() - UNSAVED):
            told["_use_default_values"] = defaults
        self.config, _ = parse(self.config_class, plain | told)
        self._train()
        self.num_inference_steps: int | None = None
        self._reset()

    def _train(self) -> None:
        """Compute the training betas, their cumulative products, and the grid of all training timesteps."""
        self.betas = train_betas(self.config)
        self.alphas_cumprod = train_alphas_cumprod(self.config, self.betas, finite=self.finite_snr)
        self._check_noise()

    def _check_noise(self) -> None:
        """Raise `ConfigError` unless the first timestep has some noise and all but the last have some signal."""
        products, config = self.alphas_cumprod, self.config
        # Only the last timestep may be pure noise (zero terminal SNR).
        if not (products[0] < 1 and (products[:-1] > 0).all() and products.isfinite().all()):
            raise ConfigError(
                f"{config.owner}: beta_start, beta_end and beta_schedule (or trained_betas) must give some noise at "
                "the first timestep and leave some image before the last; use the values from the model's training"
            )

    def _check_reach(self) -> None:
        """Raise `ConfigError` if `trained_betas` end before the last training timestep; such a config can be kept."""
        if (n := len(self.config.own("trained_betas") or self)) < len(self):
            raise ConfigError(
                f"{self.config.owner}: trained_betas has {n} entries for {len(self)} training timesteps; pass "
                f"num_train_timesteps={n}, or the betas of all of them"
            )

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Turn arithmetic errors into a `ConfigError`: settings that are valid alone may be impossible together."""
        try:
            with np.errstate(divide="raise", invalid="raise", over="raise"):
                yield
        except (ArithmeticError, IndexError, ValueError) as error:
            if isinstance(error, SfumatoError):
                raise
            raise ConfigError(
                f"{type(self).__name__}: these settings allow no schedule of this length ({reason(error)}); change one"
            ) from error

    def _reset(self) -> None:
        self.begin_index: int | None = None  # index into `timesteps` to start from, set by `set_begin_index`
        self.step_index: int | None = None  # index of the next step; None before the first
        self._state: State | None = None
        self._built: dict[Any, Sequence[Row]] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **overrides: Any) -> Self:
        """Create a scheduler from the config of any scheduler.

        Keys that belong to other schedulers are kept but not used; unknown keys are logged once. With
        `return_unused_kwargs`, the unused keys are returned too. Raises `ConfigError` for an invalid value.
        """
        if not isinstance(config, Mapping):
            raise UsageError(f"from_config takes a dict of settings, not {shown(config)}")
        mapping = {key: value for key, value in config.items() if value is not None or key not in UNSAVED}
        defaults = mapping.pop("_use_default_values", ())
        for key in [key for key in mapping if isinstance(defaults, (list, tuple)) and key in defaults]:
            del mapping[key]
        mapping |= overrides
        known = mapping.keys() & (kinds_of(cls.config_class).keys() - {"extra"})
        for key in mapping.keys() & KINDS.keys() - known:  # validate keys of other schedulers, too: some are read
            check_value(cls.__name__, key, mapping[key], KINDS[key] | None)
        scheduler = cls(**{key: mapping.pop(key) for key in known})
        mapping.pop("_class_name", None)
        scheduler.config = scheduler.config.replace(extra={**scheduler.config.extra, **mapping})
        if unknown := sorted(key for key in mapping if key not in sibling_keys() and not key.startswith("_")):
            logger.warning("%s: unknown config keys, kept but not used: %s", cls.__name__, ", ".join(unknown))
        return cast("Any", (scheduler, mapping)) if return_unused_kwargs else scheduler

    @classmethod
    def _file(cls, name: str | PathLike[str], subfolder: str | None, keywords: dict[str, Any]) -> Path:
        """Return the path of `scheduler_config.json`; hub options are removed from `keywords`."""
        check_argument("subfolder", subfolder, str | None)
        hub = {key: keywords.pop(key) for key in HUB_KEYWORDS & keywords.keys()}
        wanted = f"{subfolder}/{CONFIG_NAME}" if subfolder else CONFIG_NAME
        return path if (path := expanded(name)).is_file() else locate_folder(name, by_patterns(wanted), **hub) / wanted

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **keywords: Any,
    ) -> Self:
        """Load `scheduler_config.json` from a folder, a file or a hub id.

        Keywords are hub options or config overrides. Raises `CheckpointError` if the file is missing or is not a JSON
        object, `ConfigError` for an invalid value.
        """
        path = cls._file(name, subfolder, keywords)
        try:
            return cls.from_config(read_json(path), return_unused_kwargs, **keywords)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def load_config(
        cls, name: str | PathLike[str], return_unused_kwargs: bool = False, **keywords: Any
    ) -> dict[str, Any]:
        """Return the contents of the file that `from_pretrained` loads, for `from_config`; takes the same keywords."""
        config = read_json(cls._file(name, keywords.pop("subfolder", None), keywords))
        return cast("Any", (config, keywords)) if return_unused_kwargs else config

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write `scheduler_config.json` to a folder, atomically. Raises `OutputError` if it cannot be written."""
        keys = {key: value for key, value in self.config.items() if key not in {"_use_default_values", *UNSAVED}}
        write_json(output_folder(folder) / CONFIG_NAME, keys | {"_diffusers_version": LAYOUT_VERSION})

    save_config = save_pretrained

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """The classes that can be created from this scheduler's config, including its own."""
        import sfumato.schedulers as package

        own = type(self).__name__
        return [getattr(package, name) for name in (COMPATIBLE if own in COMPATIBLE[:14] else (own,))]

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.config.to_dict(), indent=2, default=str)}"

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this index of `timesteps` (image-to-image) instead of looking up the first timestep."""
        check_argument("begin_index", begin_index, Annotated[int, Within(0, MOST_STEPS)])
        self.begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Set the noise levels: n steps, or custom timesteps or sigmas.

        Resets the current run. Raises `UsageError` if this scheduler does not support the custom schedule, or for
        fewer than one step.
        """
        n, custom = self._counted(num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        with self._arithmetic():
            self._choose(n, device, **custom)

    def _counted(self, n: Any, **custom: Sequence[float] | None) -> tuple[int, dict[str, list[float]]]:
        """Return the number of steps and the custom grid, if any; raises the same errors as `set_timesteps`."""
        self._check_reach()
        given: dict[str, Any] = {key: values for key, values in custom.items() if values is not None}
        if refused := given.keys() - self.custom_grids:
            raise UsageError(
                f"{type(self).__name__} takes no custom {' or '.join(sorted(refused))}; pass num_inference_steps"
            )
        if (n is not None) + len(given) != 1:
            raise UsageError("set_timesteps: pass exactly one of num_inference_steps, timesteps and sigmas")
        try:
            given = {key: [float(value) for value in values] for key, values in given.items()}
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"set_timesteps: {' and '.join(given)} must be a list of numbers") from error
        n = next(map(len, given.values()), n)
        if not isinstance(n, (int, np.integer)) or not 1 <= n <= MOST_STEPS:
            raise UsageError(
                f"set_timesteps: steps must be a whole number, at least 1 and at most {MOST_STEPS}, not {n!r}"
            )
        return int(n), given

    def _choose(self, n: int, device: Any, **custom: Any) -> None:
        """Compute the grid of n steps, or the custom grid of n values, and `_install` it."""
        raise NotImplementedError

    def _install(self, n: int, timesteps: np.ndarray, device: Any) -> None:
        """Make a grid the current one and reset the run."""
        if as_device(device).type == "mps" and timesteps.dtype == np.float64:
            timesteps = timesteps.astype(np.float32)  # MPS has no float64
        self.num_inference_steps = n
        self.timesteps = torch.from_numpy(timesteps.copy()).to(device)
        self._reset()

    def _chosen_steps(self) -> int:
        """Return the number of steps; raises `UsageError` before `set_timesteps`."""
        if self.num_inference_steps is None:
            raise UsageError(f"{type(self).__name__}: call set_timesteps first")
        return self.num_inference_steps

    def _clip(self) -> Clip | None:
        """Return the clipping of the predicted x0: thresholding, plain clipping or None."""
        config = self.config
        if config.own("thresholding"):
            return Clip(config.sample_max_value, config.dynamic_thresholding_ratio)
        return Clip(config.clip_sample_range) if config.own("clip_sample") else None

    def _rows(self, start: int, **options: Any) -> Sequence[Row]:
        """Return the rows from index `start` of `timesteps` on."""
        raise NotImplementedError

    def _weights(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signal and noise weights of training timesteps, (B,) each, for `add_noise`."""
        raise NotImplementedError

    def _weights_at(self, entry: int) -> tuple[float, float]:
        """Return the signal and noise weights at an index of `timesteps`."""
        raise NotImplementedError

    def table(self, start: int = 0, *, eta: float = 0.0) -> Table:
        """Return the steps from index `start` of `timesteps` on, as numbers. Does not change the scheduler.

        `start` counts model calls, so it must be a multiple of `order`. Only DDIM and TCD use `eta`. Raises
        `UsageError` before `set_timesteps` and if `start` is out of range.
        """
        self._chosen_steps()
        check_argument("start", start, int)
        if not 0 <= start < len(self.timesteps) or start % self.order:
            raise UsageError(f"start = {start} must be one of {len(self.timesteps)} entries, divisible by {self.order}")
        options = {"eta": eta} if "eta" in inspect.signature(self.step).parameters else {}
        with self._arithmetic():
            rows = tuple(map(folded, self._rows(start, **options)))
        weights = tuple(map(self._weights_at, range(start, len(self.timesteps))))
        return Table(rows, self.timesteps[start:], float(self.init_noise_sigma), weights)

    def noise_source(self, shape: Sequence[int], generators: Generators = None, device: Any = None) -> Noise:
        """Return the noise source for one run over `table`: float32, of this shape, on this device."""
        return GaussianNoise(shape, generators, device)

    def index_for_timestep(self, timestep: Timestep, schedule_timesteps: Tensor | None = None) -> int:
        """Return the index of a timestep; the second index if it occurs twice, so that a late start skips no sigma.

        Raises `UsageError` if the timestep is not in the schedule.
        """
        entries = (self.timesteps if schedule_timesteps is None else schedule_timesteps) == timestep
        found = entries.nonzero().flatten().tolist()
        if not found:
            raise UsageError(f"timestep {float(timestep):g} is not one of the scheduler's timesteps")
        return found[1] if len(found) > 1 else found[0]

    def _row(self, timestep: Timestep, **options: Any) -> Row:
        """Return the row of the next step; the first step of a run is looked up by timestep unless an index is set."""
        check_number("timestep", timestep)
        self._check_reach()
        if self.needs_grid:
            self._chosen_steps()
        if self.step_index is None:
            if isinstance(timestep, Tensor):
                timestep = timestep.to(self.timesteps.device)
            begin = self.begin_index
            self.step_index = self._first = self.index_for_timestep(timestep) if begin is None else begin
        key = tuple(options.items())
        if key not in self._built:
            with self._arithmetic():
                self._built[key] = [folded(row) for row in self._rows(self._first, **options)]
        rows, offset = self._built[key], self.step_index - self._first
        if offset >= len(rows):
            raise UsageError(f"{type(self).__name__}: all steps are taken; call set_timesteps to start again")
        return rows[offset]

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """Return the latents (B, C, H, W) scaled as model input for this timestep."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        generator: Generators = None,
        *,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Stepped:
        """Take one step: from model output and latents (B, C, H, W) at `timestep` to the next latents.

        Noise comes from one generator, one per image, or torch's default generator, unless `variance_noise` is given.
        The scheduler keeps the state that the next step needs; `table` and `advance` do the same without state.
        """
        noise = noise_for(sample, generator, variance_noise)
        return self._step(self._row(timestep), model_output, sample, noise, return_dict)

    def _step(self, row: Row, model_output: Tensor, sample: Tensor, noise: Noise | None, return_dict: bool) -> Stepped:
        state = State(sample) if self._state is None else self._state.with_x(sample)
        z = None if row.noise is None or noise is None else noise(row)
        self._state = advance(row, state, model_output, noise if z is None else lambda _: z)
        if self.step_index is not None:
            self.step_index += 1
        x = self._state.x
        values = (x, self.second_output(row, sample, model_output, z)) if self.gives_original else (x,)
        return self.output(*values) if return_dict else values

    def second_output(self, row: Row, sample: Tensor, model_output: Tensor, z: Tensor | None = None) -> Tensor:
        """Return the second value of `step`, besides the next latents; `z` is the noise that was added."""
        return predict_original(row, sample, model_output)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Add noise to clean latents (B, C, H, W) at timesteps (B,), or at the current step during a run."""
        self._check_reach()
        signal, spread = (
            weight.to(original_samples).view(-1, *(1,) * (original_samples.dim() - 1))
            for weight in self._weights(noising(original_samples, noise, timesteps))
        )
        return signal * original_samples + spread * noise
