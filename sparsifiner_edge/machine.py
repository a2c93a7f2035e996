"""Machine and software of a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import msgspec

from sparsifiner_edge.records import Unavailable

PACKAGES = ("sparsifiner-edge", "numpy", "onnx", "onnxruntime")
"""Distributions whose versions are recorded."""
VARIABLES = re.compile(r"^(OMP|KMP|GOMP|MKL|OPENBLAS|BLIS|ORT|ONNXRUNTIME)_|_NUM_THREADS$|^CUDA_VISIBLE_DEVICES$")
"""Environment variables that are recorded: they change threads, devices or math libraries."""
NO_CPUFREQ = Unavailable("cpufreq is not readable, as in most virtual machines")


class Machine(msgspec.Struct, frozen=True):
    """Processor, cores, memory, operating system, clock governor and board."""

    cpu_model: str | Unavailable
    logical_cores: int
    affinity_cores: int
    memory_bytes: int | Unavailable
    os: str
    kernel: str
    architecture: str
    governor: str | Unavailable
    board: str | Unavailable


class Environment(msgspec.Struct, frozen=True):
    """Python version, relevant packages, and variables that control threads and devices."""

    python: str
    packages: dict[str, str | Unavailable]
    variables: dict[str, str]


def available_cores() -> int:
    """Return the number of logical cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _cpu_fields(root: Path) -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    return fields


_X86 = ("x86_64", "AMD64", "i686")
"""Names that `platform.machine` gives to x86 processors."""


def has_int8_products(root: Path = Path("/")) -> bool:
    """Return True if the processor accumulates int8 products in 32 bits.

    x86 without VNNI or AMX adds pairs of products in 16 bits, which saturate (oneDNN, "Nuances of int8 computations").
    """
    fields = _cpu_fields(root)
    flags = fields.get("flags")
    if flags is None:  # Arm, or hidden.
        return "features" in fields or platform.machine() not in _X86
    return not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(flags.split())


def _cpu_model(root: Path) -> str | Unavailable:
    fields = _cpu_fields(root)
    if fields.get("model name"):
        return fields["model name"]
    if "cpu implementer" in fields:  # Arm kernels give numbers, x86 kernels a name.
        return f"implementer {fields['cpu implementer']}, part {fields.get('cpu part', 'unknown')}"
    return Unavailable("/proc/cpuinfo names no model")


def _memory_bytes(root: Path) -> int | Unavailable:
    match = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo") or "", re.MULTILINE)
    return int(match[1]) * 1024 if match else Unavailable("/proc/meminfo has no MemTotal")


def machine(root: Path = Path("/")) -> Machine:
    """Describe this machine.

    Args:
        root: Folder that contains `proc` and `sys`; tests give another one.
    """
    system = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read(root / "etc/os-release") or "", re.MULTILINE)
    return Machine(
        cpu_model=_cpu_model(root),
        logical_cores=os.cpu_count() or 1,
        affinity_cores=available_cores(),
        memory_bytes=_memory_bytes(root),
        os=system[1] if system else platform.system(),
        kernel=platform.release(),
        architecture=platform.machine(),
        governor=_read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or NO_CPUFREQ,
        board=_read(root / "proc/device-tree/model") or Unavailable("no device tree, as on a PC"),
    )


def jetson_release(root: Path = Path("/")) -> str | None:
    """Return the release of Jetson Linux, such as "36.4.3"; None on other machines.

    Release 36 is JetPack 6; 38 and 39 are JetPack 7.

    Args:
        root: Folder that contains `etc` and `var`; tests give another one.
    """
    release = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _read(root / "etc/nv_tegra_release") or "")
    if release:
        return f"{release[1]}.{release[2]}"
    packages = _read(root / "var/lib/dpkg/status") or ""
    core = re.search(r"^Package: nvidia-l4t-core\n(?:.+\n)*?Version: ([\d.]+)", packages, re.MULTILINE)
    return core[1] if core else None


def package_version(name: str) -> str | Unavailable:
    """Return the version of an installed distribution, or why there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Unavailable("not installed")


def environment() -> Environment:
    """Describe the software of this process."""
    return Environment(
        python=platform.python_version(),
        packages={name: package_version(name) for name in PACKAGES},
        variables={name: value for name, value in sorted(os.environ.items()) if VARIABLES.search(name)},
    )
