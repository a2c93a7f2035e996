"""Building an engine with full TensorRT, 10.3 to 11.x, for the GPU of this machine; what TensorRT-RTX shares of it.

The network is strongly typed: every type comes from the ONNX file, int8 through its QDQ nodes. Names that not every
version has are looked up by feature. Nothing here runs before CUDA has answered.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from sparsifiner_edge.artifacts import MAX_FILE
from sparsifiner_edge.bundle import engines
from sparsifiner_edge.bundle.engines import BatchRange, Details, Engine
from sparsifiner_edge.errors import ArtifactError, BackendError, ConfigError
from sparsifiner_edge.files import read_bytes, write_bytes
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.backend import cache_folder
from sparsifiner_edge.runtime.cuda import CudaDevice
from sparsifiner_edge.runtime.tensorrt.errors import Messages, build_error, make_logger, rejected_model


class BuilderOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of a build, beside those of every backend.

    Attributes:
        kernels: "portable" (the operators' bodies), "plugin" (the CUDA kernels), or what is fastest of all.
        optimisation_level: 0 (fast build) to 5 (slow build); TensorRT's own default is 3.
        workspace_mib: scratch memory of the builder; None decides by what is free.
        version_compatible, hardware_compatible: for later versions, and for other GPUs.
        timing_cache: keep measured times between builds.
    """

    kernels: Literal["auto", "portable", "plugin"] = "auto"
    optimisation_level: Annotated[int, msgspec.Meta(ge=0, le=5)] = 3
    workspace_mib: Annotated[int, msgspec.Meta(ge=1)] | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    timing_cache: bool = True


class Prepared(NamedTuple):
    """TensorRT's objects for one build: a model, parsed, and how to compile it."""

    builder: Any
    network: Any
    config: Any
    messages: Messages


def build_engine_file(
    trt: Any, model: bytes, device: CudaDevice, free: int, engine: Engine, options: BuilderOptions, tell: Progress
) -> tuple[bytes, Details]:
    """Build an engine; returns its content and what is known about it.

    Args:
        trt: the module `tensorrt`.
        model: ONNX.
        device: as CUDA tells. free: bytes of its memory that are free.
        engine: what it shall be: batch sizes, and what it shall be compatible with.
        tell: called with (stage, done, total).

    Raises:
        UnsupportedModelError: the parser rejects the model; its nodes are named.
        ConfigError: an axis other than the batch is dynamic.
        BackendError: TensorRT builds no engine, or was stopped.
    """
    builder, network, config, messages = prepare_build(trt, model, engine.batch, f"TensorRT {trt.__version__}")
    # Of the free memory an integrated GPU leaves half to the system.
    workspace = options.workspace_mib << 20 if options.workspace_mib else free // 4 * (2 if device.integrated else 3)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.builder_optimization_level = options.optimisation_level
    if engines.VERSION_COMPATIBLE in engine.compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if engines.AMPERE_PLUS in engine.compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    monitor = make_monitor(trt, tell)
    config.progress_monitor = monitor
    times = timing_cache_path(device, str(trt.__version__)) if options.timing_cache else None
    reused = times is not None and load_timing_cache(config, times)
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        if monitor.stopped:
            raise BackendError("The build was stopped.", "The bundle is as it was.")
        raise build_error(messages, workspace, free)
    if times is not None:
        save_timing_cache(config, times)
    return bytes(serialised), Details(
        layers=int(network.num_layers),
        workspace_bytes=workspace,
        optimisation_level=options.optimisation_level,
        timing_cache="reused" if reused else "new" if times else "not used",
        device=device.name,
        driver=device.driver_version,
        warnings=tuple(messages.warnings)[:10],
    )


def prepare_build(trt: Any, model: bytes, batch: BatchRange, name: str) -> Prepared:
    """A strongly typed network of an ONNX file, and a configuration that keeps its precision and takes its batches.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`. name: its name and version, for messages.

    Raises:
        UnsupportedModelError: the parser rejects the model; its nodes are named.
        ConfigError: an axis other than the batch is dynamic.
    """
    messages = Messages()
    logger = make_logger(trt, messages)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise rejected_model(parser, name)
    config = builder.create_builder_config()
    # TF32 keeps 10 bits of a float32 product: an fp32 bundle would not give its golden output any more.
    config.clear_flag(trt.BuilderFlag.TF32)
    _add_profile(builder, network, config, batch)
    return Prepared(builder, network, config, messages)


def _add_profile(builder: Any, network: Any, config: Any, batch: BatchRange) -> None:
    """Sizes of the first axis where it is dynamic; a model whose axes are all fixed needs no profile."""
    profile = builder.create_optimization_profile()
    dynamic = False
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        shape = tuple(tensor.shape)
        if -1 in shape[1:]:
            raise ConfigError(
                f"Input {tensor.name!r} has shape {list(shape)}: only the batch may be dynamic.", "Export it again."
            )
        if shape[:1] == (-1,):
            dynamic = True
            profile.set_shape(tensor.name, *((size, *shape[1:]) for size in (batch.least, batch.best, batch.most)))
    if dynamic:
        config.add_optimization_profile(profile)


def make_monitor(trt: Any, tell: Progress) -> Any:
    """TensorRT's progress, reported as (phase, done, total); where nobody listens any more it asks TensorRT to stop."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Called by TensorRT, from any of its threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            self._steps: dict[str, int] = {}
            self._parents: dict[str, str | None] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """A phase begins, inside another or at the top."""
            self._steps[phase_name], self._parents[phase_name] = num_steps, parent_phase
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            """One step is done; False stops the build."""
            self._tell(phase_name, step + 1)
            return not self.stopped

        def phase_finish(self, phase_name: str) -> None:
            """A phase ends."""
            self._tell(phase_name, self._steps.pop(phase_name, 0))

        def _tell(self, phase: str, done: int) -> None:
            # Phases nest deeply and the inner ones last milliseconds: two levels are what a person can follow.
            parent = self._parents.get(phase)
            if self.stopped or (parent and self._parents.get(parent)):
                return
            try:
                tell(phase, float(done), float(self._steps.get(phase, done)))
            except OSError:  # The process that asked for the engine is gone.
                self.stopped = True

    return Monitor()


def load_timing_cache(config: Any, path: Path) -> bool:
    """Give TensorRT the times of kernels that earlier builds measured, or an empty cache; whether some were usable."""
    content = b""
    with contextlib.suppress(ArtifactError):
        content = read_bytes(path, MAX_FILE)
    for attempt in dict.fromkeys((content, b"")):  # A damaged file is as good as none.
        cache = config.create_timing_cache(attempt)
        if cache is not None and config.set_timing_cache(cache, False):
            return bool(attempt)
    return False


def save_timing_cache(config: Any, path: Path) -> None:
    """Keep what TensorRT has measured; a disk that fails costs the next build some time, no more."""
    cache = config.get_timing_cache()
    if cache is not None:
        with contextlib.suppress(ArtifactError):
            write_bytes(path, bytes(cache.serialize()))


def timing_cache_path(device: CudaDevice, version: str) -> Path:
    """Where the times of a device and a version are kept: not in the bundle, since native code reads them and they grow
    with every model built there.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-").lower()
    return cache_folder() / f"tensorrt-{version}-sm{device.sm[0]}{device.sm[1]}-{name}.cache"
