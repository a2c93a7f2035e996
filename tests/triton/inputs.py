"""Inputs of the kernels' tests: cases of the operators' matrix at any head dimension and element type."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsifiner_edge.ops import reference, torch_merge
from sparsifiner_edge.ops import torch as torch_ops
from sparsifiner_edge.ops.schema import OPERATORS
from tests.ops import matrix
from tests.ops.matrix import Case

ATTENTION = ("KeySelect", "SparseAttention")
NAMES = (*ATTENTION, "MatchTokens", "MergeTokens")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PAPER = Case(
    OPERATORS["SparseAttention"],
    {"num_heads": 2, "num_prefix": 1, "tile": 1, "cell": 0, "scale": 0.125, "prefix_keys": 0}, 13, 1,
    merged=False,
)  # fmt: skip


def case_of(name: str, patches: int, batch: int = 1, sized: bool | None = None, **changes: Any) -> Case:
    """The first case of an operator's matrix with other sizes; sized: over merged tokens."""
    base = matrix.cases(name, merged=sized)[0]
    return dataclasses.replace(base, attributes={**base.attributes, **changes}, patches=patches, batch=batch)


def tensors(
    case: Case, seed: int = 0, width: int = matrix.HEAD_DIM, dtype: str = "float32", device: str = "cpu"
) -> Any:
    """Inputs of a case as tensors, floats in `dtype`; as the kernels take them, without sizes where all are 1."""
    whole = matrix.HEAD_DIM
    try:
        matrix.HEAD_DIM = width
        arrays = case.inputs(seed)
    finally:
        matrix.HEAD_DIM = whole
    if not case.merged:
        del arrays[1]
    found = [torch.from_numpy(x).to(device) for x in arrays]
    return [x.to(DTYPES[dtype]) if x.is_floating_point() else x for x in found]


def run(case: Case, given: list[Tensor]) -> Tensor:
    """The public operator: which kernels run it is `kernels_for`'s choice."""
    settings = dict(case.attributes)
    if case.op.name == "MergeTokens":
        return torch_merge.merge_tokens(*given)
    if case.op.name == "MatchTokens":
        return torch_merge.match_tokens(*given, **settings)
    if case.merged:
        settings["sizes"], given = given[1], [given[0], *given[2:]]
    function: Any = torch_ops.key_select if case.op.name == "KeySelect" else torch_ops.sparse_attention
    result: Tensor = function(*given, **settings)
    return result


def hold(case: Case, given: list[Tensor], got: Tensor, dtype: str) -> None:
    """Hold a result against the reference, which gets what `dtype` left of the inputs.

    At half precision logits are one product of float16: selection scores are right to 4e-3, or 2^-12 of their range.
    """
    arrays = [x.float().cpu().numpy() if x.is_floating_point() else x.cpu().numpy() for x in given]
    found = got.float().cpu().numpy() if got.is_floating_point() else got.cpu().numpy()
    if not case.merged:
        arrays.insert(1, np.ones(arrays[0].shape[:2], np.float32))
    if case.op.name == "KeySelect" and dtype != "float32":
        settings = {k: v for k, v in case.attributes.items() if k != "keys"}
        scores = reference.key_scores(*arrays, **settings)
        most = 2**-12 * float(np.ptp(scores[np.isfinite(scores)]))
        case = dataclasses.replace(case, op=dataclasses.replace(case.op, tolerances={dtype: max(most, 4e-3)}))
    matrix.check(dataclasses.replace(case, dtype=dtype), arrays, found)


def gradients(case: Case, qkv: Tensor, lists: Tensor, weights: Tensor) -> Tensor:
    """Gradient in qkv of the sum of weights x output."""
    leaf = qkv.detach().clone().requires_grad_()
    (run(case, [leaf, lists]) * weights).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Greatest difference, relative to the greatest expected value."""
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert np.isfinite(float(error))
    assert error <= tolerance, f"error {float(error):.2e}"
