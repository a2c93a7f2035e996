"""Tests of mismatched shapes: every backend of the native library rejects them by name before it computes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from openvino.frontend import onnx as frontend

from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.native import interface
from sparsifiner_edge.ops.native.interface import Operators
from sparsifiner_edge.ops.schema import OPERATORS
from sparsifiner_edge.runtime.openvino import bind, converters
from tests.ops.matrix import cases, feed, one_node, output_type

LEAST: dict[str, dict[str, Any]] = {
    "KeySelect": {
        "num_heads": 2,
        "num_prefix": 1,
        "query_pool": 1,
        "tile": 1,
        "key_pool": 0,
        "keys": 1,
        "scale": 1.0,
        "value_power": 0.0,
    },
    "SparseAttention": {"num_heads": 2, "num_prefix": 1, "tile": 16, "key_pool": 0, "scale": 1.0, "prefix_keys": 1},
    "DenseAttention": {"num_heads": 2, "scale": 1.0},
    "CachedAttention": {"num_heads": 2, "scale": 1.0},
    "MatchTokens": {"num_heads": 2, "num_prefix": 1, "window": 16, "merged": 5},
    "MergeTokens": {},
}
NAN = float("nan")
X, QKV, SIZES, LISTS, PROJ = [1, 64, 8], [1, 64, 24], [1, 64], [1, 2, 4, 5], [2, 4, 2]
"""Matching shapes."""
TABLE: list[tuple[str, list[list[int]], dict[str, Any]]] = [
    # Fewer or more sizes than tokens, or sizes of another batch.
    ("MergeTokens", [X, [1, 1], [1, 60, 2]], {}),
    ("DenseAttention", [[2, 64, 24], [1, 128]], {}),
    ("KeySelect", [QKV, [1, 63], PROJ, PROJ], {}),
    ("MatchTokens", [QKV, [1, 65]], {}),
    # Pairs of more tokens than there are, of none, of three.
    ("MergeTokens", [X, SIZES, [1, 65, 2]], {}),
    ("MergeTokens", [X, SIZES, [1, 0, 2]], {}),
    ("MergeTokens", [X, SIZES, [1, 40, 3]], {}),
    # One list for four million tiles; lists of other heads, without keys, with more keys than there are.
    ("SparseAttention", [[1, 4_000_001, 3], [1, 4_000_001], [1, 1, 1, 1]], {"num_heads": 1, "tile": 1}),
    ("SparseAttention", [QKV, SIZES, [1, 1, 4, 5]], {}),
    ("SparseAttention", [QKV, SIZES, [1, 2, 4, 0]], {}),
    ("SparseAttention", [QKV, SIZES, [1, 2, 4, 64]], {}),
    ("SparseAttention", [QKV, SIZES, LISTS], {"num_prefix": 64}),
    # Projections of other heads, widths, channels, and without channels.
    ("KeySelect", [QKV, SIZES, [1, 4, 2], [1, 4, 2]], {}),
    ("KeySelect", [QKV, SIZES, PROJ, [2, 4, 1]], {}),
    ("KeySelect", [QKV, SIZES, [2, 4, 0], [2, 4, 0]], {}),
    # No tokens, no channels, and channels that the heads cannot share.
    ("DenseAttention", [[1, 0, 24], [1, 0]], {}),
    ("DenseAttention", [[1, 64, 0], SIZES], {}),
    ("DenseAttention", [[1, 64, 23], SIZES], {}),
    # A cache of other channels, of another batch, empty, with more counts.
    ("CachedAttention", [QKV, [1, 64, 14], SIZES], {}),
    ("CachedAttention", [QKV, [2, 64, 16], [2, 64]], {}),
    ("CachedAttention", [QKV, [1, 0, 16], [1, 0]], {}),
    ("CachedAttention", [QKV, [1, 63, 16], SIZES], {}),
    # Attributes that fit no shape.
    *(("KeySelect", [QKV, SIZES, PROJ, PROJ], change) for change in ({"keys": 64}, {"query_pool": 3}, {"scale": NAN})),
    *(("SparseAttention", [QKV, SIZES, LISTS], change) for change in ({"prefix_keys": 0}, {"num_heads": 7})),
    *(("DenseAttention", [QKV, SIZES], change) for change in ({"num_heads": 0}, {"num_heads": -1}, {"scale": NAN})),
    *(("MatchTokens", [QKV, SIZES], {"merged": merged}) for merged in (32, 0, 2**31, -1)),
    *(("MatchTokens", [QKV, SIZES], {"window": window}) for window in (0, 3)),
    # Too few and too many axes.
    ("DenseAttention", [[64, 24], [64]], {}),
    ("DenseAttention", [[1, 1, 64, 24], SIZES], {}),
    ("MergeTokens", [[64, 8], SIZES, [1, 40, 2]], {}),
    ("SparseAttention", [QKV, SIZES, [2, 4, 5]], {}),
]


def in_onnxruntime(op: str, attributes: dict[str, Any], inputs: list[np.ndarray]) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.library_path()))
    model = one_node(op, attributes, inputs, [[None] * x.ndim for x in inputs])
    onnxruntime.InferenceSession(model, options).run(None, feed(op, inputs))


def in_openvino(op: str, attributes: dict[str, Any], inputs: list[np.ndarray]) -> None:
    with contextlib.closing(Operators(2)) as operators:
        core = openvino.Core()
        core.add_extension(converters(openvino, frontend, [op], operators))
        core.compile_model(core.read_model(one_node(op, attributes, inputs), b""), "CPU")(inputs)


def in_an_extension(op: str, attributes: dict[str, Any], inputs: list[np.ndarray]) -> None:
    core, model = openvino.Core(), onnx.load_from_string(one_node(op, attributes, inputs))
    core.add_extension(str(native.openvino_extension()))
    bind(model, [op], "float32")
    core.compile_model(core.read_model(model.SerializeToString(), b""), "CPU")(inputs)


def by_name(op: str, attributes: dict[str, Any], inputs: list[np.ndarray]) -> None:
    """Call the C interface with an output buffer of the first input's size."""
    output = np.zeros(max(inputs[0].size, 64), np.int32 if OPERATORS[op].output.dtypes == ("int32",) else np.float32)
    with contextlib.closing(Operators(1)) as operators:
        operators.run(op, attributes, inputs, output)


