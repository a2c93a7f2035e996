"""What TensorRT and TensorRT-RTX do alike as backends: import their package, open engines, and say why they cannot."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from sparsifiner_edge.bundle.engines import Engine, EngineDevice, fitting_engine, mismatches
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, MissingExtraError, SparsifinerError
from sparsifiner_edge.runtime.backend import EngineBackend
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


class TensorRtBackend(EngineBackend):
    """Either of them; `load` gives its module, and `plan` and `build` are its own."""

    def why_not_here(self, engine: Engine) -> str | None:
        """See `EngineBackend.why_not_here`."""
        try:
            reasons = mismatches(engine, target(engine.backend, self.load(), probe()))
        except SparsifinerError as error:
            return error.what
        return "; ".join(reasons) or None

    def open_engine(self, path: Path, engine: Engine, bundle: Bundle) -> EngineSession:
        """See `EngineBackend.open_engine`."""
        return EngineSession(self.load(), path, engine, bundle.manifest)

    def open(self, bundle: Bundle, threads: int, kernels: str) -> EngineSession:  # noqa: ARG002
        """The engine of a bundle that runs on this machine; see `Backend.open`.

        Args:
            kernels: "portable" takes only engines whose operators are carried out by their bodies.

        Raises:
            BackendError: no CUDA device, or no engine of the bundle fits it.
        """
        trt, folder = self.load(), bundle.folder
        engines = [engine for engine in bundle.manifest.engines if engine.backend == self.name]
        portable = [engine for engine in engines if engine.details.kernels in (None, BODIES)]
        if kernels == "portable" and engines and not portable:
            raise BackendError(
                f"{folder} holds no engine for {self.name} that runs the operators' bodies.",
                f"Build one here: sparsifiner-edge build {folder} --backend {self.name} --option kernels=portable",
            )
        engines = portable if kernels == "portable" else engines
        # What needs no GPU to be seen comes first: another system's engine would not run with one either.
        fitting_engine(engines, EngineDevice(self.name, str(trt.__version__), ""), folder)
        engine = fitting_engine(engines, target(self.name, trt, probe()), folder)
        content = bundle.read(engine.file)
        return EngineSession(trt, folder / engine.file, engine, bundle.manifest, content=content)
