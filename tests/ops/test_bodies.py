"""Which operators the function bodies use, and the pairs of MatchTokens at the sizes of real images."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sparsifiner_edge.ops.bodies import INPUT_PREFIX, Structure, function_body
from sparsifiner_edge.ops.schema import OPERATORS
from tests.ops.matrix import Case, run_body, run_reference

STRUCTURES = [Structure(*flags) for flags in itertools.product((True, False), repeat=4)]


@pytest.mark.parametrize("name", list(OPERATORS))
def test_no_body_loops_or_adds_up_in_a_scatter_or_reads_sizes_of_what_never_merges(name: str) -> None:
    for structure in STRUCTURES:
        body = function_body(name, structure)
        for node in body.node:
            assert node.op_type not in ("CumSum", "Loop", "Scan", "If"), "TensorRT runs these one element at a time"
            assert not node.op_type.startswith("Scatter") or node.op_type == "ScatterElements"
            assert not any(attribute.name == "reduction" for attribute in node.attribute)
        if name in ("KeySelect", "SparseAttention", "DenseAttention"):
            read = {i for node in body.node for i in node.input}
            assert (f"{INPUT_PREFIX}sizes" in read) == structure.merged
            assert list(body.input) == [f"{INPUT_PREFIX}{tensor.name}" for tensor in OPERATORS[name].inputs]


@pytest.mark.parametrize(("tokens", "merged"), [(257, 20), (1370, 160), (1370, 684), (5477, 700)])
def test_pairs_are_the_references_at_the_sizes_of_images(tokens: int, merged: int) -> None:
    attributes = {"num_heads": 2, "num_prefix": 1, "window": 16, "merged": merged}
    case = Case(OPERATORS["MatchTokens"], attributes, tokens - 1, 2)
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((2, tokens, 3 * 2 * case.width), np.float32)
    # Half of an image is alike, in any arithmetic: ties, and patches that nobody seeks.
    qkv[1, : tokens // 2] = np.tile(np.eye(case.width, dtype=np.float32)[0], 3 * 2)
    sizes = rng.integers(1, 5, (2, tokens)).astype(np.float32)
    np.testing.assert_array_equal(run_body(case, [qkv, sizes]), run_reference(case, [qkv, sizes]))
