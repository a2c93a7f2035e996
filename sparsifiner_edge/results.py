"""The result file: what was measured, on what, with which machine and software, every raw sample, and the statistics.

Schema version 1 is one JSON object with the fields of `_FIELDS`. Units stand in key names (`latency_ms`).
A value that could not be found is `{"unavailable": "why"}`, never null.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsifiner_edge.artifacts import read_json
from sparsifiner_edge.bounds import flaw
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.files import write_text
from sparsifiner_edge.text import dump_json

RESULT_SCHEMA = 1
KINDS = ("profile", "evaluation", "comparison", "sweep", "demo", "estimate")
PACKAGES = ("sparsifiner-edge", "numpy", "onnx", "onnxruntime")
VARIABLES = re.compile(r"^(OMP|KMP|GOMP|MKL|OPENBLAS|BLIS|ORT|ONNXRUNTIME)_|_NUM_THREADS$|^CUDA_VISIBLE_DEVICES$")
_FIELDS: dict[str, type] = {
    "kind": str,
    "created": str,
    "command": list,
    "subjects": list,
    "machine": dict,
    "environment": dict,
    "method": dict,
    "samples": dict,
    "statistics": dict,
}
_MACHINE_FIELDS = (
    "cpu_model", "logical_cores", "affinity_cores", "memory_bytes", "os", "kernel", "architecture", "governor", "board",
)  # fmt: skip
_ENVIRONMENT_FIELDS = ("python", "packages", "variables")


def unavailable(why: str) -> dict[str, str]:
    """What stands where a value could not be found."""
    return {"unavailable": why}


def available_cores() -> int:
    """Logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _cpu_model(root: Path) -> Any:
    fields: dict[str, str] = {}
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    if fields.get("model name"):
        return fields["model name"]
    if "cpu implementer" in fields:  # Arm kernels give numbers where x86 gives a name.
        return f"implementer {fields['cpu implementer']}, part {fields.get('cpu part', 'unknown')}"
    return unavailable("/proc/cpuinfo names no model")


def _memory_bytes(root: Path) -> Any:
    match = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo") or "", re.MULTILINE)
    return int(match[1]) * 1024 if match else unavailable("/proc/meminfo has no MemTotal")


