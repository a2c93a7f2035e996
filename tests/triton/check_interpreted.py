"""The kernels in Triton's interpreter, on CPU tensors. `test_interpreted.py` runs this file in a process of its own,
where TRITON_INTERPRET is set before Triton is imported: pytest does not collect it by its name.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from sparsifiner_edge.ops.torch_triton import triton_layer
from sparsifiner_edge.ops.triton import VARIABLE, attend, kernels_for
from sparsifiner_edge.ops.triton.plan_forward import plan_attend, plan_layer, plan_select
from sparsifiner_edge.ops.triton.run import launch
from tests.ops.matrix import Case, cases, run_reference
from tests.triton.inputs import ATTENTION, DTYPES, NAMES, PAPER, case_of, close, gradients, hold, run, tensors
from tests.triton.interpreting import guarded, shuffled, untouched

BOTH = [dataclasses.replace(case, patches=min(case.patches, 70)) for name in NAMES for case in cases(name)]
# Logits far apart leave the range of float32 (select) or float16 (attend) by intention, and are taken again.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning")
    for what in ("overflow encountered in exp2", "overflow encountered in cast", "invalid value encountered")
]
LAYERS: list[dict[str, Any]] = [{"num_prefix": 5, "tile": 8}, {"num_prefix": 0, "cell": 0}, {"cell": 2}]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter keeps bfloat16 as 16-bit integers and multiplies those; here as float32."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def test_these_are_the_kernels_that_run() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    for case in (*(cases(name)[0] for name in NAMES), PAPER):
        given = tensors(case)
        shapes = [x.shape for x in case.inputs()]
        assert kernels_for(case.op.name, case.attributes, shapes, given[0]).name == "triton"


@pytest.mark.parametrize("case", [*BOTH, PAPER], ids=str)
def test_agrees_over_the_matrix(case: Case) -> None:
    given = tensors(case)
    hold(case, given, run(case, given), "float32")


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize(
    ("dtype", "width"),
    [("float16", 32), ("bfloat16", 64), ("float16", 96), ("bfloat16", 128), ("float32", 96), ("float16", 64)],
)
def test_agrees_at_every_element_type_and_head_dimension(name: str, dtype: str, width: int) -> None:
    case = case_of(name, 70, cell=17, scale=width**-0.5)
    given = tensors(case, width=width, dtype=dtype)
    hold(case, given, run(case, given), dtype)


def hold_a_layer(select: Case, dtype: str) -> None:
    """Lists of a layer are KeySelect's own; its output is SparseAttention's over them."""
    given = tensors(select, width=32, dtype=dtype)
    names = ["qkv", *(["sizes"] if select.merged else []), "proj_q", "proj_k"]
    given = [x.float() if name.startswith("proj") else x for name, x in zip(names, given, strict=True)]
    plan = plan_layer([x.shape for x in given], select.attributes, dtype)
    inside, guards = guarded(plan, dict(zip(names, given, strict=True)))
    done = launch(plan, inside)
    assert untouched(guards)
    hold(select, given, done["indices"], dtype)
    shared = {name: select.attributes[name] for name in ("num_heads", "num_prefix", "tile", "cell", "scale")}
    attend = case_of("SparseAttention", select.patches, sized=select.merged, **shared)
    hold(attend, [*given[:-2], done["indices"]], done["output"], dtype)


@pytest.mark.parametrize(
    ("changes", "dtype", "merged"),
    [
        *(({}, dtype, merged) for dtype in DTYPES for merged in (False, True)),
        *((x, "float16", True) for x in LAYERS),
        *((x, "float32", False) for x in LAYERS),
    ],
    ids=str,
)
def test_a_layer_is_its_two_operators(changes: dict[str, Any], dtype: str, merged: bool) -> None:
    hold_a_layer(case_of("KeySelect", 70, sized=merged, **{"cell": 17, **changes}), dtype)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("cell", "dtype"), [(100, "float16"), (220, "float16"), (70, "bfloat16")])
def test_cells_of_several_blocks_and_long_probes(cell: int, dtype: str, merged: bool) -> None:
    """Values are held in registers until their mean is known, or read again; probes of 12 are read in two parts."""
    select = case_of("KeySelect", 230, sized=merged, cell=cell, probe=12, tile=24, num_heads=2)
    hold_a_layer(select, dtype)


def test_a_query_that_is_no_number_spoils_its_own_tile() -> None:
    case = case_of("KeySelect", 70, num_heads=1, probe=4, tile=16, cell=17, keys=5)
    qkv, proj_q, proj_k = tensors(case)
    qkv[:, 1 + 20, 0] = torch.nan  # of the second tile
    got = run(case, [qkv, proj_q, proj_k]).numpy()
    np.testing.assert_array_equal(
        got, run_reference(case, [x.numpy() for x in (qkv, torch.ones(qkv.shape[:2]), proj_q, proj_k)])
    )
    np.testing.assert_array_equal(got[0, 0, 1], np.arange(5))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_programs_may_run_in_any_order(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, whichever programs of a launch come first."""
    select = case_of("KeySelect", 150, num_heads=2, tile=16, probe=8, cell=17, keys=20)
    given = dict(zip(("qkv", "proj_q", "proj_k"), tensors(select, width=32, dtype=dtype), strict=True))
    given |= {name: given[name].float() for name in ("proj_q", "proj_k")}
    plan = plan_layer([x.shape for x in given.values()], select.attributes, dtype)
    expected = {name: x.clone() for name, x in launch(plan, given).items()}
    orders = shuffled(monkeypatch)
    found = launch(plan, given)
    assert len(orders) > 1
    for name in ("indices", "output"):
        assert torch.equal(found[name], expected[name])


