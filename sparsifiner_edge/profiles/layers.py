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

from sparsifiner_edge.bundle.manifest import MODEL_FILE, TensorSpec
from sparsifiner_edge.bundle.store import open_bundle, read_listed
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.files import scratch_folder
from sparsifiner_edge.profiles.kinds import merge
from sparsifiner_edge.runtime.open import open_checked
from sparsifiner_edge.runtime.ort import load_backend, native_library
from sparsifiner_edge.runtime.session import Array, Session

SECONDS = 1.0
"""About as long the profiled queries run, within `MIN_QUERIES` and `MAX_QUERIES`."""
MIN_QUERIES, MAX_QUERIES = 3, 100
_WARM_UP = 2
_SUFFIX = "_kernel_time"
Row = dict[str, Any]
MakeInputs = Callable[[list[TensorSpec]], dict[str, Array]]


def measure_layers(
    bundle: str, backend: str, threads: int | None, kernels: str, make_inputs: MakeInputs, query_ms: float
) -> dict[str, Any]:
    """Profile a bundle in a session of its own.

    Args:
        bundle, backend, threads, kernels: see `open_session`.
        make_inputs: one query from a session's inputs.
        query_ms: about how long it takes; decides the number of queries.

    Returns:
        `layers`, a list of rows in the order of execution: `layer` (from 0; left out outside the layers), `name` of the
        node in the exported file, `op`, `kind` (one of `kinds.KINDS`), `ms` per query (ONNX Runtime's median,
        TensorRT's mean), `share` of the total, `nodes` that the backend made of it; `layers_total_ms`; `profiled_ms`,
        a whole query with the profiler on; `queries`.

    Raises:
        BackendError: the backend has no profiler, or its profile cannot be read.
    """
    queries = max(MIN_QUERIES, min(MAX_QUERIES, round(SECONDS * 1000 / max(query_ms, 1e-3))))
    folder = Path(bundle)
    manifest = open_bundle(folder)
    model = read_listed(folder, manifest, MODEL_FILE)
    with open_checked(folder, manifest, backend, threads, kernels) as session:
        inputs = make_inputs(session.inputs)
        own = getattr(session, "layer_times", None)
        if own is not None:
            for _ in range(_WARM_UP):
                session.infer(inputs)
            return _finish(_named_rows(own(inputs, queries), model), None, queries)
        _require_trace(session)
        native = str(session.description["kernels"]).startswith("native")
        threads = session.description["threads"]
    return _ort_layers(model, threads, "native" if native else "portable", inputs, queries)


def _require_trace(session: Session) -> None:
    device = session.description["device"]
    if session.backend != "onnxruntime" or device != "CPU":
        # On a GPU, ONNX Runtime's trace holds the time to launch a kernel, not the time that it takes.
        raise BackendError(f"{session.backend} on {device} tells no times per layer.", "Profile it on the CPU.")


def _ort_layers(model: bytes, threads: int, kernels: str, inputs: Mapping[str, Array], queries: int) -> dict[str, Any]:
    import onnx

    from sparsifiner_edge.profiles.attribution import find_places, operator_of, place_nodes

    with scratch_folder() as folder:
        trace = _run_profiled(model, folder, threads, kernels, inputs, queries + _WARM_UP)
        times, operators, whole = read_trace(trace, queries)
        optimised = onnx.load(str(folder / "optimised.onnx"), load_external_data=False)
    placed = place_nodes(optimised, find_places(onnx.load_from_string(model)))
    rows = []
    for node, ms in times.items():
        place = placed.get(node)
        layer, kind, label = (None, "other", node) if place is None else place
        rows.append(_row(layer, label, operator_of(node, operators[node]), kind, ms))
    return _finish(rows, whole, queries)


def _run_profiled(
    model: bytes, folder: Path, threads: int, kernels: str, inputs: Mapping[str, Array], queries: int
) -> list[dict[str, Any]]:
    """Run `queries` times with ONNX Runtime's profiler on; its trace, and the optimised graph in `folder`."""
    ort = load_backend()
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
        trace: list[dict[str, Any]] = json.loads(text)
    except Exception as error:  # ONNX Runtime's errors share no base but Exception.
        raise BackendError(f"ONNX Runtime's profiler failed: {error}", "Leave it out (--no-layers).") from error
    return trace


def read_trace(trace: list[dict[str, Any]], queries: int) -> tuple[dict[str, float], dict[str, str], float]:
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


def _named_rows(times: list[Mapping[str, Any]], model: bytes) -> list[Row]:
    """Rows of a profiler that gives names alone: a fused layer's name holds those of its nodes, joined by "+"."""
    import onnx

    from sparsifiner_edge.profiles.attribution import find_places

    exported = onnx.load_from_string(model)
    places = find_places(exported)
    operators = {node.name: node.op_type for node in exported.graph.node}
    rows = []
    for entry in times:
        name = str(entry["name"])
        parts = [part.strip().split("/")[0] for part in name.replace("(", "+").replace(")", "+").split("+")]
        known = [part for part in parts if part in places.nodes]
        # The products in it cost most of its time.
        main = next((part for part in known if operators[part] in ("MatMul", "Gemm")), known[0] if known else None)
        if main is None:
            rows.append(_row(None, name, str(entry.get("op", "")) or "fused", "other", float(entry["ms"])))
        else:
            place = places.nodes[main]
            rows.append(_row(place.layer, name, operators[main], place.kind, float(entry["ms"])))
    return rows


def _row(layer: int | None, name: str, op: str, kind: str, ms: float) -> Row:
    return {"layer": layer, "name": name, "op": op, "kind": kind, "ms": ms}


def _finish(rows: list[Row], whole_ms: float | None, queries: int) -> dict[str, Any]:
    total = sum(row["ms"] for row in rows)
    merged = [
        {name: value for name, value in row.items() if value is not None}
        | {"share": row["ms"] / total if total else 0.0}
        for row in merge(rows)
    ]
    report = {"layers": merged, "layers_total_ms": total, "queries": queries}
    return report if whole_ms is None else report | {"profiled_ms": whole_ms}
