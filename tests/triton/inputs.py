"""Inputs for kernel tests: cases of the operators' matrix at any head dimension and element type, and layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsifiner_edge.ops import reference, torch_merge
from sparsifiner_edge.ops.torch import top_keys
from sparsifiner_edge.ops.triton.schedule import Schedule
from sparsifiner_edge.ops.triton.schedule_layer import schedule_layer
from tests.ops import matrix
from tests.ops.matrix import Case

NAMES = ("KeySelect", "MatchTokens", "MergeTokens")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def case_of(name: str, patches: int, batch: int = 1, sized: bool | None = None, **changes: Any) -> Case:
    """Return the first case of an operator's matrix with other sizes; sized: over merged tokens."""
    base = matrix.cases(name, merged=sized)[0]
    return dataclasses.replace(base, attributes={**base.attributes, **changes}, patches=patches, batch=batch)


def tensors(case: Case, width: int = 8, dtype: str = "float16", device: str = "cpu") -> dict[str, Tensor]:
    """Return inputs of a case by name, as the kernels take them: tokens in `dtype`, no sizes if all are 1."""
    arrays = dataclasses.replace(case, width=width).inputs()
    found = {x.name: torch.from_numpy(a).to(device) for x, a in zip(case.op.inputs, arrays, strict=True)}
    first = case.op.inputs[0].name
    found[first] = found[first].to(DTYPES[dtype])
    return found if case.merged else {name: x for name, x in found.items() if name != "sizes"}


def layer_of(case: Case, given: dict[str, Tensor]) -> Schedule:
    """Return a layer: a case of KeySelect and its inputs."""
    element = str(given["qkv"].dtype).removeprefix("torch.")
    return schedule_layer([x.shape for x in given.values()], case.attributes, element)


def run(case: Case, given: dict[str, Tensor]) -> Tensor:
    """Run MatchTokens or MergeTokens as public operators, which choose their kernels."""
    function: Any = torch_merge.merge_tokens if case.op.name == "MergeTokens" else torch_merge.match_tokens
    result: Tensor = function(*given.values(), **case.attributes)
    return result


def hold(case: Case, given: dict[str, Tensor], got: Tensor, dtype: str) -> None:
    """Compare a result with the reference, which gets the inputs rounded to `dtype`.

    Logits are one product of float16: selection scores are right to 4e-3, or 2^-12 of their range.
    """
    arrays = [_array(x) for x in given.values()]
    if not case.merged:
        arrays.insert(1, np.ones(arrays[0].shape[:2], np.float32))
    if case.op.name == "KeySelect":
        settings = {k: v for k, v in case.attributes.items() if k != "keys"}
        scores = reference.SCORES[case.op.name](*arrays, **settings)
        most = 2**-12 * float(np.ptp(scores[np.isfinite(scores)]))
        case = dataclasses.replace(case, op=dataclasses.replace(case.op, tolerances={dtype: max(most, 4e-3)}))
    matrix.check(dataclasses.replace(case, dtype=dtype), arrays, _array(got))


def hold_layer(case: Case, given: dict[str, Tensor], done: dict[str, Tensor], schedule: Schedule) -> None:
    """Compare a layer: lists are the best of the stored scores; the output is SparseAttention's over them."""
    dtype = str(given["qkv"].dtype).removeprefix("torch.")
    assert torch.equal(done["indices"], top_keys(stored_scores(case, done, schedule), case.attributes["keys"]))
    hold(case, given, done["indices"], dtype)
    shared = {name: case.attributes[name] for name in ("num_heads", "num_prefix", "tile", "key_pool", "scale")}
    attend = case_of("SparseAttention", case.patches, case.batch, case.merged, **shared)
    read = {name: given[name] for name in ("qkv", "sizes") if name in given}
    hold(attend, read | {"indices": done["indices"]}, done["output"], dtype)


def stored_scores(case: Case, done: dict[str, Tensor], schedule: Schedule) -> Tensor:
    """Return scores [B,H,T,P] in the order of keys: `select` stores them in the order in which threads read them."""
    lanes, pitch = int(schedule.launches[1].constants["lanes"]), done["scores"].shape[-1]
    lane, within = np.divmod(np.arange(case.patches), pitch // lanes)
    return done["scores"][..., within // 8 * (8 * lanes) + lane * 8 + within % 8]


def _array(x: Tensor) -> Any:
    return x.float().cpu().numpy() if x.is_floating_point() else x.cpu().numpy()
