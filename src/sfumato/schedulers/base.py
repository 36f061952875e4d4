"""The ecosystem's scheduler contract over tables of rows: configuration, files, `set_timesteps`, `step`, `add_noise`."""

from __future__ import annotations

import inspect
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np
import torch

from sfumato.configs import parse
from sfumato.errors import CheckpointError, OutputError, UnknownArgument, UsageError, suggest
from sfumato.schedulers.configs import CONFIGS, SchedulerConfig, config_class, sibling_keys
from sfumato.schedulers.grid import train_alphas_cumprod, train_betas
from sfumato.schedulers.noise import GaussianNoise
from sfumato.schedulers.rows import Clip, Row, State, advance, folded, predict_original

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sfumato.schedulers.noise import Generators
    from sfumato.schedulers.rows import Noise

__all__ = ["Scheduler", "SchedulerOutput", "Table"]

CONFIG_NAME = "scheduler_config.json"
WRITTEN_FOR = "0.42.1"  # the reference library's version whose keys these files follow
HUB_KEYWORDS = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "token"}
logger = logging.getLogger("sfumato")


class SchedulerOutput(NamedTuple):
    """The latents one step on, and the clean latents predicted on the way, where the scheduler gives them."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


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
    finite_snr: ClassVar[bool] = True  # works in sigma, so a zero terminal SNR is kept off infinity
    config_class: ClassVar[type[SchedulerConfig]]
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
        self._begin_index: int | None = None
        self._reset()

    def _reset(self) -> None:
        self._step_index: int | None = None
        self._state: State | None = None
        self._built: tuple[Any, Sequence[Row]] = (None, ())

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | SchedulerConfig, *, return_unused_kwargs: bool = False, **overrides: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Build from any scheduler's config. Keys of siblings travel along unused; keys nobody knows are logged once."""
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
        return (scheduler, mapping) if return_unused_kwargs else scheduler

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], subfolder: str | None = None, **keywords: Any) -> Any:
        """Read `scheduler_config.json` from a folder, a file or a hub id; keywords are hub options or config overrides.

        Raises `CheckpointError` where the file is missing or is not a JSON object.
        """
        hub = {key: keywords.pop(key) for key in HUB_KEYWORDS & keywords.keys()}
        path = Path(name)
        if not path.exists():
            from sfumato.checkpoints.locate import locate_folder

            wanted = f"{subfolder}/{CONFIG_NAME}" if subfolder else CONFIG_NAME
            path = locate_folder(os.fspath(name), allow=[wanted], **hub)
        if path.is_dir():
            path = path / (subfolder or "") / CONFIG_NAME
        try:
            mapping = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: no readable scheduler configuration ({error})") from error
        if not isinstance(mapping, dict):
            raise CheckpointError(f"{path}: expected a JSON object, found a {type(mapping).__name__}")
        return cls.from_config(mapping, **keywords)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `scheduler_config.json` into a folder, all or nothing; raises `OutputError`."""
        skipped = {"_use_default_values", "solver_p"}
        keys = {key: value for key, value in self.config.to_dict().items() if key not in skipped}
        keys |= {"_class_name": type(self).__name__, "_diffusers_version": WRITTEN_FOR}
        path = Path(folder) / CONFIG_NAME
        partial = path.with_name(f".{CONFIG_NAME}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"{path}: could not be written ({error})") from error

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """The classes that can be built from this scheduler's config, its own included."""
        import sfumato.schedulers as package

        return [getattr(package, name) for name in CONFIGS]

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.config.to_dict(), indent=2, default=str)}"

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the latents a picture starts from."""
        return 1.0

    @property
    def begin_index(self) -> int | None:
        """Where in `timesteps` to begin, if `set_begin_index` said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at an entry of `timesteps` (image-to-image) and not where the first timestep is found."""
        self._begin_index = begin_index

    @property
    def step_index(self) -> int | None:
        """The entry of `timesteps` the next `step` takes; None before the first."""
        return self._step_index

    def _install(self, n: int, timesteps: np.ndarray, device: Any) -> None:
        """Make a grid the current one and forget the run in progress."""
        if torch.device(device or "cpu").type == "mps" and timesteps.dtype == np.float64:
            timesteps = timesteps.astype(np.float32)  # MPS has no float64
        self.num_inference_steps = n
        self.timesteps = torch.from_numpy(timesteps.copy()).to(device)
        self._begin_index = None
        self._reset()

    def _count(self, n: int | None, *given: Sequence[float] | None, limit: bool = False) -> int:
        """The number of steps, from exactly one of a number and explicit values."""
        values = [value for value in given if value is not None]
        if (n is not None) + len(values) != 1:
            raise UsageError("set_timesteps: pass exactly one of num_inference_steps, timesteps and sigmas")
        n = len(values[0]) if n is None else n
        if not isinstance(n, (int, np.integer)) or n < 1:
            raise UsageError(f"set_timesteps: num_inference_steps = {n!r} must be a whole number, at least 1")
        if limit and n > self.config.num_train_timesteps:
            raise UsageError(f"set_timesteps: {n} steps; the model was trained on {self.config.num_train_timesteps}")
        return int(n)

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
        if self.num_inference_steps is None:
            raise UsageError(f"{type(self).__name__}: call set_timesteps first")
        if not 0 <= start < len(self.timesteps) or start % self.order:
            raise UsageError(f"start = {start} must be one of {len(self.timesteps)} entries, divisible by {self.order}")
        options = {"eta": eta} if "eta" in inspect.signature(self.step).parameters else {}
        rows = tuple(map(folded, self._rows(start, **options)))
        return Table(rows, self.timesteps[start:], self.init_noise_sigma, self._start_weights(start))

    def noise_source(self, shape: Sequence[int], generators: Generators = None, device: Any = None) -> Noise:
        """The noise of one run over `table`, float32 of this shape on this device."""
        return GaussianNoise(shape, generators, device)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The entry a timestep stands at; the second where it stands twice, so that a late start skips no sigma."""
        entries = (self.timesteps if schedule_timesteps is None else schedule_timesteps) == timestep
        found = entries.nonzero().flatten().tolist()
        if not found:
            raise UsageError(f"timestep {float(timestep):g} is not one of the scheduler's timesteps")
        return found[1] if len(found) > 1 else found[0]

    def _row(self, timestep: float | Tensor, **options: Any) -> Row:
        """The row of the next step; the first step of a run finds its place by timestep, unless told by index."""
        if self.num_inference_steps is None:
            raise UsageError(f"{type(self).__name__}: call set_timesteps before step")
        if self._step_index is None:
            if isinstance(timestep, torch.Tensor):
                timestep = timestep.to(self.timesteps.device)
            begin = self._begin_index
            self._step_index = self._first = self.index_for_timestep(timestep) if begin is None else begin
        key = (self._first, tuple(options.items()))
        if self._built[0] != key:
            self._built = (key, [folded(row) for row in self._rows(self._first, **options)])
        offset = self._step_index - self._first
        if offset >= len(self._built[1]):
            raise UsageError(f"{type(self).__name__}: all steps are taken; call set_timesteps to start again")
        return self._built[1][offset]

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The latents as the model wants to see them at this timestep, (B, C, H, W)."""
        return sample

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take one step: model output and latents (B, C, H, W) at `timestep` in, the latents one step on out.

        Keeps what the next step needs; `table` and `advance` do the same without keeping anything here.
        """
        return self._step(self._row(timestep), model_output, sample, return_dict)

    def _step(
        self, row: Row, model_output: Tensor, sample: Tensor, return_dict: bool, noise: Noise | None = None
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        state = State(sample) if self._state is None else self._state.with_x(sample)
        self._state = advance(row, state, model_output, noise)
        if self._step_index is not None:
            self._step_index += 1
        if not self.gives_original:
            return SchedulerOutput(self._state.x) if return_dict else (self._state.x,)
        output = SchedulerOutput(self._state.x, predict_original(row, sample, model_output))
        return output if return_dict else tuple(output)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Bring clean latents (B, C, H, W) to the noise levels of timesteps (B,), or of the current step in a run."""
        signal, spread = (
            weight.to(original_samples).view(-1, *(1,) * (original_samples.dim() - 1))
            for weight in self._weights(timesteps)
        )
        return signal * original_samples + spread * noise
