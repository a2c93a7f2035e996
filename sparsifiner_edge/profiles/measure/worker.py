"""Measured process: `python -m sparsifiner_edge.profiles.measure.worker` carries out `operations`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.manifest import TensorSpec
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.profiles.measure.memory import RESIDENT, Bytes, process_bytes
from sparsifiner_edge.profiles.measure.timing import call_ms
from sparsifiner_edge.runtime.child import serve
from sparsifiner_edge.runtime.open import checked_bundle, choose_execution, find_backend, session_on
from sparsifiner_edge.runtime.session import Runtime, Session

if TYPE_CHECKING:
    from sparsifiner_edge.profiles.measure.layers import Row


def fixed_inputs(specs: list[TensorSpec]) -> dict[str, Array]:
    """Return a random array for each input of a session, the same on every call.

    uint8 inputs cover their whole range, floating-point inputs [0, 1). A dynamic batch has one image.

    Raises:
        BackendError: An input has another type, or a dynamic axis other than its first.
    """
    random = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for spec in specs:
        shape = [1 if axis == 0 and not isinstance(size, int) else size for axis, size in enumerate(spec.shape)]
        sizes = [size for size in shape if isinstance(size, int)]
        kind = np.dtype(spec.dtype)
        if len(sizes) != len(shape) or (kind != np.uint8 and kind.kind != "f"):
            what = f"Input {spec.name!r} ({spec}) cannot be synthesised for a measurement."
            raise BackendError(what, "Export the model with uint8 or float inputs, of which only the batch is dynamic.")
        is_uint8 = kind == np.uint8
        arrays[spec.name] = random.integers(0, 256, sizes, np.uint8) if is_uint8 else random.random(sizes).astype(kind)
    return arrays


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """Report of a worker after loading a bundle.

    Attributes:
        execution: Execution that was chosen.
        input_shapes: Shapes of the inputs by name.
        load_ms: Time to create the session in milliseconds, without importing the backend's package.
        first_ms: Time of the first inference in milliseconds.
        rss_before_load_bytes: Memory of the process before the session was created, in bytes.
    """

    execution: Execution
    input_shapes: dict[str, list[int]]
    load_ms: float
    first_ms: float
    rss_before_load_bytes: Bytes


class QueryBlock(NamedTuple):
    """Consecutive queries.

    Attributes:
        latency_ms: Latency of each query in milliseconds.
        window_ns: Start and end of the block, in nanoseconds of CLOCK_MONOTONIC.
    """

    latency_ms: list[float]
    window_ns: tuple[int, int]


class _Worker:
    """One session and its inputs; each public method is an operation, and `load` or `layers` comes first.

    The argument `execution` holds the fields of an `Execution`.
    """

    session: Session
    inputs: dict[str, Array]

    def load(self, bundle: str, execution: dict[str, Any]) -> Loaded:
        checked, named = checked_bundle(Path(bundle)), msgspec.convert(execution, Execution)
        chosen = choose_execution(checked, named)
        find_backend(chosen[0]).load()
        before = process_bytes(RESIDENT)
        self.session = session_on(checked, named, chosen)
        self.inputs = fixed_inputs(self.session.inputs)
        return Loaded(
            execution=chosen[0],
            input_shapes={name: list(value.shape) for name, value in self.inputs.items()},
            load_ms=self.session.load_ms,
            first_ms=call_ms(lambda: self.session.infer(self.inputs), 1)[0],
            rss_before_load_bytes=before,
        )

    def block(self, queries: int, rewarm: int) -> QueryBlock:
        session, inputs = self.session, self.inputs
        for _ in range(rewarm):
            session.infer(inputs)
        begin = time.monotonic_ns()
        times = call_ms(lambda: session.infer(inputs), queries)
        return QueryBlock(times, (begin, time.monotonic_ns()))

    def processor_s(self) -> float:
        return time.process_time()

    def describe(self) -> Runtime:  # Takes memory, so it is requested last.
        return self.session.description

    def layers(self, bundle: str, execution: dict[str, Any], query_ms: float) -> list[Row]:  # In a fresh worker.
        from sparsifiner_edge.profiles.measure.layers import measure_layers

        return measure_layers(bundle, msgspec.convert(execution, Execution), query_ms)


def operations() -> dict[str, Callable[..., Any]]:
    """Return the operations of a new worker by name; see `runtime.child.serve`."""
    worker = _Worker()
    return {name: getattr(worker, name) for name in ("load", "block", "processor_s", "describe", "layers")}


if __name__ == "__main__":
    serve(operations())
