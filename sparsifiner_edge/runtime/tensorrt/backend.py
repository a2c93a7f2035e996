"""What the backends TensorRT and TensorRT-RTX share: building, timing and opening engines.

Sparse attention and merging are built in the ways that TensorRT can have them: `bodies` are the standard operators in
the file, `plugin` the project's CUDA kernels. Others compute something else, and are kept where they are faster and
close to the bundle's outputs (`runtime.golden.LEAST_DENSE_COSINE`): `dense` is ordinary attention, `mixed` has it in
some layers, in `unmerged` nothing merges either (`baseline`).
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

WARM_UP, RUNS = 10, 30


class TensorRtBackend(Backend):
    """Either of them; `load` gives its module.

    Attributes:
        product: its name, for people.
    """

    product: ClassVar[str]

    def engines_to_build(self, bundle: Bundle, capabilities: Sequence[str], batch: BatchRange) -> list[Engine]:
        """The engines to build; what cannot be built is rejected before any build starts.

        Args:
            capabilities: compute capabilities, such as ("8.6", "8.9"); none: this machine's GPU.
            batch: sizes that the engines take; all equal where the bundle's batch is fixed.

        Returns:
            Engines without a file; under `details.variants` their `variants`.

        Raises:
            SparsifinerError: says what, and what to do.
        """
        if bundle.manifest.precision == "int8" and bundle.manifest.float16 is None:
            raise BackendError(
                f"{self.product} takes int8 with zero point 0, and {bundle.folder} is of uint8, for the processor.",
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
        """Compute capabilities to build for, of those that `engines_to_build` is given."""

    @abc.abstractmethod
    def variants(self, bundle: Bundle, engine: Engine) -> dict[str, str | None]:
        """What may carry out sparse attention in an engine, the one that always works first, and why it is not built;
        None: it is. Kernels "portable" are the bodies alone, "native" the project's CUDA kernels.
        """

    def compile(self, model: onnx.ModelProto, engine: Engine, _bundle: Bundle) -> bytes:
        """The content of an engine for an ONNX file (the bundle's, or `dense_model` of it).

        The network is strongly typed: every type comes from the file, int8 through its QDQ nodes.

        Raises:
            UnsupportedModelError: the parser rejects the model; its nodes are named.
            ConfigError: an axis other than the batch is dynamic.
            BackendError: TensorRT cannot build it.
        """
        trt = self.load()
        messages, name = make_logger(trt), f"{self.product} {trt.__version__}"
        builder = trt.Builder(messages)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, messages)
        if not parser.parse(model.SerializeToString()):
            raise parse_error(parser, name)
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        # TF32 keeps 10 bits of a float32 product: an fp32 bundle would not give its golden output any more.
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
        if dynamic:  # A model whose axes are all fixed needs no profile.
            config.add_optimization_profile(profile)
        with self.configure(trt, config, engine) as how:
            serialised = builder.build_serialized_network(network, config)
            if serialised is None:
                raise build_error(name, messages, how)
        return bytes(serialised)

    @abc.abstractmethod
    def configure(self, trt: Any, config: Any, engine: Engine) -> contextlib.AbstractContextManager[str]:
        """Settings of its own for a build, in the block; gives a sentence about them, for errors."""

    def build(self, engine: Engine, folder: Path, output: Path) -> Details:
        """Build one variant of an engine; called in a worker process that may die.

        Args:
            engine: as planned; `details.kernels` says which variant. folder: the bundle. output: file to write.

        Returns:
            What is known of it; under `variants` what its runs gave, or why it was not run here.

        Raises:
            SparsifinerError: reaches the caller of `build_engine`.
        """
        start, bundle, kernels = time.monotonic(), open_bundle(folder), str(engine.details.kernels)
        model = bundle.model()
        if kernels == DENSE:
            model = dense_model(model)
        elif kernels == UNMERGED:
            whole = unmerged_model(model)
            if whole is None:
                raise BackendError("This file's merging is not as this package exports it.", "Export it again.")
            model = whole
        content = self.compile(model, engine, bundle)
        with io_errors(output):
            output.write_bytes(content)
        seconds, processor = time.monotonic() - start, time.process_time()
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
            cpu_seconds=processor,
        )

    def require_driver(self, device: CudaDevice) -> CudaDevice:
        """The device, where its driver takes this TensorRT: one for a newer CUDA still makes its objects, and
        ends the process on use.

        Raises:
            BackendError: says which package it is, and what to do.
        """
        takes = major(device.driver_version)
        for cuda in (12, 13):
            name = f"{self.name}-cu{cuda}"
            if takes < cuda and isinstance(package_version(name), str):
                raise BackendError(
                    f"{name} needs a driver for CUDA {cuda}, and this one takes CUDA {device.driver_version} at most.",
                    f"Update the driver, or install a {self.name} for CUDA {takes} in its place; "
                    "sparsifiner-edge doctor says which extra fits.",
                )
        return device

    def why_not_here(self, engine: Engine) -> str | None:
        """Why an engine cannot be run on this machine, such as "CUDA finds no device."; None where it can."""
        try:
            return "; ".join(mismatches(engine, self._this_machine())) or None
        except SparsifinerError as error:
            return error.what

    def _this_machine(self) -> EngineDevice:
        """What an engine must fit to run here, after CUDA has answered."""
        device = self.require_driver(probe())
        return EngineDevice(str(self.load().__version__), device.compute_capability, device.name)

    def check(self, bundle: Bundle) -> Engine:
        """The engine of a bundle that runs on this machine; see `Backend.check`."""
        if self.execution.kernels != "auto":
            raise BackendError(
                f"An engine's kernels are chosen when it is built, and kernels are {self.execution.kernels}.",
                f"Leave --kernels out; give it to: sparsifiner-edge build {bundle.folder} --backend {self.name}",
            )
        require_precision(self.execution.precision, bundle.manifest.float_precision, self.name)
        trt, folder, engines = self.load(), bundle.folder, bundle.manifest.engines
        # What needs no GPU to be seen comes first: another system's engine would not run with one either.
        fitting_engine(engines, self.name, EngineDevice(str(trt.__version__)), folder)
        return fitting_engine(engines, self.name, self._this_machine(), folder)

    def prepare(self, bundle: Bundle, engine: Engine) -> None:
        """What must be there before an engine is loaded: nothing."""

    def open(self, bundle: Bundle) -> EngineSession:
        """See `Backend.open`."""
        engine, trt = self.check(bundle), self.load()
        self.prepare(bundle, engine)
        return EngineSession(trt, bundle.folder / engine.file, bundle.read(engine.file), engine, bundle.manifest)


def baselines(bundle: Bundle) -> list[str]:
    """What takes the place of what a bundle's file has: `DENSE` of sparse attention, `UNMERGED` of merging."""
    instead = {"SparseAttention": DENSE, "MergeTokens": UNMERGED}
    return [baseline for name, baseline in instead.items() if f"{DOMAIN}::{name}" in bundle.manifest.ops]


def time_engine(session: EngineSession, bundle: Bundle, batch: int) -> EngineVariant:
    """Median milliseconds that the device computes, and the gate.

    Args:
        session: on the engine; it is closed. batch: the size that it is tuned for.
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
    warning = f"runs are not recorded: {why}" if why else None
    return EngineVariant(golden=golden, compute_ms=statistics.median(times[WARM_UP:]), warning=warning)
