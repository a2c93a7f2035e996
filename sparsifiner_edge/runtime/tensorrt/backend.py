"""Code that the backends TensorRT and TensorRT-RTX share: building, timing and opening engines.

An engine can implement sparse attention and token merging in several variants:

- `bodies`: ONNX function bodies, that is, the standard operators in the file;
- `plugin`: this project's CUDA kernels as TensorRT plugins;
- `mixed`: as `plugin`, with dense attention in the layers where it is expected to be faster;
- `dense`: dense attention in all layers;
- `unmerged`: dense attention, and no merging (see `baseline`).

The last three compute a different function from the file. They are kept only if they are faster and their outputs are
close to the golden ones (`runtime.golden.LEAST_DENSE_COSINE`).
"""

from __future__ import annotations

import abc
import contextlib
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
from msgspec.structs import replace

from sparsifiner_edge.bundle.engines import (
    DENSE,
    UNMERGED,
    BatchRange,
    Details,
    Engine,
    EngineDevice,
    EngineVariant,
    fitting_engine,
    mismatches,
    system,
)
from sparsifiner_edge.bundle.store import Bundle, open_bundle
from sparsifiner_edge.errors import BackendError, ConfigError, GateError, SparsifinerError
from sparsifiner_edge.files import io_errors
from sparsifiner_edge.machine import package_version
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.runtime.backend import Backend, require_precision
from sparsifiner_edge.runtime.cuda import CudaDevice, major, probe
from sparsifiner_edge.runtime.golden import check_golden
from sparsifiner_edge.runtime.tensorrt.baseline import dense_model, unmerged_model
from sparsifiner_edge.runtime.tensorrt.errors import build_error, make_logger, parse_error
from sparsifiner_edge.runtime.tensorrt.session import EngineSession

WARM_UP = 10
"""Number of untimed runs of an engine before it is timed; they include the recording of the CUDA graph."""
RUNS = 30
"""Number of timed runs of an engine; the median counts."""


