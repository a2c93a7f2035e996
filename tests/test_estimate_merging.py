"""The estimate of models that merge tokens, of models without a bundle, and the page of boards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsifiner_edge.bundle.kernels import table_file
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape
from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.plan import plan_of
from sparsifiner_edge.profiles import roofline
from sparsifiner_edge.profiles.boards.board import load_board
from sparsifiner_edge.profiles.estimate import estimate_model, peak_activations
from sparsifiner_edge.profiles.roofline import CPU_FIT, GPU_FIT, Workload
from sparsifiner_edge.records import write_record
from tests.estimates import BOARDS, DENSE, EDGE, VIT_S, changed, counted, merged, total
from tests.plain import estimate_bundle


def test_what_merging_costs_by_hand() -> None:
    """Two layers that merge 4 and 2 of 40 patches: tokens, traffic and launches of each."""
    shape = ModelShape(3, 2, 64, 256, 1, 40, 16)
    work = Workload(shape, SparsityConfig(keep=1, merge=(4, 2, 0), merge_window=8))
    found = [o for o in roofline.operators(work) if o.kind == "pruning" and o.layer >= 0]
    assert [(o.layer, o.launches) for o in found] == [(0, 0), (0, 8), (1, 0), (1, 8)]
    ranking, moving = found[:2]
    # Means of keys over the heads' channels, then 20 seekers look at 8 partners of 32 channels.
    assert ranking.macs == 41 * 64 + 20 * 8 * 32
    assert ranking.activations == 41 * 64
    assert moving.activations == 64 * (41 + 37)
    assert (moving.macs, moving.scores) == (0, 0)
    attention = [o.macs for o in roofline.operators(work) if o.kind == "attention"]
    assert attention == [2 * tokens**2 * 64 for tokens in (41, 37, 35)]
    linear = [o.macs for o in roofline.operators(work) if o.kind == "mlp"]
    assert linear == [2 * tokens * 64 * 256 for tokens in (37, 35, 35)]  # After the merge.
    bodies = roofline.operators(dataclasses.replace(work, merging="bodies", batch=3))
    moving = next(o for o in bodies if o.kind == "pruning" and o.launches)
    assert (moving.launches, moving.scores) == (25, 3 * 2 * 20 * 8 * 32)
    compiled = roofline.operators(dataclasses.replace(work, merging="kernels"))
    assert [(o.launches, o.scores) for o in compiled if o.kind == "pruning" and o.launches] == [(10, 0), (10, 0)]
    board = load_board("jetson-orin-nano-8gb")
    launches = sum(o.launches for o in bodies)
    plain = sum(o.launches for o in roofline.operators(Workload(shape, DENSE)))
    assert launches == plain + 2 * 25
    least = launches * GPU_FIT.launch_us * 1e-6
    assert total(dataclasses.replace(work, merging="bodies"), board) > least


@settings(max_examples=60, deadline=None)
@given(board=BOARDS, patches=st.integers(600, 3000), rate=st.integers(0, 100), more=st.integers(0, 40))
def test_merging_more_never_costs_more_in_a_later_layer(board: str, patches: int, rate: int, more: int) -> None:
    def layers(work: Workload) -> dict[tuple[int, str], float]:
        found: dict[tuple[int, str], float] = {}
        for cost in roofline.costs(work, load_board(board), "fp16", GPU_FIT):
            key = cost.operator.layer, cost.operator.kind
            found[key] = found.get(key, 0.0) + cost.seconds
        return found

    less, greater = (
        layers(dataclasses.replace(merged(patches), sparsity=SparsityConfig(keep=1, merge=(r,) + (0,) * 11)))
        for r in (rate, rate + more)
    )
    for key, seconds in greater.items():
        if key[0] > 0 or key[1] in ("mlp", "projections", "attention"):
            assert seconds <= less[key], key
    assert rate or not any(kind == "pruning" for _, kind in less)


def test_nothing_merged_is_the_unmerged_model() -> None:
    """Without a pair, whatever the window and whoever would run it."""
    for base in (DENSE, EDGE):
        for merging in roofline.MERGE_LAUNCHES:
            still = dataclasses.replace(base, merge=(0, 0), merge_window=64)
            work = Workload(VIT_S, still, merging=merging)
            assert roofline.operators(work) == roofline.operators(Workload(VIT_S, base))
            assert peak_activations(work, 2) == peak_activations(Workload(VIT_S, base), 2)


def test_merging_runs_by_bodies_where_there_are_no_kernels_for_it(tmp_path: Path) -> None:
    def launches(board: str, **options: Any) -> float:
        """Of merging, in microseconds at most."""
        result = estimate_bundle(folder, board, **options)
        operators = {o["kind"]: o for o in result["statistics"]["operators"]}
        return float(operators["pruning"]["ms"] * 1e3)

    def carried(names: str) -> Any:
        """By a table for SM 86 of the launches that `names` names, each of the same code."""
        launch = {
            "symbol": "k",
            "grid": [1, 1],
            "threads": 128,
            "shared": 0,
            "inputs": [],
            "outputs": [],
            "tensors": {},
        }
        table = {
            "schema_version": 1,
            "launches": {f"{n}_1": launch | {"kernel": n} for n in names.split()},
            "nodes": {},
        }
        (folder / "kernels").mkdir(exist_ok=True)
        (folder / table_file(86)).write_text(json.dumps(table))
        changed(folder, {})
        return estimate_bundle(folder, "rtx-3060")

    folder = counted(tmp_path / "merged", sparsity=SparsityConfig(keep=0.25, merge=(40, 0)))
    least = 11 * GPU_FIT.launch_us
    assert 10 * least <= launches("rtx-3060", kernels="native") < 25 * least <= launches("rtx-3060", kernels="portable")
    assert launches("rtx-3060") == launches("rtx-3060", kernels="portable")
    found = carried("select attend")
    assert found["method"]["kernels"]["because"].endswith("for SM 86, but none that merge tokens")
    assert launches("rtx-3060") == launches("rtx-3060", kernels="portable")
    assert "none" not in carried("select attend pairs merge")["method"]["kernels"]["because"]
    assert launches("rtx-3060") == launches("rtx-3060", kernels="native")
    assert launches("cpu-generic") < launches("cpu-generic", kernels="portable")
    assert launches("cpu-generic") >= 11 * 8 * CPU_FIT.launch_us


def test_bounds_are_wide_where_tokens_merge_on_a_gpu(tmp_path: Path) -> None:
    """Nobody published what that takes; on a CPU it is as sure as the rest."""
    merging = counted(tmp_path / "merged", sparsity=SparsityConfig(keep=1, merge=(160, 0)))
    plain = counted(tmp_path / "plain")
    width = {}
    for name, folder in (("merged", merging), ("plain", plain)):
        for board, precision in (("jetson-orin-nano-8gb", "fp16"), ("cpu-generic", "fp32")):
            found = estimate_bundle(folder, board, precision=precision)["statistics"]["latency_ms"]
            width[name, board] = found["high"] / found["low"]
    assert width["merged", "jetson-orin-nano-8gb"] > 1.2 * width["plain", "jetson-orin-nano-8gb"]
    assert width["merged", "cpu-generic"] <= CPU_FIT.spread**2


def test_memory_is_of_the_tokens_that_a_layer_sees() -> None:
    """Sparse layers behind a merge gather less; the first layer's other tensors are as large as before."""
    late = (1.0, 1.0, 1.0, 0.1)
    sparsity = SparsityConfig(keep=late, merge=(300, 300, 200) + (0,) * 9)
    work = Workload(VIT_S, sparsity, portable=True, merging="bodies")
    layer, scores = peak_activations(work, 2)
    seen = plan_of(sparsity, 12, 1369).tokens(1369)[3]  # The first sparse layer.
    assert seen == 1369 - 300 - 1069 // 4 - 200
    alone = ModelShape(1, 6, 384, 1536, 1, seen, 14)
    _, expected = peak_activations(Workload(alone, SparsityConfig(keep=0.1), portable=True), 2)
    assert scores == max(expected, 4 * (1369 // 2) * 16 * 64)
    assert layer == peak_activations(Workload(VIT_S, DENSE), 2)[0]


@pytest.mark.parametrize("sparsity", [DENSE, EDGE, SparsityConfig(keep=(0.1, 1.0), merge=(160, 0))])
@pytest.mark.parametrize("kernels", ["native", "portable"])
def test_a_model_without_a_bundle_is_estimated_alike(tmp_path: Path, sparsity: SparsityConfig, kernels: str) -> None:
    board = load_board("jetson-agx-orin-64gb")
    bundle = estimate_bundle(counted(tmp_path / "b", sparsity=sparsity), board, precision="fp16", kernels=kernels)
    found = write_record(estimate_model(VIT_S, sparsity, board, "fp16", kernels=kernels))
    statistics = bundle["statistics"]
    for name in ("latency_ms", "energy_j", "operators", "fits_memory"):
        assert found[name] == statistics[name]
    weights = 2 * (12 * 12 * 384**2 + (3 * 14 * 14 + 1370) * 384)
    own = found["memory_bytes"]["value"] - statistics["memory_bytes"]["value"]
    assert own == pytest.approx(1.1 * weights, rel=0.01)  # The bundle's file holds next to nothing.
    with pytest.raises(BackendError, match="kernels is 'fast'"):
        estimate_model(VIT_S, sparsity, board, "fp16", kernels="fast")
