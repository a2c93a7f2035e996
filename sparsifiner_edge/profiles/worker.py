"""The measured process: `python -m sparsifiner_edge.profiles.worker`, one JSON request and one JSON reply per line.

    {"op": "load", "bundle": ..., "backend": ..., "threads": ..., "kernels": ..., "batch": ...}
                                                                    -> times, input and memory of loading
    {"op": "first"}                                                 -> time and memory of the first inference
    {"op": "block", "queries": n, "rewarm": m}                      -> latency_ms of n queries, after m unrecorded ones
    {"op": "memory"}                                                -> resident memory now and at its peak
    {"op": "usage"}                                                 -> processor time and page faults so far
    {"op": "layers", "bundle": ..., ..., "query_ms": ...}           -> times per layer (in a worker that loaded nothing)
    {"op": "describe"}                                              -> Session.description (costs memory: ask last)
    {"op": "close"}                                                 -> leaves; so does the end of standard input

A reply is {"ok": ...} or {"error": {"what": ..., "fix": ...}}.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sparsifiner_edge.bundle.manifest import TensorSpec
from sparsifiner_edge.errors import BackendError, SparsifinerError
from sparsifiner_edge.profiles.memory import read_memory
from sparsifiner_edge.profiles.usage import process_usage
from sparsifiner_edge.runtime import Session, open_session
from sparsifiner_edge.runtime.child import Parent
from sparsifiner_edge.runtime.open import load_backend
from sparsifiner_edge.runtime.session import Array

SEED = 0


def fixed_inputs(specs: list[TensorSpec], seed: int = SEED, batch: int = 1) -> dict[str, Array]:
    """One random array per input, the same on every call: uint8 over its range, floats in [0, 1).

    Args:
        specs: a session's inputs. seed: of the values. batch: size of a dynamic first axis.

    Raises:
        BackendError: an input of another type, or dynamic beyond its first axis.
    """
    random = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for spec in specs:
        shape = [batch if axis == 0 and not isinstance(size, int) else size for axis, size in enumerate(spec.shape)]
        sizes = [size for size in shape if isinstance(size, int)]
        kind = np.dtype(spec.dtype)
        if len(sizes) != len(shape) or (kind != np.uint8 and kind.kind != "f"):
            raise BackendError(
                f"Input {spec.name!r} ({spec}) cannot be made up for a measurement.",
                "Export with uint8 or float inputs, dynamic in the batch alone.",
            )
        arrays[spec.name] = (
            random.integers(0, 256, sizes, dtype=np.uint8) if kind == np.uint8 else random.random(sizes).astype(kind)
        )
    return arrays


class _Worker:
    """One session and its one input."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.inputs: dict[str, Array] = {}

    def load(
        self, bundle: str, backend: str, threads: int | None, kernels: str = "auto", batch: int = 1
    ) -> dict[str, Any]:
        start = time.perf_counter_ns()
        version = load_backend(backend)
        import_ms = _since(start)
        before = read_memory()["rss_bytes"]
        self.session = open_session(bundle, backend, threads, kernels)
        loaded = read_memory()["rss_bytes"]
        self.inputs = fixed_inputs(self.session.inputs, batch=batch)
        return {
            "backend_version": version,
            "input_shapes": {name: list(value.shape) for name, value in self.inputs.items()},
            "import_ms": import_ms,
            "load_ms": self.session.load_ms,
            "rss_before_load_bytes": before,
            "rss_after_load_bytes": loaded,
        }

    def first(self) -> dict[str, Any]:
        session = self._loaded()
        start = time.perf_counter_ns()
        session.infer(self.inputs)
        first_ms = _since(start)
        return {"first_inference_ms": first_ms, "rss_after_first_inference_bytes": read_memory()["rss_bytes"]}

    def block(self, queries: int, rewarm: int) -> dict[str, Any]:
        session, inputs, clock = self._loaded(), self.inputs, time.perf_counter_ns
        for _ in range(rewarm):
            session.infer(inputs)
        times: list[int] = []
        parts: dict[str, list[float]] = {}
        gc.disable()  # A collection inside one query would be Python's, not the model's.
        begin = time.monotonic_ns()
        try:
            for _ in range(queries):
                start = clock()
                session.infer(inputs)
                times.append(clock() - start)
                for name, ms in _last_parts(session).items():
                    parts.setdefault(name, []).append(ms)
        finally:
            window = (begin, time.monotonic_ns())
            gc.enable()
        return {"latency_ms": [ns / 1e6 for ns in times], "window_ns": window, "parts_ms": parts}

    def memory(self) -> dict[str, Any]:
        return read_memory()

    def usage(self) -> dict[str, Any]:
        return process_usage()

    def describe(self) -> dict[str, Any]:
        return self._loaded().description

    def layers(
        self, bundle: str, backend: str, threads: int | None, kernels: str, batch: int, query_ms: float
    ) -> dict[str, Any]:
        from sparsifiner_edge.profiles.layers import measure_layers  # imports onnx, which measuring has no use for

        def inputs(specs: list[TensorSpec]) -> dict[str, Array]:
            return fixed_inputs(specs, batch=batch)

        return measure_layers(bundle, backend, threads, kernels, inputs, query_ms)

    def _loaded(self) -> Session:
        if self.session is None:
            raise BackendError("The worker has no session.", "Send load first.")
        return self.session


def _last_parts(session: Session) -> dict[str, float]:
    """Milliseconds of the latest query's parts: of a session that offers `last_times`, a named tuple of `<part>_ms`."""
    times = getattr(session, "last_times", None)
    return {} if times is None else {name.removesuffix("_ms"): float(ms) for name, ms in times._asdict().items()}


def _since(start: int) -> float:
    return (time.perf_counter_ns() - start) / 1e6


def _answer(operations: dict[str, Callable[..., dict[str, Any]]], request: dict[str, Any]) -> dict[str, Any]:
    arguments = {name: value for name, value in request.items() if name != "op"}
    try:
        return {"ok": operations[request["op"]](**arguments)}
    except SparsifinerError as error:
        return {"error": {"what": error.what, "fix": error.fix}}


def main() -> None:
    """Serve requests until `close` or the end of standard input."""
    parent, worker = Parent(), _Worker()
    names = ("load", "first", "block", "memory", "usage", "describe", "layers")
    operations: dict[str, Callable[..., dict[str, Any]]] = {name: getattr(worker, name) for name in names}
    for request in parent.messages():
        if request["op"] == "close":
            break
        parent.send(_answer(operations, request))
    if worker.session is not None:
        worker.session.close()


if __name__ == "__main__":
    main()
