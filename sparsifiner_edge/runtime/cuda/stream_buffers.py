"""One stream with everything that it carries: buffers of inputs and outputs, events, and a recorded graph."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.runtime.cuda.driver import Driver


class StreamTimes(NamedTuple):
    """Milliseconds of one run by the device's clock; copies are 0 where device and processor share memory."""

    h2d_ms: float
    compute_ms: float
    d2h_ms: float


class StreamBuffers(AbstractContextManager["StreamBuffers"]):
    """Buffers for some inputs and outputs, and a stream that copies in, computes and copies out.

    A context manager; whatever happens, `close` releases all that was taken. On a device that shares the processor's
    memory nothing is copied: the engine works in page-locked memory of both.

    Args:
        driver: stays open until after `close`; it is not closed here.
        sizes: bytes of each input and output at its largest.

    Attributes:
        stream: its address, for the engine. zero_copy: nothing is copied.
        why_no_graph: why every run puts its work into the stream anew; None where repeated ones are recorded. CUDA or
            the engine may refuse that when it is tried, from the second run on.
        last_times: of the latest run.

    Raises:
        BackendError: CUDA fails; nothing stays taken.
    """

    def __init__(self, driver: Driver, sizes: Mapping[str, int]) -> None:
        self._driver = driver
        self.zero_copy = driver.device.integrated
        self.last_times: StreamTimes | None = None
        self.why_no_graph = None if driver.graphs else f"{driver.package} has no CUDA graphs"
        self._launch: Callable[[], None] | None = None
        self._recorded: Hashable | None = None
        self._last: Hashable | None = None
        with ExitStack() as stack:
            flags = driver.runtime.cudaStreamNonBlocking  # It does not wait for the default stream.
            self.stream = driver.take(stack, "a stream", "cudaStreamCreateWithFlags", flags, free="cudaStreamDestroy")
            self._events = [
                driver.take(stack, "an event", "cudaEventCreate", free="cudaEventDestroy") for _ in range(4)
            ]
            self._buffers = {name: driver.pinned(max(size, 1), stack) for name, size in sizes.items()}
            self._graph = stack.enter_context(ExitStack())
            self._stack = stack.pop_all()

    def pointer(self, name: str) -> int:
        """Device address of a tensor."""
        return self._buffers[name].pointer

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
        compute: Callable[[], None],
        key: Hashable | None = None,
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
            BackendError: CUDA fails, or something is too large. `last_times` is set otherwise.
        """
        results = {name: self._view(name, *kind) for name, kind in outputs.items()}
        self._driver.use()
        recording = self._recording(key, compute)
        for name, value in inputs.items():
            np.copyto(self._view(name, value.dtype, value.shape), value)
        self._record(0)
        self._copy({name: value.nbytes for name, value in inputs.items()}, to_device=True)
        self._record(1)
        self._start(recording, compute)
        self._record(2)
        self._copy({name: result.nbytes for name, result in results.items()}, to_device=False)
        self._record(3)
        self._driver.call("while running", "cudaStreamSynchronize", self.stream)
        spans = zip(self._events[:-1], self._events[1:], strict=True)
        h2d, computing, d2h = (
            float(self._driver.call("to read events", "cudaEventElapsedTime", *span)) for span in spans
        )
        self.last_times = StreamTimes(0.0, computing, 0.0) if self.zero_copy else StreamTimes(h2d, computing, d2h)
        return {name: result.copy() for name, result in results.items()}

    def _record(self, number: int) -> None:
        self._driver.call("to record an event", "cudaEventRecord", self._events[number], self.stream)

    def _copy(self, sizes: Mapping[str, int], to_device: bool) -> None:
        """Put copies of so many bytes of each tensor into the stream."""
        kinds = self._driver.runtime.cudaMemcpyKind
        kind = kinds.cudaMemcpyHostToDevice if to_device else kinds.cudaMemcpyDeviceToHost
        for name, size in () if self.zero_copy else sizes.items():
            places = self._buffers[name].pointer, self._buffers[name].host.ctypes.data
            target, source = places if to_device else places[::-1]
            self._driver.call("to copy", "cudaMemcpyAsync", target, source, size, kind, self.stream)

    def _view(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        """The page-locked memory of a tensor, as an array of this run's shape."""
        host, size = self._buffers[name].host, math.prod(shape) * dtype.itemsize
        if size > host.size:
            raise BackendError(
                f"{name!r} needs {size} bytes; its buffer has {host.size}.",
                "Build the engine for larger batches, or give a smaller one.",
            )
        return host[:size].view(dtype).reshape(shape)

    def _recording(self, key: Hashable | None, compute: Callable[[], None]) -> Callable[[], None] | None:
        """What launches the recording of that key; None where there is none.

        A run that differs from the one before is never recorded: the engine may allocate in it, which a recording
        forbids. One recording is kept: after a change of shapes an engine's earlier ones are no longer valid.
        """
        if key is None or self.why_no_graph is not None:
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

    def close(self) -> None:
        """Release everything; closing twice is harmless.

        Raises:
            BackendError: CUDA fails in one of the steps; the others are done all the same.
        """
        self._buffers = {}
        self._stack.close()

    def __exit__(self, *_error: object) -> None:
        self.close()