class TensorRtBackend(Backend):
    """Base class of the two backends.

    Attributes:
        product: Name of the product, for users.
    """

    product: ClassVar[str]

    def engines_to_build(self, bundle: Bundle, capabilities: Sequence[str], batch: BatchRange) -> list[Engine]:
        """Plan the engines to build, and reject impossible requests before any build starts.

        Args:
            bundle: Bundle to build for.
            capabilities: Compute capabilities, such as ("8.6", "8.9"). If empty, that of this machine's GPU.
            batch: Batch sizes of the engines; all equal if the bundle has a fixed batch.

        Returns:
            Engines without a file. Their `details.variants` hold the variants to build, and the reasons why others are
            not built.

        Raises:
            SparsifinerError: The backend cannot build one of the engines.
        """
        if bundle.manifest.precision == "int8" and bundle.manifest.float16 is None:
            raise BackendError(
                f"{self.product} requires int8 with zero point 0, but {bundle.folder} has uint8 activations.",
                "Export it again with --int8-target tensorrt, or run it with --backend onnxruntime.",
            )
        version, engines = str(self.load().__version__), []
        for capability in self.targets(capabilities):
            engine = Engine(self.name, version, capability, *system(), bundle.precision, batch)
            reasons = self.variants(bundle, engine).items()
            tried = {name: EngineVariant(failed=why and f"not built: {why}") for name, why in reasons}
            engines.append(replace(engine, details=Details(variants=tried)))
        return engines

    @abc.abstractmethod
    def targets(self, capabilities: Sequence[str]) -> Sequence[str]:
        """Return the compute capabilities to build for.

        Args:
            capabilities: Requested capabilities, as passed to `engines_to_build`.

        Raises:
            SparsifinerError: The backend cannot build for one of them on this machine.
        """

    @abc.abstractmethod
    def variants(self, bundle: Bundle, engine: Engine) -> dict[str, str | None]:
        """Return the variants of an engine, the one that always works first.

        The option `kernels` limits them: "portable" to the function bodies, "native" to this project's CUDA kernels.

        Returns:
            Name of the variant -> reason why it is not built, or None if it is built.
        """

    def compile(self, model: onnx.ModelProto, engine: Engine, _bundle: Bundle) -> bytes:
        """Build an engine from an ONNX model.

        The network is strongly typed: all types come from the file, int8 through its QDQ nodes.

        Args:
            model: Model of the bundle, or a variant of it such as `dense_model`.
            engine: Engine to build.

        Returns:
            The serialized engine.

        Raises:
            UnsupportedModelError: The parser rejects the model; the message names the nodes.
            ConfigError: An axis other than the batch is dynamic.
            BackendError: TensorRT cannot build the engine.
        """
        trt = self.load()
        messages, name = make_logger(trt), f"{self.product} {trt.__version__}"
        builder = trt.Builder(messages)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, messages)
        if not parser.parse(model.SerializeToString()):
            raise parse_error(parser, name)
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        # TF32 keeps 10 bits of the mantissa, with which an fp32 bundle would fail its golden check.
        config.clear_flag(trt.BuilderFlag.TF32)
        dynamic = [tensor for tensor in map(network.get_input, range(network.num_inputs)) if -1 in tensor.shape]
        for tensor in dynamic:
            shape = tuple(tensor.shape)
            if -1 in shape[1:]:
                raise ConfigError(
                    f"Input {tensor.name!r} has shape {list(shape)}: only the batch may be dynamic.", "Export it again."
                )
            sizes = (engine.batch.least, engine.batch.best, engine.batch.most)
            profile.set_shape(tensor.name, *((size, *shape[1:]) for size in sizes))
        if dynamic:  # A model with fixed axes needs no optimization profile.
            config.add_optimization_profile(profile)
        with self.configure(trt, config, engine) as how:
            serialised = builder.build_serialized_network(network, config)
            if serialised is None:
                raise build_error(name, messages, how)
        return bytes(serialised)

    @abc.abstractmethod
    def configure(self, trt: Any, config: Any, engine: Engine) -> contextlib.AbstractContextManager[str]:
        """Apply the backend's own build settings for the duration of a `with` block.

        Returns:
            A context manager that gives a sentence about the settings, for error messages.
        """

    def build(self, engine: Engine, folder: Path, output: Path) -> Details:
        """Build one variant of an engine, and time and check it if this machine can run it.

        This runs in a child process, which may die. Errors are passed on to the caller of `build_engine`.

        Args:
            engine: Planned engine; `details.kernels` names the variant.
            folder: Folder of the bundle.
            output: Engine file to write.

        Returns:
            Details of the engine. Its `variants` hold the result of the runs, or the reason why there were none.

        Raises:
            SparsifinerError: The variant cannot be built or run.
        """
        start, bundle, kernels = time.monotonic(), open_bundle(folder), str(engine.details.kernels)
        model = bundle.model()
        if kernels == DENSE:
            model = dense_model(model)
        elif kernels == UNMERGED:
            unmerged = unmerged_model(model)
            if unmerged is None:
                what = "The file's merge layers are not in the form that this package exports."
                raise BackendError(what, "Export the bundle again.")
            model = unmerged
        content = self.compile(model, engine, bundle)
        with io_errors(output):
            output.write_bytes(content)
        seconds, cpu_seconds = time.monotonic() - start, time.process_time()
        why = self.why_not_here(engine)
        timed = EngineVariant(failed=why)
        if why is None:
            session = EngineSession(self.load(), output, content, engine, bundle.manifest)
            timed = time_engine(session, bundle, engine.batch.best)
        return Details(
            kernels=kernels,
            variants={kernels: timed},
            bytes=len(content),
            build_seconds=seconds,
            cpu_seconds=cpu_seconds,
        )

    def require_driver(self, device: CudaDevice) -> CudaDevice:
        """Return the device after a check that its driver supports the installed TensorRT.

        A TensorRT for a newer CUDA can create its objects all the same, but it ends the process when they are used.

        Raises:
            BackendError: The installed package requires a newer driver.
        """
        supported = major(device.driver_version)
        for cuda in (12, 13):
            name = f"{self.name}-cu{cuda}"
            if supported < cuda and isinstance(package_version(name), str):
                raise BackendError(
                    f"{name} needs a driver for CUDA {cuda}, and this one takes CUDA {device.driver_version} at most.",
                    f"Update the driver, or install a {self.name} for CUDA {supported} instead; "
                    "`sparsifiner-edge doctor` says which extra fits.",
                )
        return device

    def why_not_here(self, engine: Engine) -> str | None:
        """Return why an engine cannot run on this machine, such as "CUDA finds no device.", or None if it can."""
        try:
            return "; ".join(mismatches(engine, self._this_machine())) or None
        except SparsifinerError as error:
            return error.what

    def _this_machine(self) -> EngineDevice:
        """Return the device that an engine must fit to run on this machine, after a check that CUDA works."""
        device = self.require_driver(probe())
        return EngineDevice(str(self.load().__version__), device.compute_capability, device.name)

    def check(self, bundle: Bundle) -> Engine:
        """Return the engine of a bundle that runs on this machine; see `Backend.check`."""
        if self.execution.kernels != "auto":
            raise BackendError(
                f"kernels is {self.execution.kernels}, but an engine's kernels are chosen when it is built.",
                f"Leave --kernels out, or pass it to: sparsifiner-edge build {bundle.folder} --backend {self.name}",
            )
        require_precision(self.execution.compute_precision, bundle.manifest.float_precision, self.name)
        trt, folder, engines = self.load(), bundle.folder, bundle.manifest.engines
        # First the checks that need no GPU: an engine of another system would not run with a GPU either.
        fitting_engine(engines, self.name, EngineDevice(str(trt.__version__)), folder)
        return fitting_engine(engines, self.name, self._this_machine(), folder)

    def prepare(self, bundle: Bundle, engine: Engine) -> None:
        """Prepare this process for loading an engine. By default nothing is needed."""

    def open(self, bundle: Bundle) -> EngineSession:
        """Open a session on the engine of a bundle that fits this machine; see `Backend.open`."""
        engine, trt = self.check(bundle), self.load()
        self.prepare(bundle, engine)
        return EngineSession(trt, bundle.folder / engine.file, bundle.read(engine.file), engine, bundle.manifest)


