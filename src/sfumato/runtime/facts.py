"""Machine facts: a frozen value, read from this machine or from a JSON file that describes another."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sfumato.cache import read_kept
from sfumato.errors import CheckpointError, ConfigError, UsageError, suggest
from sfumato.files import expanded, output_file, output_folder, read_json, write_json
from sfumato.runtime import limits, processor
from sfumato.runtime.quirks import Quirk, known_quirks
from sfumato.runtime.validation import check_fields, check_speeds

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

__all__ = [
    "MACHINES",
    "Facts",
    "cached_speeds",
    "facts_named",
    "kept_name",
    "machine",
    "machine_names",
    "read_facts",
    "refreshed",
]

log = logging.getLogger("sfumato")

MACHINES = Path(__file__).parent / "machines"
LIBRARIES = ("torch", "safetensors", "tokenizers", "numpy")
# The version of what runtime/speeds.py measures. Increase it when that changes, so that older results are ignored.
MEASURED = 2
# Seconds; the system counts in hundredths.
SAMPLED = 0.1
SYSTEMS = {"linux": "linux", "darwin": "macos", "win32": "windows"}
ARCHITECTURES = {"amd64": "x86_64", "aarch64": "arm64"}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A machine as seen by one process. Sizes are in bytes, speeds in operations per second.

    accelerator         the best device: "cpu", "cuda" or "mps"; its name, and on CUDA its compute capability
    memory_total, _free limited by control groups and `ulimit -v`; memory this process already holds counts as free
    address_limited     memory_free is address space (`ulimit -v`), so mapped files count too
    accelerator_memory_total, _free   None on a CPU and for unified memory
    cores, load         cores this process may use; how many of them other processes keep busy
    instructions        of avx2, avx512, avx512_vnni, avx512_bf16, amx_bf16, neon, neon_bf16
    cache_l2, cache_l3  size of one core's level 2 cache, and of the shared level 3 cache
    compiler            path of a C compiler
    onednn              torch's oneDNN operations on packed weights give correct results
    system_build        the build of macOS, such as "25C56"; its kernels can change between builds
    canaries            verdicts on the accelerator: "conv float32" to "passed" or what is wrong (canaries.py)
    speeds              measured by `sfumato doctor`: operations per second for "conv_bfloat16" and so on
    """

    name: str
    system: str
    system_version: str
    architecture: str
    processor: str
    accelerator: str = "cpu"
    accelerator_name: str | None = None
    compute_capability: tuple[int, int] | None = None
    memory_total: int
    memory_free: int
    address_limited: bool = False
    accelerator_memory_total: int | None = None
    accelerator_memory_free: int | None = None
    unified_memory: bool = False
    cores: int
    load: float = 0.0
    instructions: tuple[str, ...] = ()
    cache_l2: int | None = None
    cache_l3: int | None = None
    python: str
    libraries: Mapping[str, str] = field(default_factory=dict)
    compiler: str | None = None
    onednn: bool = True
    speeds: Mapping[str, float] = field(default_factory=dict)
    system_build: str | None = None
    canaries: Mapping[str, str] = field(default_factory=dict)

    @property
    def free_cores(self) -> int:
        """Number of idle cores, at least one."""
        return max(1, self.cores - int(self.load + 0.5))

    @property
    def quirks(self) -> tuple[Quirk, ...]:
        """Known issues of this system with this version of torch."""
        torch = self.libraries.get("torch", "")
        return known_quirks(self.system_version, self.accelerator, torch, self.architecture)

    @property
    def refused(self) -> Quirk | None:
        """The issue because of which the accelerator is not used at all, or None."""
        return next((quirk for quirk in self.quirks if quirk.refused), None)

    def native_bfloat16(self, device: str) -> bool:
        """Return whether a device type multiplies bfloat16 natively, as GPUs since Ampere and Metal do."""
        if device != "cpu":
            return device == "mps" or (self.compute_capability or (0, 0)) >= (8, 0)
        return not {"avx512_bf16", "amx_bf16", "neon_bf16"}.isdisjoint(self.instructions)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write the fields to a JSON file. Raises `OutputError` if it cannot be written."""
        file = output_file(path)
        output_folder(file.parent)
        write_json(file, self.to_dict())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "facts") -> Self:
        """Build from JSON values. Raises `ConfigError`, naming `where`, for missing, unknown or invalid keys."""
        check_fields(cls, values, where)
        frozen: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        facts = cls(**frozen)
        _check_together(facts, where)
        return facts

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> Self:
        """Read a JSON file. Raises `UsageError` if it cannot be read and `ConfigError` for invalid values."""
        try:
            values = read_json(expanded(path))
        except CheckpointError as error:
            raise UsageError(
                f"{path} cannot be read as a JSON object of facts; 'sfumato doctor --save-facts FILE' writes one"
            ) from error
        return cls.from_dict(values, str(path))


def machine_names() -> tuple[str, ...]:
    """Return the names of the machines whose facts ship with the package."""
    return tuple(sorted(path.stem for path in MACHINES.glob("*.json")))


def machine(name: str) -> Facts:
    """Return the facts of a machine that ships with the package. Raises `UsageError` for an unknown name."""
    if name not in machine_names():
        known = ", ".join(machine_names())
        raise UsageError(f"there is no machine {name!r}{suggest(name, machine_names())}; use one of {known}")
    return Facts.from_json(MACHINES / f"{name}.json")


def facts_named(name: str) -> Facts:
    """Return facts by name, if they ship with the package, or from the path of a JSON file."""
    return Facts.from_json(name) if name.endswith(".json") or os.sep in name else machine(name)


def _check_together(facts: Facts, where: str) -> None:
    """Raise `ConfigError` for fields that contradict each other."""
    pairs = [("memory_free", "memory_total"), ("accelerator_memory_free", "accelerator_memory_total")]
    for free, total in pairs:
        some, whole = getattr(facts, free), getattr(facts, total)
        if (some is None) != (whole is None) or (some is not None and some > whole):
            raise ConfigError(f"{where}: {free} is {some}, which does not match {total} = {whole}")
    if facts.accelerator == "cuda":
        for key in ("compute_capability", "accelerator_memory_free"):
            if getattr(facts, key) is None:
                raise ConfigError(f"{where}: {key} is missing, which a CUDA machine needs")
    if facts.accelerator == "mps" and (facts.system != "macos" or not facts.unified_memory):
        raise ConfigError(f"{where}: accelerator 'mps' requires system 'macos' and unified_memory true")


def read_facts(device: str | None = None) -> Facts:
    """Return the facts of this machine as seen by this process now. Takes a tenth of a second.

    device: restricts the accelerator ("cpu", "cuda", "cuda:1", "mps"); by default, the best one present. Raises
    `UsageError` if it is unknown or absent.
    """
    load = _Load()
    import torch

    from sfumato.runtime.device import parse_device
    from sfumato.runtime.onednn import packable

    chosen = parse_device(device)
    total, free, address_limited = _memory()
    cpus = limits.usable_cpus()
    quota = limits.ControlGroups().cpu_quota()
    cores = min(limits.whole_cores(cpus), limits.thread_limit() or sys.maxsize)
    cache_l2, cache_l3 = processor.caches()
    facts = Facts(
        name=platform.node() or "this machine",
        system=SYSTEMS.get(sys.platform, sys.platform),
        system_version=platform.mac_ver()[0] or platform.release(),
        system_build=processor.system_build(),
        architecture=ARCHITECTURES.get(platform.machine().lower(), platform.machine().lower()),
        processor=processor.processor_name(),
        memory_total=total,
        memory_free=free,
        address_limited=address_limited,
        cores=cores if quota is None else max(1, min(cores, int(quota + 0.5))),
        instructions=processor.instruction_sets(),
        cache_l2=cache_l2,
        cache_l3=cache_l3,
        python=platform.python_version(),
        libraries={name: found for name in LIBRARIES if (found := _version(name))},
        compiler=processor.compiler(),
        onednn=chosen.type != "cpu" or packable(torch.float32),
        **_accelerator(chosen.type, chosen.index, free),
    )
    return dataclasses.replace(facts, speeds=cached_speeds(facts), load=load.of(cpus))


def kept_name(facts: Facts) -> str:
    """Return the cache key for the speeds of this machine with this version of torch."""
    key = (MEASURED, facts.processor, facts.accelerator_name, facts.cores, facts.system, facts.libraries.get("torch"))
    return f"speeds/{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"


def cached_speeds(facts: Facts) -> Mapping[str, float]:
    """Return the speeds measured earlier; empty if there are none."""
    return read_kept(kept_name(facts), lambda values: check_speeds(values, "speeds"))


def refreshed(facts: Facts) -> Facts:
    """Return the facts with the current amount of free memory."""
    total, free, address_limited = _memory()
    now = _accelerator(facts.accelerator, None, free)
    values = {key: now[key] for key in ("accelerator_memory_free", "accelerator_memory_total") if key in now}
    values["memory_free"] = now.get("memory_free", free)
    return dataclasses.replace(facts, memory_total=total, address_limited=address_limited, **values)


def _memory() -> tuple[int, int, bool]:
    """Return total bytes, bytes available to this process, and whether they are address space."""
    import psutil

    groups, system, own = limits.ControlGroups(), psutil.virtual_memory(), psutil.Process().memory_info()
    total = min(system.total, groups.memory_limit() or system.total)
    room = groups.free_memory()
    free = min(total, own.rss + min(system.available, system.available if room is None else room))
    addresses = limits.address_space_limit()
    if addresses is None or addresses - own.vms + own.rss >= free:
        return total, free, False
    return min(total, addresses), max(0, addresses - own.vms + own.rss), True


class _Load:
    """How busy other processes keep the cores. Sampled, because a load average lags by a minute."""

    def __init__(self) -> None:
        """Begin to sample."""
        import psutil

        self._process, self._began = psutil.Process(), time.monotonic()
        self._process.cpu_percent(None)
        psutil.cpu_percent(None, percpu=True)

    def of(self, cpus: tuple[int, ...]) -> float:
        """Return how many of these cores were busy, once there are enough samples."""
        import psutil

        time.sleep(max(0.0, SAMPLED - (time.monotonic() - self._began)))
        busy, own = psutil.cpu_percent(None, percpu=True), self._process.cpu_percent(None)
        return round(max(0.0, sum(busy[cpu] for cpu in cpus if cpu < len(busy)) - own) / 100, 2)


def _accelerator(kind: str, index: int | None, memory_free: int) -> dict[str, Any]:
    import torch

    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index or 0)
        free, total = torch.cuda.mem_get_info(index or 0)
        return {
            "accelerator": "cuda",
            "accelerator_name": properties.name,
            "compute_capability": (properties.major, properties.minor),
            "accelerator_memory_total": total,
            # Memory that torch has reserved for this process counts as free.
            "accelerator_memory_free": min(total, free + torch.cuda.memory_reserved(index or 0)),
        }
    if kind == "mps":
        # Metal works well only up to this share of the unified memory.
        allowed = torch.mps.recommended_max_memory()
        name = processor.processor_name()
        return {
            "accelerator": "mps",
            "accelerator_name": name,
            "memory_free": min(memory_free, allowed),
            "unified_memory": True,
        }
    return {"accelerator": "cpu"}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
