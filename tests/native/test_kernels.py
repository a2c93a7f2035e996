"""The native kernels: against the NumPy reference on every instruction set of this machine, repeatable, bounded."""

from __future__ import annotations

import contextlib
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

from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.kernels import NATIVE
from sparsifiner_edge.ops.native.interface import Operators
from tests.everything import first
from tests.ops import matrix
from tests.ops.matrix import Case, body_model, cases, check, run_body, run_native, run_reference, run_torch
from tests.ops.test_parity import PAPER
from tests.plain import examine

SETS = ("AVX3", "AVX2", "SSE2") if os.uname().machine == "x86_64" else ("NEON",)


def session(case: Case, inputs: list[np.ndarray]) -> Callable[[], np.ndarray]:
    """A node in ONNX Runtime with the library, to be run again and again."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(str(native.library_path()))
    model = body_model(case, inputs).SerializeToString()
    ours = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = dict(zip([t.name for t in case.op.inputs], inputs, strict=True))
    return lambda: ours.run(None, feed)[0]


@pytest.fixture(params=(8, 64, 20, 72))
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Channels of a head: less than a vector, the usual, and two that leave remainders."""
    monkeypatch.setattr(matrix, "HEAD_DIM", request.param)
    return request.param


def test_the_library_was_built_and_doctor_says_so() -> None:
    path = native.library_path()
    assert path is not None, native.NOT_BUILT
    found = examine()
    assert found["native_library"] == str(path)
    assert native.target() in found["native_library_reason"]


@pytest.mark.parametrize("name", NATIVE.operators)
def test_agrees_with_the_reference_on_any_number_of_threads(name: str, width: int) -> None:
    chosen = cases(name) + cases(name, full=True)[:: 3 if width == 8 else 30]
    made = [(case, case.inputs(seed)) for seed, case in enumerate(chosen + PAPER * (name == "SparseAttention"))]
    found = []
    for threads in (1, 2, 5):
        with contextlib.closing(Operators(threads)) as operators:
            results = [run_native(case, inputs, operators) for case, inputs in made]
        for (case, inputs), got in zip(made, results, strict=True):
            check(case, inputs, got)
        found.append([got.tobytes() for got in results])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("name", NATIVE.operators)
def test_onnx_runtime_calls_the_same_kernels(name: str) -> None:
    case = next(c for c in cases(name) if c.batch == 2)
    inputs = case.inputs()
    assert session(case, inputs)().tobytes() == run_native(case, inputs).tobytes()


@pytest.mark.parametrize("target", first((*SETS, "AVX9")))
def test_every_instruction_set_agrees(target: str) -> None:
    script = (
        "import sys\n"
        "from sparsifiner_edge.ops import native\n"
        "from sparsifiner_edge.ops.kernels import NATIVE\n"
        "from tests.ops import matrix\n"
        "assert native.target() == sys.argv[1], native.target()\n"
        "for width in (64, 20):\n"
        "    matrix.HEAD_DIM = width\n"
        "    for name in NATIVE.operators:\n"
        "        for seed, case in enumerate(matrix.cases(name)):\n"
        "            inputs = case.inputs(seed)\n"
        "            matrix.check(case, inputs, matrix.run_native(case, inputs))\n"
    )
    environment = os.environ | {native.TARGET_VARIABLE: target}
    command = [sys.executable, "-c", script, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if target == "AVX9":
        assert "SPARSIFINER_TARGET is 'AVX9': no instruction set" in done.stderr
        return
    if f"'{target}': no instruction set" in done.stderr:
        pytest.skip(f"this machine has no {target}")
    assert done.returncode == 0, done.stderr


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


def test_sessions_and_callers_in_parallel() -> None:
    operators = Operators(3)
    jobs: list[tuple[Callable[[], np.ndarray], bytes]] = []
    for name in NATIVE.operators:
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
    return session(case, case.inputs())


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
