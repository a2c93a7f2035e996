"""Runs models of a few hundred bytes with absurd sizes and records the answer of ONNX Runtime to each.

`python -m tests.native.hostile LIBRARY` prints them as JSON, in a process limited to 6 GB. Tensors are made inside the
model by ConstantOfShape, since NumPy itself rejects many of these shapes.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from sparsifiner_edge.ops.schema import DOMAIN, VERSION

LIMIT, ROOM = 6 << 30, 400 << 20
MOST = 2**31 - 1
"""Largest allowed value of an attribute."""


class Case(NamedTuple):
    """A node, its input shapes, and the expected result: the output's shape, or a part of the error message.

    Attributes:
        scarce: Limit the process to ROOM more memory than it has.
    """

    op: str
    shapes: list[list[int]]
    attributes: dict[str, int | float]
    outcome: str
    scarce: bool = False


def _select(qkv: list[int], heads: int, outcome: str, channels: int = 1, **changes: int | float) -> Case:
    """Return a KeySelect node with one key and the fewest tiles."""
    attributes = {"num_prefix": 0, "query_pool": 1, "tile": 1, "key_pool": 0, "keys": 1, "value_power": 0.0, **changes}
    proj = [heads, qkv[2] // (3 * heads), channels] if qkv[0] else [1, 1, channels]
    return Case("KeySelect", [qkv, qkv[:2], proj, proj], {"num_heads": heads, **attributes}, outcome)


def _attend(qkv: list[int], heads: int, indices: list[int], outcome: str, **changes: int) -> Case:
    attributes = {"num_prefix": 0, "prefix_keys": 1, "tile": 16, "key_pool": 0, **changes}
    return Case("SparseAttention", [qkv, qkv[:2], indices], {"num_heads": heads, **attributes}, outcome)


def _plain(qkv: list[int], heads: int, outcome: str) -> Case:
    return Case("DenseAttention", [qkv, qkv[:2]], {"num_heads": heads}, outcome)


PLACES, MEMORY, SMALL = "too large for 32-bit places", "out of memory", [1, 40, 24]
CASES = [
    # No elements, and sizes whose product exceeds 2^63: undefined as signed, small again as unsigned numbers.
    _plain([0, 2**40, 3 * 2**30], 2**30, PLACES),
    _plain([0, 2**32, 3 * 2**32], 1, PLACES),
    _plain([0, 2**62, 12], 1, PLACES),
    _select([0, 2**40, 3 * 2**30], 2**30, PLACES),
    _select([0, 2**33, 3 * 2**31], 1, PLACES),
    _attend([0, 2**40, 3 * 2**30], 2**30, [0, 2**30, 2**36, 1], PLACES),
    _attend([0, 2**28 + 1, 3], 1, [0, 1, 2**24 + 1, 1], "too many for 32-bit places"),
    # Nothing to do.
    _plain([0, 40, 24], 2, "[0, 40, 8]"),
    _plain([0, 1, 3 * 2**30], 2**30, f"[0, 1, {2**30}]"),
    _select([0, 40, 3], 1, "[0, 1, 40, 1]"),
    _select([0, 40, 3], 1, "[0, 1, 1, 40]", tile=MOST, key_pool=MOST, keys=40, value_power=2.0),
    _attend([0, 40, 24], 2, [0, 2, 3, 5], "[0, 40, 8]", key_pool=MOST),
    # Settings larger than every tensor, at the limit of the allowed range, or beyond it.
    _select(SMALL, 2, "[1, 2, 1, 1]", query_pool=MOST, tile=MOST, key_pool=MOST),
    _select(SMALL, 2, "[1, 2, 1, 1]", query_pool=1, tile=MOST, key_pool=MOST, value_power=2.0),
    _select(SMALL, 2, "keys exceed", keys=MOST),
    _select(SMALL, 2, "leave no patch", num_prefix=MOST),
    _attend(SMALL, 2, [1, 2, 1, 5], "[1, 40, 8]", tile=MOST, key_pool=MOST),
    _attend(SMALL, 2, [1, 2, 1, 5], "leave no patch", num_prefix=MOST),
    *(_select(SMALL, 2, f"{name} is {2**31}", **{name: 2**31}) for name in ("query_pool", "tile", "key_pool", "keys")),
    _attend(SMALL, 2, [1, 2, 3, 5], f"key_pool is {-(2**63)}", key_pool=-(2**63)),
    # More memory than available: the buffers of the call, allocated on the calling thread.
    _select([1, 2**24, 3], 1, MEMORY, channels=128, query_pool=MOST, tile=MOST),
    _select([2, 2**20, 3], 1, MEMORY, channels=2**13, query_pool=MOST, tile=MOST),
    # And the buffers of each thread, allocated there: 16 rows of as many logits as tokens.
    _select([2, 2**22, 3], 1, MEMORY, tile=MOST)._replace(scarce=True),
]


def model(case: Case) -> bytes:
    names = [f"input{i}" for i in range(len(case.shapes))]
    nodes, initializers = [], []
    for name, shape in zip(names, case.shapes, strict=True):
        kind = np.int32 if case.op == "SparseAttention" and name == "input2" else np.float32
        value = helper.make_tensor("value", helper.np_dtype_to_tensor_dtype(np.dtype(kind)), [1], [0])
        initializers.append(helper.make_tensor(f"{name} shape", TensorProto.INT64, [len(shape)], shape))
        nodes.append(helper.make_node("ConstantOfShape", [f"{name} shape"], [name], value=value))
    nodes.append(helper.make_node(case.op, names, ["output"], domain=DOMAIN, scale=1.0, **case.attributes))
    kind = TensorProto.INT32 if case.op == "KeySelect" else TensorProto.FLOAT
    output = helper.make_tensor_value_info("output", kind, None)
    graph = helper.make_graph(nodes, "hostile", [], [output], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    made: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return made


def outcome(library: str, case: Case) -> str:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.register_custom_ops_library(library)
    try:
        session: Any = onnxruntime.InferenceSession(model(case), options, providers=["CPUExecutionProvider"])
        resource.setrlimit(resource.RLIMIT_AS, (mapped() + ROOM if case.scarce else LIMIT, LIMIT))
        return str(list(session.run(None, {})[0].shape))
    except Exception as error:  # ONNX Runtime's own exceptions share no base class.
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))


def mapped() -> int:
    """Return the address space of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    for case in CASES:
        print(json.dumps([str(case), len(model(case)), case.outcome, outcome(sys.argv[1], case)]), flush=True)
