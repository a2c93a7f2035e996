"""Tests of all implementations of every operator against the NumPy reference over the schema's matrix.

The structure of function bodies is tested as well.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from sparsifiner_edge.ops import torch as torch_ops
from sparsifiner_edge.ops.bodies import INPUT_PREFIX, Structure, function_body
from sparsifiner_edge.ops.schema import OPERATORS
from tests.ops.matrix import PAPER, Case, cases, check, run_body, run_native, run_reference, run_torch

NARROW = [case for name in OPERATORS for case in cases(name)]


def test_the_matrix_reaches_every_tested_value() -> None:
    for name, op in OPERATORS.items():
        for attribute in op.attributes:
            seen = {c.attributes[attribute.name] for c in [*NARROW, *PAPER] if c.op.name == name}
            assert seen >= set(attribute.tested), f"{name}.{attribute.name}"


@pytest.mark.parametrize("name", list(OPERATORS))
def test_torch_agrees_over_all_combinations(name: str) -> None:
    chosen = cases(name, full=True)
    assert len(chosen) >= 4
    for seed, case in enumerate(chosen + PAPER * (name == "SparseAttention")):
        inputs = case.inputs(seed)
        check(case, inputs, run_torch(case, inputs))


@pytest.mark.parametrize("case", NARROW + PAPER, ids=str)
def test_body_agrees(case: Case) -> None:
    inputs = case.inputs()
    check(case, inputs, run_body(case, inputs))


@pytest.mark.parametrize("case", [case for case in PAPER if not case.merged], ids=str)
def test_lists_too_large_for_a_mask_are_gathered(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case.inputs()
    found = []
    for limit, unused in ((torch_ops.LARGEST_MASK, "_tile_attention"), (0, "_masked_attention")):
        with monkeypatch.context() as patch:
            patch.setattr(torch_ops, "LARGEST_MASK", limit)
            patch.delattr(torch_ops, unused)  # the other path is taken
            qkv = torch.from_numpy(inputs[0]).requires_grad_()
            out = torch_ops.sparse_attention(qkv, torch.from_numpy(inputs[2]), **case.attributes)
            check(case, inputs, out.detach().numpy())
            found.append((out.detach(), torch.autograd.grad(out.square().sum(), qkv)[0]))
    for masked, gathered in zip(*found, strict=True):
        torch.testing.assert_close(gathered, masked, rtol=0, atol=1e-5 * float(masked.abs().max()))


@pytest.mark.parametrize("name", list(OPERATORS))
def test_half_precision(name: str) -> None:
    for case in cases(name, dtype="float16")[:6]:
        inputs = case.inputs()
        check(case, inputs, run_torch(case, inputs))
        check(case, inputs, run_body(case, inputs))


@pytest.mark.parametrize("run", [run_torch, run_body, run_native])
def test_ties_go_to_the_lower_index_and_nan_loses(run: Any) -> None:
    case = next(c for c in cases("KeySelect") if c.patches == 130 and c.attributes["keys"] == 5)
    inputs = case.inputs()
    inputs[0][:] = 1.0
    expected = np.broadcast_to(np.arange(5), run_reference(case, inputs).shape)
    np.testing.assert_array_equal(run(case, inputs), expected)
    poisoned = dataclasses.replace(case, attributes={**case.attributes, "num_heads": 1})
    inputs = poisoned.inputs()
    qkv, prefix = inputs[0], poisoned.prefix
    width = qkv.shape[-1] // 3
    # A NaN value affects only its own key's score and, through the mean, the keys pooled with it: never selected.
    qkv[:, prefix + 100, 2 * width :] = np.nan
    got = run(poisoned, inputs)
    np.testing.assert_array_equal(got, run_reference(poisoned, inputs))
    assert not np.isin(got, np.arange(55, 110)).any()


def test_everything_selected_is_dense_attention() -> None:
    case = next(c for c in cases("SparseAttention") if c.attributes["key_pool"])
    qkv, sizes, lists = case.inputs()
    everything = np.broadcast_to(np.arange(case.patches, dtype=np.int32), (*lists.shape[:3], case.patches))
    heads, scale = case.attributes["num_heads"], case.attributes["scale"]
    dense = Case(OPERATORS["DenseAttention"], {"num_heads": heads, "scale": scale}, case.patches, case.batch)
    for run in (run_torch, run_body, run_reference):
        got = run(case, [qkv, sizes, np.ascontiguousarray(everything)])
        np.testing.assert_allclose(got, run_reference(dense, [qkv, sizes]), atol=1e-5)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_batch_rows_are_independent_and_runs_alike(name: str) -> None:
    case = next(c for c in cases(name) if c.batch == 2)
    inputs = case.inputs()
    both = run_torch(case, inputs)
    assert run_torch(case, inputs).tobytes() == both.tobytes()
    assert run_body(case, inputs).tobytes() == run_body(case, inputs).tobytes()
    for row in range(2):
        alone = [x[row : row + 1] if t.axes[0] == "B" else x for t, x in zip(case.op.inputs, inputs, strict=True)]
        got = run_torch(dataclasses.replace(case, batch=1), alone)
        np.testing.assert_allclose(got, both[row : row + 1], atol=1e-5)


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
    # Half of an image is uniform: ties in any arithmetic, and patches that no query selects.
    qkv[1, : tokens // 2] = np.tile(np.eye(case.width, dtype=np.float32)[0], 3 * 2)
    sizes = rng.integers(1, 5, (2, tokens)).astype(np.float32)
    np.testing.assert_array_equal(run_body(case, [qkv, sizes]), run_reference(case, [qkv, sizes]))
