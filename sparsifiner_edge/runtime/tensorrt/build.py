"""Building an engine with full TensorRT, 10.3 to 11.x, for the GPU of this machine.

The network is strongly typed: every type comes from the ONNX file, int8 through its QDQ nodes. Names that not every
version has are looked up by feature. Nothing here runs before CUDA has answered.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sparsifiner_edge.artifacts import MAX_FILE
from sparsifiner_edge.bundle import engines
from sparsifiner_edge.bundle.engines import BatchRange, Details, Engine
from sparsifiner_edge.errors import ArtifactError, BackendError, ConfigError
from sparsifiner_edge.files import read_bytes, write_bytes
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.cache import cache_folder
from sparsifiner_edge.runtime.cuda import Device
from sparsifiner_edge.runtime.tensorrt.errors import Messages, build_error, make_logger, refused_model
from sparsifiner_edge.runtime.tensorrt.session import BODIES

SHARE_DISCRETE, SHARE_INTEGRATED = 0.75, 0.5
"""Of the free memory, how much the builder may use as workspace; an integrated GPU leaves the rest to the system."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How to build, as it goes to the process that builds.

    Attributes:
        optimisation_level: 0 (fast build) to 5 (slow build); TensorRT's own default is 3.
        workspace_bytes: scratch memory; None decides by what is free.
        timing_cache: a file to read and renew; None for none.
        detailed: keep all that the inspector can tell about layers.
        candidates: ways of carrying out sparse attention that are tried; see `choose`.
        bundle: the bundle's folder.
    """

    optimisation_level: int = 3
    workspace_bytes: int | None = msgspec.field(name="workspace", default=None)
    timing_cache: str | None = None
    detailed: bool = False
    candidates: tuple[str, ...] = (BODIES,)
    bundle: str = ""


class Built(NamedTuple):
    """An engine's content and what is known about it."""

    content: bytes
    details: Details


def build_engine_file(
    trt: Any, model: bytes, device: Device, free: int, engine: Engine, settings: Settings, tell: Progress
) -> Built:
    """Build an engine.

    Args:
        trt: the module `tensorrt`.
        model: ONNX.
        engine: what it shall be: batch sizes, and what it shall be compatible with.
        device: as CUDA tells.
        free: bytes of its memory that are free.
        tell: called with (stage, done, total).

    Raises:
        UnsupportedModelError: the parser refuses the model; its nodes are named.
        ConfigError: an axis other than the batch is dynamic.
        BackendError: TensorRT builds no engine, or was told to stop.
    """
    messages = Messages()
    logger = make_logger(trt, messages)
    builder = trt.Builder(logger)
    network = parse(trt, builder, logger, model, f"TensorRT {trt.__version__}")
    workspace = settings.workspace_bytes or workspace_bytes(free, device.integrated)
    config = _configure(trt, builder, workspace, engine, settings)
    add_profile(builder, network, config, engine.batch)
    monitor = make_monitor(trt, tell)
    config.progress_monitor = monitor
    cache = TimingCache(Path(settings.timing_cache)) if settings.timing_cache else None
    reused = cache is not None and cache.load(config)
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        if monitor.stopped:
            raise BackendError("The build was stopped.", "The bundle is as it was.")
        raise build_error(messages, workspace, free)
    if cache is not None:
        cache.save(config)
    details = Details(
        layers=int(network.num_layers),
        workspace_bytes=workspace,
        optimisation_level=settings.optimisation_level,
        timing_cache="reused" if reused else "new" if cache else "not used",
        device=device.name,
        driver=device.driver_version,
        warnings=tuple(messages.warnings)[:10],
    )
    return Built(bytes(serialised), details)


def parse(trt: Any, builder: Any, logger: Any, model: bytes, name: str) -> Any:
    """A strongly typed network of an ONNX file.

    Args:
        name: TensorRT's name and version, for messages.

    Raises:
        UnsupportedModelError: the parser refuses the model; its nodes are named.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise refused_model(parser, name)
    return network


def workspace_bytes(free: int, integrated: bool) -> int:
    """Scratch memory that the builder may use."""
    return int(free * (SHARE_INTEGRATED if integrated else SHARE_DISCRETE))


def _configure(trt: Any, builder: Any, workspace: int, engine: Engine, settings: Settings) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.builder_optimization_level = settings.optimisation_level
    # TF32 keeps 10 bits of a float32 product: an fp32 bundle would not give its golden output any more.
    config.clear_flag(trt.BuilderFlag.TF32)
    verbosity = trt.ProfilingVerbosity.DETAILED if settings.detailed else trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    config.profiling_verbosity = verbosity
    if engines.VERSION_COMPATIBLE in engine.compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if engines.AMPERE_PLUS in engine.compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    return config


def add_profile(builder: Any, network: Any, config: Any, batch: BatchRange) -> None:
    """Sizes of the first axis where it is dynamic; a model whose axes are all fixed needs no profile.

    Raises:
        ConfigError: another axis is dynamic.
    """
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


def write_engine(path: Path, content: bytes) -> None:
    """Write what was built.

    Raises:
        ArtifactError: the disk refuses.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be written: {error.strerror}.", "Free space or choose another place."
        ) from error


def make_monitor(trt: Any, tell: Progress) -> Any:
    """TensorRT's progress, told as (phase, done, total); where nobody listens any more it asks TensorRT to stop."""

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
            self._tell(phase_name, self._steps.get(phase_name, 0))
            self._steps.pop(phase_name, None)

        def _tell(self, phase: str, done: int) -> None:
            # Phases nest deeply and the inner ones last milliseconds: two levels are what a person can follow.
            parent = self._parents.get(phase)
            if self.stopped or (parent and self._parents.get(parent)):
                return
            try:
                tell(phase, float(done), float(self._steps.get(phase, 0)))
            except OSError:  # The process that asked for the engine is gone.
                self.stopped = True

    return Monitor()


class TimingCache:
    """Measured times of kernels, kept between builds: a second build on a device takes a fraction of the time.

    It lives in the user's cache folder, not in the bundle: it belongs to one device and version, grows with every model
    built there, and is read by native code, so it must be the user's own file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, config: Any) -> bool:
        """Give TensorRT what is kept, or an empty cache; whether there was something usable."""
        content = b""
        with contextlib.suppress(ArtifactError):
            content = read_bytes(self._path, MAX_FILE)
        for attempt in dict.fromkeys((content, b"")):  # A damaged file is as good as none.
            cache = config.create_timing_cache(attempt)
            if cache is not None and config.set_timing_cache(cache, False):
                return bool(attempt)
        return False

    def save(self, config: Any) -> None:
        """Keep what TensorRT has measured; a disk that refuses costs the next build some time, no more."""
        cache = config.get_timing_cache()
        if cache is None:
            return
        with contextlib.suppress(ArtifactError):
            write_bytes(self._path, bytes(cache.serialize()))


def timing_cache_path(device: Device, version: str) -> Path:
    """Where the times of a device and a version are kept."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.name).strip("-").lower()
    return cache_folder() / f"tensorrt-{version}-sm{device.sm[0]}{device.sm[1]}-{name}.cache"
