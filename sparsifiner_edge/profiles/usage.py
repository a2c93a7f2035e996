"""What else went on while something was measured: other programs, page faults, swapping; from procfs."""

from __future__ import annotations

import os
import re
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

from sparsifiner_edge.results import available_cores, unavailable

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


def process_usage() -> dict[str, Any]:
    """Of this process, all threads, since it started: processor seconds, page faults, and how often it was interrupted.

    `major_faults` had to wait for a disk; `involuntary_switches` gave the processor to another.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu_s": used.ru_utime + used.ru_stime,
        "major_faults": used.ru_majflt,
        "minor_faults": used.ru_minflt,
        "involuntary_switches": used.ru_nivcsw,
    }


def usage_between(before: Snapshot, after: Snapshot, own_s: float) -> dict[str, Any]:
    """What other programs took between two snapshots.

    Args:
        before, after: of the same machine.
        own_s: processor seconds that the measurement itself used in between, all of its processes together.

    Returns:
        `other_cores`: processor seconds of all other programs per second, on the `allowed_cores` that this process may
        use (time stolen by other virtual machines counts); `swapped_bytes` of the whole machine; `seconds`.
    """
    seconds = after.time_s - before.time_s
    other: Any = unavailable("/proc/stat is not readable")
    if before.busy_s is not None and after.busy_s is not None and seconds > 0:
        other = max(0.0, (after.busy_s - before.busy_s - own_s) / seconds)
    swapped: Any = unavailable("/proc/vmstat does not tell")
    if before.swapped_pages is not None and after.swapped_pages is not None:
        swapped = (after.swapped_pages - before.swapped_pages) * _PAGE_BYTES
    return {"other_cores": other, "allowed_cores": available_cores(), "swapped_bytes": swapped, "seconds": seconds}


def process_between(before: dict[str, Any], after: dict[str, Any], queries: int) -> dict[str, Any]:
    """What a worker used between two `process_usage`s, faults and interruptions per query too."""
    spent = {name: after[name] - before[name] for name in before}
    return spent | {"minor_faults_per_query": spent["minor_faults"] / max(1, queries)}
