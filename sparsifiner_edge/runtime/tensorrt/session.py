"""Session on an engine. TensorRT and TensorRT-RTX have the same interface, so `trt` is either module."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.engines import BASELINES, DENSE, MIXED, PLUGIN, UNMERGED, Engine
from sparsifiner_edge.bundle.manifest import Manifest, TensorSpec
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import precision_text
from sparsifiner_edge.runtime.cuda import Driver
from sparsifiner_edge.runtime.session import Runtime, Session
from sparsifiner_edge.runtime.tensorrt.errors import make_logger, run_error

Shape = tuple[int, ...]
"""Shape of a tensor in a run."""
_AGAIN = "Build the engine again on this machine."
"""Advice for an engine that fails."""
_KERNELS = {
    PLUGIN: "CUDA kernels, as a plugin",
    MIXED: "CUDA kernels, as a plugin, and dense attention in some layers",
    DENSE: "dense attention",
    UNMERGED: "dense attention, without token merging",
}
"""Description of a variant for users; that of all others is "function bodies"."""


class EngineSession(Session):
    """A `Session` on an engine. The caller has checked that the engine fits this machine's CUDA device.

    One CUDA stream copies the inputs, computes and copies the outputs, in buffers of the largest shapes. On a device
    that shares the CPU's memory nothing is copied: the engine works directly in the page-locked buffers.

    Args:
        trt: Module `tensorrt` or `tensorrt_rtx`.
        path: Path of the engine, for messages.
        content: Content of the engine.
        engine: Target of the engine.
        manifest: Manifest of the bundle; it names the dynamic axes.

    Attributes:
        golden_runs: Three runs, because each works differently: the first is launched directly, the second is recorded
            as a CUDA graph, and the third launches that graph as all later runs do.
        compute_ms: Device time of the latest run in milliseconds, without copies.

    Raises:
        BackendError: There is no CUDA device, CUDA fails, or TensorRT rejects the engine. All resources are freed.
    """

    golden_runs = 3
    compute_ms = 0.0

    def __init__(self, trt: Any, path: Path, content: bytes, engine: Engine, manifest: Manifest) -> None:
        start = time.perf_counter_ns()
        self.backend = engine.backend
        self._trt, self.model, self._messages = trt, path, make_logger(trt)
        self.least_batch, self.in_place_of_sparse = engine.batch.least, engine.details.kernels in BASELINES
        self._bound: Mapping[str, Shape] = {}
        self._runs = 0
        self._launch: Callable[[], None] | None = None
        self._graph = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._driver = driver = Driver()
            self._runtime = trt.Runtime(self._messages)
            stack.callback(self._drop)
            self._engine = self._runtime.deserialize_cuda_engine(content)
            if self._engine is None:
                fix = "It was built by another version or is damaged: build it again on this machine."
                raise run_error(path, "to load an engine", self._messages, fix)
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise run_error(path, "to prepare a run", self._messages, _AGAIN)
            self.inputs, self.outputs = self._specs(manifest)
            shapes = {spec.name: self._engine.get_tensor_profile_shape(spec.name, 0) for spec in self.inputs}
            self._ranges = {name: (tuple(least), tuple(most)) for name, (least, _, most) in shapes.items()}
            flags = driver.runtime.cudaStreamNonBlocking  # The stream does not wait for the default stream.
            self._stream = driver.take(stack, "a stream", "cudaStreamCreateWithFlags", flags, free="cudaStreamDestroy")
            self._events = [driver.take(stack, "an event", "cudaEventCreate", free="cudaEventDestroy") for _ in "ab"]
            self._bind({name: most for name, (_, most) in self._ranges.items()})
            self._buffers: dict[str, tuple[Array, int]] = {}
            for spec in (*self.inputs, *self.outputs):
                size = math.prod(self._context.get_tensor_shape(spec.name)) * np.dtype(spec.dtype).itemsize
                self._buffers[spec.name] = driver.pin(max(size, 1), stack)
                self._context.set_tensor_address(spec.name, self._buffers[spec.name][1])
            stack.enter_context(self._graph)
            self._stack = stack.pop_all()
        self.load_ms = (time.perf_counter_ns() - start) / 1e6
        self.description = Runtime(
            backend=self.backend,
            version=str(trt.__version__),
            provider="TensorRT-RTX" if self.backend == "tensorrt-rtx" else "TensorRT",
            device=str(driver.device),
            precision=precision_text(engine.precision, manifest.float_precision),
            kernels=_KERNELS.get(str(engine.details.kernels), "function bodies"),
            threads=1,
            cuda=f"{driver.package}, driver for CUDA {driver.device.driver_version}",
        )

    def _specs(self, manifest: Manifest) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """Return the inputs and outputs of the engine, with the manifest's names of dynamic axes."""
        named = {spec.name: spec.shape for spec in (*manifest.inputs, *manifest.outputs)}
        specs: dict[bool, list[TensorSpec]] = {True: [], False: []}
        for name in map(self._engine.get_tensor_name, range(self._engine.num_io_tensors)):
            shape, kind = tuple(self._engine.get_tensor_shape(name)), self._engine.get_tensor_dtype(name)
            names = named.get(name, [None] * len(shape))
            axes = tuple(size if size >= 0 else other for size, other in zip(shape, names, strict=True))
            try:
                dtype = str(np.dtype(self._trt.nptype(kind)).name)
            except TypeError as error:
                what = f"{name!r} has type {kind}, which NumPy does not support."
                raise BackendError(what, "Export with another type.") from error
            is_input = self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            specs[is_input].append(TensorSpec(name, dtype, axes))
        return specs[True], specs[False]

    def _bind(self, shapes: Mapping[str, Shape]) -> None:
        """Set the shapes of the inputs for the runs that follow.

        A change of shapes drops the recorded graph, since graphs of earlier shapes are no longer valid for the engine.
        """
        if shapes == self._bound:
            return
        self._bound, self._runs, self._launch = {}, 0, None
        self._graph.close()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise run_error(self.model, f"to accept {name!r} of shape {list(shape)}", self._messages, _AGAIN)
        self._bound = shapes

    def validate(self, inputs: Mapping[str, Array]) -> None:
        """Check inputs as `Session.validate` does, and that their sizes are in the range of the engine."""
        super().validate(inputs)
        for name, (least, most) in self._ranges.items():
            for axis, size in enumerate(inputs[name].shape):
                if not least[axis] <= size <= most[axis]:
                    raise BackendError(
                        f"Input {name!r} got {size} on axis {axis}; this engine takes {least[axis]} to {most[axis]}.",
                        "Use a size in that range, or build an engine for other batch sizes.",
                    )

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        if self._engine is None:
            raise self.closed_error()
        self._driver.use()
        self._bind({name: value.shape for name, value in inputs.items()})
        # The first run of given shapes is never recorded: the engine may allocate memory, which a recording forbids.
        if self._runs and self._launch is None and self.description.why_no_graph is None:
            try:
                self._launch = self._driver.capture(self._stream, self._enqueue, self._graph)
            except BackendError as error:
                self._refuse_graphs(error)
        self._runs += 1
        for name, value in inputs.items():
            np.copyto(self._view(name, value.dtype, value.shape), value)
        outputs = {
            spec.name: self._view(spec.name, np.dtype(spec.dtype), tuple(self._context.get_tensor_shape(spec.name)))
            for spec in self.outputs
        }
        start, end = self._events
        self._copy(inputs, to_device=True)
        self._driver.call("to record an event", "cudaEventRecord", start, self._stream)
        self._start()
        self._driver.call("to record an event", "cudaEventRecord", end, self._stream)
        self._copy(outputs, to_device=False)
        self._driver.call("while running", "cudaStreamSynchronize", self._stream)
        self.compute_ms = float(self._driver.call("to read events", "cudaEventElapsedTime", start, end))
        return {name: output.copy() for name, output in outputs.items()}  # The next run writes into the buffers.

    def _view(self, name: str, dtype: np.dtype[Any], shape: Shape) -> Array:
        """Return the page-locked memory of a tensor as an array of this run's type and shape."""
        return self._buffers[name][0][: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def _copy(self, arrays: Mapping[str, Array], to_device: bool) -> None:
        """Put copies between page-locked and device memory into the stream, for all arrays."""
        kinds = self._driver.runtime.cudaMemcpyKind
        kind = kinds.cudaMemcpyHostToDevice if to_device else kinds.cudaMemcpyDeviceToHost
        for name, array in () if self._driver.device.integrated else arrays.items():
            host, pointer = self._buffers[name]
            target, source = (pointer, host.ctypes.data) if to_device else (host.ctypes.data, pointer)
            self._driver.call("to copy", "cudaMemcpyAsync", target, source, array.nbytes, kind, self._stream)

    def _enqueue(self) -> None:
        """Put a run of the engine into the stream."""
        if not self._context.execute_async_v3(self._stream):
            raise run_error(self.model, "to run", self._messages, _AGAIN)

    def _start(self) -> None:
        """Launch the recorded graph, or the engine directly if there is no graph or its launch fails."""
        if self._launch is not None:
            try:
                return self._launch()
            except BackendError as error:
                self._refuse_graphs(error)
        return self._enqueue()

    def _refuse_graphs(self, error: BackendError) -> None:
        """Record no graphs from now on. If the device was lost, the direct run that follows reports it."""
        self.description = replace(self.description, why_no_graph=error.what)
        self._launch = None
        with contextlib.suppress(BackendError):
            self._graph.close()

    def _drop(self) -> None:
        """Drop TensorRT's objects in the order of their dependencies; dropping the last reference frees them."""
        self._context = self._engine = self._runtime = None

    def close(self) -> None:
        """Free all resources; see `Session.close`. If CUDA fails to free one, the others are freed all the same."""
        self._stack.close()
