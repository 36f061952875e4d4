"""The ecosystem's scheduler contract over tables of rows: configuration, files, grids, `step`, `add_noise`."""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from sfumato.checkpoints.locate import HubOptions, by_patterns, locate_folder
from sfumato.configs import parse
from sfumato.errors import UnknownArgument, UsageError, suggest
from sfumato.files import LAYOUT_VERSION, output_folder, read_json, write_json
from sfumato.schedulers.configs import CONFIGS, SchedulerConfig, config_class, sibling_keys
from sfumato.schedulers.grid import train_alphas_cumprod, train_betas
from sfumato.schedulers.noise import GaussianNoise, Generators, noise_for
from sfumato.schedulers.rows import Clip, Noise, Row, State, advance, folded, predict_original

__all__ = ["Scheduler", "SchedulerOutput", "Stepped", "Table", "Timestep"]

CONFIG_NAME = "scheduler_config.json"
HUB_KEYWORDS = {field.name for field in fields(HubOptions)}
logger = logging.getLogger("sfumato")


class SchedulerOutput(NamedTuple):
    """The latents one step on, and the clean latents predicted on the way, where the scheduler gives them."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


Stepped = SchedulerOutput | tuple[Tensor, ...]
Timestep = int | float | Tensor


@dataclass(frozen=True)
class Table:
    """Everything a denoising loop needs: one row per model call, with its timestep, and how the latents start."""

    rows: tuple[Row, ...]
    timesteps: Tensor  # (len(rows),), as the model takes them
    init_noise_sigma: float  # standard deviation of pure-noise latents
    start_weights: tuple[float, float]  # of image and noise, at the first row

    def noised(self, original: Tensor, noise: Tensor) -> Tensor:
        """Latents of an image brought to the first row's noise level (image-to-image), in the image's dtype."""
        signal, spread = self.start_weights
        return (original.float() * signal).add_(noise.to(original.device), alpha=spread).to(original.dtype)


class Scheduler:
    """Base of the fourteen: a frozen `config` and the current grid. `table` is pure; `step` runs the same rows."""

    order: ClassVar[int] = 1  # model calls per step
    gives_original: ClassVar[bool] = True
    custom_grids: ClassVar[tuple[str, ...]] = ()  # which of "timesteps" and "sigmas" can be given to set_timesteps
    finite_snr: ClassVar[bool] = True  # works in sigma, so a zero terminal SNR is kept off infinity
    config_class: ClassVar[type[SchedulerConfig]]
    init_noise_sigma: float = 1.0  # standard deviation of the latents a picture starts from
    timesteps: Tensor

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__name__ in CONFIGS:
            cls.config_class = config_class(cls.__name__)
            keys = inspect.signature(cls.config_class).parameters
            cls.__signature__ = inspect.Signature([p for key, p in keys.items() if key != "extra"])

    def __init__(self, **options: Any) -> None:
        known = set(self.config_class.__dataclass_fields__) - {"extra"}
        for key in options.keys() - known:
            raise UnknownArgument(f"{type(self).__name__} has no option {key!r}{suggest(key, known)}")
        plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in options.items()}
        # Written down as the ecosystem does: a key left at its default lets a sibling use its own default.
        self.config, _ = parse(self.config_class, plain | {"_use_default_values": sorted(known - options.keys())})
        self.betas = train_betas(self.config)
        self.alphas_cumprod = train_alphas_cumprod(self.config, self.betas, finite=self.finite_snr)
        self.num_inference_steps: int | None = None
        self._reset()

    def _reset(self) -> None:
        self.begin_index: int | None = None  # the entry of `timesteps` to begin at, where `set_begin_index` said so
        self.step_index: int | None = None  # the entry the next `step` takes; None before the first
        self._state: State | None = None
        self._built: dict[Any, Sequence[Row]] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | SchedulerConfig, **overrides: Any) -> Self:
        """Build from any scheduler's config. Siblings' keys travel along unused; keys nobody knows are logged once."""
        mapping = dict(config.items())
        for key in mapping.pop("_use_default_values", ()):
            mapping.pop(key, None)
        mapping |= overrides
        known = mapping.keys() & (cls.config_class.__dataclass_fields__.keys() - {"extra"})
        scheduler = cls(**{key: mapping.pop(key) for key in known})
        if "_class_name" in mapping:
            mapping["_class_name"] = cls.__name__
        scheduler.config = scheduler.config.replace(extra={**scheduler.config.extra, **mapping})
        if unknown := sorted(key for key in mapping if key not in sibling_keys() and not key.startswith("_")):
            logger.warning("%s: unknown config keys, kept but not used: %s", cls.__name__, ", ".join(unknown))
        return scheduler

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], subfolder: str | None = None, **keywords: Any) -> Self:
        """Read `scheduler_config.json` from a folder, a file or a hub id; keywords are hub options or config overrides.

        Raises `CheckpointError` where the file is missing or is not a JSON object.
        """
        hub = {key: keywords.pop(key) for key in HUB_KEYWORDS & keywords.keys()}
        path = Path(name)
        if not path.is_file():
            wanted = f"{subfolder}/{CONFIG_NAME}" if subfolder else CONFIG_NAME
            path = locate_folder(name, by_patterns(wanted), **hub) / wanted
        return cls.from_config(read_json(path), **keywords)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write `scheduler_config.json` into a folder, all or nothing; raises `OutputError`."""
        skipped = {"_use_default_values", "solver_p"}
        keys = {key: value for key, value in self.config.to_dict().items() if key not in skipped}
        keys |= {"_class_name": type(self).__name__, "_diffusers_version": LAYOUT_VERSION}
        write_json(output_folder(folder) / CONFIG_NAME, keys)

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """The classes that can be built from this scheduler's config, its own included."""
        import sfumato.schedulers as package

        return [getattr(package, name) for name in CONFIGS]

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.config.to_dict(), indent=2, default=str)}"

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at an entry of `timesteps` (image-to-image) and not where the first timestep is found."""
        self.begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the grid: of n steps, or a custom one of given timesteps or sigmas, and forget the run in progress.

        Raises `UsageError` for a custom grid that this sampler cannot take, and for fewer steps than one.
        """
        custom = {"timesteps": timesteps, "sigmas": sigmas}
        custom = {key: values for key, values in custom.items() if values is not None}
        if refused := custom.keys() - self.custom_grids:
            raise UsageError(
                f"{type(self).__name__} takes no custom {' or '.join(sorted(refused))}; pass num_inference_steps"
            )
        if (num_inference_steps is not None) + len(custom) != 1:
            raise UsageError("set_timesteps: pass exactly one of num_inference_steps, timesteps and sigmas")
        n = next(map(len, custom.values()), num_inference_steps)
        if not isinstance(n, (int, np.integer)) or n < 1:
            raise UsageError(f"set_timesteps: num_inference_steps = {n!r} must be a whole number, at least 1")
        self._choose(int(n), device, **custom)

    def _choose(self, n: int, device: Any, **custom: Any) -> None:
        """Work out the grid of n steps, or the custom one of n values, and `_install` it."""
        raise NotImplementedError

    def _install(self, n: int, timesteps: np.ndarray, device: Any) -> None:
        """Make a grid the current one and forget the run in progress."""
        if torch.device(device or "cpu").type == "mps" and timesteps.dtype == np.float64:
            timesteps = timesteps.astype(np.float32)  # MPS has no float64
        self.num_inference_steps = n
        self.timesteps = torch.from_numpy(timesteps.copy()).to(device)
        self._reset()

    def _chosen_steps(self) -> int:
        """The number of steps chosen; raises `UsageError` before `set_timesteps`."""
        if self.num_inference_steps is None:
            raise UsageError(f"{type(self).__name__}: call set_timesteps first")
        return self.num_inference_steps

    def _clip(self) -> Clip | None:
        """What limits the predicted x0: thresholding, else plain clipping, else nothing."""
        config = self.config
        if config.own("thresholding"):
            return Clip(config.sample_max_value, config.dynamic_thresholding_ratio)
        return Clip(config.clip_sample_range) if config.own("clip_sample") else None

    def _rows(self, start: int, **options: Any) -> Sequence[Row]:
        """The rows from entry `start` of `timesteps` on."""
        raise NotImplementedError

    def _weights(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise weights of training timesteps, (B,) each, for `add_noise`."""
        raise NotImplementedError

    def _start_weights(self, start: int) -> tuple[float, float]:
        """Signal and noise weights at entry `start` of `timesteps`."""
        raise NotImplementedError

    def table(self, start: int = 0, *, eta: float = 0.0) -> Table:
        """The steps from entry `start` of `timesteps` on, as numbers. Leaves the scheduler as it is.

        `start` counts entries, so it is a multiple of `order`. `eta` is DDIM's; other schedulers have none.
        Raises `UsageError` before `set_timesteps` and for a start outside it.
        """
        self._chosen_steps()
        if not 0 <= start < len(self.timesteps) or start % self.order:
            raise UsageError(f"start = {start} must be one of {len(self.timesteps)} entries, divisible by {self.order}")
        options = {"eta": eta} if "eta" in inspect.signature(self.step).parameters else {}
        rows = tuple(map(folded, self._rows(start, **options)))
        return Table(rows, self.timesteps[start:], self.init_noise_sigma, self._start_weights(start))

    def noise_source(self, shape: Sequence[int], generators: Generators = None, device: Any = None) -> Noise:
        """The noise of one run over `table`, float32 of this shape on this device."""
        return GaussianNoise(shape, generators, device)

    def index_for_timestep(self, timestep: Timestep, schedule_timesteps: Tensor | None = None) -> int:
        """The entry a timestep stands at; the second where it stands twice, so that a late start skips no sigma."""
        entries = (self.timesteps if schedule_timesteps is None else schedule_timesteps) == timestep
        found = entries.nonzero().flatten().tolist()
        if not found:
            raise UsageError(f"timestep {float(timestep):g} is not one of the scheduler's timesteps")
        return found[1] if len(found) > 1 else found[0]

    def _row(self, timestep: Timestep, **options: Any) -> Row:
        """The row of the next step; the first step of a run finds its place by timestep, unless told by index."""
        self._chosen_steps()
        if self.step_index is None:
            if isinstance(timestep, Tensor):
                timestep = timestep.to(self.timesteps.device)
            begin = self.begin_index
            self.step_index = self._first = self.index_for_timestep(timestep) if begin is None else begin
        key = tuple(options.items())
        if key not in self._built:
            self._built[key] = [folded(row) for row in self._rows(self._first, **options)]
        rows, offset = self._built[key], self.step_index - self._first
        if offset >= len(rows):
            raise UsageError(f"{type(self).__name__}: all steps are taken; call set_timesteps to start again")
        return rows[offset]

    def scale_model_input(self, sample: Tensor, timestep: Timestep | None = None) -> Tensor:
        """The latents as the model wants to see them at this timestep, (B, C, H, W)."""
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
        """Take one step: model output and latents (B, C, H, W) at `timestep` in, the latents one step on out.

        A sampler that adds noise draws it from one generator, one per image, or torch's default, unless
        `variance_noise` is given. Keeps what the next step needs; `table` and `advance` do the same without that.
        """
        noise = noise_for(sample, generator, variance_noise)
        return self._step(self._row(timestep), model_output, sample, noise, return_dict)

    def _step(self, row: Row, model_output: Tensor, sample: Tensor, noise: Noise | None, return_dict: bool) -> Stepped:
        state = State(sample) if self._state is None else self._state.with_x(sample)
        self._state = advance(row, state, model_output, noise)
        if self.step_index is not None:
            self.step_index += 1
        x = self._state.x
        values = (x, predict_original(row, sample, model_output)) if self.gives_original else (x,)
        return SchedulerOutput(*values) if return_dict else values

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Bring clean latents (B, C, H, W) to the noise levels of timesteps (B,), or of the current step in a run."""
        signal, spread = (
            weight.to(original_samples).view(-1, *(1,) * (original_samples.dim() - 1))
            for weight in self._weights(timesteps)
        )
        return signal * original_samples + spread * noise
