"""Memory of a measured process, phase by phase: resident, proportional, on the device; each with its source.

From outside or inside the process, at the end of each phase:

    memory = MemoryPhases(worker.pid)
    ...load...              memory.end("load")
    ...first inference...   memory.end("first_inference")
    ...many more...         memory.end("steady")
    memory.report()

Files: proc_pid_status(5), proc_pid_clear_refs(5) and the kernel's filesystems/proc.rst.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sparsifiner_edge.profiles.sensors.base import UnavailableError, read_text, why
from sparsifiner_edge.profiles.sensors.nvml import nvml_device
from sparsifiner_edge.results import unavailable

_RESET_PEAK = "5"
SOURCES = {
    "rss_bytes": "VmRSS at the phase's end",
    "peak_rss_bytes": "VmHWM, reset through clear_refs at the phase's start",
    "pss_bytes": "Pss of smaps_rollup at the phase's end (the kernel keeps no peak of it)",
}


def read_memory(process: Path = Path("/proc/self")) -> dict[str, Any]:
    """Resident set now, its peak, and the proportional share (pages divided among the processes that map them).

    Args:
        process: a process's folder in procfs.

    Returns:
        `rss_bytes`, `peak_rss_bytes`, `pss_bytes`; each an int, or why it is unavailable.
    """
    fields = (
        ("rss_bytes", "status", "VmRSS"),
        ("peak_rss_bytes", "status", "VmHWM"),
        ("pss_bytes", "smaps_rollup", "Pss"),
    )
    return {key: _kilobytes(process / file, field) for key, file, field in fields}


def _kilobytes(path: Path, field: str) -> Any:
    """A field of a file of procfs in bytes, or why it is unavailable."""
    try:
        text = read_text(path)
    except OSError as error:
        return unavailable(why(error))
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else unavailable(f"{path} has no {field}")


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
        self._phases: dict[str, dict[str, Any]] = {}
        self._peak: Any = None
        self._reset = ""
        self._begin()

    def end(self, name: str) -> dict[str, Any]:
        """End a phase and begin the next.

        Returns:
            `rss_bytes`, `peak_rss_bytes`, `pss_bytes`, `device_bytes` (an NVIDIA card) and `unified_bytes` (a Jetson,
            whose processor and GPU share their memory); each an int, or why it is unavailable.
        """
        phase = read_memory(self._process)
        if self._reset and phase["peak_rss_bytes"] == self._peak:
            phase["peak_rss_bytes"] = unavailable(f"it lies before this phase, and cannot be reset: {self._reset}")
        phase |= self._device()
        self._phases[name] = phase
        self._begin()
        return phase

    def report(self) -> dict[str, Any]:
        """The phases by name, and `sources`: where each figure comes from."""
        device = {
            "device_bytes": "NVML's memory of this process; where NVML does not name it, the rise of the card's used "
            "memory since before the first phase, other programs included (then `device_source` says so)",
            "unified_bytes": "fall of MemAvailable since before the first phase: process and device together, other "
            "programs included",
        }
        return {"phases": dict(self._phases), "sources": SOURCES | device}

    def _begin(self) -> None:
        try:
            (self._process / "clear_refs").write_text(_RESET_PEAK, encoding="ascii")
            self._reset = ""
        except OSError as error:
            self._reset = why(error)
        self._peak = read_memory(self._process)["peak_rss_bytes"]

    def _mem_available(self) -> Any:
        return _kilobytes(self._root / "proc/meminfo", "MemAvailable")

    def _device(self) -> dict[str, Any]:
        if self._unified:
            return {
                "device_bytes": unavailable("processor and GPU share their memory: see unified_bytes"),
                "unified_bytes": _fall(self._available, self._mem_available()),
            }
        report = {"unified_bytes": unavailable("processor and GPU have memories of their own, or there is no GPU")}
        return report | _device_memory(self._pid, self._card_used)


def _fall(before: Any, now: Any) -> Any:
    if isinstance(before, int) and isinstance(now, int):
        return max(0, before - now)
    return now if isinstance(before, int) else before


def _card_used() -> Any:
    """Bytes in use on the card, by whomever."""
    try:
        with nvml_device() as (nvml, card):
            return int(nvml.nvmlDeviceGetMemoryInfo(card).used)
    except UnavailableError as error:
        return unavailable(why(error))


def _device_memory(pid: int, used_before: Any) -> dict[str, Any]:
    """`device_bytes` of a process; where NVML does not tell it by process, the card's rise, and `device_source`."""
    try:
        with nvml_device() as (nvml, card):
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(card)
    except UnavailableError as error:
        return {"device_bytes": unavailable(why(error))}
    used = [process.usedGpuMemory for process in processes if process.pid == pid]
    if used and used[0] is not None:
        return {"device_bytes": int(used[0])}
    now = _card_used()
    if not isinstance(now, int) or not isinstance(used_before, int):
        return {"device_bytes": used_before if isinstance(now, int) else now}
    # In a container the driver counts processes by other numbers; on some systems it tells no memory by process.
    reason = "NVML gives no memory of this process" if used else "NVML does not list this process"
    return {"device_bytes": max(0, now - used_before), "device_source": f"{reason}: rise of the card's used memory"}
