"""One table of shapes that do not fit each other, which every backend of the native library refuses, by name and before
it computes.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import openvino
import pytest
from openvino.frontend import onnx as frontend

from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.native import interface
from sparsifiner_edge.ops.native.interface import Operators
from sparsifiner_edge.ops.schema import OPERATORS
from sparsifiner_edge.runtime.openvino.operators import converters
from tests.native.hostile import bare_model
from tests.ops.matrix import Case, cases, output_type

LEAST = {
    "KeySelect": {"num_heads": 1, "num_prefix": 1, "probe": 1, "tile": 1, "cell": 0, "keys": 1, "scale": 1.0,
                  "value_power": 0.0},
    "SparseAttention": {"num_heads": 1, "num_prefix": 1, "tile": 1, "cell": 0, "scale": 1.0, "prefix_keys": 1},
    "DenseAttention": {"num_heads": 2, "scale": 1.0},
    "MatchTokens": {"num_heads": 2, "num_prefix": 1, "window": 16, "merged": 5},
    "MergeTokens": {},
}  # fmt: skip


class Hostile(NamedTuple):
    """A node, the shapes of its inputs, and attributes other than the least."""

    op: str
    shapes: list[list[int]]
    attributes: Mapping[str, Any] = MappingProxyType({})

    def inputs(self) -> list[np.ndarray]:
        kinds = [np.int32 if t.dtypes == ("int32",) else np.float32 for t in OPERATORS[self.op].inputs]
        return [np.zeros(shape, kind) for shape, kind in zip(self.shapes, kinds, strict=True)]

    def settings(self) -> dict[str, Any]:
        return {**LEAST[self.op], **self.attributes}


NAN = float("nan")
TABLE = [
    # Fewer sizes than tokens, or more, or of another batch.
    Hostile("MergeTokens", [[1, 64, 8], [1, 1], [1, 60, 2]]),
    Hostile("MergeTokens", [[1, 64, 8], [1, 65], [1, 60, 2]]),
    Hostile("MergeTokens", [[2, 64, 8], [1, 64], [2, 60, 2]]),
    Hostile("DenseAttention", [[1, 64, 24], [1, 1]]),
    Hostile("DenseAttention", [[2, 64, 24], [1, 128]]),
    Hostile("SparseAttention", [[1, 64, 24], [1, 1], [1, 2, 4, 5]], {"num_heads": 2, "tile": 16}),
    Hostile("KeySelect", [[1, 64, 24], [1, 63], [2, 4, 2], [2, 4, 2]], {"num_heads": 2}),
    Hostile("MatchTokens", [[1, 64, 24], [1, 1]]),
    Hostile("MatchTokens", [[1, 64, 24], [1, 65]]),
    Hostile("MatchTokens", [[2, 64, 24], [1, 64]]),
    # Pairs of more tokens than there are, of none, of three, of another batch.
    Hostile("MergeTokens", [[1, 64, 8], [1, 64], [1, 65, 2]]),
    Hostile("MergeTokens", [[1, 64, 8], [1, 64], [1, 0, 2]]),
    Hostile("MergeTokens", [[1, 64, 8], [1, 64], [1, 40, 3]]),
    Hostile("MergeTokens", [[1, 64, 8], [1, 64], [3, 40, 2]]),
    # One list for four million tiles; lists of other heads, of no key, of more keys than there are.
    Hostile("SparseAttention", [[1, 4_000_001, 3], [1, 4_000_001], [1, 1, 1, 1]]),
    Hostile("SparseAttention", [[1, 64, 24], [1, 64], [1, 1, 4, 5]], {"num_heads": 2, "tile": 16}),
    Hostile("SparseAttention", [[1, 64, 24], [1, 64], [1, 2, 4, 0]], {"num_heads": 2, "tile": 16}),
    Hostile("SparseAttention", [[1, 64, 24], [1, 64], [1, 2, 4, 64]], {"num_heads": 2, "tile": 16}),
    Hostile("SparseAttention", [[2, 64, 24], [2, 64], [1, 2, 4, 5]], {"num_heads": 2, "tile": 16}),
    Hostile("SparseAttention", [[1, 64, 24], [1, 64], [1, 2, 4, 5]], {"num_heads": 2, "tile": 16, "num_prefix": 64}),
    # Projections of other heads, widths, channels, and of none.
    Hostile("KeySelect", [[1, 64, 24], [1, 64], [1, 4, 2], [1, 4, 2]], {"num_heads": 2}),
    Hostile("KeySelect", [[1, 64, 24], [1, 64], [2, 1, 2], [2, 1, 2]], {"num_heads": 2}),
    Hostile("KeySelect", [[1, 64, 24], [1, 64], [2, 4, 2], [2, 4, 1]], {"num_heads": 2}),
    Hostile("KeySelect", [[1, 64, 24], [1, 64], [2, 4, 0], [2, 4, 0]], {"num_heads": 2}),
    Hostile("KeySelect", [[1, 64, 24], [1, 64], [2, 4, 2], [2, 4, 2]], {"num_heads": 2, "keys": 64}),
    # No tokens, no channels, and none that heads could share.
    Hostile("DenseAttention", [[1, 0, 24], [1, 0]]),
    Hostile("DenseAttention", [[1, 64, 0], [1, 64]]),
    Hostile("DenseAttention", [[1, 64, 23], [1, 64]]),
    Hostile("MatchTokens", [[1, 64, 24], [1, 64]], {"merged": 32}),
    # Attributes that no shape suits.
    *(
        Hostile(op, [[1, 64, 24], [1, 64], *rest], change)
        for op, rest, changes in (
            ("KeySelect", [[2, 4, 2], [2, 4, 2]], ({"num_heads": 2, "probe": 3}, {"num_heads": 2, "scale": NAN})),
            ("SparseAttention", [[1, 2, 4, 5]], ({"num_heads": 2, "tile": 16, "prefix_keys": 0}, {"num_heads": 7})),
            ("DenseAttention", [], ({"num_heads": 0}, {"num_heads": -1}, {"scale": NAN})),
            ("MatchTokens", [], ({"merged": 0}, {"merged": 2**31}, {"merged": -1}, {"window": 0}, {"window": 3})),
        )
        for change in changes
    ),
    # Axes too few and too many.
    Hostile("DenseAttention", [[64, 24], [64]]),
    Hostile("DenseAttention", [[1, 1, 64, 24], [1, 64]]),
    Hostile("MatchTokens", [[1, 64, 24], [64]]),
    Hostile("MergeTokens", [[64, 8], [1, 64], [1, 40, 2]]),
    Hostile("MergeTokens", [[1, 64, 8], [1, 64], [40, 2]]),
    Hostile("SparseAttention", [[1, 64, 24], [1, 64], [2, 4, 5]], {"num_heads": 2, "tile": 16}),
]  # fmt: skip


def in_onnxruntime(op: str, attributes: dict[str, Any], inputs: list[np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.library_path()))
    session = onnxruntime.InferenceSession(bare_model(op, attributes, inputs, True), options)
    names = [tensor.name for tensor in OPERATORS[op].inputs]
    return session.run(None, dict(zip(names, inputs, strict=True)))[0]


def in_openvino(op: str, attributes: dict[str, Any], inputs: list[np.ndarray]) -> np.ndarray:
    operators = Operators(2)
    try:
        core = openvino.Core()
        core.add_extension(converters(openvino, frontend, [op], operators))
        compiled = core.compile_model(core.read_model(bare_model(op, attributes, inputs, False), b""), "CPU")
        return np.array(compiled(inputs)[0])
    finally:
        operators.close()


def by_name(op: str, attributes: dict[str, Any], inputs: list[np.ndarray]) -> np.ndarray:
    """By the bindings of the C interface, into room for as much as the first input has."""
    output = np.zeros(max(inputs[0].size, 64), np.int32 if OPERATORS[op].output.dtypes == ("int32",) else np.float32)
    operators = Operators(1)
    try:
        operators.run(op, attributes, inputs, output)
    finally:
        operators.close()
    return output


BACKENDS = (in_onnxruntime, in_openvino, by_name)


@pytest.mark.parametrize("run", BACKENDS)
@pytest.mark.parametrize("hostile", TABLE, ids=str)
def test_shapes_that_do_not_fit_are_refused(run: Callable[..., np.ndarray], hostile: Hostile) -> None:
    with pytest.raises(Exception, match=f"sparsifiner::{hostile.op}: "):
        run(hostile.op, hostile.settings(), hostile.inputs())


def _calls(case: Case) -> tuple[Any, Callable[[], int], ctypes.Structure]:
    """The arguments of a call of the C interface that is well, what calls it, and its message."""
    operators, inputs = Operators(1), case.inputs()
    shape = [tuple(x.shape) for x in inputs]
    output = np.zeros(case.op.output_shape(case.attributes, shape), output_type(case))
    tensors = [interface._tensor(case.op.name, x, (x.dtype.name,)) for x in (*inputs, output)]
    arguments = interface._arguments(case.op.name, case.attributes, shape, tensors)
    call = interface._Call(interface._VERSION, 0, None, None)
    function = getattr(operators._library, interface._FUNCTIONS[case.op.name][0])
    kept = (operators, inputs, output)
    return arguments, lambda: int(function(ctypes.byref(call), *arguments)) if kept else 0, call


@pytest.mark.parametrize("op", list(LEAST))
def test_the_c_interface_counts_the_elements_of_every_tensor(op: str) -> None:
    arguments, call, answer = _calls(cases(op)[0])
    assert call() == 0
    held = [x if isinstance(x, ctypes.Structure) else x._obj for x in arguments]
    tensors = [x for x in held if isinstance(x, interface._Tensor)]
    fields = [getattr(x, field[0]) for x in held for field in x._fields_]
    tensors += [field for field in fields if isinstance(field, interface._Tensor)]
    assert len(tensors) >= len(OPERATORS[op].inputs) + 1
    for tensor in tensors:
        right = tensor.count
        for wrong in (right - 1, right + 1, 1, -1, -(2**63), 2**63 - 1):
            tensor.count = wrong
            assert call() == 1, (tensor, wrong)
            assert f" has {wrong} elements, not " in answer.message.decode()
        tensor.count = right
    assert call() == 0


@pytest.mark.parametrize("op", list(LEAST))
def test_the_c_interface_refuses_sizes_that_are_none(op: str) -> None:
    arguments, call, answer = _calls(cases(op)[0])
    for held in (x if isinstance(x, ctypes.Structure) else x._obj for x in arguments):
        for name, kind in held._fields_:
            if kind is not ctypes.c_int64 or isinstance(held, interface._Tensor):
                continue
            right = getattr(held, name)
            for wrong in (-1, -(2**63), 2**31, 2**63 - 1):
                setattr(held, name, wrong)
                assert call() == 1, (name, wrong)
                assert answer.message
            setattr(held, name, right)
    assert call() == 0


def test_types_are_the_schemas() -> None:
    case = next(c for c in cases("SparseAttention") if c.patches == 37)
    qkv, sizes, lists = case.inputs()
    for wrong in (
        [qkv, sizes, lists.astype(np.float32)],
        [qkv.astype(np.float64), sizes, lists],
        [np.asfortranarray(qkv), sizes, lists],
    ):
        with pytest.raises(BackendError, match=r"sparsifiner::SparseAttention: got .* for contiguous (float|int)32"):
            by_name("SparseAttention", dataclasses.asdict(case)["attributes"], wrong)