def machine(root: Path = Path("/")) -> dict[str, Any]:
    """The machine: processor, cores, memory, system, clock governor and board.

    Args:
        root: where `proc` and `sys` are; tests give a made-up tree.
    """
    governor = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    board = _read(root / "proc/device-tree/model")
    system = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read(root / "etc/os-release") or "", re.MULTILINE)
    return {
        "cpu_model": _cpu_model(root),
        "logical_cores": os.cpu_count() or 1,
        "affinity_cores": available_cores(),
        "memory_bytes": _memory_bytes(root),
        "os": system[1] if system else platform.system(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "governor": governor or unavailable("cpufreq is not readable, as in most virtual machines"),
        "board": board or unavailable("no device tree, as on a PC"),
    }


def package_version(name: str) -> Any:
    """Version of an installed distribution, or why there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return unavailable("not installed")


def environment() -> dict[str, Any]:
    """Python, the packages that a measurement depends on, and the variables that steer threads and devices."""
    return {
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "variables": {name: value for name, value in sorted(os.environ.items()) if VARIABLES.search(name)},
    }


def new_result(
    kind: str,
    subjects: Sequence[Mapping[str, Any]],
    method: Mapping[str, Any],
    samples: Mapping[str, Any],
    statistics: Mapping[str, Any],
) -> dict[str, Any]:
    """A result of schema version 1, with machine, environment, time (UTC) and command filled in.

    Args:
        kind: one of `KINDS`.
        subjects: what was measured; each has `path` and `sha256`. A comparison's first subject is the one judged.
        method: how, in enough detail to do it again.
        samples: every raw sample; units in the key names.
        statistics: values derived from `samples`, with their intervals.

    Raises:
        ArtifactError: a field is missing, mistyped or null.
    """
    result = {
        "schema_version": RESULT_SCHEMA,
        "kind": kind,
        "created": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command(),
        "subjects": [dict(subject) for subject in subjects],
        "machine": machine(),
        "environment": environment(),
        "method": dict(method),
        "samples": dict(samples),
        "statistics": dict(statistics),
    }
    check_result(result, "The result")
    return result


def command() -> list[str]:
    """What was typed: the program by its place below the working directory, or by its name."""
    program = os.path.relpath(sys.argv[0])
    return [Path(program).name if program.startswith("..") else program, *sys.argv[1:]]


def check_result(result: Mapping[str, Any], origin: str) -> None:
    """Check a result against the schema.

    Raises:
        ArtifactError: names the first field that is missing, mistyped or null.
    """
    for name, kind in _FIELDS.items():
        if not isinstance(result.get(name), kind):
            _refuse(origin, name, f"{_found(result, name)}; it must be a {_JSON_NAMES[kind]}")
    if result["kind"] not in KINDS:
        _refuse(origin, "kind", f"{result['kind']!r}; it must be one of {', '.join(KINDS)}")
    try:
        datetime.datetime.strptime(result["created"], "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        _refuse(origin, "created", f"{result['created']!r}; it must be a UTC time such as 2025-01-31T12:00:00Z")
    _check_subjects(result["subjects"], origin)
    for field, names in (("machine", _MACHINE_FIELDS), ("environment", _ENVIRONMENT_FIELDS)):
        for name in names:
            if name not in result[field]:
                _refuse(origin, f"{field}.{name}", "missing")
    _refuse_nulls(result, "", origin)


_JSON_NAMES: dict[type, str] = {str: "string", list: "list", dict: "JSON object"}


def _found(container: Mapping[str, Any], name: str) -> str:
    return f"of type {type(container[name]).__name__}" if name in container else "missing"


def _refuse(origin: str, field: str, problem: str) -> None:
    raise ArtifactError(f"{origin}: field {field} is {problem}.", "Measure again, or restore the file.")


def _check_subjects(subjects: list[Any], origin: str) -> None:
    if not subjects:
        _refuse(origin, "subjects", "empty")
    for number, subject in enumerate(subjects):
        if not isinstance(subject, dict):
            _refuse(origin, f"subjects[{number}]", f"of type {type(subject).__name__}; it must be a JSON object")
        for name in ("path", "sha256"):
            if not isinstance(subject.get(name), (str, dict)):
                _refuse(origin, f"subjects[{number}].{name}", f"{_found(subject, name)}; it must be a string")


def _refuse_nulls(value: Any, path: str, origin: str) -> None:
    if value is None:
        _refuse(origin, path, 'null; write {"unavailable": "why"} instead')
    if isinstance(value, Mapping):
        for name, child in value.items():
            _refuse_nulls(child, f"{path}.{name}" if path else str(name), origin)
    elif isinstance(value, (list, tuple)):
        for number, child in enumerate(value):
            _refuse_nulls(child, f"{path}[{number}]", origin)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result whole or not at all.

    Raises:
        ArtifactError: it does not fit the schema, holds NaN or infinity, or the disk refuses.
    """
    check_result(result, str(path))
    try:
        text = dump_json(result)
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: the result cannot be JSON: {error}.", "Report this as a bug.") from error
    write_text(path, text)


def read_result(path: Path) -> dict[str, Any]:
    """Read and check a result.

    Raises:
        ArtifactError: missing, no regular file, not JSON, of a newer schema, nested deeply, NaN or infinity in it, or a
            field is missing, mistyped or null.
    """
    result = read_json(path, RESULT_SCHEMA)
    found = flaw(result)
    if found is not None:
        raise ArtifactError(f"{path}: {found}.", "Measure again: such a file cannot be believed.")
    check_result(result, str(path))
    return result
