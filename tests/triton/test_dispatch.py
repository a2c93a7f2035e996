"""Which kernels run an operator, without a GPU: the choice and its reasons, limits, and life without Triton."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsifiner_edge.errors import BackendError, ConfigError, MissingExtraError
from sparsifiner_edge.ops.triton import VARIABLE, Choice, kernels_for
from sparsifiner_edge.ops.triton.plan import refusals
from sparsifiner_edge.ops.triton.plan_forward import plan_attend, plan_layer
from sparsifiner_edge.ops.triton.plan_merge import plan_match, plan_merge
from tests.triton.inputs import NAMES, case_of, hold, run, tensors

SELECT = case_of("KeySelect", 40)
ATTEND = case_of("SparseAttention", 40)


def choose(case: Any = ATTEND, device: str = "cpu", dtype: str = "float32") -> Choice:
    qkv = SimpleNamespace(device=SimpleNamespace(type=device), dtype=f"torch.{dtype}")
    return kernels_for(case.op.name, case.attributes, [x.shape for x in case.inputs()], qkv)


def test_on_a_cpu_torch_runs_and_says_why() -> None:
    qkv = torch.zeros(1, 2, 3)
    assert kernels_for("KeySelect", {}, [], qkv) == Choice("torch", ("the tensors are on cpu, not on a CUDA GPU",))


def test_a_gpu_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose(device="cuda") == Choice("torch", ("triton is not installed",))
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(MissingExtraError, match=r"sparsifiner-edge\[triton\]"):
        choose(device="cuda")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the extra `triton` is not installed")
def test_a_gpu_runs_triton_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 7))
    assert choose(device="cuda") == Choice("triton")
    assert choose(SELECT, device="cuda", dtype="float16") == Choice("triton")
    wide = case_of("SparseAttention", 400, tile=200)
    assert choose(wide, device="cuda") == Choice("torch", ("tile 200 exceeds 128",))
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(BackendError, match="tile 200 exceeds 128"):
        choose(wide, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(BackendError, match=r"compute capability 7\.5 is below 8\.0"):
        choose(device="cuda")


def test_the_variable_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    assert choose(device="cuda") == Choice("torch", (f"{VARIABLE} is torch",))
    monkeypatch.setenv(VARIABLE, "cutlass")
    with pytest.raises(ConfigError, match="cutlass"):
        choose()
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises((BackendError, MissingExtraError)):
        run(ATTEND, tensors(ATTEND))


@pytest.mark.parametrize(
    ("name", "shapes", "changes", "capability", "dtype", "reason"),
    [
        ("DenseAttention", [(1, 41, 24), (1, 41)], {}, 80, "float32", "no Triton kernel for DenseAttention"),
        ("SparseAttention", [(1, 41, 24), (1, 41), (1, 1, 3, 5)], {}, 75, "float32", "capability 7.5 is below 8.0"),
        ("SparseAttention", [(1, 41, 24), (1, 41), (1, 1, 3, 5)], {}, 80, "float64", "got float64"),
        ("SparseAttention", [(1, 41, 25), (1, 41), (1, 1, 3, 5)], {}, 80, "float32", "not a multiple"),
        ("SparseAttention", [(1, 41, 408), (1, 41), (1, 1, 3, 5)], {}, 80, "float32", "head dimension 136 exceeds"),
        ("SparseAttention", [(1, 2**20, 3072), (1, 2**20), (1, 1, 2**16, 5)], {}, 80, "float32", "above 2^31"),
        ("SparseAttention", [(70000, 41, 24), (70000, 41), (70000, 1, 3, 5)], {}, 80, "float32", "batch 70000"),
        ("KeySelect", [(1, 16386, 24), (1, 16386), *[(1, 8, 4)] * 2], {}, 80, "float32", "patches 16385 exceeds"),
        ("KeySelect", [(1, 41, 3 * 72), (1, 41), *[(1, 72, 65)] * 2], {}, 80, "float32", "channels 65 exceeds 64"),
        ("MatchTokens", [(1, 16386, 24), (1, 16386)], {}, 80, "float32", "number of patches 16385 exceeds"),
        ("MatchTokens", [(1, 41, 3 * 136), (1, 41)], {}, 80, "float32", "head dimension 136 exceeds 128"),
        ("MatchTokens", [(1, 41, 24), (1, 41)], {"window": 3}, 80, "float32", "window 3 is odd"),
        ("MatchTokens", [(1, 41, 24), (1, 41)], {"num_heads": 70000}, 80, "float32", "not a multiple"),
        ("MatchTokens", [(70000, 41, 24), (70000, 41)], {}, 80, "float32", "batch 70000"),
        ("MergeTokens", [(1, 41, 24), (1, 41), (1, 30, 2)], {}, 80, "float64", "x must be float32, float16, bfloat16"),
        ("MergeTokens", [(1, 2**20, 2**11), (1, 2**20), (1, 9, 2)], {}, 80, "float32", "x has 2147483648 elements"),
        ("MergeTokens", [(70000, 4, 8), (70000, 4), (70000, 2, 2)], {}, 80, "float32", "batch 70000"),
        ("MergeTokens", [(1, 41, 24), (1, 41), (1, 42, 2)], {}, 80, "float32", "pairs must have shape"),
    ],
)
def test_refusals(name: str, shapes: Any, changes: Any, capability: int, dtype: str, reason: str) -> None:
    attributes = case_of(name, 40, **changes).attributes if name in NAMES else {"num_heads": 1, "scale": 1.0}
    assert any(reason in found for found in refusals(name, attributes, shapes, dtype, capability))


def test_nothing_is_refused_in_vain() -> None:
    for capability in (80, 87, 120):
        for case in (case_of(name, 40) for name in NAMES):
            shapes = [x.shape for x in case.inputs()]
            assert refusals(case.op.name, case.attributes, shapes, "float16", capability) == []


def test_torch_runs_without_triton() -> None:
    script = (
        "import sys\nsys.modules['triton'] = None\nimport torch\nfrom sparsifiner_edge.ops import torch as ops\n"
        "out = ops.sparse_attention(torch.ones(1, 5, 24), torch.zeros(1, 1, 1, 1, dtype=torch.int32), num_heads=1,"
        " num_prefix=1, tile=4, cell=2, scale=1.0)\nassert out.shape == (1, 5, 8)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plans_name_only_buffers_they_have() -> None:
    for cell in (0, 7):
        case = case_of("SparseAttention", 40, cell=cell)
        shapes = [x.shape for x in tensors(case)]
        for plan in (
            plan_attend(shapes, case.attributes, "float16"),
            plan_attend(shapes, case.attributes, "float32"),
        ):
            used = {buffer for launch in plan.launches for buffer in launch.arguments.values()}
            assert used - {None} <= set(plan.buffers)
            scratch = {name for name, buffer in plan.buffers.items() if buffer.role == "scratch"}
            assert scratch <= used


def test_merging_is_four_launches_and_one() -> None:
    for name, make, kernels in (
        ("MatchTokens", plan_match, ["metric", "partners", "suitors", "pairs"]),
        ("MergeTokens", plan_merge, ["merge"]),
    ):
        case = case_of(name, 40)
        plan = make([x.shape for x in tensors(case)], case.attributes, "float16")
        assert [launch.kernel for launch in plan.launches] == kernels
        assert {buffer for launch in plan.launches for buffer in launch.arguments.values()} == set(plan.buffers)
        inputs = [buffer.name for buffer in plan.buffers.values() if buffer.role == "input"]
        assert sorted(inputs) == sorted(x.name for x in case.op.inputs)


def test_a_layer_is_three_launches() -> None:
    case = case_of("KeySelect", 1024, num_heads=6, tile=64, probe=8, cell=41, keys=103)
    shapes = [x.shape for x in tensors(case, width=64)]
    for dtype in ("float16", "bfloat16"):
        plan = plan_layer(shapes, case.attributes, dtype)
        assert [launch.kernel for launch in plan.launches] == ["summarise", "select", "attend"]
        used = {buffer for launch in plan.launches for buffer in launch.arguments.values()}
        assert used - {None} == set(plan.buffers)


def test_torch_still_runs_here() -> None:
    given = tensors(SELECT)
    hold(SELECT, given, run(SELECT, given), "float32")
