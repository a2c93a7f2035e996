"""TensorRT for RTX: engines for GeForce and RTX GPUs, built ahead of time on any x86-64 machine, even without a GPU.

The engines run the ONNX function bodies in the file, because a registered plugin would end the process. If the machine
has the GPU of the engine, dense attention is built for comparison and the faster one is kept.
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
"""Supported compute capability -> its name in `tensorrt_rtx.ComputeCapability`."""


class TensorRtRtx(TensorRtBackend):
    """Backend that builds one engine per compute capability, for the operating system and CPU of this machine."""

    name, product = "tensorrt-rtx", "TensorRT-RTX"

    def load(self) -> Any:
        """Import `tensorrt_rtx`; see `Backend.load`."""
        return import_package("tensorrt_rtx", "tensorrt-rtx", "tensorrt-rtx", "Reinstall tensorrt-rtx.")

    def targets(self, capabilities: Sequence[str]) -> Sequence[str]:
        """Return the requested compute capabilities, or that of this machine's GPU; see `TensorRtBackend.targets`."""
        if self.execution.kernels == "native":
            what = "TensorRT-RTX does not support custom CUDA kernels."
            raise ConfigError(what, "Leave --kernels out, or choose portable.")
        capabilities = capabilities or (probe().compute_capability,)
        for capability in capabilities:
            if capability not in ARCHITECTURES:
                raise ConfigError(
                    f"TensorRT-RTX does not support compute capability {capability}.",
                    f"It supports {', '.join(ARCHITECTURES)}. For others, such as a Jetson, build on the device with "
                    "--backend tensorrt.",
                )
        return capabilities

    def variants(self, bundle: Bundle, engine: Engine) -> dict[str, str | None]:
        """Return the function bodies and the baselines; see `TensorRtBackend.variants`.

        The baselines are not built if this machine lacks the GPU of the engine, since they could not be compared.
        """
        if self.execution.kernels == "portable":
            return {BODIES: None}
        why = self.why_not_here(engine)
        how = "nothing can be timed here ({}); on a machine with that GPU, `build` compares them"
        return {BODIES: None} | dict.fromkeys(baselines(bundle), why and how.format(why.rstrip(".")))

    @contextlib.contextmanager
    def configure(self, trt: Any, config: Any, engine: Engine) -> Iterator[str]:
        """Set the compute capability of the engine; see `TensorRtBackend.configure`."""
        config.num_compute_capabilities, capability = 1, engine.compute_capability
        kind = getattr(trt.ComputeCapability, ARCHITECTURES[capability], None)
        if kind is None or not config.set_compute_capability(kind, 0):
            raise BackendError(
                f"{self.product} {trt.__version__} does not know compute capability {capability}.",
                "Upgrade tensorrt-rtx.",
            )
        yield f"The target was compute capability {capability}."
