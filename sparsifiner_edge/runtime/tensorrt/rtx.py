"""TensorRT for RTX: engines for GeForce and RTX cards, built ahead of time on any x86-64 machine, even without a GPU.

The bodies in the file are what runs: a registered plugin would end the process. Dense attention is built beside them,
and the faster one kept, where the GPU of the engine is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsifiner_edge.bundle.engines import BODIES, DENSE, BatchRange, Engine
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, ConfigError
from sparsifiner_edge.runtime.backend import import_package, require_stored
from sparsifiner_edge.runtime.cuda import probe
from sparsifiner_edge.runtime.tensorrt.backend import TensorRtBackend, has_sparse_attention, prepare_build

ARCHITECTURES = {"8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120"}
"""Compute capability -> its name in `tensorrt_rtx.ComputeCapability`."""


class TensorRtRtx(TensorRtBackend):
    """Builds one engine per compute capability, for this operating system and processor."""

    name = "tensorrt-rtx"

    def load(self) -> Any:
        """The module `tensorrt_rtx`; see `Backend.load`."""
        return import_package("tensorrt_rtx", "tensorrt-rtx", "tensorrt-rtx", "Reinstall tensorrt-rtx.")

    def plan(self, bundle: Bundle, capabilities: Sequence[str], batch: BatchRange) -> list[Engine]:
        """See `TensorRtBackend.plan`."""
        require_stored(self.execution.precision, bundle.manifest.float_precision, self.name)
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
        if bundle.manifest.precision == "int8" and bundle.manifest.float16 is None:
            raise BackendError(
                f"TensorRT-RTX takes int8 with zero point 0, and {bundle.folder} is of uint8, for the processor.",
                "Export it again with --int8-target tensorrt, or run it with --backend onnxruntime.",
            )
        return [self._planned(bundle, capability, batch) for capability in capabilities]

    def _planned(self, bundle: Bundle, capability: str, batch: BatchRange) -> Engine:
        """With dense attention beside sparse; where the engine's GPU is not here nothing can be compared."""
        engine = self.engine(bundle, capability, batch, (BODIES,), {})
        if self.execution.kernels == "portable" or not has_sparse_attention(bundle):
            return engine
        why = self.why_not_here(engine)
        if why is None:
            return self.engine(bundle, capability, batch, (BODIES, DENSE), {})
        reason = f"nothing can be timed here ({why.rstrip('.')}); on a machine with that GPU build compares the two"
        return self.engine(bundle, capability, batch, (BODIES,), {DENSE: reason})

    def compile(self, model: bytes, engine: Engine, _bundle: Bundle) -> bytes:
        """See `TensorRtBackend.compile`."""
        trt, capability = self.load(), engine.compute_capability
        name = f"TensorRT-RTX {trt.__version__}"
        builder, network, config, messages = prepare_build(trt, model, engine.batch, name)
        config.num_compute_capabilities = 1
        kind = getattr(trt.ComputeCapability, ARCHITECTURES[capability], None)
        if kind is None or not config.set_compute_capability(kind, 0):
            raise BackendError(f"{name} does not know compute capability {capability}.", "Upgrade tensorrt-rtx.")
        serialised = builder.build_serialized_network(network, config)
        if serialised is None:
            raise BackendError(
                f"TensorRT-RTX built no engine for compute capability {capability}: {messages.text()}.",
                "Export the model in another precision, or upgrade tensorrt-rtx.",
            )
        return bytes(serialised)
