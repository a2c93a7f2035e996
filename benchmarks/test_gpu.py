"""The roofline of GPUs against published speeds and plans, occupancy, and what is told of the kernels' main loop."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")

sys.path.insert(0, str(Path(__file__).parent))  # scripts here import each other by name

import gpu_bound
import gpu_published
from gpu_roofline import LaunchWork, Work, gpu, resources, seconds
from gpu_work import work_of
from occupancy import LIMITS, occupancy
from sass import counts, main_loop, read

from sparsifiner_edge.bundle.kernels import MOST_SHARED_BYTES
from sparsifiner_edge.ops.triton.compile import CAPABILITIES, compile_launch
from sparsifiner_edge.ops.triton.plan_layer import plan_layer

HEADS = 6


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
    once = c["block_g"] * c["block_n"] * c["block_c"]
    grid = math.prod(plan.launches[1].grid)
    assert made["select"] == pytest.approx(grid * once * (2 * blocks + 1), rel=0.1)
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


BUDGET = {87: 450, 90: 350}
"""Instructions of a warp for a block of 64 queries and 64 listed keys, sums of cells in."""


@pytest.mark.parametrize(
    ("capability", "tokens"), [*((x, 2305) for x in CAPABILITIES), (87, 1370), (87, 5477), (120, 1370)]
)
def test_the_main_loop_of_attention(capability: int, tokens: int) -> None:
    """What can be said of speed without a GPU: matrix units, copies that run ahead, no spills, few instructions."""
    patches = tokens - 1
    a = {
        "num_heads": HEADS, "num_prefix": 1, "tile": 64, "cell": -(-patches // 25), "scale": 0.125, "probe": 8,
        "keys": -(-patches // 10), "value_power": 2.0,
    }  # fmt: skip
    plan = plan_layer([(1, tokens, 3 * HEADS * 64), *[(HEADS, 64, 24)] * 2], a, "float16")
    made = compile_launch(plan, plan.launches[-1], capability)
    assert made.shared <= MOST_SHARED_BYTES or capability in (100, 110), "there export takes smaller blocks"
    body = main_loop(read(made.cubin))
    found = counts(body)
    # The sums of cells stand there twice, for either half of the cells: a block but one runs one of them.
    executed = len(body) - sum("_add_selected" in x.functions for x in body) / 2
    assert plan.launches[-1].constants["block_n"] == 64
    assert found["matrix"] > 0
    assert found["local"] == 0
    assert found["copy"] > 0
    # From 10.0 on the matrix units have memory of their own, to and from which their operands are moved.
    assert executed <= (600 if capability in (100, 110) else BUDGET.get(capability, 450)), dict(found)


@pytest.mark.parametrize(
    ("sizes", "blocks", "limit"),
    [
        ((90, 4, 168, 56 * 1024), 3, "registers"),  # 65536 registers / 128 threads x 168, a warp's whole
        ((86, 4, 96, 48 * 1024), 2, "shared memory"),  # 100 KiB / 49
        ((86, 8, 32, 1024), 6, "warps"),
        ((86, 1, 32, 9 * 1024), 10, "shared memory"),  # 100 KiB / 10
        ((80, 1, 32, 0), 32, "blocks"),
    ],
)
def test_occupancy(sizes: tuple[int, int, int, int], blocks: int, limit: str) -> None:
    found = occupancy(*sizes)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == blocks * sizes[1] / LIMITS[sizes[0]].warps
