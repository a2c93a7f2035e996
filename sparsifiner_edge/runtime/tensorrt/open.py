"""From an engine in a bundle to a session, and the package before it: alike for TensorRT and TensorRT-RTX."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsifiner_edge.bundle.engines import Device, Engine, fitting_engine, mismatches
from sparsifiner_edge.bundle.manifest import Manifest
from sparsifiner_edge.bundle.store import read_listed
from sparsifiner_edge.errors import BackendError, MissingExtraError, SparsifinerError
from sparsifiner_edge.runtime.cuda import probe
from sparsifiner_edge.runtime.tensorrt.session import BODIES, EngineSession, target


def import_package(module: str, package: str, fix: str) -> Any:
    """Import TensorRT's Python module; that touches no driver.

    Args:
        module, package: its names in Python and for pip; the extra is named as the package.
        fix: what to do where it is installed and does not import.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is installed and cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, f"{module}_bindings", f"{module}_libs"):
            raise BackendError(f"{module} lacks the module {error.name}.", f"Reinstall {package}.") from error
        raise MissingExtraError(package, package) from error
    except Exception as error:  # Its libraries may be missing, or be those of another version.
        raise BackendError(f"{module} cannot be imported: {error}.", fix) from error


def why_no_fit(load_backend: Callable[[], Any], engine: Engine) -> str | None:
    """Why an engine cannot be run on this machine; None where it can. See `build.EngineBackend`."""
    try:
        reasons = mismatches(engine, target(engine.backend, load_backend(), probe()))
    except SparsifinerError as error:
        return error.what
    return "; ".join(reasons) or None


def open_listed(trt: Any, backend: str, folder: Path, manifest: Manifest, kernels: str) -> EngineSession:
    """The engine of a checked bundle that runs on this machine; see `open_session`.

    Args:
        trt: the module of `backend`.
        kernels: "portable" takes only engines whose operators are carried out by their bodies.

    Raises:
        BackendError: no CUDA device, or no engine of the bundle fits it.
    """
    engines = [engine for engine in manifest.engines if engine.backend == backend]
    portable = [engine for engine in engines if engine.details.get("kernels", BODIES) == BODIES]
    if kernels == "portable" and engines and not portable:
        raise BackendError(
            f"{folder} holds no engine for {backend} that runs the operators' bodies.",
            f"Build one here: sparsifiner-edge build {folder} --backend {backend} --option kernels=portable",
        )
    engines = portable if kernels == "portable" else engines
    # What needs no GPU to be seen comes first: another system's engine would not run with one either.
    fitting_engine(engines, Device(backend, str(trt.__version__), ""), folder)
    engine = fitting_engine(engines, target(backend, trt, probe()), folder)
    content = read_listed(folder, manifest, engine.file)
    return EngineSession(trt, folder / engine.file, engine, manifest, content=content)
