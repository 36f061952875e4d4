"""Limits on this process: control groups (versions 1 and 2), CPU affinity and `ulimit -v`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ControlGroups", "address_space_limit", "thread_limit", "usable_cpus", "whole_cores"]

# Version 1 represents "no limit" as the largest multiple of a page in 63 bits.
UNLIMITED = 2**60


@dataclass(frozen=True)
class ControlGroups:
    """The control groups of a process, read below `root` (a different folder in tests)."""

    root: Path = Path("/")

    def free_memory(self) -> int | None:
        """Return the bytes that may still be allocated, the minimum over all enclosing groups; None without a limit.

        Cached file pages count as free: the kernel reclaims them before it kills a process.
        """
        rooms = []
        for folder in self._folders("memory"):
            limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
            used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
            if limit is not None and limit < UNLIMITED and used is not None:
                rooms.append(max(0, limit - used + _file_pages(folder / "memory.stat")))
        return min(rooms, default=None)

    def memory_limit(self) -> int | None:
        """Return the smallest memory limit of all enclosing groups in bytes; None without one."""
        limits = [_number(f / "memory.max", f / "memory.limit_in_bytes") for f in self._folders("memory")]
        return min((limit for limit in limits if limit is not None and limit < UNLIMITED), default=None)

    def cpu_quota(self) -> float | None:
        """Return the CPU time limit in cores, the minimum over all enclosing groups; None without a limit."""
        quotas = []
        for folder in self._folders("cpu"):
            words = _words(folder / "cpu.max")
            if not words:
                words = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
            if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:
                quotas.append(int(words[0]) / int(words[1]))
        return min(quotas, default=None)

    def _folders(self, controller: str) -> Iterator[Path]:
        """Yield the group's folder and its parents, in each hierarchy that may have the controller.

        In a container, the group's path may not exist below the mount; the parents that do exist still count.
        """
        mounts = self.root / "sys/fs/cgroup"
        for line in _lines(self.root / "proc/self/cgroup"):
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if controllers and controller not in controllers.split(","):
                continue
            bases = [mounts / controllers, mounts / controller] if controllers else [mounts, mounts / "unified"]
            for base in bases:
                folder = base / path.strip("/")
                yield from (place for place in (folder, *folder.parents) if place == base or base in place.parents)


def address_space_limit() -> int | None:
    """Return the address space allowed by `ulimit -v` in bytes; None without a limit."""
    if sys.platform == "win32":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY or limit >= UNLIMITED else limit


def thread_limit() -> int | None:
    """Return the number of threads from the variable that torch follows too; None for one thread per core."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) or None if wanted.isdecimal() else None


def usable_cpus() -> tuple[int, ...]:
    """Return the numbers of the logical CPUs that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return tuple(sorted(affinity(0))) if affinity else tuple(range(os.cpu_count() or 1))


def whole_cores(cpus: tuple[int, ...], root: Path = Path("/")) -> int:
    """Return the number of physical cores: two threads of one core share its arithmetic units."""
    siblings = root / "sys/devices/system/cpu"
    groups = {" ".join(_words(siblings / f"cpu{cpu}/topology/thread_siblings_list")) or str(cpu) for cpu in cpus}
    return max(1, len(groups))


def _file_pages(path: Path) -> int:
    values = dict(line.split() for line in _lines(path) if line.count(" ") == 1)
    found = values.get("total_inactive_file", values.get("inactive_file", "0"))
    return int(found) if found.isdigit() else 0


def _number(*paths: Path) -> int | None:
    """Return the first number found in these files; None if there is none."""
    words = [word for path in paths for word in _words(path)]
    return next((int(word) for word in words if word.isdigit()), None)


def _words(path: Path) -> list[str]:
    return [word for line in _lines(path) for word in line.split()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
