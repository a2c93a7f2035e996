"""What TensorRT and TensorRT-RTX do alike as backends: open engines, say why they cannot, and finish a build."""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from sparsifiner_edge.bundle.engines import (
    BODIES,
    BatchRange,
    Details,
    Engine,
    EngineCandidate,
    EngineDevice,
    fitting_engine,
    mismatches,
)
from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.errors import ArtifactError, BackendError, SparsifinerError
from sparsifiner_edge.files import io_errors
from sparsifiner_edge.machine import package_version
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.backend import Backend, require_stored
from sparsifiner_edge.runtime.cuda import CudaDevice, probe
from sparsifiner_edge.runtime.cuda.driver import major
from sparsifiner_edge.runtime.tensorrt.candidates import time_engine
from sparsifiner_edge.runtime.tensorrt.session import EngineSession


class Planned(NamedTuple):
    """One engine to build.

    Attributes:
        engine: what it will be, without file and details.
        candidates: what may carry out sparse attention in it (`bundle.engines.BODIES`, ..), the one that always works
            first. left_out: others -> why they are not built.
    """

    engine: Engine
    candidates: tuple[str, ...]
    left_out: Mapping[str, str]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate of an engine to build, as it goes to the process that builds it.

    Attributes:
        bundle: its folder. model_sha256: of its model when the engine was planned.
        output: path of the engine to write.
        engine: as planned: no file, no details.
        candidate: what shall carry out sparse attention: one of `Planned.candidates`.
    """

    bundle: str
    model_sha256: str
    output: str
    engine: Engine
    candidate: str = BODIES

    def checked_bundle(self) -> Bundle:
        """The bundle, opened in this process.

        Raises:
            ArtifactError: it is damaged, or its model is another by now.
        """
        bundle = open_bundle(Path(self.bundle))
        if bundle.manifest.files[MODEL_FILE] != self.model_sha256:
            raise ArtifactError(f"{self.bundle} was exported anew while the engines were built.", "Build them again.")
        return bundle


class TensorRtBackend(Backend):
    """Either of them; `load` gives its module."""

    def default_timeout_s(self) -> float:
        """Seconds that building one candidate may take."""
        return 600.0

    @abc.abstractmethod
    def plan(self, bundle: Bundle, capabilities: Sequence[str], batch: BatchRange) -> list[Planned]:
        """What is to be built; what cannot be is rejected before anything is. Kernels "portable" are the bodies alone,
        "native" the project's CUDA kernels.

        Args:
            capabilities: compute capabilities asked for, such as ("8.6", "8.9"); none: this machine's GPU.
            batch: sizes that the engines shall take; all equal where the bundle's batch is fixed.

        Raises:
            SparsifinerError: says what, and what to do.
        """

    @abc.abstractmethod
    def compile(self, job: Job, bundle: Bundle) -> tuple[bytes, Details]:
        """The content of one candidate of an engine, and what is known of its build."""

    def build(self, job: Job, tell: Progress) -> Details:
        """Build one candidate of an engine; called in a worker process that may die.

        Returns:
            What is known of it; under `candidates` what its runs gave, or why it was not run here.

        Raises:
            SparsifinerError: reaches the caller of `build_engine`.
        """
        start, bundle, path = time.monotonic(), job.checked_bundle(), Path(job.output)
        tell("building", 0, 1)
        content, details = self.compile(job, bundle)
        with io_errors(path):
            path.write_bytes(content)
        tell("checking", 0, 1)
        seconds, processor = time.monotonic() - start, time.process_time()
        why = self.why_not_here(job.engine)
        timed = EngineCandidate(failed=why)
        if why is None:
            engine = msgspec.structs.replace(job.engine, details=Details(kernels=job.candidate))
            timed = time_engine(EngineSession(self.load(), path, content, engine, bundle.manifest), bundle)
        return msgspec.structs.replace(
            details, kernels=job.candidate, candidates={job.candidate: timed}, bytes=len(content),
            build_seconds=seconds, cpu_seconds=processor,
        )  # fmt: skip

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
            if takes < cuda and isinstance(package_version(name), str):
                raise BackendError(
                    f"{name} needs a driver for CUDA {cuda}, and this one takes CUDA {device.driver_version} at most.",
                    f"Update the driver, or install a {self.name} for CUDA {takes} in its place; "
                    "sparsifiner-edge doctor says which extra fits.",
                )

    def why_not_here(self, engine: Engine) -> str | None:
        """Why an engine cannot be run on this machine, such as "CUDA finds no device."; None where it can."""
        try:
            return "; ".join(mismatches(engine, self._this_machine())) or None
        except SparsifinerError as error:
            return error.what

    def _this_machine(self) -> EngineDevice:
        """What an engine must fit to run here, after CUDA has answered."""
        found = self.device()
        return EngineDevice(str(self.load().__version__), found.compute_capability, found.name)

    def open(self, bundle: Bundle) -> EngineSession:
        """The engine of a bundle that runs on this machine; see `Backend.open`.

        Raises:
            BackendError: no CUDA device, or no engine of the bundle fits it.
        """
        if self.execution.kernels != "auto":
            raise BackendError(
                f"An engine's kernels are chosen when it is built, and kernels are {self.execution.kernels}.",
                f"Leave --kernels out; give it to: sparsifiner-edge build {bundle.folder} --backend {self.name}",
            )
        require_stored(self.execution.precision, bundle.manifest.float_precision, self.name)
        trt, folder, engines = self.load(), bundle.folder, bundle.manifest.engines
        # What needs no GPU to be seen comes first: another system's engine would not run with one either.
        fitting_engine(engines, self.name, EngineDevice(str(trt.__version__)), folder)
        engine = fitting_engine(engines, self.name, self._this_machine(), folder)
        return EngineSession(trt, folder / engine.file, bundle.read(engine.file), engine, bundle.manifest)