@pytest.mark.parametrize("run", [in_onnxruntime, in_openvino, in_an_extension, by_name])
@pytest.mark.parametrize("row", TABLE, ids=str)
def test_shapes_that_do_not_fit_are_refused(run: Callable[..., None], row: tuple[str, Any, Any]) -> None:
    op, shapes, changes = row
    kinds = [np.int32 if t.dtypes == ("int32",) else np.float32 for t in OPERATORS[op].inputs]
    inputs = [np.zeros(shape, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    with pytest.raises(Exception, match=f"sparsifiner::{op}: "):
        run(op, {**LEAST[op], **changes}, inputs)


@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.float64, np.int64])
def test_an_extension_takes_the_schemas_types_alone(kind: Any) -> None:
    """Smaller element types would be read beyond their end."""
    case = cases("SparseAttention")[0]
    inputs = case.inputs()
    for number in range(len(inputs)):
        wrong = [x.astype(kind) if n == number else x for n, x in enumerate(inputs)]
        with pytest.raises(Exception, match=f"sparsifiner::SparseAttention: input {number} is of type"):
            in_an_extension("SparseAttention", case.attributes, wrong)


@contextlib.contextmanager
def well_called(op: str) -> Iterator[tuple[list[ctypes.Structure], Callable[[], int], ctypes.Structure]]:
    """Return valid arguments of a C call, a function that makes the call, and its message."""
    case = cases(op)[0]
    inputs = case.inputs()
    shapes = [x.shape for x in inputs]
    output = np.zeros(case.op.output_shape(case.attributes, shapes), output_type(case))
    kinds = (*case.op.inputs, case.op.output)
    tensors = [interface._tensor(op, x, kind) for x, kind in zip((*inputs, output), kinds, strict=True)]
    arguments = interface._arguments(op, case.attributes, inputs, tensors)
    answer = interface._Call(interface._VERSION, 0, None, None)
    with contextlib.closing(Operators(1)) as operators:
        function = getattr(operators._library, interface._FUNCTIONS[op][0])
        held = [x if isinstance(x, ctypes.Structure) else x._obj for x in arguments]
        yield held, lambda: int(function(ctypes.byref(answer), *arguments)), answer


@pytest.mark.parametrize("op", list(LEAST))
def test_the_c_interface_counts_elements_and_refuses_sizes_that_are_none(op: str) -> None:
    rounded = (2,) if op.endswith("Attention") else (1, 2)
    with well_called(op) as (held, call, answer):
        inner = [x for one in held for x in (getattr(one, name) for name, _ in one._fields_)]
        tensors = [x for x in (*held, *inner) if isinstance(x, (interface._Tensor, interface._Output))]
        assert call() == 0
        assert len(tensors) >= len(OPERATORS[op].inputs) + 1
        for owner in (*tensors, *(x for x in held if x not in tensors)):
            for name in [name for name, kind in owner._fields_ if kind is ctypes.c_int64]:
                right = getattr(owner, name)
                more = {"count": (right - 1, right + 1, 1), "rounded": rounded}.get(name, (2**31,))
                for wrong in (-1, -(2**63), 2**63 - 1, *more):
                    setattr(owner, name, wrong)
                    assert call() == 1, (owner, name, wrong)
                    said = answer.message.decode()
                    assert said if name != "count" else f" has {wrong} elements, not " in said
                setattr(owner, name, right)
        # Without an output, the call only reports whether it would be rejected.
        for tensor in [x for x in tensors if x.count]:
            address, tensor.data = tensor.data, None
            assert call() == (tensor is not held[-1]), tensor
            assert tensor is held[-1] or answer.message.decode().endswith(" is null")
            tensor.data = address
        assert call() == 0
        answer.version += 1
        assert call() == 3, "of another version"


def test_types_are_the_schemas() -> None:
    case = next(c for c in cases("SparseAttention") if c.patches == 37)
    qkv, sizes, lists = case.inputs()
    for wrong in (
        [qkv, sizes, lists.astype(np.float32)],
        [qkv.astype(np.float64), sizes, lists],
        [np.asfortranarray(qkv), sizes, lists],
    ):
        with pytest.raises(BackendError, match=r"sparsifiner::SparseAttention: \w+ must be contiguous (float|int)32"):
            by_name("SparseAttention", case.attributes, wrong)
