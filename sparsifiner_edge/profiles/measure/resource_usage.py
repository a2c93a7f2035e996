"""Processor time, page faults and swapping while something was measured: the worker's and other programs'."""

from __future__ import annotations

import os
import re
import resource
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.records import Unavailable

_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""user, nice, system, irq, softirq and steal of a line of /proc/stat (proc(5)); guests are part of user."""
_PAGE_BYTES = 4096


class MachineUsage(NamedTuple):
    """The machine at a moment.

    Attributes:
        time_s: of a monotonic clock.
        busy_s: processor seconds since boot, of anything, on the cores that this process may use; None: unknown.
        swapped_bytes: moved to and from swap since boot; None: unknown.
    """

    time_s: float
    busy_s: float | None
    swapped_bytes: int | None


class ProcessUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Of one process, all threads: processor seconds, and page faults that waited for a disk."""

    cpu_s: float
    major_faults: int


class Usage(ProcessUsage, frozen=True, kw_only=True):
    """A worker's, and what others took, while its queries ran.

    Attributes:
        other_cores: processor seconds of all other programs per second, on the `allowed_cores` that this process may
            use (time stolen by other virtual machines counts).
        swapped_bytes: of the whole machine.
    """

    other_cores: float | Unavailable
    allowed_cores: int
    swapped_bytes: int | Unavailable


def machine_usage(root: Path = Path("/")) -> MachineUsage:
    """Read /proc/stat and /proc/vmstat.

    Args:
        root: where `proc` is; tests give a made-up tree.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    ticks = []
    for match in re.finditer(r"^cpu(\d+) (.+)$", _read(root / "proc/stat"), re.MULTILINE):
        fields = match[2].split()
        if (allowed is None or int(match[1]) in allowed) and len(fields) > max(_BUSY_FIELDS):
            ticks += [int(fields[field]) for field in _BUSY_FIELDS]
    pages = re.findall(r"^pswp(?:in|out) (\d+)$", _read(root / "proc/vmstat"), re.MULTILINE)
    return MachineUsage(
        time_s=time.monotonic(),
        busy_s=sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None,
        swapped_bytes=sum(map(int, pages)) * _PAGE_BYTES if pages else None,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def process_usage() -> ProcessUsage:
    """Of this process, since it started."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return ProcessUsage(cpu_s=used.ru_utime + used.ru_stime, major_faults=used.ru_majflt)


def usage_between(
    worker: tuple[ProcessUsage, ProcessUsage], machine: tuple[MachineUsage, MachineUsage], own_s: float
) -> Usage:
    """What a worker and other programs used.

    Args:
        worker, machine: before and after.
        own_s: processor seconds that the measurement itself used in between, all of its processes together.
    """
    before, after = machine
    seconds = after.time_s - before.time_s
    other: float | Unavailable = Unavailable("/proc/stat is not readable")
    if before.busy_s is not None and after.busy_s is not None and seconds > 0:
        other = max(0.0, (after.busy_s - before.busy_s - own_s) / seconds)
    swapped: int | Unavailable = Unavailable("/proc/vmstat does not tell")
    if before.swapped_bytes is not None and after.swapped_bytes is not None:
        swapped = after.swapped_bytes - before.swapped_bytes
    return Usage(
        cpu_s=worker[1].cpu_s - worker[0].cpu_s,
        major_faults=worker[1].major_faults - worker[0].major_faults,
        other_cores=other,
        allowed_cores=available_cores(),
        swapped_bytes=swapped,
    )
