"""A GPU that is not there: memory, streams, events and graphs with the rules of the real ones, and a count of all.

Device memory is memory of this process, so engines of the fake TensorRT compute real results in it. What is put into a
stream runs at once, or is recorded while the stream is captured. Errors are put in by name of the function of CUDA's
runtime API (`fail`), and a lost device fails everything, as a real one does.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any


class CudaError(Exception):
    """An error of CUDA by its name in the runtime API, such as "cudaErrorMemoryAllocation"."""


@dataclasses.dataclass
class Gpu:
    """One device; the defaults are those of an Orin. `fail`: function of CUDA -> name of the error that it gives."""

    name: str = "Orin"
    sm: tuple[int, int] = (8, 7)
    memory: int = 8 << 30
    integrated: bool = True
    driver: int = 12060
    count: int = 1
    fail: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lost = False
        self.used = 0
        self.calls: Counter[str] = Counter()
        self._numbers = itertools.count(1000)
        self._blocks: dict[int, tuple[Any, int, str]] = {}
        self._live: dict[int, str] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._recording: dict[int, list[Callable[[], None]]] = {}
        self._clock = 0.0
        self._stamps: dict[int, float] = {}

    def live(self) -> dict[str, int]:
        """What is taken and not given back, by kind; empty when all is."""
        return dict(Counter([kind for _, _, kind in self._blocks.values()] + list(self._live.values())))

    def check(self, function: str) -> None:
        """Count a call, and fail it where it shall fail."""
        self.calls[function] += 1
        if function in self.fail:
            if function == "cudaStreamEndCapture":
                self._recording.clear()  # A capture that fails is over all the same.
            self.lost = self.fail[function] == "cudaErrorIllegalAddress"
            raise CudaError(self.fail[function])
        if self.lost:
            raise CudaError("cudaErrorIllegalAddress")

    def allocate(self, size: int, kind: str) -> int:
        if self.used + size > self.memory:
            raise CudaError("cudaErrorMemoryAllocation")
        block = (ctypes.c_uint8 * max(size, 1))()
        self.used += size
        self._blocks[ctypes.addressof(block)] = (block, size, kind)
        return ctypes.addressof(block)

    def free(self, pointer: int, kind: str) -> None:
        """Give memory back; what is not taken, or of another kind, is an error."""
        if pointer not in self._blocks or self._blocks[pointer][2] != kind:
            raise CudaError("cudaErrorInvalidValue")
        self.used -= self._blocks.pop(pointer)[1]

    def block(self, pointer: int) -> Any:
        return self._blocks[pointer][0]

    def make(self, kind: str) -> int:
        """A stream, event, graph, engine or context."""
        number = next(self._numbers)
        self._live[number] = kind
        return number

    def drop(self, number: int, kind: str) -> None:
        if self._live.get(number) != kind:
            raise CudaError("cudaErrorInvalidResourceHandle")
        del self._live[number]
        self._graphs.pop(number, None)

    def put(self, stream: int, work: Callable[[], None], milliseconds: float = 1.0) -> None:
        """Put work into a stream."""

        def run() -> None:
            work()
            self._clock += milliseconds

        if stream in self._recording:
            self._recording[stream].append(run)
        else:
            run()

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copy between two blocks; sizes beyond either are an error."""
        for pointer in (target, source):
            if pointer not in self._blocks or size > self._blocks[pointer][1]:
                raise CudaError("cudaErrorInvalidValue")
        self.put(stream, lambda: ctypes.memmove(target, source, size) and None, 0.25)

    def stamp(self, event: int) -> None:
        self._stamps[event] = self._clock

    def between(self, start: int, end: int) -> float:
        if start not in self._stamps or end not in self._stamps:
            raise CudaError("cudaErrorInvalidResourceHandle")
        return self._stamps[end] - self._stamps[start]

    def captures(self, stream: int) -> bool:
        return stream in self._recording

    def begin(self, stream: int) -> None:
        self._recording[stream] = []

    def end(self, stream: int) -> int:
        """End recording; returns a graph."""
        graph = self.make("graph")
        self._graphs[graph] = self._recording.pop(stream)
        return graph

    def instantiate(self, graph: int) -> int:
        executable = self.make("executable graph")
        self._graphs[executable] = self._graphs[graph]
        return executable

    def launch(self, executable: int, stream: int) -> None:
        for step in self._graphs[executable]:
            self.put(stream, step, 0.0)
