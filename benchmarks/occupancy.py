"""How many blocks of a compiled kernel fit on a multiprocessor at once, from the limits of its GPU generation."""

from __future__ import annotations

import dataclasses

_KIB = 1024
_REGISTERS = 65536
_REGISTER_GRANULARITY = 256
"""Registers are given out to warps in units of so many."""
_RESERVED, _SHARED_GRANULARITY = 1 * _KIB, 128
"""Bytes of shared memory: what the driver keeps of each block's, and the unit that it is given out in."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one multiprocessor.

    Attributes:
        blocks, warps: resident at most.
        shared: bytes of shared memory.
    """

    blocks: int
    warps: int
    shared: int

    @property
    def block_shared(self) -> int:
        """Most bytes that one block may ask for."""
        return self.shared - _RESERVED


LIMITS = {
    80: Limits(32, 64, 164 * _KIB),
    86: Limits(16, 48, 100 * _KIB),
    87: Limits(16, 48, 164 * _KIB),
    89: Limits(24, 48, 100 * _KIB),
    90: Limits(32, 64, 228 * _KIB),
    100: Limits(32, 64, 228 * _KIB),
    110: Limits(24, 48, 228 * _KIB),
    120: Limits(24, 48, 100 * _KIB),
}
"""By compute capability times ten. Blocks and shared memory: `cuda_occupancy.h` of CUDA 13.5; warps: CUDA C++
Programming Guide, "Technical Specifications per Compute Capability". All have 65536 registers."""


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """blocks: resident on a multiprocessor. share: of its warps, 0 to 1. limit: what allows no more blocks."""

    blocks: int
    share: float
    limit: str


def occupancy(capability: int, warps: int, registers: int, shared: int) -> Occupancy:
    """Occupancy of a kernel.

    Args:
        capability: compute capability times ten, one of `LIMITS`. warps: of a block. registers: of a thread.
        shared: bytes of a block.
    """
    limits = LIMITS[capability]
    a_warp = _up(registers * 32, _REGISTER_GRANULARITY)
    # Registers belong to one of a multiprocessor's four parts, and a warp cannot straddle two.
    fit = {
        "registers": _REGISTERS // 4 // a_warp * 4 // warps,
        "shared memory": limits.shared // _up(shared + _RESERVED, _SHARED_GRANULARITY),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    limit = min(fit, key=lambda name: fit[name])
    return Occupancy(fit[limit], fit[limit] * warps / limits.warps, limit)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
