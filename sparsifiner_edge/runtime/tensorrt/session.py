"""A session on an engine's file. TensorRT and TensorRT-RTX share this interface, so `trt` is either module."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.engines import DENSE, PLUGIN, Engine
from sparsifiner_edge.bundle.manifest import Manifest, TensorSpec
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import precision_text
from sparsifiner_edge.runtime.cuda import Driver, StreamBuffers
from sparsifiner_edge.runtime.session import Runtime, Session
from sparsifiner_edge.runtime.tensorrt.errors import make_logger, run_error

Shape = tuple[int, ...]
_AGAIN = "Build the engine again on this machine."
_KERNELS = {PLUGIN: "CUDA kernels, as a plugin", DENSE: "dense attention"}


class EngineSession(Session):
    """A `Session` on an engine. Whoever makes one has seen that the engine fits this machine's CUDA device.

    Attributes:
        golden_runs: see `bundle.golden.check_golden`: the first is plain, the second is recorded, the third launches
            that recording, as every later one does.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        path: the engine's file, for messages. content: of it.
        engine: what it was built for.
        manifest: of its bundle; names the dynamic axes.

    Raises:
        BackendError: no CUDA device, or TensorRT rejects the engine.
    """

    golden_runs = 3

    def __init__(self, trt: Any, path: Path, content: bytes, engine: Engine, manifest: Manifest) -> None:
        start = time.perf_counter_ns()
        self.backend = engine.backend
        self._trt, self.model, self._messages = trt, path, make_logger(trt)
        self.least_batch, self.in_place_of_sparse = engine.batch.least, engine.details.kernels == DENSE
        self._bound: dict[str, Shape] = {}
        with contextlib.ExitStack() as stack:
            self._driver = Driver()
            self._engine = self._deserialise(content)
            stack.callback(self._drop)
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise run_error(path, "to prepare a run", self._messages, _AGAIN)
            self.inputs, self.outputs = self._specs(manifest)
            shapes = {spec.name: self._engine.get_tensor_profile_shape(spec.name, 0) for spec in self.inputs}
            self._ranges = {name: (tuple(least), tuple(most)) for name, (least, _, most) in shapes.items()}
            self._bind({name: most for name, (_, most) in self._ranges.items()})
            self._buffers = StreamBuffers(self._driver, {
                spec.name: math.prod(self._context.get_tensor_shape(spec.name)) * np.dtype(spec.dtype).itemsize
                for spec in (*self.inputs, *self.outputs)
            }, stack)  # fmt: skip
            for spec in (*self.inputs, *self.outputs):
                self._context.set_tensor_address(spec.name, self._buffers.pointer(spec.name))
            self._stack = stack.pop_all()
        self.load_ms, device = (time.perf_counter_ns() - start) / 1e6, self._driver.device
        self._description = Runtime(
            backend=self.backend,
            version=str(trt.__version__),
            provider="TensorRT-RTX" if self.backend == "tensorrt-rtx" else "TensorRT",
            device=f"{device.name} (compute capability {device.compute_capability})",
            precision=precision_text(engine.precision, manifest.float_precision),
            kernels=_KERNELS.get(str(engine.details.kernels), "function bodies"),
            threads=1,
            cuda=f"{self._driver.package}, driver for CUDA {device.driver_version}",
        )

    def _deserialise(self, content: bytes) -> Any:
        runtime = self._trt.Runtime(self._messages)
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            fix = "It was built by another version or is damaged: build it again on this machine."
            raise run_error(self.model, "to load an engine", self._messages, fix)
        self._runtime = runtime
        return engine

    def _specs(self, manifest: Manifest) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """Inputs and outputs, with the manifest's names of dynamic axes."""
        named = {spec.name: spec.shape for spec in (*manifest.inputs, *manifest.outputs)}
        found: dict[bool, list[TensorSpec]] = {True: [], False: []}
        for number in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(number)
            shape = tuple(self._engine.get_tensor_shape(name))
            names = named.get(name, [None] * len(shape))
            axes = tuple(size if size >= 0 else other for size, other in zip(shape, names, strict=True))
            spec = TensorSpec(name, self._dtype(name), axes)
            found[self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT].append(spec)
        return found[True], found[False]

    def _dtype(self, name: str) -> str:
        kind = self._engine.get_tensor_dtype(name)
        try:
            return str(np.dtype(self._trt.nptype(kind)).name)
        except TypeError as error:
            raise BackendError(f"{name!r} has type {kind}, which NumPy lacks.", "Export with another type.") from error

    def _bind(self, shapes: Mapping[str, Shape]) -> None:
        if shapes == self._bound:
            return
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise run_error(self.model, f"to take {name!r} of shape {list(shape)}", self._messages, _AGAIN)
        self._bound = dict(shapes)

    @property
    def description(self) -> Runtime:
        """See `Session.description`."""
        return replace(self._description, why_no_graph=self._buffers.why_no_graph)

    @property
    def compute_ms(self) -> float:
        """Of the latest run, by the device's clock, copies excluded."""
        return self._buffers.compute_ms

    def validate(self, inputs: Mapping[str, Array]) -> None:
        """See `Session.validate`; sizes must also be in the range that the engine was built for."""
        super().validate(inputs)
        for name, (least, most) in self._ranges.items():
            for axis, size in enumerate(inputs[name].shape):
                if not least[axis] <= size <= most[axis]:
                    raise BackendError(
                        f"Input {name!r} got {size} on axis {axis}; this engine takes {least[axis]} to {most[axis]}.",
                        "Give that many, or build an engine for other batch sizes.",
                    )

    def _run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        if self._engine is None:
            raise self.closed()
        shapes: dict[str, Shape] = {name: value.shape for name, value in inputs.items()}
        self._driver.use()
        self._bind(shapes)
        outputs = {s.name: (np.dtype(s.dtype), tuple(self._context.get_tensor_shape(s.name))) for s in self.outputs}
        return self._buffers.run(inputs, outputs, self._enqueue, tuple(sorted(shapes.items())))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._buffers.stream):
            raise run_error(self.model, "to run", self._messages, _AGAIN)

    def _drop(self) -> None:
        """Let go of TensorRT's objects, those that use others first; the last reference frees them."""
        self._context = self._engine = self._runtime = None

    def close(self) -> None:
        """See `Session.close`."""
        self._stack.close()
