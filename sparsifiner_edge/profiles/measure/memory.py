"""Memory of a measured process, and device memory that it uses; values that cannot be read carry the reason.

Files: proc_pid_status(5) and the kernel's filesystems/proc.rst.
"""

from __future__ import annotations

import re
from pathlib import Path

from sparsifiner_edge.profiles.sensors.nvml import open_card
from sparsifiner_edge.profiles.sensors.power import UnavailableError, read_text, why
from sparsifiner_edge.records import Unavailable

Bytes = int | Unavailable
RESIDENT = "VmRSS"
"""Field of procfs with the resident set of a process."""
PEAK = "VmHWM"
"""Field of procfs with the largest resident set of a process since it started."""


def process_bytes(field: str, process: Path = Path("/proc/self")) -> Bytes:
    """Return a field of a process's memory, `RESIDENT` or `PEAK`, in bytes.

    Args:
        field: Name of the field.
        process: Folder of the process in procfs.
    """
    return _kilobytes(process / "status", field)


def _kilobytes(path: Path, field: str) -> Bytes:
    """Return a field of a procfs file in bytes."""
    try:
        match = re.search(rf"^{field}:\s+(\d+) kB", read_text(path), re.MULTILINE)
    except OSError as error:
        return Unavailable(why(error))
    return int(match[1]) * 1024 if match else Unavailable(f"{path} has no {field}")


def device_bytes(root: Path = Path("/")) -> tuple[Bytes, str]:
    """Return the device memory in use by all programs in bytes, and a description of what its increase measures.

    On a Jetson, where processor and GPU share their memory, the value is minus the available memory, so that its
    increase has the same meaning.

    Args:
        root: Folder that contains `proc` and `etc`; for tests.
    """
    if (root / "etc/nv_tegra_release").exists():
        available = _kilobytes(root / "proc/meminfo", "MemAvailable")
        used: Bytes = -available if isinstance(available, int) else available
        return used, "decrease of MemAvailable, including other programs and the processor's share"
    try:
        with open_card() as card:
            used = int(card.nvml.nvmlDeviceGetMemoryInfo(card.handle).used)
    except UnavailableError as error:
        used = Unavailable(why(error))
    return used, "increase of the card's used memory (NVML), including other programs"
