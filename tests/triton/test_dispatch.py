"""Tests of kernel selection without a GPU: the reasons against a kernel, limits, and operation without Triton."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from sparsifiner_edge.ops.triton.schedule import refusals
from tests.triton.inputs import NAMES, case_of

QKV, SIZES = (1, 41, 24), (1, 41)
PROJECTIONS = [(1, 8, 4)] * 2


@pytest.mark.parametrize(
    ("name", "shapes", "changes", "reason"),
    [
        ("DenseAttention", [QKV, SIZES], {}, "no Triton kernel for DenseAttention"),
        ("SparseAttention", [QKV, SIZES, (1, 1, 3, 5)], {}, "together with the KeySelect"),
        ("KeySelect", [(1, 41, 25), SIZES, *PROJECTIONS], {}, "not a multiple"),
        ("KeySelect", [(1, 41, 3 * 72), SIZES, *[(1, 72, 4)] * 2], {}, "head dimension 72 exceeds 64"),
        ("KeySelect", [(1, 16386, 24), (1, 16386), *PROJECTIONS], {"key_pool": 999}, "patches 16385 exceeds"),
        ("KeySelect", [(1, 41, 3 * 64), SIZES, *[(1, 64, 65)] * 2], {}, "channels 65 exceeds 64"),
        ("KeySelect", [QKV, SIZES, *PROJECTIONS], {"key_pool": 0}, "key_pool 0 (no background tokens)"),
        (
            "KeySelect",
            [(1, 65, 24), (1, 65), *PROJECTIONS],
            {"key_pool": 2},
            "32 background tokens and 1 prefix tokens exceed the limit of 32",
        ),
        ("KeySelect", [(70000, 41, 24), (70000, 41), *PROJECTIONS], {}, "batch 70000"),
        ("MatchTokens", [(1, 16386, 24), (1, 16386)], {}, "patches 16385 exceeds"),
        ("MatchTokens", [(1, 41, 3 * 136), SIZES], {}, "head dimension 136 exceeds 128"),
        ("MatchTokens", [QKV, SIZES], {"window": 3}, "window 3 is odd"),
        ("MergeTokens", [(1, 2**20, 2**11), (1, 2**20), (1, 9, 2)], {}, "has 2147483648 elements"),
        ("MergeTokens", [QKV, SIZES, (1, 42, 2)], {}, "pairs must have shape"),
    ],
)
def test_refusals(name: str, shapes: Any, changes: Any, reason: str) -> None:
    attributes = case_of(name, 40, **changes).attributes if name in NAMES else {"num_heads": 1, "scale": 1.0}
    assert any(reason in found for found in refusals(name, attributes, shapes, "float16", 80))


def test_other_types_and_older_gpus_are_refused_and_nothing_else() -> None:
    for case in (case_of(name, 40) for name in NAMES):
        shapes = [x.shape for x in case.inputs()]
        for capability in (80, 87, 120):
            assert refusals(case.op.name, case.attributes, shapes, "bfloat16", capability) == []
        for dtype in ("float32", "float64"):
            assert f"got {dtype}" in refusals(case.op.name, case.attributes, shapes, dtype, 80)[0]
        assert "7.5 is below 8.0" in refusals(case.op.name, case.attributes, shapes, "float16", 75)[0]


def test_torch_runs_without_triton() -> None:
    script = (
        "import sys\nsys.modules['triton'] = None\nimport torch\nfrom sparsifiner_edge.ops import torch as ops\n"
        "out = ops.sparse_attention(torch.ones(1, 5, 24), torch.zeros(1, 1, 1, 1, dtype=torch.int32), num_heads=1,"
        " num_prefix=1, tile=4, key_pool=2, scale=1.0)\nassert out.shape == (1, 5, 8)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
