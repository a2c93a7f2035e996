"""One stream with everything that it carries: buffers of inputs and outputs, events, and a recorded graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.runtime.cuda.driver import Driver, HostMemory


class Times(NamedTuple):
    """Milliseconds of one run by the device's clock; copies are 0 where device and processor share memory."""

    h2d_ms: float
    compute_ms: float
    d2h_ms: float


class _Slot(NamedTuple):
    memory: HostMemory
    pointer: int
    size: int


class StreamBuffers:
    """Buffers for some inputs and outputs, and a stream that copies in, computes and copies out.

    A context manager; whatever happens, `close` gives back all that was taken. On a device that shares the processor's
    memory nothing is copied: the engine works in the page-locked memory itself.

    Args:
        driver: stays open until after `close`; it is not closed here.
        inputs, outputs: bytes of each tensor at its largest.
        zero_copy: None decides by the device.

    Raises:
        BackendError: CUDA fails; nothing stays taken.
    """

    def __init__(
        self, driver: Driver, inputs: Mapping[str, int], outputs: Mapping[str, int], zero_copy: bool | None = None
    ) -> None:
        self._driver = driver
        self.zero_copy = driver.device.integrated if zero_copy is None else zero_copy
        self.last_times: Times | None = None
        self._graph: Any = None
        self._graph_name: Hashable | None = None
        self._last: Hashable | None = None
        self._slots: dict[str, _Slot] = {}
        with contextlib.ExitStack() as stack:
            self._stream: Any = driver.stream()
            stack.callback(driver.free_stream, self._stream)
            self._events: list[Any] = []
            for _ in range(4):
                self._events.append(driver.event())
                stack.callback(driver.free_event, self._events[-1])
            for name, size in {**inputs, **outputs}.items():
                self._slots[name] = self._slot(max(size, 1), stack)
            stack.callback(self._free_graph)
            self._stack = stack.pop_all()

    def _slot(self, size: int, stack: contextlib.ExitStack) -> _Slot:
        memory = self._driver.allocate_host(size)
        stack.callback(self._driver.free_host, memory)
        if self.zero_copy:
            return _Slot(memory, memory.device_pointer, size)
        pointer = self._driver.allocate(size)
        stack.callback(self._driver.free, pointer)
        return _Slot(memory, pointer, size)

    @property
    def stream_number(self) -> int:
        """The stream's address, for the engine."""
        return self._driver.stream_number(self._stream)

    def pointer(self, name: str) -> int:
        """Device address of a tensor."""
        return self._slots[name].pointer

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
        compute: Callable[[], None],
        graph: Hashable | None = None,
    ) -> dict[str, Array]:
        """Copy in, compute, copy out, and wait.

        Args:
            inputs: arrays no larger than their buffers.
            outputs: type and shape of each output of this run.
            compute: puts the work into the stream.
            graph: names what `compute` does; from the second run of one name in a row on, a recording of it is
                launched.

        Returns:
            Arrays of their own, not views of the buffers.

        Raises:
            BackendError: CUDA fails, or something is too large. `last_times` is set otherwise.
        """
        driver, stream = self._driver, self._stream
        driver.use()
        recorded = self._recording(graph, compute)
        driver.record(self._events[0], stream)
        for name, value in inputs.items():
            self._put(name, value)
        driver.record(self._events[1], stream)
        if recorded is None:
            compute()
        else:
            driver.launch(recorded, stream)
        driver.record(self._events[2], stream)
        for name, (dtype, shape) in outputs.items():
            if not self.zero_copy:
                slot = self._slots[name]
                driver.copy_out(slot.memory, slot.pointer, self._fitting(name, _bytes(dtype, shape)), stream)
        driver.record(self._events[3], stream)
        driver.synchronise(stream)
        start, filled, done, end = self._events
        self.last_times = Times(
            0.0 if self.zero_copy else driver.elapsed_ms(start, filled),
            driver.elapsed_ms(filled, done),
            0.0 if self.zero_copy else driver.elapsed_ms(done, end),
        )
        return {name: self._get(name, dtype, shape) for name, (dtype, shape) in outputs.items()}

    def _put(self, name: str, value: Array) -> None:
        size = self._fitting(name, value.nbytes)
        slot = self._slots[name]
        np.copyto(slot.memory.bytes[:size].view(value.dtype).reshape(value.shape), value)
        if not self.zero_copy:
            self._driver.copy_in(slot.pointer, slot.memory, size, self._stream)

    def _get(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
        size = self._fitting(name, _bytes(dtype, shape))
        result: Array = self._slots[name].memory.bytes[:size].view(dtype).reshape(shape).copy()
        return result

    def _fitting(self, name: str, size: int) -> int:
        if size > self._slots[name].size:
            raise BackendError(
                f"{name!r} needs {size} bytes; its buffer has {self._slots[name].size}.",
                "Build the engine for larger batches, or give a smaller one.",
            )
        return size

    def _recording(self, name: Hashable | None, compute: Callable[[], None]) -> Any:
        """The graph of that name; None while `compute` must run itself.

        A run that differs from the one before is never recorded: the engine may allocate in it, which a recording
        forbids. One recording is kept: after a change of shapes an engine's earlier ones are no longer valid.
        """
        if name is None or not self._driver.graphs:
            return None
        if self._graph is not None and self._graph_name != name:
            self._free_graph()
        if self._graph is None and self._last == name:
            self._record(compute)
            self._graph_name = name
        self._last = name
        return self._graph

    def _record(self, compute: Callable[[], None]) -> None:
        self._driver.begin_capture(self._stream)
        try:
            compute()
        except BaseException:
            with contextlib.suppress(BackendError):
                self._driver.free_graph(self._driver.end_capture(self._stream))
            raise
        self._graph = self._driver.end_capture(self._stream)

    def _free_graph(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            self._driver.free_graph(graph)

    def close(self) -> None:
        """Give everything back; closing twice is harmless.

        Raises:
            BackendError: CUDA fails in one of the steps; the others are done all the same.
        """
        self._slots = {}
        try:
            self._stack.close()
        finally:
            self._stream, self._events = None, []  # pycuda gives them back with their last reference.

    def __enter__(self) -> StreamBuffers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
