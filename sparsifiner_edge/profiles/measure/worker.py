"""The measured process: `python -m sparsifiner_edge.profiles.measure.worker`, which carries out `operations`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.manifest import TensorSpec
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.profiles.measure.memory import Bytes, read_memory
from sparsifiner_edge.profiles.measure.resource_usage import ProcessUsage, process_usage
from sparsifiner_edge.profiles.measure.timing import call_ms
from sparsifiner_edge.runtime.child import serve
from sparsifiner_edge.runtime.open import checked_bundle, find_backend, open_checked
from sparsifiner_edge.runtime.session import Description, Session

if TYPE_CHECKING:
    from sparsifiner_edge.profiles.measure.layers import LayerTimes


def fixed_inputs(specs: list[TensorSpec], batch: int = 1) -> dict[str, Array]:
    """One random array per input, the same on every call: uint8 over its range, floats in [0, 1).

    Args:
        specs: a session's inputs. batch: size of a dynamic first axis.

    Raises:
        BackendError: an input of another type, or dynamic beyond its first axis.
    """
    random = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for spec in specs:
        shape = [batch if axis == 0 and not isinstance(size, int) else size for axis, size in enumerate(spec.shape)]
        sizes = [size for size in shape if isinstance(size, int)]
        kind = np.dtype(spec.dtype)
        if len(sizes) != len(shape) or (kind != np.uint8 and kind.kind != "f"):
            raise BackendError(
                f"Input {spec.name!r} ({spec}) cannot be synthesised for a measurement.",
                "Export with uint8 or float inputs, dynamic in the batch alone.",
            )
        arrays[spec.name] = (
            random.integers(0, 256, sizes, dtype=np.uint8) if kind == np.uint8 else random.random(sizes).astype(kind)
        )
    return arrays


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle to load, and how to run it. batch: size of a dynamic first axis."""

    bundle: str
    execution: Execution
    batch: int = 1


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What was loaded; import_ms: of the backend's package, load_ms: of the session alone."""

    input_shapes: dict[str, list[int]]
    import_ms: float
    load_ms: float
    rss_before_load_bytes: Bytes


class QueryBlock(msgspec.Struct, frozen=True, kw_only=True):
    """Queries one after the other.

    Attributes:
        latency_ms: of each. window_ns: when it began and ended, CLOCK_MONOTONIC.
        parts_ms: of each, by part, where the session gives them.
    """

    latency_ms: list[float]
    window_ns: tuple[int, int]
    parts_ms: dict[str, list[float]]


class _Worker:
    """One session and its one input; each public method is an operation."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.inputs: dict[str, Array] = {}

    def load(self, **given: Any) -> Loaded:
        asked = msgspec.convert(given, Load)
        start = time.perf_counter_ns()
        find_backend(asked.execution).load()
        import_ms = (time.perf_counter_ns() - start) / 1e6
        before = read_memory().rss_bytes
        self.session = open_checked(checked_bundle(Path(asked.bundle)), asked.execution)
        self.inputs = fixed_inputs(self.session.inputs, asked.batch)
        return Loaded(
            input_shapes={name: list(value.shape) for name, value in self.inputs.items()},
            import_ms=import_ms,
            load_ms=self.session.load_ms,
            rss_before_load_bytes=before,
        )

    def first(self) -> float:
        session = self._loaded()
        return call_ms(lambda: session.infer(self.inputs), 1)[0]

    def block(self, queries: int, rewarm: int) -> QueryBlock:
        session, inputs = self._loaded(), self.inputs
        parts: dict[str, list[float]] = {}

        def keep_parts() -> None:
            for name, ms in _last_parts(session).items():
                parts.setdefault(name, []).append(ms)

        for _ in range(rewarm):
            session.infer(inputs)
        begin = time.monotonic_ns()
        times = call_ms(lambda: session.infer(inputs), queries, after=keep_parts)
        return QueryBlock(latency_ms=times, window_ns=(begin, time.monotonic_ns()), parts_ms=parts)

    def usage(self) -> ProcessUsage:
        return process_usage()

    def describe(self) -> Description:  # Costs memory: asked last.
        return self._loaded().description

    def layers(self, query_ms: float, **given: Any) -> LayerTimes:  # Of a worker that loaded nothing.
        from sparsifiner_edge.profiles.measure.layers import measure_layers

        asked = msgspec.convert(given, Load)
        return measure_layers(asked.bundle, asked.execution, partial(fixed_inputs, batch=asked.batch), query_ms)

    def _loaded(self) -> Session:
        if self.session is None:
            raise BackendError("The worker has no session.", "Send load first.")
        return self.session


def _last_parts(session: Session) -> dict[str, float]:
    """Milliseconds of the latest query's parts: of a session that offers `last_times`, a named tuple of `<part>_ms`."""
    times = getattr(session, "last_times", None)
    return {} if times is None else {name.removesuffix("_ms"): float(ms) for name, ms in times._asdict().items()}


def operations() -> dict[str, Callable[..., Any]]:
    """Those of a fresh worker; see `runtime.child.serve`."""
    worker = _Worker()

    def of(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda _tell, **arguments: method(**arguments)

    methods = worker.load, worker.first, worker.block, worker.usage, worker.describe, worker.layers
    return {method.__name__: of(method) for method in methods}


if __name__ == "__main__":
    serve(operations())
