"""Full TensorRT, 10.3 (JetPack 6) to 11.x: engines for the GPU of this machine."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsifiner_edge.bundle.engines import AMPERE_PLUS, VERSION_COMPATIBLE, BatchRange, Details, Engine, system
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, ConfigError, MissingExtraError
from sparsifiner_edge.machine import jetson_release
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import read_record
from sparsifiner_edge.runtime.backend import Job, OptionValues, import_package
from sparsifiner_edge.runtime.cuda import CudaDevice, open_driver
from sparsifiner_edge.runtime.tensorrt.backend import TensorRtBackend
from sparsifiner_edge.runtime.tensorrt.build import BuilderOptions
from sparsifiner_edge.runtime.tensorrt.candidates import MEASURED_VARIANT, Work, build_fastest, possible_candidates
from sparsifiner_edge.runtime.tensorrt.session import BODIES

OLDEST = (10, 3)


class TensorRt(TensorRtBackend):
    """Builds one engine, for the GPU of this machine."""

    name = "tensorrt"

    def load(self) -> Any:
        """The module `tensorrt`, 10.3 or later; see `Backend.load`."""
        try:
            trt = import_package("tensorrt", "tensorrt", "tensorrt", "Reinstall it; on a Jetson it comes with JetPack.")
        except MissingExtraError as error:
            if jetson_release() is None:
                raise
            raise BackendError(
                "JetPack's TensorRT is not visible to this Python.",
                "apt install python3-libnvinfer, and make the environment with: python3 -m venv --system-site-packages "
                "(docs/jetson.md). pip would bring a TensorRT that JetPack's CUDA does not run.",
            ) from error
        version = str(getattr(trt, "__version__", "0"))
        if tuple(map(int, re.findall(r"\d+", version))) < OLDEST:
            raise BackendError(
                f"TensorRT {version} is older than {'.'.join(map(str, OLDEST))}.",
                "Install a newer one; on a Jetson upgrade to JetPack 6 or later.",
            )
        return trt

    def plan(
        self, bundle: Bundle, capabilities: Sequence[str], batch: BatchRange, options: OptionValues
    ) -> list[Engine]:
        """See `EngineBackend.plan`."""
        trt = self.load()
        wanted = _read_options(options)
        device = self.device()
        others = [c for c in capabilities if c != device.compute_capability]
        if others:
            raise ConfigError(
                f"TensorRT builds for the GPU that it runs on ({device.name}, {device.compute_capability}), "
                f"not for {', '.join(others)}.",
                "Build on a machine that has that GPU, or use --backend tensorrt-rtx, which builds ahead of time.",
            )
        compatible = _compatible(wanted, device)
        candidates = possible_candidates(trt, bundle, device, wanted.kernels)
        variant = candidates[0] if len(candidates) == 1 else MEASURED_VARIANT
        engine = Engine(
            self.name, str(trt.__version__), device.compute_capability, *system(), bundle.precision,
            batch, "" if variant == BODIES else variant, compatible,
        )  # fmt: skip
        return [engine]

    def build(self, job: Job, tell: Progress) -> Details:
        """See `EngineBackend.build`."""
        trt, options = self.load(), _read_options(job.options)
        with contextlib.closing(open_driver()) as driver:  # Stays open while TensorRT has objects.
            work = Work(trt, job.checked_bundle(), job.engine, options, driver)
            return build_fastest(work, Path(job.output), tell)


def _read_options(options: OptionValues) -> BuilderOptions:
    fix = f"tensorrt has the options {', '.join(BuilderOptions.__struct_fields__)}."
    return read_record(options, BuilderOptions, "--option", fix, ConfigError)


def _compatible(options: BuilderOptions, device: CudaDevice) -> tuple[str, ...]:
    if options.hardware_compatible and (device.integrated or device.sm < (8, 0)):
        raise ConfigError(
            "Hardware-compatible engines need a GPU card, no Jetson, of compute capability 8.0 or later; "
            f"this is {device.name}, {device.compute_capability}.",
            "Leave the option hardware_compatible out.",
        )
    wanted = ((VERSION_COMPATIBLE, options.version_compatible), (AMPERE_PLUS, options.hardware_compatible))
    return tuple(word for word, asked in wanted if asked)
