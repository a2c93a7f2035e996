"""The native kernels: against the NumPy reference on every instruction set of this machine, repeatable, bounded."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.kernels import NATIVE
from sparsifiner_edge.ops.schema import OPERATORS
from tests.everything import first
from tests.ops import matrix
from tests.ops.matrix import Case, body_model, cases, check, run_body, run_reference, run_torch
from tests.ops.test_parity import PAPER
from tests.plain import examine

SETS = ("AVX3", "AVX2", "SSE2") if os.uname().machine == "x86_64" else ("NEON",)


def session(case: Case, inputs: list[np.ndarray]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(native.library_path()))
    model = body_model(case, inputs).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_native(case: Case, inputs: list[np.ndarray]) -> np.ndarray:
    names = [t.name for t in case.op.inputs]
    return session(case, inputs).run(None, dict(zip(names, inputs, strict=True)))[0]


@pytest.fixture(params=(8, 64, 20, 72))
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Channels of a head: less than a vector, the usual, and two that leave remainders."""
    monkeypatch.setattr(matrix, "HEAD_DIM", request.param)
    return request.param


def test_the_library_was_built_and_doctor_says_so() -> None:
    path = native.library_path()
    assert path is not None, native.why_missing()
    found = examine()
    assert found["native_library"] == str(path)
    assert native.target() in found["native_library_reason"]


@pytest.mark.parametrize("name", NATIVE.operators)
def test_agrees_with_the_reference(name: str, width: int) -> None:
    for seed, case in enumerate(cases(name) + (PAPER if name == "SparseAttention" else [])):
        inputs = case.inputs(seed)
        check(case, inputs, run_native(case, inputs))


@pytest.mark.parametrize("name", NATIVE.operators)
def test_agrees_over_all_combinations(name: str) -> None:
    for seed, case in enumerate(cases(name, full=True)[::3]):
        inputs = case.inputs(seed)
        check(case, inputs, run_native(case, inputs))


