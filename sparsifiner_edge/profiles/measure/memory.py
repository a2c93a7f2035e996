"""Memory of a measured process: resident, proportional, on the device; each with its source.

Files: proc_pid_status(5) and the kernel's filesystems/proc.rst.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from sparsifiner_edge.profiles.sensors.nvml import open_card
from sparsifiner_edge.profiles.sensors.power import UnavailableError, read_text, why
from sparsifiner_edge.records import Unavailable

Bytes = int | Unavailable


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Of a process: resident set, its peak since it started, and the proportional share (pages divided among those that
    map them).
    """

    rss_bytes: Bytes
    peak_rss_bytes: Bytes
    pss_bytes: Bytes


def read_memory(process: Path = Path("/proc/self")) -> Memory:
    """Memory now.

    Args:
        process: a process's folder in procfs.
    """
    return Memory(
        rss_bytes=_kilobytes(process / "status", "VmRSS"),
        peak_rss_bytes=_kilobytes(process / "status", "VmHWM"),
        pss_bytes=_kilobytes(process / "smaps_rollup", "Pss"),
    )


def _kilobytes(path: Path, field: str) -> Bytes:
    """A field of a file of procfs."""
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", read_text(path), re.MULTILINE)
    except OSError as error:
        return Unavailable(why(error))
    return int(match[1]) * 1024 if match else Unavailable(f"{path} has no {field}")


class DeviceMemory:
    """What a process takes of its device's memory, by what all programs hold before it loads anything and later.

    Args:
        root: where `proc` and `etc` are; tests give a made-up tree.

    Attributes:
        source: who tells it, for people.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        jetson = (root / "etc/nv_tegra_release").exists()
        what = "fall of MemAvailable, processor's share included" if jetson else "rise of the card's used memory (NVML)"
        self.source = f"{what}, since before loading, other programs included"
        self._meminfo = root / "proc/meminfo" if jetson else None
        self._before = self._held()

    def taken(self) -> Bytes:
        """Bytes since it was made."""
        now, before = self._held(), self._before
        return max(0, now - before) if isinstance(now, int) and isinstance(before, int) else now

    def _held(self) -> Bytes:
        """On a Jetson, whose processor and GPU share their memory, less than nothing: what is not available."""
        if self._meminfo is not None:
            available = _kilobytes(self._meminfo, "MemAvailable")
            return -available if isinstance(available, int) else available
        try:
            with open_card() as card:
                return int(card.nvml.nvmlDeviceGetMemoryInfo(card.handle).used)
        except UnavailableError as error:
            return Unavailable(why(error))
