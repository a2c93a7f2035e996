"""Sparse attention and merging in the ways that TensorRT can have them: which are possible, the model of each, and how
fast it runs.

`bodies` are the standard operators in the file, `plugin` the project's CUDA kernels, `dense` ordinary attention, which
computes something else: it is kept where it is faster and its outputs are close to the bundle's
(`bundle.golden.LEAST_DENSE_COSINE`).
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from sparsifiner_edge.bundle.engines import EngineCandidate
from sparsifiner_edge.bundle.golden import check_golden
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import GateError
from sparsifiner_edge.ops.bodies import Structure, function_body
from sparsifiner_edge.ops.graph import drop_unused, gets_merged
from sparsifiner_edge.ops.kernels import TRITON
from sparsifiner_edge.ops.schema import DOMAIN
from sparsifiner_edge.runtime.tensorrt.session import EngineSession

WARM_UP, RUNS = 10, 30
_SPARSE, _DENSE = "SparseAttention", "DenseAttention"


def has_sparse_attention(bundle: Bundle) -> bool:
    """Whether dense attention can take the place of nodes in a bundle's file."""
    return f"{DOMAIN}::{_SPARSE}" in bundle.manifest.ops


def has_kernel_operators(bundle: Bundle) -> bool:
    """Whether a bundle's file has nodes that there are CUDA kernels for: sparse attention, or tokens that merge."""
    return any(f"{DOMAIN}::{name}" in bundle.manifest.ops for name in TRITON.operators)


def time_engine(session: EngineSession, bundle: Bundle) -> EngineCandidate:
    """Median milliseconds that the device computes, at the batch size that the engine is tuned for, and the gate.

    Args:
        session: on the engine; it is closed.
    """
    with session:
        try:
            golden: Any = check_golden(session, bundle)
        except GateError as error:
            golden = error.what
        spec = session.inputs[0]
        shape = [session.best_batch, *(size for size in spec.shape[1:] if isinstance(size, int))]
        image = np.random.default_rng(0).integers(0, 256, shape).astype(spec.dtype)
        times = []
        for number in range(WARM_UP + RUNS):
            session.infer({spec.name: image})
            if number >= WARM_UP and session.last_times is not None:
                times.append(session.last_times.compute_ms)
        why = session.description.why_no_graph
    warning = f"runs are not recorded: {why}" if why else None
    return EngineCandidate(golden=golden, compute_ms=statistics.median(times), runs=len(times), warning=warning)


def dense_model(content: bytes) -> bytes:
    """The model with dense attention, in standard operators, where it has sparse; tokens merge as they did.

    Args:
        content: an ONNX file.
    """
    import onnx

    model = onnx.load_from_string(content)
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == _SPARSE:
            kept = [a for a in node.attribute if a.name in ("num_heads", "scale")]
            made = onnx.helper.make_node(_DENSE, node.input[:2], node.output, node.name, domain=DOMAIN)
            made.attribute.extend(kept)
            node.CopyFrom(made)
    drop_unused(model)
    dense = [node for node in model.graph.node if node.domain == DOMAIN and node.op_type == _DENSE]
    for function in [function for function in model.functions if function.name == _DENSE]:
        model.functions.remove(function)
    if dense:
        merged = any(gets_merged(model, node) for node in dense)
        model.functions.append(function_body(_DENSE, Structure(merged=merged)))
    return bytes(model.SerializeToString())