def test_ragged_tile_probe_and_cell_with_registers() -> None:
    case = case_of("KeySelect", 45, num_prefix=5, probe=4, tile=20, cell=13, keys=11)
    given = tensors(case)
    indices = run(case, given)
    hold(case, given, indices, "float32")
    attention = case_of("SparseAttention", 45, num_prefix=5, tile=20, cell=13)
    hold(attention, [given[0], indices], run(attention, [given[0], indices]), "float32")


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_selection_survives_small_and_large_projections(size: float) -> None:
    """What would vanish or overflow in float16: the split parts are scaled. Logits stay the same."""
    case = case_of("KeySelect", 40)
    qkv, proj_q, proj_k = tensors(case)
    hold(case, [qkv, proj_q * size, proj_k / size], run(case, [qkv, proj_q * size, proj_k / size]), "float32")


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's maximum is numpy's
def test_ties_go_to_the_lower_index_and_nan_loses() -> None:
    case = case_of("KeySelect", 60, num_heads=1, cell=20, keys=5)
    qkv, proj_q, proj_k = tensors(case)
    same = torch.ones_like(qkv)
    assert (run(case, [same, proj_q, proj_k]) == torch.arange(5, dtype=torch.int32)).all()
    width = qkv.shape[-1] // 3
    qkv[:, 1 + 30, 2 * width :] = torch.nan  # a value: spoils its own cell
    got = run(case, [qkv, proj_q, proj_k])
    np.testing.assert_array_equal(
        got.numpy(), run_reference(case, [x.numpy() for x in (qkv, torch.ones(qkv.shape[:2]), proj_q, proj_k)])
    )
    assert not np.isin(got.numpy(), np.arange(20, 40)).any()
    qkv[:, 1 + 10, width : 2 * width] = torch.nan  # a key: spoils every softmax
    assert (run(case, [qkv, proj_q, proj_k]) == torch.arange(5, dtype=torch.int32)).all()


@pytest.mark.parametrize("few", [1, 3])
def test_few_distinct_scores(few: int) -> None:
    """Many keys alike: the bracket closes on one value, and its ties are counted."""
    case = case_of("KeySelect", 64, num_heads=1, num_prefix=0, value_power=0.0, keys=13)
    qkv, proj_q, proj_k = tensors(case)
    qkv = qkv[:, torch.arange(64) % few]
    sizes = torch.ones(qkv.shape[:2])
    expected = run_reference(case, [x.numpy() for x in (qkv, sizes, proj_q, proj_k)])
    got = run(case, [qkv, proj_q, proj_k]).numpy()
    assert (np.diff(got, axis=-1) > 0).all()
    np.testing.assert_array_equal(np.sort(got % few, -1), np.sort(expected % few, -1))


@pytest.mark.parametrize(
    "factors",
    [2.0 ** (np.arange(150) % 16), np.where(np.arange(150) % 2, 1.0, 300.0), np.where(np.arange(150) == 77, 1e4, 1.0)],
    ids=["geometric", "two clusters", "an outlier"],
)
def test_scores_that_are_nothing_like_normal(factors: np.ndarray) -> None:
    """Secants lead astray: halvings see to the end."""
    case = case_of("KeySelect", 150, num_heads=1, num_prefix=0, value_power=0.0, cell=0, keys=40)
    qkv, proj_q, proj_k = tensors(case)
    width = qkv.shape[-1] // 3
    qkv[..., width : 2 * width] *= torch.from_numpy(factors.astype(np.float32))[None, :, None]
    sizes = torch.ones(qkv.shape[:2])
    expected = run_reference(case, [x.numpy() for x in (qkv, sizes, proj_q, proj_k)])
    np.testing.assert_array_equal(run(case, [qkv, proj_q, proj_k]).numpy(), expected)


