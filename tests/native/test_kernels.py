"""Tests of the native kernels on every instruction set of this machine: accuracy, repeatability, bounds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch

from sparsifiner_edge.ops import native
from sparsifiner_edge.ops import torch as ops
from sparsifiner_edge.ops.kernels import NATIVE
from sparsifiner_edge.ops.native.interface import Operators
from sparsifiner_edge.ops.torch_native import native_kernels
from tests.ops.matrix import PAPER, Case, body_model, cases, check, feed, run_body, run_native, run_reference, run_torch
from tests.plain import examine

SETS = ("AVX3", "AVX2", "SSE2") if os.uname().machine == "x86_64" else ("NEON",)
BF16_SETS = ("AMX", "AVX3_ZEN4", "NEON_BF16")
LACKING = pytest.mark.skipif(
    native.why_unusable() is None and native.target() not in BF16_SETS, reason="the processor multiplies no bfloat16"
)
PRECISIONS = [
    *((name, "float32") for name in NATIVE),
    *(pytest.param(name, "bfloat16", marks=LACKING) for name in NATIVE if name.endswith("Attention")),
]
WIDTHS = (8, 64, 17, 72)
"""Channels of a head: less than a vector, the usual, and two that leave remainders."""
OUTSIDE = (-1, 130, 2**31 - 1, -(2**31))


def session(case: Case, inputs: list[np.ndarray]) -> Callable[[], np.ndarray]:
    """Return a session of one node with the library, for repeated runs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(native.library_path()))
    ours = onnxruntime.InferenceSession(body_model(case, inputs), options, providers=["CPUExecutionProvider"])
    fed = feed(case.op.name, inputs)
    return lambda: ours.run(None, fed)[0]


def test_the_library_was_built_and_doctor_says_so() -> None:
    path = native.library_path()
    assert path is not None, native.NOT_BUILT
    found = examine()
    assert found["native_library"] == str(path)
    assert native.target() in found["native_library_reason"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_agrees_with_the_reference_on_any_number_of_threads(name: str, precision: str, width: int) -> None:
    chosen = cases(name, width=width) + cases(name, full=True, width=width)[:: 3 if width == 8 else 30]
    chosen += [dataclasses.replace(case, width=width) for case in PAPER * (name == "SparseAttention")]
    made = [(case, case.inputs(seed)) for seed, case in enumerate(chosen)]
    found = []
    for threads in (1, 2, 5):
        with contextlib.closing(Operators(threads, precision == "bfloat16")) as operators:
            assert operators.precision == precision
            results = [run_native(case, inputs, operators) for case, inputs in made]
        for (case, inputs), got in zip(made, results, strict=True):
            check(dataclasses.replace(case, dtype=precision), inputs, got)
        found.append([got.tobytes() for got in results])
    assert found[0] == found[1] == found[2]


@LACKING
def test_lists_of_one_query_and_prefix_rows_stay_float32() -> None:
    single = PAPER[0]
    assert (single.attributes["tile"], single.attributes["key_pool"]) == (1, 0)
    tiles = next(c for c in cases("SparseAttention") if c.prefix and c.attributes["tile"] > 1)
    with contextlib.closing(Operators(1, True)) as halves, contextlib.closing(Operators(1)) as exact:
        inputs = single.inputs()
        np.testing.assert_array_equal(run_native(single, inputs, halves), run_native(single, inputs, exact))
        inputs = tiles.inputs()
        got, wanted = run_native(tiles, inputs, halves), run_native(tiles, inputs, exact)
    np.testing.assert_array_equal(got[:, : tiles.prefix], wanted[:, : tiles.prefix])
    assert (got[:, tiles.prefix :] != wanted[:, tiles.prefix :]).any()


@pytest.mark.parametrize("name", NATIVE)
def test_onnx_runtime_calls_the_same_kernels(name: str) -> None:
    case = next(c for c in cases(name) if c.batch == 2)
    inputs = case.inputs()
    assert session(case, inputs)().tobytes() == run_native(case, inputs).tobytes()


def test_an_instruction_set_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.TARGET_VARIABLE, "AVX9")
    with pytest.raises(ValueError, match="SPARSIFINER_TARGET is 'AVX9': no instruction set"):
        native.target.__wrapped__()


