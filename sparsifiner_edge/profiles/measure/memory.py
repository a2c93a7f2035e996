"""Memory of a measured process, and what it takes of its device's; each says why where it is not known.

Files: proc_pid_status(5) and the kernel's filesystems/proc.rst.
"""

from __future__ import annotations

import re
from pathlib import Path

from sparsifiner_edge.profiles.sensors.nvml import open_card
from sparsifiner_edge.profiles.sensors.power import UnavailableError, read_text, why
from sparsifiner_edge.records import Unavailable

Bytes = int | Unavailable
RESIDENT, PEAK = "VmRSS", "VmHWM"
"""Of a process: its resident set, and the greatest that it had since it started."""


def process_bytes(field: str, process: Path = Path("/proc/self")) -> Bytes:
    """`RESIDENT` or `PEAK` of a process, by its folder in procfs."""
    return _kilobytes(process / "status", field)


def _kilobytes(path: Path, field: str) -> Bytes:
    """A field of a file of procfs."""
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", read_text(path), re.MULTILINE)
    except OSError as error:
        return Unavailable(why(error))
    return int(match[1]) * 1024 if match else Unavailable(f"{path} has no {field}")


def device_bytes(root: Path = Path("/")) -> tuple[Bytes, str]:
    """What all programs hold of the device's memory, and for people the source of its rise. On a Jetson, whose
    processor and GPU share their memory, less than nothing: what is not available.

    Args:
        root: where `proc` and `etc` are; tests give a made-up tree.
    """
    if (root / "etc/nv_tegra_release").exists():
        available = _kilobytes(root / "proc/meminfo", "MemAvailable")
        held: Bytes = -available if isinstance(available, int) else available
        return held, "fall of MemAvailable, processor's share and other programs included"
    try:
        with open_card() as card:
            held = int(card.nvml.nvmlDeviceGetMemoryInfo(card.handle).used)
    except UnavailableError as error:
        held = Unavailable(why(error))
    return held, "rise of the card's used memory (NVML), other programs included"
