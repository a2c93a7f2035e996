"""TensorRT for RTX: engines for GeForce and RTX cards, built ahead of time on any x86-64 machine, even without a GPU.

The bodies in the file are what runs: a registered plugin would end the process. Dense attention is built beside them,
and the faster one kept, where the GPU of the engine is here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from sparsifiner_edge.bundle.engines import BODIES, Engine
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, ConfigError
from sparsifiner_edge.runtime.backend import import_package
from sparsifiner_edge.runtime.cuda import probe
from sparsifiner_edge.runtime.tensorrt.backend import TensorRtBackend, baselines

ARCHITECTURES = {"8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120"}
"""Compute capability -> its name in `tensorrt_rtx.ComputeCapability`."""


class TensorRtRtx(TensorRtBackend):
    """Builds one engine per compute capability, for this operating system and processor."""

    name, product = "tensorrt-rtx", "TensorRT-RTX"

    def load(self) -> Any:
        """The module `tensorrt_rtx`; see `Backend.load`."""
        return import_package("tensorrt_rtx", "tensorrt-rtx", "tensorrt-rtx", "Reinstall tensorrt-rtx.")

    def targets(self, capabilities: Sequence[str]) -> Sequence[str]:
        """See `TensorRtBackend`."""
        if self.execution.kernels == "native":
            raise ConfigError("TensorRT-RTX takes no CUDA kernels of others.", "Leave --kernels out, or say portable.")
        capabilities = capabilities or (probe().compute_capability,)
        for capability in capabilities:
            if capability not in ARCHITECTURES:
                raise ConfigError(
                    f"TensorRT-RTX builds nothing for compute capability {capability}.",
                    f"It takes {', '.join(ARCHITECTURES)}; for others, such as a Jetson, build on the device with "
                    "--backend tensorrt.",
                )
        return capabilities

    def variants(self, bundle: Bundle, engine: Engine) -> dict[str, str | None]:
        """See `TensorRtBackend`; where the engine's GPU is not here nothing can be compared."""
        if self.execution.kernels == "portable":
            return {BODIES: None}
        why = self.why_not_here(engine)
        how = "nothing can be timed here ({}); on a machine with that GPU build compares them"
        return {BODIES: None} | dict.fromkeys(baselines(bundle), why and how.format(why.rstrip(".")))

    @contextlib.contextmanager
    def configure(self, trt: Any, config: Any, engine: Engine) -> Iterator[str]:
        """See `TensorRtBackend`."""
        config.num_compute_capabilities, capability = 1, engine.compute_capability
        kind = getattr(trt.ComputeCapability, ARCHITECTURES[capability], None)
        if kind is None or not config.set_compute_capability(kind, 0):
            raise BackendError(
                f"{self.product} {trt.__version__} does not know compute capability {capability}.",
                "Upgrade tensorrt-rtx.",
            )
        yield f"It was for compute capability {capability}."
