"""One stream with everything that it carries: buffers of inputs and outputs, events, and a recorded graph."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.runtime.cuda.driver import Driver


class StreamBuffers:
    """Buffers for some inputs and outputs, and a stream that copies in, computes and copies out.

    On a device that shares the processor's memory nothing is copied: the engine works in page-locked memory of both.

    Args:
        sizes: bytes of each input and output at its largest.
        stack: gives back all that is taken, when it closes.

    Attributes:
        stream: its address, for the engine.
        why_no_graph: why every run puts its work into the stream anew; None where repeated ones are recorded. CUDA or
            the engine may refuse that when it is tried, from the second run on.
        compute_ms: of the latest run, by the device's clock, copies excluded.

    Raises:
        BackendError: CUDA fails.
    """

    def __init__(self, driver: Driver, sizes: Mapping[str, int], stack: ExitStack) -> None:
        self._driver = driver
        self.compute_ms = 0.0
        self.why_no_graph: str | None = None
        self._launch: Callable[[], None] | None = None
        self._recorded: Hashable | None = None
        self._last: Hashable | None = None
        flags = driver.runtime.cudaStreamNonBlocking  # It does not wait for the default stream.
        self.stream = driver.take(stack, "a stream", "cudaStreamCreateWithFlags", flags, free="cudaStreamDestroy")
        self._events = [driver.take(stack, "an event", "cudaEventCreate", free="cudaEventDestroy") for _ in range(2)]
        self._buffers = {name: driver.pinned(max(size, 1), stack) for name, size in sizes.items()}
        self._graph = stack.enter_context(ExitStack())

    def pointer(self, name: str) -> int:
        """Device address of a tensor."""
        return self._buffers[name][1]

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
        compute: Callable[[], None],
        key: Hashable,
    ) -> dict[str, Array]:
        """Copy in, compute, copy out, and wait.

        Args:
            inputs: arrays no larger than their buffers.
            outputs: type and shape of each output of this run.
            compute: puts the work into the stream.
            key: names what `compute` does; from the second run of one key in a row on, a recording of it is launched,
                where none was refused.

        Returns:
            Arrays of their own, not views of the buffers.

        Raises:
            BackendError: CUDA fails, or something is too large. `compute_ms` is set otherwise.
        """
        results = {name: self._view(name, *kind) for name, kind in outputs.items()}
        recording = self._recording(key, compute)
        for name, value in inputs.items():
            np.copyto(self._view(name, value.dtype, value.shape), value)
        start, end = self._events
        self._copy(inputs, to_device=True)
        self._driver.call("to record an event", "cudaEventRecord", start, self.stream)
        self._start(recording, compute)
        self._driver.call("to record an event", "cudaEventRecord", end, self.stream)
        self._copy(results, to_device=False)
        self._driver.call("while running", "cudaStreamSynchronize", self.stream)
        self.compute_ms = float(self._driver.call("to read events", "cudaEventElapsedTime", start, end))
        return {name: result.copy() for name, result in results.items()}

    def _copy(self, arrays: Mapping[str, Array], to_device: bool) -> None:
        """Put copies of as many bytes of each tensor into the stream."""
        kinds = self._driver.runtime.cudaMemcpyKind
        kind = kinds.cudaMemcpyHostToDevice if to_device else kinds.cudaMemcpyDeviceToHost
        for name, array in () if self._driver.device.integrated else arrays.items():
            host, pointer = self._buffers[name]
            target, source = (pointer, host.ctypes.data) if to_device else (host.ctypes.data, pointer)
            self._driver.call("to copy", "cudaMemcpyAsync", target, source, array.nbytes, kind, self.stream)

    def _view(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """The page-locked memory of a tensor, as an array of this run's shape."""
        host, size = self._buffers[name][0], math.prod(shape) * dtype.itemsize
        if size > host.size:
            raise BackendError(
                f"{name!r} needs {size} bytes; its buffer has {host.size}.",
                "Build the engine for larger batches, or give a smaller one.",
            )
        return host[:size].view(dtype).reshape(shape)

    def _recording(self, key: Hashable, compute: Callable[[], None]) -> Callable[[], None] | None:
        """What launches the recording of that key; None where there is none.

        A run that differs from the one before is never recorded: the engine may allocate in it, which a recording
        forbids. One recording is kept: after a change of shapes an engine's earlier ones are no longer valid.
        """
        if self.why_no_graph is not None:
            return None
        if self._recorded != key:
            self._launch = self._recorded = None
            self._graph.close()
        if self._launch is None and self._last == key:
            try:
                self._launch, self._recorded = self._driver.capture(self.stream, compute, self._graph), key
            except BackendError as error:
                self._refuse_graphs(error)
        self._last = key
        return self._launch

    def _start(self, recording: Callable[[], None] | None, compute: Callable[[], None]) -> None:
        """Put a run's work into the stream: by its recording, or by `compute` where there is none or it is refused."""
        if recording is not None:
            try:
                return recording()
            except BackendError as error:
                self._refuse_graphs(error)
        return compute()

    def _refuse_graphs(self, error: BackendError) -> None:
        """Record nothing from now on. A device that is lost says so in the plain run that follows."""
        self.why_no_graph = error.what
        self._launch = self._recorded = None
        with contextlib.suppress(BackendError):
            self._graph.close()
