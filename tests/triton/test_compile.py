"""Kernels compiled ahead of time, with no GPU: every generation, no spills, what a launcher is told."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from sparsifiner_edge.bundle.kernels import MOST_SHARED_BYTES
from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.ops.triton.compile import CAPABILITIES, Compiled, compile_launch, compile_plan, hidden_parameters
from sparsifiner_edge.ops.triton.plan import Plan, refusals
from sparsifiner_edge.ops.triton.plan_forward import plan_attend, plan_layer
from sparsifiner_edge.ops.triton.plan_merge import plan_match, plan_merge
from tests.everything import first

PATCHES, HEADS, KEYS = 1024, 6, 103
SOME: list[tuple[int, str, int, int, str, str]] = [
    (87, "float16", 64, 64, "layer", "summarise select attend"),
    (90, "float16", 64, 64, "layer", "summarise select"),
    (86, "float32", 64, 64, "layer", "summarise select membership rest attend"),
    (90, "bfloat16", 128, 64, "layer", "summarise select attend"),
    (80, "float16", 96, 16, "layer", "rest attend"),
    (120, "bfloat16", 32, 16, "layer", "summarise select"),
    (120, "float32", 128, 64, "layer", "summarise attend"),
    (87, "float16", 64, 128, "layer", "attend"),
]
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 110: 227, 120: 99}
"""Most shared memory of a block, by compute capability times ten: CUDA C++ Programming Guide."""


@pytest.fixture(autouse=True)
def _compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def plan_of(kind: str, capability: int, dtype: str, width: int, tile: int) -> Plan:
    qkv = (1, PATCHES + 1, 3 * HEADS * width)
    a: dict[str, Any] = {"num_heads": HEADS, "num_prefix": 1, "tile": tile, "cell": 41, "scale": width**-0.5}
    if kind == "layer":
        a |= {"probe": 8, "keys": KEYS, "value_power": 2.0}
        shapes = [qkv, (HEADS, width, 24), (HEADS, width, 24)]
        assert refusals("KeySelect", a, [qkv, qkv[:2], *shapes[1:]], dtype, capability) == []
        return plan_layer(shapes, a, dtype)
    a |= {"prefix_keys": 1}
    shapes = [qkv, (1, HEADS, PATCHES // tile, KEYS)]
    assert refusals("SparseAttention", a, [qkv, qkv[:2], *shapes[1:]], dtype, capability) == []
    return plan_attend(shapes, a, dtype)


def fits(made: Compiled) -> None:
    assert made.cubin[:4] == b"\x7fELF"
    assert re.search(rf"^\.target sm_{made.capability}a?\b", made.ptx, re.MULTILINE)
    assert 0 < made.registers <= 255
    assert made.shared <= SHARED_KIB[made.capability] << 10
    assert made.spilled == 0, f"{made.kernel} spills {made.spilled} bytes on sm_{made.capability}"


@pytest.mark.parametrize("capability", first(sorted(CAPABILITIES, key=lambda x: x != 87)))
def test_attention_compiles_for_every_generation(capability: int) -> None:
    plan = plan_of("attend", capability, "float16", 64, 16)
    fits(compile_launch(plan, plan.launches[-1], capability))


@pytest.mark.everything
@pytest.mark.parametrize("sample", SOME, ids=lambda x: "-".join(str(y).replace(" ", "+") for y in x))
def test_all_kernels_compile_somewhere(sample: tuple[int, str, int, int, str, str]) -> None:
    capability, dtype, width, tile, kind, kernels = sample
    plan = plan_of(kind, capability, dtype, width, tile)
    wanted = kernels.split()
    chosen = [launch for launch in plan.launches if launch.kernel in wanted]
    assert [launch.kernel for launch in chosen] == wanted
    for launch in chosen:
        fits(compile_launch(plan, launch, capability))


@pytest.mark.everything
@pytest.mark.parametrize("capability", [87, 90])
@pytest.mark.parametrize("changes", [{"prefix": 0}, {"merged": True}, {"batch": 8, "probe": 16}, {"cell": 0}], ids=str)
def test_every_variant_of_a_layer_compiles(changes: dict[str, Any], capability: int) -> None:
    """Without prefix, over merged tokens, with many tiles to a program, without cells."""
    settings = {"prefix": 1, "merged": False, "batch": 1, "probe": 8, "cell": 41, **changes}
    tokens, batch = PATCHES + settings["prefix"], settings["batch"]
    shapes = [(batch, tokens, 3 * HEADS * 64), *([(batch, tokens)] if settings["merged"] else [])]
    a = {
        "num_heads": HEADS, "num_prefix": settings["prefix"], "tile": 64, "cell": settings["cell"], "scale": 0.125,
        "probe": settings["probe"], "keys": KEYS, "value_power": 2.0,
    }  # fmt: skip
    plan = plan_layer([*shapes, *[(HEADS, 64, 24)] * 2], a, "float16")
    assert [launch.kernel for launch in plan.launches] == ["summarise", "select", "attend"]
    for made in compile_plan(plan, capability):
        fits(made)
        assert made.shared <= MOST_SHARED_BYTES


@pytest.mark.everything
@pytest.mark.parametrize(
    ("capability", "dtype", "width", "patches", "kernels"),
    [
        (87, "float16", 64, 1369, "metric partners suitors pairs merge"),
        (90, "float32", 128, 16384, "partners pairs merge"),
        (120, "bfloat16", 96, 16384, "metric partners pairs"),
    ],
)
def test_merging_compiles(capability: int, dtype: str, width: int, patches: int, kernels: str) -> None:
    tokens, merged = patches + 1, patches // 8
    a = {"num_heads": HEADS, "num_prefix": 1, "window": 16, "merged": merged}
    shapes = [(1, tokens, 3 * HEADS * width), (1, tokens)]
    assert refusals("MatchTokens", a, shapes, dtype, capability) == []
    match = plan_match(shapes, a, dtype)
    merge = plan_merge([(1, tokens, HEADS * width), (1, tokens), (1, tokens - merged, 2)], {}, dtype)
    chosen = [(plan, x) for plan in (match, merge) for x in plan.launches if x.kernel in kernels.split()]
    assert [x.kernel for _, x in chosen] == kernels.split()
    for plan, launch in chosen:
        made = compile_launch(plan, launch, capability)
        fits(made)
        assert made.shared <= MOST_SHARED_BYTES


@pytest.mark.everything
def test_what_a_launcher_is_told() -> None:
    plan = plan_of("attend", 87, "float16", 64, 64)
    made = compile_plan(plan, 87)
    assert [x.kernel for x in made] == ["summarise", "attend"]
    attend = made[-1]
    parameters = re.search(r"\.entry (\w+)\((.*?)\)", attend.ptx, re.DOTALL)
    assert parameters is not None
    assert parameters[1] == attend.symbol
    assert parameters[2].count(".param .u64") == len(attend.arguments) + attend.hidden
    assert [x.name for x in attend.arguments] == [
        "qkv", "indices", "cell_sums", "cell_sizes", "partial_out", "partial_stats", "output",
    ]  # fmt: skip
    assert attend.grid == (1 + 16, HEADS, 1)
    assert attend.threads == 128
    told = json.loads(json.dumps(attend.metadata()))
    assert told["arguments"][0] == {
        "name": "qkv", "dtype": "float16", "shape": [1, 1025, 3 * HEADS * 64], "role": "input",
    }  # fmt: skip


@pytest.mark.parametrize("hidden", [0, 1, 2])
def test_hidden_parameters_are_those_beyond_the_arguments(hidden: int) -> None:
    """Triton 3.4 writes one, 3.9 two."""
    parameters = ",\n".join(f"\t.param .u64 .ptr .global .align 1 k_param_{n}" for n in range(3 + hidden))
    ptx = (
        f".visible .entry other(\n\t.param .u64 other_param_0\n)\n{{\n}}\n.visible .entry k(\n{parameters}\n)\n{{\n}}\n"
    )
    assert hidden_parameters(ptx, "k", 3) == hidden
    with pytest.raises(BackendError, match=f"'k' takes {3 + hidden} parameters in its PTX, not the 9"):
        hidden_parameters(ptx, "k", 9)
    with pytest.raises(BackendError, match="'none' takes 0 parameters"):
        hidden_parameters(ptx, "none", 3)


def test_an_older_assembly_version() -> None:
    plan = plan_of("attend", 87, "float16", 64, 16)
    made = compile_launch(plan, plan.launches[0], 87, ptx_version=85)
    assert ".version 8.5" in made.ptx


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("attend", 87, "float16", 64, 16)
    with pytest.raises(BackendError, match=r"(?s)7\.5 .*8\.0 or more"):
        compile_launch(plan, plan.launches[0], 75)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="Unset it"):
        compile_launch(plan, plan.launches[0], 87)
    monkeypatch.delitem(sys.modules, "sparsifiner_edge.ops.triton.kernels", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingExtraError, match=r"sparsifiner-edge\[triton\]"):
        compile_launch(plan, plan.launches[0], 87)
