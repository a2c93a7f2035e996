"""TensorRT for RTX: engines for GeForce and RTX cards, built ahead of time on any x86-64 machine, even without a GPU.

The bodies in the file are what runs: a registered plugin would end the process. It knows no option of a build.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsifiner_edge.bundle.engines import BatchRange, Details, Engine, system
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, ConfigError
from sparsifiner_edge.files import io_errors
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.backend import Job, OptionValues, import_package
from sparsifiner_edge.runtime.cuda import probe
from sparsifiner_edge.runtime.tensorrt.backend import TensorRtBackend
from sparsifiner_edge.runtime.tensorrt.build import make_monitor, prepare_build
from sparsifiner_edge.runtime.tensorrt.rtx_graph import check_operators, without_single_products

ARCHITECTURES = {"7.5": "SM75", "8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120"}
"""Compute capability -> its name in `tensorrt_rtx.ComputeCapability`."""
_TURING = "7.5"


class TensorRtRtx(TensorRtBackend):
    """Builds one engine per compute capability, for this operating system and processor."""

    name = "tensorrt-rtx"

    def load(self) -> Any:
        """The module `tensorrt_rtx`; see `Backend.load`."""
        return import_package("tensorrt_rtx", "tensorrt-rtx", "tensorrt-rtx", "Reinstall tensorrt-rtx.")

    def plan(
        self, bundle: Bundle, capabilities: Sequence[str], batch: BatchRange, options: OptionValues
    ) -> list[Engine]:
        """See `EngineBackend.plan`."""
        import onnx

        version = str(self.load().__version__)
        if options:
            raise ConfigError(f"tensorrt-rtx has no option {min(options)!r}.", "Leave it out.")
        capabilities = capabilities or (probe().compute_capability,)
        for capability in capabilities:
            if capability not in ARCHITECTURES:
                raise ConfigError(
                    f"TensorRT-RTX builds nothing for compute capability {capability}.",
                    f"It takes {', '.join(ARCHITECTURES)}; for others, such as a Jetson, build on the device with "
                    "--backend tensorrt.",
                )
        model = bundle.model()
        check_operators(model)
        half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
        if _TURING in capabilities and not half:
            raise ConfigError(
                f"Compute capability 7.5 (Turing) takes no {bundle.precision} bundle like this one: "
                "TensorRT-RTX compiles no product of float32 matrices for it.",
                "Export with --precision fp16, or with --precision int8 --recipe tensorrt, or leave 7.5 out.",
            )
        return [
            Engine(self.name, version, capability, *system(), bundle.precision, batch) for capability in capabilities
        ]

    def build(self, job: Job, tell: Progress) -> Details:
        """See `EngineBackend.build`."""
        trt = self.load()
        capability = job.engine.compute_capability
        start = time.monotonic()
        tell("reading the model", 0, 1)
        model = job.checked_bundle().model()
        if capability == _TURING:
            model = without_single_products(model)
        tell("parsing the model", 0, 1)
        content, name = model.SerializeToString(), f"TensorRT-RTX {trt.__version__}"
        builder, network, config, messages = prepare_build(trt, content, job.engine.batch, name)
        parsed = time.monotonic()
        config.num_compute_capabilities = 1
        kind = getattr(trt.ComputeCapability, ARCHITECTURES[capability], None)
        if kind is None or not config.set_compute_capability(kind, 0):
            raise BackendError(f"{name} does not know compute capability {capability}.", "Upgrade tensorrt-rtx.")
        config.progress_monitor = make_monitor(trt, tell)
        serialised = builder.build_serialized_network(network, config)
        if serialised is None:
            raise BackendError(
                f"TensorRT-RTX built no engine for compute capability {capability}: {messages.text()}.",
                "Export the model in another precision, or upgrade tensorrt-rtx.",
            )
        tell("writing the engine", 0, 1)
        with io_errors(Path(job.output)):
            Path(job.output).write_bytes(serialised)
        return Details(
            layers=int(network.num_layers),
            parse_seconds=parsed - start,
            compile_seconds=time.monotonic() - parsed,
            cpu_seconds=time.process_time(),
        )