@pytest.mark.parametrize("target", first(SETS))
def test_every_instruction_set_agrees(target: str) -> None:
    script = (
        "import sys\n"
        "from sparsifiner_edge.ops import native\n"
        "from sparsifiner_edge.ops.kernels import NATIVE\n"
        "from tests.native.test_kernels import run_native\n"
        "from tests.ops import matrix\n"
        "assert native.target() == sys.argv[1], native.target()\n"
        "for width in (64, 20):\n"
        "    matrix.HEAD_DIM = width\n"
        "    for name in NATIVE.operators:\n"
        "        for seed, case in enumerate(matrix.cases(name)):\n"
        "            inputs = case.inputs(seed)\n"
        "            matrix.check(case, inputs, run_native(case, inputs))\n"
    )
    environment = os.environ | {native.TARGET_VARIABLE: target}
    command = [sys.executable, "-c", script, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if f"'{target}': no instruction set" in done.stderr:
        pytest.skip(f"this machine has no {target}")
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_refused() -> None:
    script = "from sparsifiner_edge.runtime.processor import native_library; native_library('auto')"
    environment = os.environ | {native.TARGET_VARIABLE: "AVX9"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "BackendError" in done.stderr
    assert "SPARSIFINER_TARGET is 'AVX9'" in done.stderr


@settings(max_examples=60, deadline=None)
@given(
    patches=st.integers(1, 150), prefix=st.integers(0, 3), heads=st.integers(1, 3),
    tile=st.sampled_from([1, 8, 16, 48]), cell=st.integers(0, 40), keep=st.floats(0.01, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_agrees(patches: int, prefix: int, heads: int, tile: int, cell: int, keep: float, seed: int) -> None:
    keys = max(1, int(keep * patches))
    select = Case(
        OPERATORS["KeySelect"],
        {"num_heads": heads, "num_prefix": prefix, "probe": tile // 8 or 1, "tile": tile, "cell": cell, "keys": keys,
         "scale": 0.3, "value_power": 2.0},
        patches, 1,
    )  # fmt: skip
    inputs = select.inputs(seed)
    lists = run_native(select, inputs)
    check(select, inputs, lists)
    attend = Case(
        OPERATORS["SparseAttention"],
        {"num_heads": heads, "num_prefix": prefix, "tile": tile, "cell": cell, "scale": 0.3, "prefix_keys": 1},
        patches, 1,
    )  # fmt: skip
    given = [*inputs[:2], lists]
    check(attend, given, run_native(attend, given))


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
    prefix = case.attributes["num_prefix"]
    qkv, sizes = case.inputs()
    qkv[:, prefix:] = qkv[:, prefix, None]
    turned = qkv[:, prefix] * np.where(np.arange(qkv.shape[-1]) % 2, 1, -1)
    qkv[:, prefix + 1 :: 2] = turned[:, None]  # Seekers are alike, the sought are alike, and each pair as close.
    sizes[:] = 5
    sizes[:, [prefix + 20, prefix + 21]] = 1
    for run in (run_native, run_reference, run_torch, run_body):
        pairs = run(case, [qkv, sizes])[0]
        (made,) = pairs[pairs[:, 0] != pairs[:, 1]]
        assert made.tolist() == [prefix + 21, prefix + 20], run


def test_ties_infinities_and_nan() -> None:
    case = next(c for c in cases("KeySelect") if c.patches == 130 and c.attributes["keys"] == 40)
    inputs = case.inputs()
    inputs[0][:] = 1.0
    expected = np.broadcast_to(np.arange(40), run_reference(case, inputs).shape)
    np.testing.assert_array_equal(run_native(case, inputs), expected)
    inputs = case.inputs()
    qkv = inputs[0]
    width = qkv.shape[-1] // 3
    qkv[:, 101:, 2 * width :] = np.nan
    got = run_native(case, inputs)
    np.testing.assert_array_equal(got, run_reference(case, inputs))
    assert not np.isin(got, np.arange(110, 130)).any()
    qkv[:] = np.nan
    np.testing.assert_array_equal(run_native(case, inputs), expected)


@pytest.mark.parametrize("wrong", [-1, 130, 2**31 - 1, -(2**31)])
def test_indices_outside_touch_nothing_outside(wrong: int) -> None:
    case = next(c for c in cases("SparseAttention") if c.patches == 130 and c.attributes["cell"])
    qkv, sizes, lists = case.inputs()
    fine = run_native(case, [qkv, sizes, lists])
    spoiled = lists.copy()
    spoiled[:, 0, 0] = wrong
    got = run_native(case, [qkv, sizes, spoiled])
    assert got.shape == fine.shape
    rows = slice(case.prefix + case.attributes["tile"], None)
    np.testing.assert_array_equal(got[:, rows], fine[:, rows])  # other tiles are as they were
    unsorted = np.ascontiguousarray(lists[..., ::-1])
    np.testing.assert_allclose(run_native(case, [qkv, sizes, unsorted]), fine, atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 130, 2**31 - 1, -(2**31)])
def test_merged_tokens_outside_touch_nothing_outside(wrong: int) -> None:
    attend = next(c for c in cases("SparseAttention", merged=True) if c.patches == 130 and c.attributes["cell"])
    qkv, sizes, lists = attend.inputs()
    lists[:, 0, 0] = wrong
    assert run_native(attend, [qkv, sizes, lists]).shape == (*qkv.shape[:2], qkv.shape[2] // 3)
    merge = next(c for c in cases("MergeTokens") if c.patches == 130)
    x, sizes, pairs = merge.inputs()
    fine = run_native(merge, [x, sizes, pairs])
    pairs[:, 0] = wrong
    np.testing.assert_array_equal(run_native(merge, [x, sizes, pairs])[:, 1:], fine[:, 1:])


@pytest.mark.parametrize("name", NATIVE.operators)
def test_repeatable_and_indifferent_to_threads(name: str) -> None:
    case = next(c for c in cases(name) if c.batch == 2)
    inputs = case.inputs()
    feed = dict(zip([t.name for t in case.op.inputs], inputs, strict=True))
    ours = session(case, inputs)
    first = ours.run(None, feed)[0].tobytes()
    assert all(ours.run(None, feed)[0].tobytes() == first for _ in range(5))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(native.library_path()))
    alone = onnxruntime.InferenceSession(body_model(case, inputs).SerializeToString(), options)
    assert alone.run(None, feed)[0].tobytes() == first


def test_sessions_and_callers_in_parallel() -> None:
    jobs = []
    for name in NATIVE.operators:
        for case in cases(name)[:3]:
            inputs = case.inputs()
            feed = dict(zip([t.name for t in case.op.inputs], inputs, strict=True))
            ours = session(case, inputs)
            jobs += [(ours, feed, ours.run(None, feed)[0].tobytes())] * 2  # two callers of one session, too
    failures: list[str] = []

    def work(ours: Any, feed: dict[str, np.ndarray], expected: bytes) -> None:
        failures.extend("differs" for _ in range(40) if ours.run(None, feed)[0].tobytes() != expected)

    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.everything
def test_many_calls_do_not_grow() -> None:
    script = (
        "import json, resource, sys\n"
        "from tests.native.test_kernels import growing_session\n"
        "run = growing_session()\n"
        "def resident():\n"
        "    return int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1])\n"
        "for _ in range(2000): run()\n"
        "before = resident()\n"
        "for _ in range(int(sys.argv[1])): run()\n"
        "print(json.dumps(resident() - before))\n"
    )
    calls = "1000000"
    done = subprocess.run([sys.executable, "-c", script, calls], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) < 2048, f"grew by {done.stdout} kB"


def growing_session() -> Callable[[], Any]:
    """One small SparseAttention, bound for many calls."""
    case = next(c for c in cases("SparseAttention") if c.patches == 37)
    inputs = case.inputs()
    return functools.partial(
        session(case, inputs).run, None, dict(zip([t.name for t in case.op.inputs], inputs, strict=True))
    )


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("SparseAttention", {"tile": 3}, "indices must have shape"),
        ("SparseAttention", {"num_prefix": 500}, "leave no patch after 500"),
        ("SparseAttention", {"num_heads": 7}, r"qkv must have shape \[B, N, 3 \* num_heads \* d\]"),
        ("SparseAttention", {"prefix_keys": 0}, "prefix_keys 0 goes with tile 1"),
        ("KeySelect", {"keys": 5000}, "keys exceed the patches"),
        ("KeySelect", {"probe": 3}, "tile is not a multiple of probe"),
        ("KeySelect", {"scale": float("nan")}, "scale is nan"),
        ("DenseAttention", {"num_heads": 0}, "num_heads is 0"),
        ("MatchTokens", {"merged": 66}, "merged 66 exceeds half of the 130 patches"),
        ("MatchTokens", {"merged": 0}, "merged is 0"),
        ("MatchTokens", {"window": 0}, "window is 0"),
        ("MatchTokens", {"window": 3}, "window 3 is odd"),
    ],
)
def test_what_the_schema_refuses_is_refused(op: str, change: dict[str, Any], message: str) -> None:
    case = cases(op)[0]
    inputs = case.inputs()
    wrong = dataclasses.replace(case, attributes={**case.attributes, **change})
    model = body_model(wrong, inputs)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(native.library_path()))
    feed = dict(zip([t.name for t in case.op.inputs], inputs, strict=True))
    with pytest.raises(Exception, match=f"sparsifiner::{op}: .*{message}"):
        onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feed)


def test_the_native_node_itself_runs(tmp_path: Any) -> None:
    case = cases("DenseAttention")[0]
    inputs = case.inputs()
    kinds = {}
    for registered in (True, False):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        if registered:
            options.register_custom_ops_library(str(native.library_path()))
        onnxruntime.InferenceSession(body_model(case, inputs).SerializeToString(), options)
        kinds[registered] = {n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert kinds[True] == {"DenseAttention"}
    assert "Softmax" in kinds[False]
    assert "DenseAttention" not in kinds[False]
