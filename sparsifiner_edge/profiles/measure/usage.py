"""What else went on while something was measured: other programs, page faults, swapping; from procfs."""

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


class Snapshot(NamedTuple):
    """The machine at a moment.

    Attributes:
        time_s: of a monotonic clock.
        busy_s: processor seconds that the cores which this process may use have spent on anything, since boot.
        swapped_pages: pages moved to and from swap since boot.
        Both are None where procfs does not tell.
    """

    time_s: float
    busy_s: float | None
    swapped_pages: int | None


def snapshot(root: Path = Path("/")) -> Snapshot:
    """Read /proc/stat and /proc/vmstat.

    Args:
        root: where `proc` is; tests give a made-up tree.
    """
    return Snapshot(time.monotonic(), _busy_s(root), _swapped_pages(root))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _busy_s(root: Path) -> float | None:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    total, found = 0, False
    for match in re.finditer(r"^cpu(\d+) (.+)$", _read(root / "proc/stat"), re.MULTILINE):
        ticks = match[2].split()
        if (allowed is None or int(match[1]) in allowed) and len(ticks) > max(_BUSY_FIELDS):
            total, found = total + sum(int(ticks[field]) for field in _BUSY_FIELDS), True
    return total / os.sysconf("SC_CLK_TCK") if found else None


def _swapped_pages(root: Path) -> int | None:
    found = re.findall(r"^pswp(?:in|out) (\d+)$", _read(root / "proc/vmstat"), re.MULTILINE)
    return sum(map(int, found)) if found else None


class ProcessUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Of one process, all threads.

    Attributes:
        cpu_s: processor seconds. major_faults: page faults that waited for a disk; minor_faults: that did not.
        involuntary_switches: how often the processor was given to another.
    """

    cpu_s: float
    major_faults: int
    minor_faults: int
    involuntary_switches: int


class OtherUsage(NamedTuple):
    """What other programs took meanwhile.

    Attributes:
        other_cores: processor seconds of all other programs per second, on the `allowed_cores` that this process may
            use (time stolen by other virtual machines counts).
        swapped_bytes: of the whole machine. seconds: how long it was looked at.
    """

    other_cores: float | Unavailable
    allowed_cores: int
    swapped_bytes: int | Unavailable
    seconds: float


class Usage(ProcessUsage, frozen=True, kw_only=True):
    """A worker's, and what others took, while its queries ran; see `OtherUsage`."""

    minor_faults_per_query: float
    other_cores: float | Unavailable
    allowed_cores: int
    swapped_bytes: int | Unavailable
    seconds: float


def process_usage() -> ProcessUsage:
    """Of this process, since it started."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return ProcessUsage(
        cpu_s=used.ru_utime + used.ru_stime,
        major_faults=used.ru_majflt,
        minor_faults=used.ru_minflt,
        involuntary_switches=used.ru_nivcsw,
    )


def usage_between(before: Snapshot, after: Snapshot, own_s: float) -> OtherUsage:
    """What other programs took between two snapshots.

    Args:
        before, after: of the same machine.
        own_s: processor seconds that the measurement itself used in between, all of its processes together.
    """
    seconds = after.time_s - before.time_s
    other: float | Unavailable = Unavailable("/proc/stat is not readable")
    if before.busy_s is not None and after.busy_s is not None and seconds > 0:
        other = max(0.0, (after.busy_s - before.busy_s - own_s) / seconds)
    swapped: int | Unavailable = Unavailable("/proc/vmstat does not tell")
    if before.swapped_pages is not None and after.swapped_pages is not None:
        swapped = (after.swapped_pages - before.swapped_pages) * _PAGE_BYTES
    return OtherUsage(other_cores=other, allowed_cores=available_cores(), swapped_bytes=swapped, seconds=seconds)


def worker_usage(before: ProcessUsage, after: ProcessUsage, others: OtherUsage, queries: int) -> Usage:
    """What a worker used between two `process_usage`s for so many queries, and others meanwhile."""
    used = {name: getattr(after, name) - getattr(before, name) for name in ProcessUsage.__struct_fields__}
    return Usage(**used, minor_faults_per_query=used["minor_faults"] / max(1, queries), **others._asdict())
