"""Time per layer and kind of work, from the backend's profiler.

It runs in a session of its own, after the latency was measured. The nodes of an exported file are named by their
module, such as "blocks.3.mlp.fc1.MatMul" (`export.graph`): layer 3, MLP. ONNX Runtime keeps these names, and appends to
the names of nodes that it fuses. Nodes that it names itself count for the layer that ran before them.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.manifest import MODEL_FILE
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.files import scratch_folder
from sparsifiner_edge.ops.schema import OPERATORS
from sparsifiner_edge.profiles.measure.worker import fixed_inputs
from sparsifiner_edge.runtime.backend import native_library
from sparsifiner_edge.runtime.onnxruntime import inference_session, session_options
from sparsifiner_edge.runtime.open import session_on

LAYER_KINDS = ("selection", "attention", "projections", "mlp", "norms", "decoder", "other")
"""Kinds of work in a model.

selection: KeySelect, LandmarkKeySelect, and the pruning or matching of tokens. other: additions, layer scale, embedding
and head.
"""
MIN_QUERIES, MAX_QUERIES = 3, 100
"""Limits of the number of profiled queries."""
_PROFILED_S = 1.0
"""Approximate duration of the profiled queries in seconds, within `MIN_QUERIES` and `MAX_QUERIES`."""
_WARM_UP = 2
"""Number of unrecorded queries at the start."""
_SUFFIX = "_kernel_time"
"""Suffix of a node's name in the trace event with the time of its kernel."""
_INLINED = "_inlfunc_"
"""Prefix that ONNX Runtime gives to the nodes of a function body: "_inlfunc_KeySelect_token_3_KeySelect/top"."""
_SCOPE = re.compile(r"(?:model\.)?blocks\.(\d+)\.(?:(.*)\.)?[^.]*")
"""Node name of a layer: index of the block, module within the block, and operator."""
_PROJECTIONS = ("qkv", "proj", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate")
"""Names of an attention module's linear layers."""
_FIX = "Times per layer are left out; all other results are valid."
Trace = list[dict[str, Any]]
"""Events of ONNX Runtime's profiler."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Time of a node of the exported file, per query.

    Attributes:
        layer: Index of the layer, from 0; None outside the layers.
        name: Name of the node.
        op: Operator of the node.
        kind: One of `LAYER_KINDS`.
        nodes: Number of nodes that the backend made of it.
        ms: Median time in milliseconds, as ONNX Runtime reports it.
    """

    layer: int | None = None
    name: str
    op: str
    kind: str
    nodes: int = 1
    ms: float


def measure_layers(bundle: str | Path, execution: Execution, query_ms: float) -> list[Row]:
    """Profile a bundle in a session of its own; return the rows in the order of execution.

    Args:
        bundle: Bundle folder.
        execution: How to run it.
        query_ms: Approximate time of a query in milliseconds; it determines the number of queries.

    Raises:
        BackendError: The backend has no profiler, or its profile cannot be read.
    """
    queries = max(MIN_QUERIES, min(MAX_QUERIES, round(_PROFILED_S * 1000 / max(query_ms, 1e-3))))
    checked = open_bundle(Path(bundle))
    with session_on(checked, execution) as session:
        inputs, ran = fixed_inputs(session.inputs), session.description
        if session.backend != "onnxruntime" or execution.provider != "cpu":
            # On a GPU, ONNX Runtime's trace holds the time to launch a kernel, not the time that it takes.
            what = f"{session.backend} on {ran.device} does not report times per layer."
            raise BackendError(what, "Profile it on the CPU.")
    library = native_library("native" if str(ran.kernels).startswith("native") else "portable")
    options = session_options(execution.cores, execution.compute_precision == "bf16")
    trace = _record_trace(checked.read(MODEL_FILE), options, library, inputs, queries + _WARM_UP)
    return _rows(read_trace(trace, queries), {node.name for node in checked.model().graph.node})


def _record_trace(model: bytes, options: Any, library: Path | None, inputs: Mapping[str, Array], queries: int) -> Trace:
    """Return the trace of `queries` runs with ONNX Runtime's profiler."""
    with scratch_folder() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "trace")
        session = inference_session(model, options, library, "the bundle's model", _FIX)
        try:
            for _ in range(queries):
                session.run(None, dict(inputs))
            trace: Trace = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        except Exception as error:  # ONNX Runtime's errors share no base but Exception.
            raise BackendError(f"ONNX Runtime's profiler failed: {error}", _FIX) from error
    return trace