def test_tokens_that_are_equal_or_nan_match_the_first() -> None:
    for case in cases("MatchTokens"):
        qkv, sizes = case.inputs()
        for value, size in ((1.0, 1), (0.0, 2), (np.nan, 3), (1.0, np.nan), (1.0, -1)):
            qkv[:], sizes[:] = value, size
            inputs = [qkv, sizes]
            np.testing.assert_array_equal(
                run_native(case, inputs), run_reference(case, inputs), err_msg=f"{case} {value} {size}"
            )


def test_of_pairs_as_close_the_smaller_merges() -> None:
    case = next(c for c in cases("MatchTokens") if c.patches == 37)
    case = dataclasses.replace(case, attributes={**case.attributes, "merged": 1})
    prefix = case.prefix
    qkv, sizes = case.inputs()
    qkv[:, prefix:] = qkv[:, prefix, None]
    turned = qkv[:, prefix] * np.where(np.arange(qkv.shape[-1]) % 2, 1, -1)
    # All sources are alike, all targets are alike, and all pairs equally similar.
    qkv[:, prefix + 1 :: 2] = turned[:, None]
    sizes[:] = 5
    sizes[:, [prefix + 20, prefix + 21]] = 1
    for run in (run_native, run_reference, run_torch, run_body):
        pairs = run(case, [qkv, sizes])[0]
        (made,) = pairs[pairs[:, 0] != pairs[:, 1]]
        assert made.tolist() == [prefix + 21, prefix + 20], run


@pytest.mark.parametrize("wrong", OUTSIDE)
@pytest.mark.parametrize("merged", [False, True])
def test_indices_outside_touch_nothing_outside(wrong: int, merged: bool) -> None:
    case = next(c for c in cases("SparseAttention", merged=merged) if c.patches == 130 and c.attributes["key_pool"])
    qkv, sizes, lists = case.inputs()
    fine = run_native(case, [qkv, sizes, lists])
    unsorted = np.ascontiguousarray(lists[..., ::-1])
    np.testing.assert_allclose(run_native(case, [qkv, sizes, unsorted]), fine, atol=1e-5)
    lists[:, 0, 0] = wrong
    rows = slice(case.prefix + case.attributes["tile"], None)
    got = run_native(case, [qkv, sizes, lists])
    np.testing.assert_array_equal(got[:, rows], fine[:, rows])  # other tiles are unchanged


@pytest.mark.parametrize("wrong", OUTSIDE)
def test_pairs_outside_touch_nothing_outside(wrong: int) -> None:
    merge = next(c for c in cases("MergeTokens") if c.patches == 130)
    x, sizes, pairs = merge.inputs()
    fine = run_native(merge, [x, sizes, pairs])
    pairs[:, 0] = wrong
    np.testing.assert_array_equal(run_native(merge, [x, sizes, pairs])[:, 1:], fine[:, 1:])


def test_sessions_and_callers_in_parallel() -> None:
    operators = Operators(3)
    jobs: list[tuple[Callable[[], np.ndarray], bytes]] = []
    for name in NATIVE:
        for case in cases(name)[:3]:
            inputs = case.inputs()
            ours, shared = session(case, inputs), functools.partial(run_native, case, inputs, operators)
            jobs += [(ours, ours().tobytes())] * 2 + [(shared, shared().tobytes())]  # two callers of one session, too
    failures: list[str] = []

    def work(run: Callable[[], np.ndarray], expected: bytes) -> None:
        failures.extend("differs" for _ in range(40) if run().tobytes() != expected)

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    operators.close()
    assert failures == []


@pytest.mark.parametrize("name", ["KeySelect", "SparseAttention"])
def test_torch_runs_them_where_it_is_told_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    plain = Operators.run
    monkeypatch.setattr(Operators, "run", lambda self, op, *rest: (ran.append(op), plain(self, op, *rest))[1])
    call = ops.key_select if name == "KeySelect" else ops.sparse_attention
    for seed, case in enumerate(cases(name)):
        inputs = case.inputs(seed)
        first_one, sizes, *rest = (torch.from_numpy(x) for x in inputs)
        options = {**case.attributes, "sizes": sizes if case.merged else None}
        with native_kernels(2):
            got = call(first_one, *rest, **options)
            assert ran == [name]
            if name.endswith("Attention"):
                again = call(first_one.clone().requires_grad_(), *rest, **options)
                assert again.requires_grad
                torch.testing.assert_close(again.detach(), got, rtol=1e-4, atol=1e-5)
        check(case, inputs, got.numpy())
        call(first_one, *rest, **options)
        assert ran == [name]
        ran.clear()
