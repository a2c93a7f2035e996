"""Time per layer and part, from the backend's own profiler, in a session of its own after the latency was measured.

A session that offers `layer_times(inputs, queries)` (a list of `{"name", "ms"}`, milliseconds per query, in the order
of execution) is asked; ONNX Runtime's trace is read here. Either way rows have the exported file's layers and kinds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.manifest import MODEL_FILE, TensorSpec
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.files import scratch_folder
from sparsifiner_edge.runtime.onnxruntime.session import inference_session, session_options
from sparsifiner_edge.runtime.open import open_checked

LAYER_KINDS = ("selection", "attention", "projections", "mlp", "norms", "decoder", "other")
"""Parts of a layer. selection: KeySelect, LandmarkKeySelect, and what prunes tokens or matches them.
other: adds, layer scale, embedding and head."""
MIN_QUERIES, MAX_QUERIES = 3, 100
_PROFILED_S = 1.0
"""About as long the profiled queries run, within `MIN_QUERIES` and `MAX_QUERIES`."""
_WARM_UP = 2
_SUFFIX = "_kernel_time"
_FIX = "Leave it out (--no-layers)."
Trace = list[dict[str, Any]]
MakeInputs = Callable[[list[TensorSpec]], dict[str, Array]]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Time of a node of the exported file, per query.

    Attributes:
        layer: from 0; None outside the layers. name: of the node. op: its operator. kind: one of `LAYER_KINDS`.
        ms: ONNX Runtime's median. share: of the total. nodes: that the backend made of it.
    """

    layer: int | None = None
    name: str
    op: str
    kind: str
    nodes: int = 1
    ms: float
    share: float = 0.0


class LayerTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Time per node, in the order of execution, per query; and the sum."""

    layers: list[Row]
    layers_total_ms: float


def ms_by_kind(rows: Sequence[Row]) -> dict[str, float]:
    """Milliseconds of each of `LAYER_KINDS` over all layers, from the rows of a result's `layers`."""
    return {kind: sum((row.ms for row in rows if row.kind == kind), 0.0) for kind in LAYER_KINDS}


def measure_layers(bundle: str, execution: Execution, make_inputs: MakeInputs, query_ms: float) -> LayerTimes:
    """Profile a bundle in a session of its own.

    Args:
        bundle: a folder. execution: how it is run.
        make_inputs: one query from a session's inputs.
        query_ms: about how long it takes; decides the number of queries.

    Raises:
        BackendError: the backend has no profiler, or its profile cannot be read.
    """
    queries = max(MIN_QUERIES, min(MAX_QUERIES, round(_PROFILED_S * 1000 / max(query_ms, 1e-3))))
    checked = open_bundle(Path(bundle))
    model = checked.read(MODEL_FILE)
    with open_checked(checked, execution) as session:
        inputs = make_inputs(session.inputs)
        layer_times = getattr(session, "layer_times", None)
        if layer_times is not None:
            for _ in range(_WARM_UP):
                session.infer(inputs)
            return _merged(_session_rows(layer_times(inputs, queries), model))
        ran = session.description
        if session.backend != "onnxruntime" or not execution.on_processor:
            # On a GPU, ONNX Runtime's trace holds the time to launch a kernel, not the time that it takes.
            raise BackendError(f"{session.backend} on {ran.device} gives no times per layer.", "Profile it on the CPU.")
    native = str(ran.kernels).startswith("native")
    options = session_options(execution.cores, execution.precision == "bf16")
    return _ort_layers(model, options, "native" if native else "portable", inputs, queries)


def _ort_layers(model: bytes, options: Any, kernels: str, inputs: Mapping[str, Array], queries: int) -> LayerTimes:
    import onnx

    from sparsifiner_edge.profiles.measure.attribution import Place, find_places, place_nodes

    with scratch_folder() as folder:
        trace = _run_profiled(model, options, folder, kernels, inputs, queries + _WARM_UP)
        times, operators = read_trace(trace, queries)
        optimised = onnx.load(str(folder / "optimised.onnx"), load_external_data=False)
    places = place_nodes(optimised, find_places(onnx.load_from_string(model)))
    rows = []
    for node, ms in times.items():
        place = places.get(node, Place(None, "other", node))
        op = place.function or operators[node]
        rows.append(Row(layer=place.layer, name=place.name, op=op, kind=place.kind, ms=ms))
    return _merged(rows)


