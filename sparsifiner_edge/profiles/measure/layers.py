"""Time per layer and part, from the backend's own profiler, in a session of its own after the latency was measured.

A session that offers `layer_times(inputs, queries)` (a list of `{"name", "ms"}`, milliseconds per query, in the order
of execution) is asked; ONNX Runtime's trace is read here. Either way rows have the exported file's layers and kinds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.manifest import MODEL_FILE, TensorSpec
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.files import scratch_folder
from sparsifiner_edge.profiles.measure.kinds import Row, merge
from sparsifiner_edge.runtime.onnxruntime.session import import_onnxruntime, native_library
from sparsifiner_edge.runtime.open import open_checked
from sparsifiner_edge.runtime.session import Session

SECONDS = 1.0
"""About as long the profiled queries run, within `MIN_QUERIES` and `MAX_QUERIES`."""
MIN_QUERIES, MAX_QUERIES = 3, 100
_WARM_UP = 2
_SUFFIX = "_kernel_time"
Trace = list[dict[str, Any]]
"""Events as ONNX Runtime writes them."""
MakeInputs = Callable[[list[TensorSpec]], dict[str, Array]]


class LayerTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Time per node, in the order of execution, per query.

    Attributes:
        profiled_ms: a whole query with the profiler on, where that tells. queries: how many were profiled.
    """

    layers: list[Row]
    layers_total_ms: float
    queries: int
    profiled_ms: float | None = None


class _Timed(msgspec.Struct, frozen=True):
    """What a session's own profiler says of a layer."""

    name: str
    ms: float
    op: str = ""


def measure_layers(
    bundle: str, backend: str, threads: int | None, kernels: str, make_inputs: MakeInputs, query_ms: float
) -> LayerTimes:
    """Profile a bundle in a session of its own.

    Args:
        bundle, backend, threads, kernels: see `open_session`.
        make_inputs: one query from a session's inputs.
        query_ms: about how long it takes; decides the number of queries.

    Raises:
        BackendError: the backend has no profiler, or its profile cannot be read.
    """
    queries = max(MIN_QUERIES, min(MAX_QUERIES, round(SECONDS * 1000 / max(query_ms, 1e-3))))
    checked = open_bundle(Path(bundle))
    model = checked.read(MODEL_FILE)
    with open_checked(checked, backend, threads, kernels) as session:
        inputs = make_inputs(session.inputs)
        own = getattr(session, "layer_times", None)
        if own is not None:
            for _ in range(_WARM_UP):
                session.infer(inputs)
            return _finish(_named_rows(own(inputs, queries), model), queries)
        _require_trace(session)
        ran = session.description
    assert isinstance(ran.threads, int)
    native = str(ran.kernels).startswith("native")
    return _ort_layers(model, ran.threads, "native" if native else "portable", inputs, queries)


def _require_trace(session: Session) -> None:
    device = session.description.device
    if session.backend != "onnxruntime" or device != "CPU":
        # On a GPU, ONNX Runtime's trace holds the time to launch a kernel, not the time that it takes.
        raise BackendError(f"{session.backend} on {device} tells no times per layer.", "Profile it on the CPU.")


def _ort_layers(model: bytes, threads: int, kernels: str, inputs: Mapping[str, Array], queries: int) -> LayerTimes:
    import onnx

    from sparsifiner_edge.profiles.measure.attribution import find_places, operator_of, place_nodes

    with scratch_folder() as folder:
        trace = _run_profiled(model, folder, threads, kernels, inputs, queries + _WARM_UP)
        times, operators, whole = read_trace(trace, queries)
        optimised = onnx.load(str(folder / "optimised.onnx"), load_external_data=False)
    placed = place_nodes(optimised, find_places(onnx.load_from_string(model)))
    rows = []
    for node, ms in times.items():
        place = placed.get(node)
        layer, kind, label = (None, "other", node) if place is None else place
        rows.append(Row(layer=layer, name=label, op=operator_of(node, operators[node]), kind=kind, ms=ms))
    return _finish(rows, queries, whole)


def _run_profiled(
    model: bytes, folder: Path, threads: int, kernels: str, inputs: Mapping[str, Array], queries: int
) -> Trace:
    """Run `queries` times with ONNX Runtime's profiler on; its trace, and the optimised graph in `folder`."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "trace")
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    # The weights go beside it: only the graph is read.
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "128")
    library = native_library(kernels)
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        for _ in range(queries):
            session.run(names, dict(inputs))
        text = Path(session.end_profiling()).read_text(encoding="utf-8")
        trace: Trace = json.loads(text)
    except Exception as error:  # ONNX Runtime's errors share no base but Exception.
        raise BackendError(f"ONNX Runtime's profiler failed: {error}", "Leave it out (--no-layers).") from error
    return trace


def read_trace(trace: Trace, queries: int) -> tuple[dict[str, float], dict[str, str], float]:
    """Median milliseconds of each node over the last `queries` runs, its operator, and a whole run's median.

    Args:
        trace: events of ONNX Runtime's profiler: `cat`, `name`, `dur` in microseconds, `args`.

    Raises:
        BackendError: there are no such events.
    """
    durations: dict[str, list[float]] = {}
    operators: dict[str, str] = {}
    runs: list[float] = []
    try:
        for event in trace:
            name = event["name"]
            if event["cat"] == "Node" and name.endswith(_SUFFIX):
                node = name.removesuffix(_SUFFIX)
                durations.setdefault(node, []).append(event["dur"] / 1000)
                operators[node] = str(event["args"]["op_name"])
            elif event["cat"] == "Session" and name == "model_run":
                runs.append(event["dur"] / 1000)
    except (KeyError, TypeError, AttributeError) as error:
        raise BackendError(
            f"ONNX Runtime's trace holds an event without {error}.", "Leave it out (--no-layers)."
        ) from error
    if not durations or not runs:
        raise BackendError("ONNX Runtime's trace holds no nodes.", "Leave it out (--no-layers).")
    # A name that several nodes share gives several times for each run: they add up.
    times = {}
    for node, each in durations.items():
        per_run = max(1, len(each) // len(runs))
        sums = [sum(each[i : i + per_run]) for i in range(0, len(each), per_run)]
        times[node] = statistics.median(sums[-queries:])
    return times, operators, statistics.median(runs[-queries:])


def _named_rows(times: object, model: bytes) -> list[Row]:
    """Rows of a profiler that gives names alone: a fused layer's name holds those of its nodes, joined by "+"."""
    import onnx

    from sparsifiner_edge.profiles.measure.attribution import find_places

    exported = onnx.load_from_string(model)
    places = find_places(exported)
    operators = {node.name: node.op_type for node in exported.graph.node}
    rows = []
    for entry in msgspec.convert(times, list[_Timed]):
        name = entry.name
        parts = [part.strip().split("/")[0] for part in name.replace("(", "+").replace(")", "+").split("+")]
        known = [part for part in parts if part in places.nodes]
        # The products in it cost most of its time.
        main = next((part for part in known if operators[part] in ("MatMul", "Gemm")), known[0] if known else None)
        if main is None:
            rows.append(Row(name=name, op=entry.op or "fused", kind="other", ms=entry.ms))
        else:
            place = places.nodes[main]
            rows.append(Row(layer=place.layer, name=name, op=operators[main], kind=place.kind, ms=entry.ms))
    return rows


def _finish(rows: list[Row], queries: int, whole_ms: float | None = None) -> LayerTimes:
    merged, total = merge(rows), sum(row.ms for row in rows)
    return LayerTimes(layers=merged, layers_total_ms=total, queries=queries, profiled_ms=whole_ms)