def test_winners_are_written_in_parts() -> None:
    case = case_of("KeySelect", 300, num_heads=1, keys=70)
    given = dict(zip(("qkv", "proj_q", "proj_k"), tensors(case), strict=True))
    plan = plan_select([x.shape for x in given.values()], case.attributes, "float32")
    last = plan.launches[-1]
    parts = dataclasses.replace(last, constants={**last.constants, "block_v": 64})
    split = dataclasses.replace(plan, launches=(*plan.launches[:-1], parts))
    assert torch.equal(launch(split, given)["indices"], launch(plan, given)["indices"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_logit_far_above_the_sample_is_taken_again(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One listed key, of none that is looked at before, has logits that float16 cannot hold beside the others'."""
    case = case_of("SparseAttention", 150, num_heads=1)
    qkv, indices = tensors(case, dtype=dtype)
    width = qkv.shape[-1] // 3
    lists = torch.arange(0, 140, 2, dtype=indices.dtype).expand(*indices.shape[:3], -1).contiguous()
    given = [qkv.clone(), lists]
    listed = int(lists[0, 0, 0, 1]) + case.attributes["num_prefix"]
    rows = slice(case.attributes["num_prefix"], case.attributes["num_prefix"] + case.attributes["tile"])
    # So that this key's logit is some 60 in base 2, and that of others as it was.
    given[0][0, rows, 0], given[0][0, :, width], given[0][0, listed, width] = 8, 0, 60 / case.attributes["scale"] / 11.5
    calls: list[int] = []
    again = attend._tile_again
    monkeypatch.setattr(attend, "_tile_again", lambda *args: (calls.append(1), again(*args))[1])
    hold(case, given, run(case, given), dtype)
    assert len(calls) == (dtype == "float16")


def test_everything_selected_is_dense_attention() -> None:
    case = case_of("SparseAttention", 37, cell=10)
    qkv, lists = tensors(case)
    everything = torch.arange(37, dtype=torch.int32).expand(*lists.shape[:3], 37)
    heads = case.attributes["num_heads"]
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=case.attributes["scale"])
    close(run(case, [qkv, everything]), dense.transpose(1, 2).flatten(2), 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_twice_the_same_bits(dtype: str) -> None:
    first = (case_of(name, 40) for name in ("MatchTokens", "MergeTokens", "KeySelect"))
    for case in (*first, case_of("SparseAttention", 40, cell=7)):
        given = tensors(case, dtype=dtype)
        assert run(case, given).numpy().tobytes() == run(case, given).numpy().tobytes()


@pytest.mark.parametrize("patches", [37, 16])
def test_selection_stays_within_its_tensors(patches: int) -> None:
    case = case_of("KeySelect", patches, cell=7)
    given = dict(zip(("qkv", "proj_q", "proj_k"), tensors(case, width=24), strict=True))
    plan = plan_select([x.shape for x in given.values()], case.attributes, "float32")
    inside, guards = guarded(plan, given)
    assert torch.equal(launch(plan, inside)["indices"], run(case, list(given.values())))
    assert untouched(guards)


@pytest.mark.parametrize("case", [case_of("SparseAttention", 37, num_prefix=5, cell=7), PAPER], ids=str)
def test_attention_stays_within_its_tensors(case: Case) -> None:
    """What was never written is NaN here: reading it would show in the result."""
    qkv, lists = tensors(case, width=24)
    shapes = [qkv.shape, lists.shape]
    plan = plan_attend(shapes, case.attributes, "float32")
    inside, guards = guarded(plan, {"qkv": qkv, "indices": lists})
    done = launch(plan, inside)
    assert torch.equal(done["output"], run(case, [qkv, lists]))
    assert untouched(guards)


@pytest.mark.parametrize("case", [case_of("SparseAttention", 37, cell=7), PAPER], ids=str)
def test_wild_indices_touch_nothing_outside(case: Case) -> None:
    qkv, lists = tensors(case)
    wild = torch.randint(-(2**31), 2**31 - 1, lists.shape, dtype=torch.int32)
    wild[..., 0] = 2**31 - 1
    plan = plan_attend([qkv.shape, lists.shape], case.attributes, "float32")
    inside, guards = guarded(plan, {"qkv": qkv, "indices": wild})
    assert torch.isfinite(launch(plan, inside)["output"]).all()
    assert untouched(guards)


def test_compiled_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("SparseAttention", 20, tile=8, cell=7)
    select = case_of("KeySelect", 20, tile=8, cell=7, probe=4)
    qkv, proj_q, proj_k = tensors(select)

    def attend(qkv: torch.Tensor) -> Any:
        return run(case, [qkv, run(select, [qkv, proj_q, proj_k])])

    compiled: Any = torch.compile(attend, backend="eager", fullgraph=True)
    assert torch.equal(compiled(qkv), attend(qkv))


def test_where_a_gradient_may_follow_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    case, select = case_of("SparseAttention", 37, cell=7), case_of("KeySelect", 37, tile=8, probe=4, cell=10, keys=9)
    (qkv, lists), (x, *projections) = tensors(case), tensors(select, width=32)
    weights = torch.randn(1, 38, 8)
    assert triton_layer(select.attributes, x.requires_grad_(), None, *projections) is None
    got = gradients(case, qkv, lists, weights)
    monkeypatch.setenv(VARIABLE, "torch")
    assert torch.equal(got, gradients(case, qkv, lists, weights))