def read_trace(trace: Trace, queries: int) -> dict[str, float]:
    """Return the median time in milliseconds of each node over the last runs, in the order of execution.

    Args:
        trace: Events of ONNX Runtime's profiler with `cat`, `name` and `dur` in microseconds. The nodes of a run come
            before the run itself.
        queries: Number of runs.

    Raises:
        BackendError: The trace contains no such events.
    """
    runs: list[dict[str, float]] = [{}]
    for event in trace:
        name = event["name"]
        if event["cat"] == "Node" and name.endswith(_SUFFIX):
            node = name.removesuffix(_SUFFIX)
            # Several nodes may share a name: their times add up.
            runs[-1][node] = runs[-1].get(node, 0.0) + event["dur"] / 1000
        elif event["cat"] == "Session" and name == "model_run":
            runs.append({})
    last = runs[:-1][-queries:]
    if not any(last):
        raise BackendError("ONNX Runtime's trace contains no nodes.", _FIX)
    return {
        node: statistics.median(run.get(node, 0.0) for run in last)
        for node in dict.fromkeys(n for r in last for n in r)
    }


def node_place(name: str) -> tuple[int | None, str, str]:
    """Return layer, kind and operator of a node of an exported file, from its name.

    If the name does not reveal them, the layer is None and the kind "other".
    """
    name = name.partition("/")[0]
    if name.startswith(_INLINED):
        op = name.removeprefix(_INLINED).partition("_")[0]
        return None, _kind_of_operator(op) or "other", op
    match, op = _SCOPE.fullmatch(name), re.sub(r"_\d+$", "", name.rpartition(".")[2])
    if match is None:
        return None, "decoder" if name.startswith("decoder") else "other", op
    return int(match[1]), _kind_of_operator(op) or _kind_of_module((match[2] or "").split(".")), op


def _kind_of_operator(op: str) -> str | None:
    """Return the kind of an operator of this package; None for any other operator."""
    return ("attention" if op.endswith("Attention") else "selection") if op in OPERATORS else None


def _kind_of_module(parts: list[str]) -> str:
    """Return the kind of a module within a block, such as ["attn", "qkv"]."""
    if any("norm" in part for part in parts):
        return "norms"
    if parts[0] == "attn":
        return "projections" if len(parts) > 1 and parts[1] in _PROJECTIONS else "attention"
    return {"mlp": "mlp", "pruning": "selection", "merging": "selection"}.get(parts[0], "other")


def _rows(times: Mapping[str, float], named: Collection[str]) -> list[Row]:
    """Return one row per node from times in the order of execution; the nodes of one function body share a row.

    Nodes that the file does not name were added by ONNX Runtime and belong to the layer before them.

    Args:
        times: Milliseconds by name of the node.
        named: Names of the nodes in the file.
    """
    rows: dict[tuple[int | None, str], Row] = {}
    previous = None
    for name, ms in times.items():
        layer, kind, op = node_place(name)
        layer = previous if layer is None and kind != "decoder" and name not in named else layer
        previous = layer
        key = layer, op if name.startswith(_INLINED) else name
        row = rows.get(key) or Row(layer=layer, name=key[1], op=op, kind=kind, nodes=0, ms=0.0)
        rows[key] = msgspec.structs.replace(row, nodes=row.nodes + 1, ms=row.ms + ms)
    return list(rows.values())
