"""Memory of a measured process, phase by phase: resident, proportional, on the device; each with its source.

From outside or inside the process, at the end of each phase:

    memory = MemoryPhases(worker.pid)
    ...load...              memory.end("load")
    ...first inference...   memory.end("first_inference")
    ...many more...         memory.end("steady")
    memory.phases

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

_RESET_PEAK = "5"
SOURCES = {
    "rss_bytes": "VmRSS at the phase's end",
    "peak_rss_bytes": "VmHWM, reset through clear_refs at the phase's start",
    "pss_bytes": "Pss of smaps_rollup at the phase's end (the kernel keeps no peak of it)",
    "device_bytes": "NVML's memory of this process; where NVML does not name it, the rise of the card's used "
    "memory since before the first phase, other programs included (then `device_source` says so)",
    "unified_bytes": "fall of MemAvailable since before the first phase: process and device together, other "
    "programs included",
}
"""Where each figure comes from."""
Bytes = int | Unavailable


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Of a process: resident set, its peak, and the proportional share (pages divided among those that map them)."""

    rss_bytes: Bytes
    peak_rss_bytes: Bytes
    pss_bytes: Bytes


class Phase(Memory, frozen=True, kw_only=True):
    """Of a process, at the end of a phase.

    Attributes:
        device_bytes: of an NVIDIA card; device_source: where another source than `SOURCES` says was taken.
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
        self._root = root
        self._process = root / "proc" / str(pid)
        self._unified = (root / "etc/nv_tegra_release").exists()
        self._available = self._mem_available()
        self._card_used = _card_used()
        self.phases: dict[str, Phase] = {}
        self._peak: Bytes | None = None
        self._reset = ""
        self._begin()

    def end(self, name: str) -> Phase:
        """End a phase and begin the next."""
        now = read_memory(self._process)
        peak = now.peak_rss_bytes
        if self._reset and peak == self._peak:
            peak = Unavailable(f"it lies before this phase, and cannot be reset: {self._reset}")
        phase = self._with_device(replace(now, peak_rss_bytes=peak))
        self.phases[name] = phase
        self._begin()
        return phase

    def _begin(self) -> None:
        try:
            (self._process / "clear_refs").write_text(_RESET_PEAK, encoding="ascii")
            self._reset = ""
        except OSError as error:
            self._reset = why(error)
        self._peak = read_memory(self._process).peak_rss_bytes

    def _mem_available(self) -> Bytes:
        return _kilobytes(self._root / "proc/meminfo", "MemAvailable")

    def _with_device(self, process: Memory) -> Phase:
        if self._unified:
            device: Bytes = Unavailable("processor and GPU share their memory: see unified_bytes")
            source = None
            unified = _fall(self._available, self._mem_available())
        else:
            device, source = _device_memory(self._pid, self._card_used)
            unified = Unavailable("processor and GPU have memories of their own, or there is no GPU")
        return Phase(**asdict(process), device_bytes=device, device_source=source, unified_bytes=unified)


def _fall(before: Bytes, now: Bytes) -> Bytes:
    if isinstance(before, int) and isinstance(now, int):
        return max(0, before - now)
    return now if isinstance(before, int) else before


def _card_used() -> Bytes:
    """Bytes in use on the card, by whomever."""
    try:
        with nvml_device() as (nvml, card):
            return int(nvml.nvmlDeviceGetMemoryInfo(card).used)
    except UnavailableError as error:
        return Unavailable(why(error))


def _device_memory(pid: int, used_before: Bytes) -> tuple[Bytes, str | None]:
    """`device_bytes` of a process; where NVML does not tell it by process, the card's rise, and `device_source`."""
    try:
        with nvml_device() as (nvml, card):
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(card)
    except UnavailableError as error:
        return Unavailable(why(error)), None
    used = [process.usedGpuMemory for process in processes if process.pid == pid]
    if used and used[0] is not None:
        return int(used[0]), None
    now = _card_used()
    if not isinstance(now, int) or not isinstance(used_before, int):
        return (used_before if isinstance(now, int) else now), None
    # In a container the driver counts processes by other numbers; on some systems it tells no memory by process.
    reason = "NVML gives no memory of this process" if used else "NVML does not list this process"
    return max(0, now - used_before), f"{reason}: rise of the card's used memory"