def _run_profiled(
    model: bytes, options: Any, folder: Path, kernels: str, inputs: Mapping[str, Array], queries: int
) -> Trace:
    """Run `queries` times with ONNX Runtime's profiler on; its trace, and the optimised graph in `folder`."""
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "trace")
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    # The weights go beside it: only the graph is read.
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "128")
    session = inference_session(model, options, kernels, "the bundle's model", _FIX)
    try:
        for _ in range(queries):
            session.run(None, dict(inputs))
        trace: Trace = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    except Exception as error:  # ONNX Runtime's errors share no base but Exception.
        raise BackendError(f"ONNX Runtime's profiler failed: {error}", _FIX) from error
    return trace


def read_trace(trace: Trace, queries: int) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds of each node over the last `queries` runs, and its operator.

    Args:
        trace: events of ONNX Runtime's profiler: `cat`, `name`, `dur` in microseconds, `args`; a run's nodes come
            before the run itself.

    Raises:
        BackendError: there are no such events.
    """
    operators: dict[str, str] = {}
    runs: list[dict[str, float]] = [{}]
    try:
        for event in trace:
            name = event["name"]
            if event["cat"] == "Node" and name.endswith(_SUFFIX):
                node = name.removesuffix(_SUFFIX)
                # Several nodes may share a name: their times add up.
                runs[-1][node] = runs[-1].get(node, 0.0) + event["dur"] / 1000
                operators[node] = str(event["args"]["op_name"])
            elif event["cat"] == "Session" and name == "model_run":
                runs.append({})
    except (KeyError, TypeError, AttributeError) as error:
        raise BackendError(f"ONNX Runtime's trace holds an event without {error}.", _FIX) from error
    if not operators or len(runs) == 1:
        raise BackendError("ONNX Runtime's trace holds no nodes.", _FIX)
    last = runs[:-1][-queries:]
    return {node: statistics.median(run.get(node, 0.0) for run in last) for node in operators}, operators


def _session_rows(times: Sequence[Mapping[str, Any]], model: bytes) -> list[Row]:
    """Rows of a profiler that gives names alone: a fused layer's name holds those of its nodes, joined by "+"."""
    import onnx

    from sparsifiner_edge.profiles.measure.attribution import find_places

    exported = onnx.load_from_string(model)
    places = find_places(exported).nodes
    operators = {node.name: node.op_type for node in exported.graph.node}
    rows = []
    for entry in times:
        name, ms = entry["name"], entry["ms"]
        parts = [part.strip().split("/")[0] for part in name.replace("(", "+").replace(")", "+").split("+")]
        # The products in it cost most of its time.
        known = sorted((part for part in parts if part in places), key=lambda p: operators[p] not in ("MatMul", "Gemm"))
        if known:
            place, op = places[known[0]], operators[known[0]]
            rows.append(Row(layer=place.layer, name=name, op=op, kind=place.kind, ms=ms))
        else:
            rows.append(Row(name=name, op="fused", kind="other", ms=ms))
    return rows


def _merged(rows: Sequence[Row]) -> LayerTimes:
    """Rows of one layer, name, operator and kind become one, with their number and share; order is kept."""
    groups: dict[tuple[int | None, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.layer, row.name, row.op, row.kind), []).append(row)
    total = sum(row.ms for row in rows)
    merged = []
    for group in groups.values():
        ms = sum(row.ms for row in group)
        merged.append(replace(group[0], nodes=len(group), ms=ms, share=ms / total if total else 0.0))
    return LayerTimes(layers=merged, layers_total_ms=total)
