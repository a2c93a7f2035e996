"""What is installed, what works, and what to do about the rest. Needs the base install alone."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
from collections.abc import Mapping
from typing import Any

from msgspec import to_builtins

from sparsifiner_edge.camera.confine import confinement
from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.ops import native
from sparsifiner_edge.quiet import NO_TELEMETRY
from sparsifiner_edge.results import environment, machine, package_version, unavailable
from sparsifiner_edge.runtime import cuda, ort_cuda, ort_tensorrt
from sparsifiner_edge.runtime.ort import load_backend
from sparsifiner_edge.runtime.tensorrt import full as tensorrt
from sparsifiner_edge.runtime.tensorrt import rtx as tensorrt_rtx

DISTRIBUTION = "sparsifiner-edge"
_REQUIREMENT = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)(?:\[(?P<extras>[^\]]*)\])?.*?extra\s*==\s*['\"](?P<extra>[^'\"]+)"
)


def examine() -> dict[str, Any]:
    """Look at this installation.

    Returns:
        `native_library` (path or None) and `native_library_reason`; `backends`: per name `available`, `reason` and
        `version`; `cuda`: the device as CUDA describes it, or `unavailable`; `triton`: as a backend; `telemetry`:
        per library "off", or what switches it on; `decoding`: what confines the process that decodes videos and streams
        here, see `camera.confine.confinement`; `extras`: per extra its `packages` (name to version or why not),
        `complete` and the `install` command, or `unavailable`; `warnings`; `machine` and `environment` as in results.
    """
    device = _cuda()
    return {
        **_native_library(),
        "backends": {
            "onnxruntime": _onnxruntime(),
            **{module.BACKEND: _provider(module, device) for module in (ort_cuda, ort_tensorrt)},
            "tensorrt": _engines("tensorrt", tensorrt, device, "builds engines for the GPU of this machine"),
            "tensorrt-rtx": _engines(
                "tensorrt-rtx", tensorrt_rtx, device, "builds engines ahead of time for RTX cards"
            ),
        },
        "cuda": device,
        "triton": _triton(),
        "telemetry": _telemetry(),
        "decoding": to_builtins(confinement()),
        "extras": _extras(),
        "warnings": _warnings(),
        "machine": machine(),
        "environment": environment(),
    }


def _native_library() -> dict[str, Any]:
    try:
        reason = native.why_unusable()
    except ValueError as error:
        reason = f"cannot be used: {error}"
    if reason is not None:
        return {"native_library": None, "native_library_reason": reason}
    return {
        "native_library": str(native.library_path()),
        "native_library_reason": f"loads, and uses {native.target()}",
    }


def _backend(available: bool, reason: str, version: Any) -> dict[str, Any]:
    return {"available": available, "reason": reason, "version": version}


def _cuda() -> dict[str, Any]:
    """The device 0, or why there is none; nothing of TensorRT's may be touched where there is none."""
    try:
        found = cuda.probe()
    except SparsifinerError as error:
        return unavailable(f"{error.what} {error.fix}")
    return found._asdict() | {"compute_capability": found.compute_capability, "sm": list(found.sm)}


def _onnxruntime() -> dict[str, Any]:
    try:
        module = load_backend()
    except SparsifinerError as error:
        return _backend(False, f"{error.what} {error.fix}", unavailable("cannot be imported"))
    providers = ", ".join(module.get_available_providers())
    return _backend(True, f"imports, and offers {providers}; uses CPUExecutionProvider", str(module.__version__))


def _provider(module: Any, device: Mapping[str, Any]) -> dict[str, Any]:
    """That a build offers a provider says nothing about the machine: it does so without any GPU."""
    try:
        version = str(module.load_backend().__version__)
    except SparsifinerError as error:
        return _backend(False, f"{error.what} {error.fix}", package_version("onnxruntime"))
    if "unavailable" in device:
        return _backend(False, f"{module.PROVIDER} is built in, and {device['unavailable']}", version)
    return _backend(True, f"{module.PROVIDER} is built in; whether it starts is seen when a bundle is opened", version)


def _engines(package: str, module: Any, device: Mapping[str, Any], skill: str) -> dict[str, Any]:
    """A backend that runs engines: they run where there is a device; TensorRT-RTX also builds where there is none."""
    try:
        version = str(module.load_backend().__version__)
    except SparsifinerError as error:
        return _backend(False, f"{error.what} {error.fix}", package_version(package))
    if "unavailable" not in device:
        return _backend(True, f"imports; {skill}, and runs them on {device['name']}", version)
    ahead = module is tensorrt_rtx
    does = f"{skill}, and cannot run them here" if ahead else "cannot be used here"
    return _backend(ahead, f"imports; {does}: {device['unavailable']}", version)


def _triton() -> dict[str, Any]:
    """Triton compiles kernels at export, and with a GPU runs them in training."""
    try:
        module = importlib.import_module("triton")
    except ModuleNotFoundError:
        reason = f'is not installed. pip install "{DISTRIBUTION}[triton]"'
        return _backend(False, reason, package_version("triton"))
    except Exception as error:  # Its own library may not load.
        return _backend(False, f"cannot be imported: {error}", package_version("triton"))
    return _backend(True, "imports; compiles kernels for boards, with or without a GPU", str(module.__version__))


def _telemetry() -> dict[str, str]:
    """Whether a library may report its use from here: "off", or what switches it on."""
    name = "ORT_DISABLE_TELEMETRY"
    value = os.environ.get(name, "")
    return {
        "onnxruntime": "off" if value == NO_TELEMETRY[name] else f"on: {name} is set to {value!r} in the environment"
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
