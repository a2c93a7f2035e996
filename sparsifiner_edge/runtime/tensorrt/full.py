"""Full TensorRT, 10.3 (JetPack 6) to 11.x: engines for the GPU of this machine."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

from sparsifiner_edge.bundle.engines import BODIES, DENSE, PLUGIN, BatchRange, Details, Engine, system
from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, ConfigError, MissingExtraError
from sparsifiner_edge.machine import jetson_release
from sparsifiner_edge.runtime.backend import import_package, require_stored
from sparsifiner_edge.runtime.cuda import CudaDevice, open_driver, probe
from sparsifiner_edge.runtime.tensorrt import plugin
from sparsifiner_edge.runtime.tensorrt.backend import Job, Planned, TensorRtBackend
from sparsifiner_edge.runtime.tensorrt.build import build_engine_file
from sparsifiner_edge.runtime.tensorrt.candidates import (
    dense_model,
    has_kernel_operators,
    has_sparse_attention,
)

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

    def plan(self, bundle: Bundle, capabilities: Sequence[str], batch: BatchRange) -> list[Planned]:
        """See `TensorRtBackend.plan`."""
        require_stored(self.execution.precision, bundle.manifest.float_precision, self.name)
        trt, device = self.load(), self.device()
        others = [c for c in capabilities if c != device.compute_capability]
        if others:
            raise ConfigError(
                f"TensorRT builds for the GPU that it runs on ({device.name}, {device.compute_capability}), "
                f"not for {', '.join(others)}.",
                "Build on a machine that has that GPU, or use --backend tensorrt-rtx, which builds ahead of time.",
            )
        version = str(trt.__version__)
        engine = Engine(self.name, version, device.compute_capability, *system(), bundle.precision, batch)
        return [Planned(engine, *_candidates(trt, bundle, device, batch, self.execution.kernels))]

    def default_timeout_s(self) -> float:
        """See `TensorRtBackend.default_timeout_s`; three times that on a Jetson, whose processor is a small one."""
        return super().default_timeout_s() * (3 if probe().integrated else 1)

    def compile(self, job: Job, bundle: Bundle) -> tuple[bytes, Details]:
        """See `TensorRtBackend.compile`."""
        trt = self.load()
        with contextlib.closing(open_driver()) as driver:  # Stays open while TensorRT has objects.
            model, free = bundle.read(MODEL_FILE), driver.free_bytes()
            if job.candidate == DENSE:
                model = dense_model(model)
            if job.candidate == PLUGIN:
                model = plugin.with_plugins(trt, model, bundle, driver.device)
            return build_engine_file(trt, model, driver.device, free, job.engine.batch)


def _candidates(
    trt: Any, bundle: Bundle, device: CudaDevice, batch: BatchRange, kernels: str
) -> tuple[tuple[str, ...], dict[str, str]]:
    """What is built of the choice `kernels`, and why other candidates are not."""
    reason: str | None = "the model has no sparse attention, and no tokens merge"
    operators = has_kernel_operators(bundle)
    if operators:
        reason = plugin.why_not(trt, bundle, device, batch)
    if kernels == "native":
        if reason:
            raise BackendError(f"The CUDA kernels cannot be used: {reason}.", "Leave --kernels out, or say portable.")
        return (PLUGIN,), {}
    if kernels == "portable" or not operators:
        return (BODIES,), {}
    dense = (DENSE,) if has_sparse_attention(bundle) else ()
    return ((BODIES, *dense), {PLUGIN: reason}) if reason else ((BODIES, PLUGIN, *dense), {})
