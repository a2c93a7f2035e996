"""The roofline of GPUs: held against published speeds, its counts against what plans say must be multiplied."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # its scripts import each other by name

import gpu_bound
import gpu_published
from gpu_roofline import LaunchWork, Work, gpu, resources, seconds
from gpu_work import work_of

from sparsifiner_edge.ops.triton.compile import compile_launch

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_it_gives_published_speeds() -> None:
    """FlashAttention-2 and -3 on an H100, FlashAttention-2 on an RTX A5000, from 512 to 16,384 tokens."""
    rows = gpu_published.compare(gpu_published.recorded())
    assert len(rows) == 17
    assert all(abs(row["ratio"] - 1) <= gpu_published.WITHIN for row in rows), rows


@pytest.mark.parametrize(("capability", "tile"), [(87, 64), (90, 128)])
def test_products_are_counted_as_often_as_they_are_made(capability: int, tile: int) -> None:
    """Loops are told apart and unrolled rounds counted: what the matrix units multiply follows from the plan."""
    tokens = 2305
    plan = gpu_bound.layer(tokens, 0.10, 1, tile)
    works = {
        step.kernel: work_of(compile_launch(plan, step, capability), plan) for step in plan.launches[1:]
    }  # fmt: skip
    made = {
        name: sum(k.programs * k.warps * (k.products + k.warp_products) for k in work.kinds)
        for name, work in works.items()
    }
    constants = {step.kernel: dict(step.constants) for step in plan.launches}
    c = constants["select"]
    blocks = math.ceil((tokens - 1) / c["block_n"])
    once = c["numbers"] * c["block_g"] * c["block_n"] * c["block_c"]
    grid = math.prod(plan.launches[1].grid)
    assert made["select"] == pytest.approx(grid * once * 2 * blocks, rel=0.1)
    c = constants["attend"]
    listed = math.ceil(c["keys"] / c["block_t"]) * c["block_t"]
    pairs = c["tiles"] * gpu_bound.HEADS * c["block_m"] * (listed + 32)
    attention = 2 * pairs * gpu_bound.WIDTH
    summed = c["tiles"] * gpu_bound.HEADS * 2 * 16 * (listed + c["block_n"]) * gpu_bound.WIDTH
    # And sums of weights and counts, eight columns wide; the compiler makes some of the last few twice.
    assert attention + summed <= made["attend"] <= 1.35 * (attention + summed)


def test_more_work_takes_longer_and_squares_add_up() -> None:
    on = gpu("jetson-orin-nano-8gb-super")
    idle = Work(80, 4, 0, 0, 0, 0, 0)
    busy = Work(80, 4, 1e6, 0, 0, 0, 0)
    alone = LaunchWork((busy,), 1000, 0, 0)
    assert seconds(LaunchWork((idle,), 2, 0, 0), on) == pytest.approx(on.launch_s)
    issue = resources(alone, on)["issue"]
    assert issue == pytest.approx(10 * 4 * 1e6 / 4 / on.clock)
    moved = LaunchWork((busy,), 1000, 0, issue * 0.9 * 102e9)
    gap = on.launch_s
    assert seconds(moved, on) - gap == pytest.approx(math.sqrt(2) * (seconds(alone, on) - gap))
    # Few warps cannot hide what one waits for.
    assert resources(LaunchWork((busy,), 1, 0, 0), on)["latency"] > 2 * issue > resources(alone, on)["latency"]
