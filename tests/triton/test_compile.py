"""Tests of ahead-of-time kernel compilation without a GPU: every generation, spills, launch parameters."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from sparsifiner_edge.bundle.kernels import MOST_SHARED_BYTES
from sparsifiner_edge.errors import BackendError, MissingExtraError
from sparsifiner_edge.ops.triton.compile import CAPABILITIES, Compiled, compile_launch, compile_schedule, resources
from sparsifiner_edge.ops.triton.schedule import Schedule, refusals
from sparsifiner_edge.ops.triton.schedule_layer import schedule_layer
from sparsifiner_edge.ops.triton.schedule_merge import schedule_merge, schedule_merging
from tests.everything import first

PATCHES, HEADS, KEYS = 1024, 6, 103
LAYERS: list[tuple[int, dict[str, Any]]] = [
    (87, {"tile": 64}),
    (90, {"tile": 64}),
    (90, {"dtype": "bfloat16", "tile": 64}),
    (87, {"tile": 128}),
    (89, {"dtype": "bfloat16", "width": 32}),
    *(
        (sm, {"tile": 64, **x})
        for sm in (87, 90)
        for x in ({"prefix": 0}, {"merged": True}, {"batch": 8, "query_pool": 16})
    ),
]
"""Capability and changes: without prefix, over merged tokens, with many tiles per program."""


MATCH = {"num_heads": 6, "num_prefix": 1, "window": 16, "merged": 160}


@pytest.fixture(autouse=True)
def _compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def layer(dtype: str = "float16", width: int = 64, tile: int = 16, **changes: Any) -> Schedule:
    """Return a layer over 1024 patches; `merged`, `batch` and `prefix` are changes besides its attributes."""
    settings = {"prefix": 1, "merged": False, "batch": 1, "query_pool": 8, **changes}
    key_pool = settings.pop("key_pool", 41)
    qkv = (settings["batch"], PATCHES + settings["prefix"], 3 * HEADS * width)
    a: dict[str, Any] = {
        "num_heads": HEADS,
        "num_prefix": settings["prefix"],
        "tile": tile,
        "key_pool": key_pool,
        "scale": width**-0.5,
        "query_pool": settings["query_pool"],
        "keys": KEYS,
        "value_power": 2.0,
    }
    shapes = [qkv, *([qkv[:2]] if settings["merged"] else []), *[(HEADS, width, 24)] * 2]
    assert refusals("KeySelect", a, [qkv, qkv[:2], *shapes[-2:]], dtype, 87) == []
    return schedule_layer(shapes, a, dtype)


def fits(made: Compiled) -> None:
    """Assert that it assembles for its GPU without spills, and is small enough for TensorRT's plugins."""
    assert made.cubin[:4] == b"\x7fELF"
    assert re.search(rf"^\.target sm_{made.capability}a?\b", made.ptx, re.MULTILINE)
    registers, spilled = resources(made)
    assert 0 < registers <= 255
    assert spilled == 0, f"{made.launch.kernel} spills {spilled} bytes on sm_{made.capability}"
    assert made.shared <= MOST_SHARED_BYTES or made.capability in (100, 110), "there export takes smaller blocks"


@pytest.mark.parametrize("capability", first(sorted(CAPABILITIES, key=lambda x: x != 87)))
def test_attention_compiles_for_every_generation(capability: int) -> None:
    schedule = layer()
    fits(compile_launch(schedule, schedule.launches[-1], capability))


@pytest.mark.everything
@pytest.mark.parametrize(("capability", "changes"), LAYERS, ids=str)
def test_every_variant_of_a_layer_compiles(capability: int, changes: dict[str, Any]) -> None:
    for made in compile_schedule(layer(**changes), capability):
        fits(made)


@pytest.mark.everything
@pytest.mark.parametrize(
    ("capability", "dtype", "width", "patches"), [(87, "float16", 72, 1369), (90, "bfloat16", 128, 16384)]
)
def test_merging_compiles(capability: int, dtype: str, width: int, patches: int) -> None:
    tokens, merged = patches + 1, patches // 8
    a = {"num_heads": HEADS, "num_prefix": 1, "window": 16, "merged": merged}
    shapes = [(1, tokens, 3 * HEADS * width), (1, tokens)]
    assert refusals("MatchTokens", a, shapes, dtype, capability) == []
    fewer = [(1, tokens, HEADS * width), (1, tokens), (1, tokens - merged, 2)]
    both = schedule_merging([*shapes, fewer[0], (1, 2 * patches)], a, dtype)
    for schedule in (both, schedule_merge(fewer, {}, dtype)):
        for made in compile_schedule(schedule, capability):
            fits(made)


PTXAS = Path(sys.prefix) / "cuda-12.6" / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
"""The assembler of CUDA 12.6, which JetPack 6's driver uses."""


@pytest.mark.everything
@pytest.mark.skipif(not PTXAS.is_file(), reason=f"CUDA 12.6's assembler is not installed: {PTXAS}")
@pytest.mark.parametrize(("changes", "most"), [({}, 0), ({"key_pool": 34}, 36), ({"merged": True}, 0)], ids=str)
def test_jetpack_6_assembles_without_spills_but_where_cells_are_most(changes: dict[str, Any], most: int) -> None:
    """With 31 background tokens and the class token, `attend` has no free register and spills a few."""
    merging = schedule_merging([(1, 1370, 1152), (1, 1370), (1, 1370, 384), (1, 1369)], MATCH, "float16")
    for schedule in (layer(tile=64, **changes), *([merging] if changes.get("merged") else [])):
        for made in compile_schedule(schedule, 87, 85):
            PTXAS.chmod(0o755)  # As in a wheel that was unpacked into a folder.
            registers, spilled = resources(made, PTXAS)
            assert 0 < registers <= 255
            assert spilled <= (most if made.launch.kernel == "attend" else 0), (made.launch.kernel, registers, spilled)


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = layer()
    with pytest.raises(BackendError, match=r"(?s)7\.5 .*8\.0 or more"):
        compile_launch(schedule, schedule.launches[0], 75)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="Unset it"):
        compile_launch(schedule, schedule.launches[0], 87)
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.delattr("sparsifiner_edge.ops.triton.attend")
    monkeypatch.setitem(sys.modules, "sparsifiner_edge.ops.triton.attend", None)
    with pytest.raises(MissingExtraError, match=r"\[triton\]"):
        compile_launch(schedule, schedule.launches[0], 87)
