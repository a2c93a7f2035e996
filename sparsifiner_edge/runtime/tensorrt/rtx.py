"""TensorRT for RTX: engines for GeForce and RTX cards, built ahead of time on any x86-64 machine, even without a GPU.

The bodies in the file are what runs: a registered plugin would end the process. It knows no option of a build.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sparsifiner_edge.bundle.engines import Details, Engine, system
from sparsifiner_edge.errors import BackendError, ConfigError
from sparsifiner_edge.onnx_file import read_model
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.backend import BuildRequest, Job, Planned
from sparsifiner_edge.runtime.build_worker import job_model
from sparsifiner_edge.runtime.cuda import probe
from sparsifiner_edge.runtime.tensorrt.backend import TensorRtBackend, import_package
from sparsifiner_edge.runtime.tensorrt.build import add_profile, make_monitor, parse, write_engine
from sparsifiner_edge.runtime.tensorrt.errors import Messages, make_logger
from sparsifiner_edge.runtime.tensorrt.rtx_graph import check_operators, without_single_products

CAPABILITIES = {"7.5": "SM75", "8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120"}
"""Compute capability -> its name in `tensorrt_rtx.ComputeCapability`."""
_OTHERS = {
    "7.2": "a Jetson Xavier", "8.7": "a Jetson Orin", "10.1": "a Jetson Thor", "11.0": "a Jetson Thor",
    "12.1": "a GB10, whose processor is an Arm",
    "7.0": "a data centre's GPU", "9.0": "a data centre's GPU", "10.0": "a data centre's GPU",
    "10.3": "a data centre's GPU",
}  # fmt: skip
_TURING = "7.5"


class TensorRtRtx(TensorRtBackend):
    """Builds one engine per compute capability, for this operating system and processor."""

    name = "tensorrt-rtx"

    def load(self) -> Any:
        """The module `tensorrt_rtx`; see `Backend.load`."""
        return import_package("tensorrt_rtx", "tensorrt-rtx", "Reinstall tensorrt-rtx.")

    def plan(self, request: BuildRequest) -> list[Planned]:
        """See `EngineBackend.plan`."""
        import onnx

        version = str(self.load().__version__)
        if request.options:
            raise ConfigError(f"tensorrt-rtx has no option {min(request.options)!r}.", "Leave it out.")
        capabilities = request.capabilities or (probe().compute_capability,)
        for capability in capabilities:
            _check_capability(capability)
        model = request.bundle.model()
        check_operators(model)
        half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
        if _TURING in capabilities and not half:
            raise ConfigError(
                f"Compute capability 7.5 (Turing) takes no {request.bundle.precision} bundle like this one: "
                "TensorRT-RTX compiles no product of float32 matrices for it.",
                "Export with --precision fp16, or with --precision int8 --recipe tensorrt, or leave 7.5 out.",
            )
        return [
            Planned(Engine(self.name, version, capability, *system(), request.bundle.precision, request.batch))
            for capability in capabilities
        ]

    def build(self, job: Job, tell: Progress) -> Details:
        """See `EngineBackend.build`."""
        trt = self.load()
        capability = job.engine.compute_capability
        start = time.monotonic()
        tell("reading the model", 0, 1)
        model = read_model(job_model(job), job.model)
        if capability == _TURING:
            model = without_single_products(model)
        messages = Messages()
        logger = make_logger(trt, messages)
        builder = trt.Builder(logger)
        tell("parsing the model", 0, 1)
        network = parse(trt, builder, logger, model.SerializeToString(), f"TensorRT-RTX {trt.__version__}")
        parsed = time.monotonic()
        config = _configure(trt, builder, capability)
        add_profile(builder, network, config, job.engine.batch)
        config.progress_monitor = make_monitor(trt, tell)
        content = builder.build_serialized_network(network, config)
        if content is None:
            raise _failed(messages, capability)
        tell("writing the engine", 0, 1)
        write_engine(Path(job.output), content)
        return Details(
            layers=int(network.num_layers),
            parse_seconds=parsed - start,
            compile_seconds=time.monotonic() - parsed,
            cpu_seconds=time.process_time(),
        )


def _check_capability(capability: str) -> None:
    if capability in CAPABILITIES:
        return
    kind = _OTHERS.get(capability)
    reason = f"that is {kind}" if kind else "it knows no such architecture"
    raise ConfigError(
        f"TensorRT-RTX builds nothing for compute capability {capability}: {reason}.",
        f"It takes {', '.join(CAPABILITIES)}; for others build on the device with --backend tensorrt.",
    )


def _configure(trt: Any, builder: Any, capability: str) -> Any:
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    kind = getattr(trt.ComputeCapability, CAPABILITIES[capability], None)
    if kind is None or not config.set_compute_capability(kind, 0):
        raise BackendError(
            f"TensorRT-RTX {trt.__version__} does not know compute capability {capability}.", "Upgrade tensorrt-rtx."
        )
    # TF32 keeps 10 bits of a float32 product: an fp32 bundle would not give its golden output any more.
    config.clear_flag(trt.BuilderFlag.TF32)
    return config


def _failed(messages: Messages, capability: str) -> BackendError:
    return BackendError(
        f"TensorRT-RTX built no engine for compute capability {capability}: {messages.text()}.",
        "Export the model in another precision, or upgrade tensorrt-rtx.",
    )
