"""Processor time and page faults while something was measured: the worker's and other programs'."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

import msgspec

from sparsifiner_edge.records import Unavailable

_BUSY_FIELDS = (0, 1, 2, 5, 6, 7)
"""user, nice, system, irq, softirq and steal of a line of /proc/stat (proc(5)); guests are part of user."""


class ProcessUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Of one process, all threads: processor seconds, and page faults that waited for a disk."""

    cpu_s: float
    major_faults: int


class Usage(ProcessUsage, frozen=True, kw_only=True):
    """A worker's while its queries ran.

    Attributes:
        other_cores: processor seconds of all other programs per second, on the `allowed_cores` that this process may
            use (time stolen by other virtual machines counts).
    """

    other_cores: float | Unavailable
    allowed_cores: int


def process_usage() -> ProcessUsage:
    """Of this process, since it started."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return ProcessUsage(cpu_s=used.ru_utime + used.ru_stime, major_faults=used.ru_majflt)


def busy_s(root: Path = Path("/")) -> float | None:
    """Processor seconds since boot, of anything, on the cores that this process may use; None: /proc does not tell.

    Args:
        root: where `proc` is; tests give a made-up tree.
    """
    try:
        text = (root / "proc/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    ticks = []
    for match in re.finditer(r"^cpu(\d+) (.+)$", text, re.MULTILINE):
        fields = match[2].split()
        if (allowed is None or int(match[1]) in allowed) and len(fields) > max(_BUSY_FIELDS):
            ticks += [int(fields[field]) for field in _BUSY_FIELDS]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def other_cores(before: float | None, after: float | None, own_s: float, seconds: float) -> float | Unavailable:
    """Cores that other programs kept busy.

    Args:
        before, after: of `busy_s`, `seconds` apart.
        own_s: processor seconds that the measurement itself used in between, all of its processes together.
    """
    if before is None or after is None:
        return Unavailable("/proc/stat is not readable")
    return max(0.0, (after - before - own_s) / seconds)
