"""Every implementation of every operator against the NumPy reference, over the schema's matrix."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from sparsifiner_edge.ops import torch as torch_ops
from sparsifiner_edge.ops.schema import OPERATORS
from tests.ops.matrix import Case, allowed, cases, check, run_body, run_reference, run_torch

NARROW = [c for name in OPERATORS for c in cases(name)]
FULL = [c for name in OPERATORS for c in cases(name, full=True)]
PAPER = [
    Case(OPERATORS["SparseAttention"], a, patches, batch, merged=merged)
    for patches, batch, merged in ((37, 1, False), (64, 2, False), (64, 2, True))
    for a in [{"num_heads": 3, "num_prefix": 1, "tile": 1, "cell": 0, "scale": 0.125, "prefix_keys": 0}]
]


def _ids(case: Any) -> str:
    return str(case)


def test_the_matrix_reaches_every_tested_value() -> None:
    for name, op in OPERATORS.items():
        for attribute in op.attributes:
            extra = PAPER if name == "SparseAttention" else []
            seen = {c.attributes[attribute.name] for c in [*cases(name), *extra]}
            assert seen >= set(attribute.tested), f"{name}.{attribute.name}"


@pytest.mark.parametrize("name", list(OPERATORS))
def test_torch_agrees_over_all_combinations(name: str) -> None:
    chosen = [c for c in FULL if c.op.name == name]
    assert len(chosen) >= 4
    for seed, case in enumerate(chosen):
        inputs = case.inputs(seed)
        check(case, inputs, run_torch(case, inputs))


@pytest.mark.parametrize("case", NARROW + PAPER, ids=_ids)
@pytest.mark.parametrize("seed", [0, 1])
def test_body_agrees(case: Case, seed: int) -> None:
    inputs = case.inputs(seed)
    check(case, inputs, run_body(case, inputs))


@pytest.mark.parametrize("case", PAPER, ids=_ids)
def test_torch_agrees_where_the_prefix_is_only_attended_where_listed(case: Case) -> None:
    inputs = case.inputs()
    check(case, inputs, run_torch(case, inputs))


@pytest.mark.parametrize("case", [case for case in PAPER if not case.merged], ids=_ids)
def test_lists_too_large_for_a_mask_are_gathered(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case.inputs()
    found = []
    for limit, unused in ((torch_ops.LARGEST_MASK, "_tile_attention"), (0, "_masked_attention")):
        with monkeypatch.context() as patch:
            patch.setattr(torch_ops, "LARGEST_MASK", limit)
            patch.delattr(torch_ops, unused)  # the other way is the one that is taken
            found.append(_with_gradient(case, inputs))
            check(case, inputs, found[-1][0].numpy())
    for masked, gathered in zip(*found, strict=True):
        torch.testing.assert_close(gathered, masked, rtol=0, atol=1e-5 * float(masked.abs().max()))


def _with_gradient(case: Case, inputs: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseAttention, and the gradient in qkv of the sum of its squares."""
    qkv = torch.from_numpy(inputs[0]).requires_grad_()
    out = torch_ops.sparse_attention(qkv, torch.from_numpy(inputs[2]), **case.attributes)
    return out.detach(), torch.autograd.grad(out.square().sum(), qkv)[0]


@pytest.mark.parametrize("name", list(OPERATORS))
def test_half_precision(name: str) -> None:
    for case in cases(name, dtype="float16")[:6]:
        inputs = case.inputs()
        check(case, inputs, run_torch(case, inputs))
        check(case, inputs, run_body(case, inputs))


@pytest.mark.parametrize("run", [run_torch, run_body])
def test_ties_go_to_the_lower_index_and_nan_loses(run: Any) -> None:
    case = next(c for c in cases("KeySelect") if c.patches == 130 and c.attributes["keys"] == 5)
    inputs = case.inputs()
    inputs[0][:] = 1.0
    expected = np.broadcast_to(np.arange(5), run_reference(case, inputs).shape)
    np.testing.assert_array_equal(run(case, inputs), expected)
    poisoned = dataclasses.replace(case, attributes={**case.attributes, "num_heads": 1})
    assert allowed(poisoned)
    inputs = poisoned.inputs()
    qkv, prefix = inputs[0], poisoned.attributes["num_prefix"]
    width = qkv.shape[-1] // 3
    # A NaN value spoils the score of its own key alone, and of its cell's mates through their mean: never selected.
    qkv[:, prefix + 100, 2 * width :] = np.nan
    got = run(poisoned, inputs)
    np.testing.assert_array_equal(got, run_reference(poisoned, inputs))
    assert not np.isin(got, np.arange(55, 110)).any()


@pytest.mark.parametrize("run", [run_torch, run_body])
def test_repeatable_bit_for_bit(run: Any) -> None:
    for name in OPERATORS:
        case = cases(name)[0]
        inputs = case.inputs()
        assert run(case, inputs).tobytes() == run(case, inputs).tobytes()


def test_everything_selected_is_dense_attention() -> None:
    case = next(c for c in cases("SparseAttention") if c.attributes["cell"])
    qkv, sizes, lists = case.inputs()
    everything = np.broadcast_to(np.arange(case.patches, dtype=np.int32), (*lists.shape[:3], case.patches))
    heads, scale = case.attributes["num_heads"], case.attributes["scale"]
    dense = Case(OPERATORS["DenseAttention"], {"num_heads": heads, "scale": scale}, case.patches, case.batch)
    for run in (run_torch, run_body, run_reference):
        got = run(case, [qkv, sizes, np.ascontiguousarray(everything)])
        np.testing.assert_allclose(got, run_reference(dense, [qkv, sizes]), atol=1e-5)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_batch_rows_are_independent(name: str) -> None:
    case = next(c for c in cases(name) if c.batch == 2)
    inputs = case.inputs()
    both = run_torch(case, inputs)
    for row in range(2):
        alone = [x[row : row + 1] if t.axes[0] == "B" else x for t, x in zip(case.op.inputs, inputs, strict=True)]
        got = run_torch(dataclasses.replace(case, batch=1), alone)
        np.testing.assert_allclose(got, both[row : row + 1], atol=1e-5)
