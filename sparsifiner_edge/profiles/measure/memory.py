"""Memory of a measured process, phase by phase: resident, proportional, on the device; each with its source.

Files: proc_pid_status(5), proc_pid_clear_refs(5) and the kernel's filesystems/proc.rst.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from msgspec.structs import asdict, replace

from sparsifiner_edge.profiles.sensors.base import UnavailableError, read_text, why
from sparsifiner_edge.profiles.sensors.nvml import nvml_device
from sparsifiner_edge.records import Unavailable

DEVICE_SOURCE = "NVML's memory of this process"
UNIFIED_SOURCE = "fall of MemAvailable since before the first phase: process and device, other programs included"
Bytes = int | Unavailable


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Of a process: resident set, its peak, and the proportional share (pages divided among those that map them)."""

    rss_bytes: Bytes
    peak_rss_bytes: Bytes
    pss_bytes: Bytes


class PhaseMemory(Memory, frozen=True, kw_only=True):
    """Of a process, at the end of a phase.

    Attributes:
        device_bytes: of an NVIDIA card; device_source: where another source than `DEVICE_SOURCE` was taken.
        unified_bytes: of a Jetson, whose processor and GPU share their memory.
    """

    device_bytes: Bytes
    device_source: str | None = None
    unified_bytes: Bytes


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
        text = read_text(path)
    except OSError as error:
        return Unavailable(why(error))
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else Unavailable(f"{path} has no {field}")


class MemoryPhases:
    """Follows one process through phases; the first begins at once.

    Args:
        pid: of the process; it should not have loaded anything yet, since device memory may only be known as a change.
        root: where `proc` and `etc` are; tests give a made-up tree.
    """

    def __init__(self, pid: int, root: Path = Path("/")) -> None:
        self._pid = pid
        self._meminfo = root / "proc/meminfo"
        self._process = root / "proc" / str(pid)
        self._unified = (root / "etc/nv_tegra_release").exists()
        self._available = _kilobytes(self._meminfo, "MemAvailable")
        self._card_used, _ = _card_memory(pid)
        self.phases: dict[str, PhaseMemory] = {}
        self._peak: Bytes | None = None
        self._reset = ""
        self._begin()

    def end(self, name: str) -> PhaseMemory:
        """End a phase and begin the next."""
        now = read_memory(self._process)
        peak = now.peak_rss_bytes
        if self._reset and peak == self._peak:
            peak = Unavailable(f"it lies before this phase, and cannot be reset: {self._reset}")
        self.phases[name] = self._with_device(replace(now, peak_rss_bytes=peak))
        self._begin()
        return self.phases[name]

    def _begin(self) -> None:
        try:
            (self._process / "clear_refs").write_text("5", encoding="ascii")  # Resets VmHWM.
            self._reset = ""
        except OSError as error:
            self._reset = why(error)
        self._peak = read_memory(self._process).peak_rss_bytes

    def _with_device(self, process: Memory) -> PhaseMemory:
        device: Bytes = Unavailable("processor and GPU share their memory: see unified_bytes")
        unified: Bytes = Unavailable("processor and GPU have memories of their own, or there is no GPU")
        source = None
        if self._unified:
            unified = _difference(self._available, _kilobytes(self._meminfo, "MemAvailable"))
        else:
            used, device = _card_memory(self._pid)
            if isinstance(used, int) and isinstance(device, Unavailable):
                source = f"{device.why}: rise of the card's used memory since before the first phase"
                device = _difference(used, self._card_used)
        return PhaseMemory(**asdict(process), device_bytes=device, device_source=source, unified_bytes=unified)


def _difference(more: Bytes, less: Bytes) -> Bytes:
    if isinstance(more, int) and isinstance(less, int):
        return max(0, more - less)
    return less if isinstance(more, int) else more


def _card_memory(pid: int) -> tuple[Bytes, Bytes]:
    """Bytes in use on the card, by any process and by this one."""
    try:
        with nvml_device() as (nvml, card):
            used = int(nvml.nvmlDeviceGetMemoryInfo(card).used)
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(card)
    except UnavailableError as error:
        return Unavailable(why(error)), Unavailable(why(error))
    own = next((process.usedGpuMemory for process in processes if process.pid == pid), None)
    # In a container the driver counts processes by other numbers; on some systems it gives no memory by process.
    return used, Unavailable("NVML gives no memory of this process") if own is None else int(own)