def baselines(bundle: Bundle) -> list[str]:
    """Return the baseline variants for a bundle: `DENSE` if it has sparse attention, `UNMERGED` if it merges tokens."""
    instead = {"SparseAttention": DENSE, "MergeTokens": UNMERGED}
    return [baseline for name, baseline in instead.items() if f"{DOMAIN}::{name}" in bundle.manifest.ops]


def time_engine(session: EngineSession, bundle: Bundle, batch: int) -> EngineVariant:
    """Run the golden check on an engine and measure its median device time.

    Args:
        session: Session on the engine; it is closed at the end.
        bundle: Bundle with the golden pair.
        batch: Batch size to time, for which the engine is tuned.

    Returns:
        The result of the golden check and the median device time in milliseconds.
    """
    with session:
        try:
            golden: Any = check_golden(session, bundle)
        except GateError as error:
            golden = error.what
        spec = session.inputs[0]
        shape = [batch, *(size for size in spec.shape[1:] if isinstance(size, int))]
        image = np.random.default_rng(0).integers(0, 256, shape).astype(spec.dtype)
        times = []
        for _ in range(WARM_UP + RUNS):
            session.infer({spec.name: image})
            times.append(session.compute_ms)
        why = session.description.why_no_graph
    warning = f"runs are not recorded as CUDA graphs: {why}" if why else None
    return EngineVariant(golden=golden, compute_ms=statistics.median(times[WARM_UP:]), warning=warning)
