"""Checks of a layer's kernels in Triton's interpreter, on CPU tensors.

`test_interpreted.py` runs this file in a separate process, with TRITON_INTERPRET set before Triton is imported. Its
name keeps pytest from collecting it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from sparsifiner_edge.ops.torch_triton import triton_layer
from sparsifiner_edge.ops.triton import attend, why_not_triton
from sparsifiner_edge.ops.triton.run import launch
from tests.ops.matrix import Case, cases
from tests.triton.inputs import DTYPES, NAMES, case_of, hold, hold_layer, layer_of, tensors
from tests.triton.interpreting import launched, shuffled

BOTH = [dataclasses.replace(case, patches=min(case.patches, 70)) for case in cases("KeySelect")]
MATRIX = [case for case in BOTH if case.attributes["key_pool"] and -(-case.patches // case.attributes["key_pool"]) < 28]
# Logits far apart exceed the range of float16 (attend) by intention and are recomputed.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("overflow encountered in", "invalid value encountered", "All-NaN slice")  # its maximum is NumPy's
]


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply as float32: Triton 3.9's interpreter keeps bfloat16 as 16-bit integers and multiplies those."""
    torch.manual_seed(0)
    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def held(case: Case, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a layer in guarded tensors, NaN where nothing was written, and compare it with the reference."""
    schedule = layer_of(case, given)
    done = launched(schedule, given)
    hold_layer(case, given, done, schedule)
    return done


def test_these_are_the_kernels_that_run() -> None:
    for case in (cases(name)[0] for name in NAMES):
        given = next(iter(tensors(case).values()))
        assert not why_not_triton(case.op.name, case.attributes, [x.shape for x in case.inputs()], given)


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_agrees_over_the_matrix(case: Case) -> None:
    held(case, tensors(case))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("dtype", "width"), [("float16", 64), ("bfloat16", 64), ("bfloat16", 24)])
def test_agrees_at_every_element_type_and_head_dimension(dtype: str, width: int, merged: bool) -> None:
    case = case_of("KeySelect", 70, sized=merged, key_pool=17, num_prefix=5, scale=width**-0.5)
    held(case, tensors(case, width, dtype))


@pytest.mark.parametrize(
    ("case", "width", "dtype"),
    [
        # Pools of several blocks and long query pools.
        (case_of("KeySelect", 230, sized=False, key_pool=100, query_pool=12, tile=24, num_heads=2), 32, "float16"),
        (case_of("KeySelect", 230, sized=True, key_pool=70, query_pool=12, tile=24, num_heads=2), 32, "bfloat16"),
        # Incomplete tile, query_pool and key_pool, with registers.
        (case_of("KeySelect", 45, num_prefix=5, query_pool=4, tile=20, key_pool=13, keys=11), 8, "float16"),
        (case_of("KeySelect", 87, num_prefix=3, key_pool=3, tile=16, query_pool=8, keys=20), 8, "float16"),
    ],
    ids=str,
)
def test_agrees_at_odd_sizes(case: Case, width: int, dtype: str) -> None:
    held(case, tensors(case, width, dtype))


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_selection_survives_small_and_large_projections(size: float) -> None:
    """Split parts are scaled, or they would vanish or overflow in float16. Logits stay the same."""
    case = case_of("KeySelect", 40)
    given = tensors(case)
    held(case, given | {"proj_q": given["proj_q"] * size, "proj_k": given["proj_k"] / size})


@pytest.mark.parametrize("away", [300.0, -300.0])
def test_logits_beyond_float32_s_exponents(away: float) -> None:
    """All logits of a head (base 2) are far from 0: sums start at the maximum of a block."""
    case = case_of("KeySelect", 150, num_heads=1, num_prefix=0, key_pool=17, keys=20, scale=0.25)
    given = tensors(case, 16)
    given["qkv"][..., 0], given["qkv"][..., 16] = 16, away / 4 / 1.44
    for name in ("proj_q", "proj_k"):
        given[name][:, 0], given[name][:, :, 0] = 0, 0
        given[name][:, 0, 0] = 1
    held(case, given)


def test_ties_go_to_the_lower_index_and_nan_loses() -> None:
    case = case_of("KeySelect", 60, num_heads=1, key_pool=20, keys=5)
    given = tensors(case)
    lists = launch(layer_of(case, given), given | {"qkv": torch.ones_like(given["qkv"])})["indices"]
    assert (lists == torch.arange(5, dtype=torch.int32)).all()
    width = given["qkv"].shape[-1] // 3
    given["qkv"][:, 1 + 30, 2 * width :] = torch.nan  # a value: affects only its own key_pool
    lists = launch(layer_of(case, given), given)["indices"]
    assert not np.isin(lists.numpy(), np.arange(20, 40)).any()
    given["qkv"][:, 1 + 10, width : 2 * width] = torch.nan  # a key
    assert not (launch(layer_of(case, given), given)["indices"] == 10).any()


@pytest.mark.parametrize(
    "factors",
    [2.0 ** (np.arange(150) % 8), np.where(np.arange(150) % 2, 1.0, 300.0), np.where(np.arange(150) == 77, 1e3, 1.0)],
    ids=["geometric", "two clusters", "an outlier"],
)
def test_scores_that_are_nothing_like_normal(factors: np.ndarray) -> None:
    """The secant method misleads here; bisection completes the search."""
    case = case_of("KeySelect", 150, num_heads=1, num_prefix=0, value_power=0.0, key_pool=17, keys=40)
    given = tensors(case)
    width = given["qkv"].shape[-1] // 3
    given["qkv"][..., width : 2 * width] *= torch.from_numpy(factors).half()[None, :, None]
    hold(case, given, launch(layer_of(case, given), given)["indices"], "float16")


def attended(case: Case, given: dict[str, torch.Tensor], lists: torch.Tensor) -> torch.Tensor:
    """Return the output over lists that `select` did not make."""
    schedule = layer_of(case, given)
    schedule = dataclasses.replace(schedule, launches=(schedule.launches[0], schedule.launches[2]))
    return launched(schedule, given | {"indices": lists})["output"]


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_logit_far_above_the_sample_is_taken_again(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One listed key, outside the sample, has a logit that float16 cannot hold with the others."""
    case = case_of("KeySelect", 150, num_heads=1, key_pool=17, keys=70, tile=16, query_pool=8)
    given = tensors(case, dtype=dtype)
    tiles, width = -(-150 // 16), given["qkv"].shape[-1] // 3
    lists = torch.arange(0, 140, 2, dtype=torch.int32).expand(1, 1, tiles, -1).contiguous()
    # This key's logit becomes some 60 in base 2; the others stay.
    given["qkv"][0, 1:17, 0], given["qkv"][0, :, width] = 8, 0
    given["qkv"][0, 1 + 2, width] = 60 / case.attributes["scale"] / 11.5
    calls: list[int] = []
    again = attend._tile_again
    monkeypatch.setattr(attend, "_tile_again", lambda *args: (calls.append(1), again(*args))[1])
    shared = {name: case.attributes[name] for name in ("num_heads", "num_prefix", "tile", "key_pool", "scale")}
    read = {"qkv": given["qkv"], "indices": lists}
    hold(case_of("SparseAttention", 150, sized=False, **shared), read, attended(case, given, lists), dtype)
    assert len(calls) == (dtype == "float16")


def test_wild_lists_touch_nothing_outside() -> None:
    case = case_of("KeySelect", 37, key_pool=7, keys=9)
    given = tensors(case)
    wild = torch.randint(-(2**31), 2**31 - 1, launch(layer_of(case, given), given)["indices"].shape, dtype=torch.int32)
    wild[..., 0] = 2**31 - 1
    assert torch.isfinite(attended(case, given, wild)).all()


def test_programs_may_run_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits are the same in every order of a launch's programs."""
    case = case_of("KeySelect", 150, num_heads=2, tile=16, query_pool=8, key_pool=17, keys=20)
    given = tensors(case, 32)
    schedule = layer_of(case, given)
    expected = {name: x.clone() for name, x in launch(schedule, given).items()}
    orders = shuffled(monkeypatch)
    found = launch(schedule, given)
    assert len(orders) > 1
    for name in ("indices", "output"):
        assert torch.equal(found[name], expected[name])


def test_where_a_gradient_may_follow_torch_runs() -> None:
    case = case_of("KeySelect", 37, tile=8, query_pool=4, key_pool=10, keys=9)
    given = tensors(case, 32)
    qkv, proj_q, proj_k = given.values()
    expected = launch(layer_of(case, given), given)["output"]
    got = triton_layer(case.attributes, qkv, None, proj_q, proj_k)
    assert got is not None
    assert torch.equal(got, expected)
    assert triton_layer(case.attributes, qkv.requires_grad_(), None, proj_q, proj_k) is None
