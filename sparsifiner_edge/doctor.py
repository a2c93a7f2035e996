"""What is installed, what works, and what to do about the rest. Needs the base install alone."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.ops import native
from sparsifiner_edge.results import environment, machine, package_version, unavailable
from sparsifiner_edge.runtime.ort import load_backend

DISTRIBUTION = "sparsifiner-edge"
_TENSORRT = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx"}
_REQUIREMENT = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)(?:\[(?P<extras>[^\]]*)\])?.*?extra\s*==\s*['\"](?P<extra>[^'\"]+)"
)


def examine() -> dict[str, Any]:
    """Look at this installation.

    Returns:
        `native_library` (path or None) and `native_library_reason`; `backends`: per name `available`, `reason` and
        `version`; `extras`: per extra its `packages` (name to version or why not), `complete` and the `install`
        command, or `unavailable`; `warnings`; `machine` and `environment` as in results.
    """
    return {
        **_native_library(),
        "backends": {"onnxruntime": _onnxruntime()} | {name: _tensorrt(package) for name, package in _TENSORRT.items()},
        "extras": _extras(),
        "warnings": _warnings(),
        "machine": machine(),
        "environment": environment(),
    }


def _native_library() -> dict[str, Any]:
    path = native.library_path()
    if path is None:
        return {"native_library": None, "native_library_reason": native.why_missing()}
    try:
        reason = f"loads, and uses {native.target()}"
    except (OSError, ValueError) as error:
        return {"native_library": None, "native_library_reason": f"cannot be used: {error}"}
    return {"native_library": str(path), "native_library_reason": reason}


def _onnxruntime() -> dict[str, Any]:
    try:
        module = load_backend()
    except SparsifinerError as error:
        return {"available": False, "reason": f"{error.what} {error.fix}", "version": unavailable("cannot be imported")}
    providers = ", ".join(module.get_available_providers())
    return {
        "available": True,
        "reason": f"imports, and offers {providers}; this version uses CPUExecutionProvider",
        "version": str(module.__version__),
    }


def _tensorrt(package: str) -> dict[str, Any]:
    version = package_version(package)
    state = "is not installed either" if isinstance(version, dict) else f"{version} is installed"
    return {
        "available": False,
        "reason": f"not supported by this version (the package {package} {state})",
        "version": version,
    }


def _extras() -> dict[str, Any]:
    """Every extra's packages, from the installed metadata, so that no second list can go out of date."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return unavailable(f"{DISTRIBUTION} runs from its source folder; install it with pip to see its extras")
    wanted: dict[str, list[tuple[str, list[str]]]] = {}
    for requirement in requirements:
        if match := _REQUIREMENT.match(requirement):
            nested = [extra.strip() for extra in (match["extras"] or "").split(",") if extra.strip()]
            wanted.setdefault(match["extra"], []).append((match["name"], nested))
    return {extra: _extra(extra, _expand(wanted, extra)) for extra in wanted}


def _expand(wanted: dict[str, list[tuple[str, list[str]]]], extra: str) -> list[str]:
    """Packages of an extra, where "sparsifiner-edge[cpu]" stands for those of another."""
    names: dict[str, None] = {}
    for name, nested in wanted.get(extra, []):
        inner = [n for other in nested for n in _expand(wanted, other)] if name == DISTRIBUTION else [name]
        names |= dict.fromkeys(inner)
    return list(names)


def _extra(extra: str, names: list[str]) -> dict[str, Any]:
    packages = {name: package_version(name) for name in names}
    return {
        "packages": packages,
        "complete": all(isinstance(version, str) for version in packages.values()),
        "install": f'pip install "{DISTRIBUTION}[{extra}]"',
    }


def _warnings() -> list[str]:
    both = ("onnxruntime", "onnxruntime-gpu")
    if any(isinstance(package_version(name), dict) for name in both):
        return []
    return [
        "onnxruntime and onnxruntime-gpu are both installed and overwrite one another. "
        "Remove both and install one: pip uninstall -y onnxruntime onnxruntime-gpu"
    ]
