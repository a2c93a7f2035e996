"""What TensorRT and TensorRT-RTX do alike as backends: open engines, and say why they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from sparsifiner_edge.artifacts import MAX_FILE
from sparsifiner_edge.bundle.engines import BODIES, Details, Engine, EngineDevice, fitting_engine, mismatches
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, SparsifinerError
from sparsifiner_edge.files import io_errors, read_bytes
from sparsifiner_edge.machine import package_version
from sparsifiner_edge.runtime.backend import EngineBackend, Job, refuse_native, require_stored
from sparsifiner_edge.runtime.cuda import CudaDevice, probe
from sparsifiner_edge.runtime.cuda.driver import major
from sparsifiner_edge.runtime.tensorrt.candidates import time_engine
from sparsifiner_edge.runtime.tensorrt.session import EngineSession


class TensorRtBackend(EngineBackend):
    """Either of them; `load` gives its module, and `plan` and `build` are its own."""

    def device(self) -> CudaDevice:
        """The device, after CUDA has answered, where its driver takes this TensorRT.

        Raises:
            MissingExtraError, BackendError: see `probe` and `require_driver`.
        """
        found = probe()
        self.require_driver(found)
        return found

    def require_driver(self, device: CudaDevice) -> None:
        """Refuse a TensorRT for a newer CUDA than the driver takes: it makes its objects all the same, and ends the
        process on use.

        Raises:
            BackendError: says which package it is, and what to do.
        """
        takes = major(device.driver_version)
        for cuda in (12, 13):
            name = f"{self.name}-cu{cuda}"
            if cuda > takes and isinstance(package_version(name), str):
                raise BackendError(
                    f"{name} needs a driver for CUDA {cuda}, and this one takes CUDA {device.driver_version} at most.",
                    f"Update the driver, or install a {self.name} for CUDA {takes} in its place; "
                    "sparsifiner-edge doctor says which extra fits.",
                )

    def check(self, bundle: Bundle) -> None:
        """Refuse kernels and a precision that no engine of a bundle has: it computes in the types of the file.

        Raises:
            BackendError: says what it has.
        """
        refuse_native(self.execution.kernels)
        require_stored(self.execution.precision, bundle.manifest.float_precision, self.name)

    def why_not_here(self, engine: Engine) -> str | None:
        """See `EngineBackend.why_not_here`."""
        try:
            reasons = mismatches(engine, self._this_machine(self.load()))
        except SparsifinerError as error:
            return error.what
        return "; ".join(reasons) or None

    def _this_machine(self, trt: Any) -> EngineDevice:
        """What an engine must fit to run here, after CUDA has answered."""
        found = self.device()
        return EngineDevice(self.name, str(trt.__version__), found.compute_capability, found.name)

    def finished(self, trt: Any, job: Job, bundle: Bundle, content: bytes, details: Details) -> Details:
        """Write an engine, and time it where that is asked for; what `build` returns."""
        path = Path(job.output)
        with io_errors(path):
            path.write_bytes(content)
        timed = {job.candidate: time_engine(trt, path, job.engine, job.candidate, bundle)} if job.timed else None
        return msgspec.structs.replace(details, kernels=job.candidate, candidates=timed)

    def open_engine(self, path: Path, engine: Engine, bundle: Bundle) -> EngineSession:
        """See `EngineBackend.open_engine`."""
        return EngineSession(self.load(), path, read_bytes(path, MAX_FILE), engine, bundle.manifest)

    def open(self, bundle: Bundle) -> EngineSession:
        """The engine of a bundle that runs on this machine; see `Backend.open`. Kernels "portable" are those of engines
        whose operators are carried out by their bodies.

        Raises:
            BackendError: no CUDA device, or no engine of the bundle fits it.
        """
        self.check(bundle)
        trt, folder, kernels = self.load(), bundle.folder, self.execution.kernels
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
        engine = fitting_engine(engines, self._this_machine(trt), folder)
        return EngineSession(trt, folder / engine.file, bundle.read(engine.file), engine, bundle.manifest)
