"""How long a launch takes on a GPU, from what its machine code does: a model, held against published measurements.

A launch keeps seven resources of a GPU busy: issue slots, matrix units, special functions and shared memory of its
multiprocessors, L2, memory, and the latency of one warp's instructions. The first six overlap in part: their times add
up as squares do, over `EFFICIENCY`. One warp's latency cannot be hidden where few warps are resident: it bounds from
below. Then comes what a launch costs by itself.

The constants are the same for every kernel, dense or sparse. `gpu_published.py` holds what the model gives for
FlashAttention's own machine code against its published speed.
"""

from __future__ import annotations

import dataclasses
import math

from sparsifiner_edge.profiles.boards.board import Board, load_board

EFFICIENCY = 0.95
"""Share of its peaks that a kernel reaches, overlap aside."""
STALL = 3.0
"""Clocks from one of a warp's instructions to its next, where no other warp is there to fill them. FlashAttention-2 on
an H100 takes 6,070 for 1,171 instructions in each of a scheduler's two warps, of which matrix units take 3,300."""
ISSUE, SPECIAL, SHARED = 4, 16, 128
"""Of a multiprocessor and clock: warp instructions, special functions, bytes of shared memory (CUDA C++ Programming
Guide, arithmetic throughput and shared memory of compute capability 8.x to 12.x)."""
WARP_PRODUCTS_ON_HOPPER = 0.62
"""Share of an H100's peak that products of single warps (mma.sync) reach; of four warps: all (arXiv 2402.13499)."""
MEMORY = 0.9
"""Share of the data sheet's memory bandwidth."""
L2_BYTES_PER_CLOCK = {80: 32, 86: 16, 87: 32, 89: 16, 90: 24, 110: 32, 120: 16}
"""From L2, of a multiprocessor and clock, by compute capability: 5.5 TB/s on an H100; of all others judged."""
LAUNCH_S = {True: 7e-6, False: 3.5e-6}
"""Seconds of a launch on a Jetson (unified memory), and on other GPUs: the gap before it, and filling the chip."""
DENSE_SHARE = {80: 0.56, 86: 0.56, 87: 0.56, 89: 0.56, 90: 0.48, 110: 0.40, 120: 0.56}
"""Of peak arithmetic, what the fastest dense attention reaches at head dimension 64: on an H100 some 475 TFLOPS (arXiv
2407.08608); of all others judged, of 11.0 less, whose exponentials take as long as half its products."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Of a kind of programs of one launch.

    Attributes:
        programs: how many. warps: of each.
        instructions, special, shared_bytes: of a warp of one; special functions are counted by instruction.
        products, warp_products: multiply-accumulates of a warp on the matrix units, by four warps together and by one.
    """

    programs: int
    warps: int
    instructions: float
    special: float
    shared_bytes: float
    products: float
    warp_products: float


@dataclasses.dataclass(frozen=True)
class LaunchWork:
    """Of a launch. resident: programs that a multiprocessor holds. l2_bytes, memory_bytes: moved."""

    kinds: tuple[Work, ...]
    resident: int
    l2_bytes: float
    memory_bytes: float


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A board as the model sees it; per second, or per clock and multiprocessor."""

    board: Board

    @property
    def multiprocessors(self) -> int:
        return self.board.cuda_cores // (64 if self.board.sm == 80 else 128)

    @property
    def clock(self) -> float:
        """An H100 under load holds less than its greatest clock."""
        return 1.755e9 if self.board.name == "h100" else self.board.clock_ghz * 1e9

    @property
    def products(self) -> float:
        """Multiply-accumulates, float16 summed in float32."""
        return self.board.fp16_tflops * 1e12 / 2 / self.multiprocessors / (self.board.clock_ghz * 1e9)

    @property
    def launch_s(self) -> float:
        return LAUNCH_S[self.board.unified_memory]


def gpu(name: str) -> Gpu:
    """A board of the package."""
    return Gpu(load_board(name))


def resources(launch: LaunchWork, on: Gpu) -> dict[str, float]:
    """Seconds that each resource is busy, and the latency of the longest chain of programs."""
    programs = sum(kind.programs for kind in launch.kinds)
    # Where programs do not divide evenly some multiprocessors have one more.
    share = math.ceil(programs / on.multiprocessors) / programs
    alone = WARP_PRODUCTS_ON_HOPPER if on.board.sm == 90 else 1.0
    clocks = {"issue": 0.0, "matrix": 0.0, "special": 0.0, "shared": 0.0}
    for kind in launch.kinds:
        warps = share * kind.programs * kind.warps
        clocks["issue"] += warps * kind.instructions / ISSUE
        clocks["matrix"] += warps * (kind.products + kind.warp_products / alone) / on.products
        clocks["special"] += warps * 32 * kind.special / SPECIAL
        clocks["shared"] += warps * kind.shared_bytes / SHARED
    longest = max(launch.kinds, key=lambda kind: kind.instructions * kind.programs)
    waves = math.ceil(programs / (on.multiprocessors * launch.resident))
    alone_clocks = 4 * (longest.products + longest.warp_products / alone) / on.products  # a fourth of the units is its
    clocks["latency"] = waves * (longest.instructions * STALL + alone_clocks)
    l2 = L2_BYTES_PER_CLOCK[on.board.sm or 0] * on.multiprocessors * on.clock
    return {name: value / on.clock for name, value in clocks.items()} | {
        "l2": launch.l2_bytes / l2, "memory": launch.memory_bytes / (MEMORY * on.board.bandwidth_gb_s * 1e9),
    }  # fmt: skip


def seconds(launch: LaunchWork, on: Gpu) -> float:
    """Of one launch, with what it costs by itself."""
    busy = resources(launch, on)
    latency = busy.pop("latency")
    return max(math.sqrt(sum(x * x for x in busy.values())) / EFFICIENCY, latency) + on.launch_s


def dense_seconds(batch: int, heads: int, tokens: int, width: int, on: Gpu) -> float:
    """Of the fastest dense attention."""
    flops = 4 * batch * heads * tokens * tokens * width
    return flops / (DENSE_SHARE[on.board.sm or 0] * on.board.fp16_tflops * 1e12) + on.launch_s
