"""Sizes that the launches of a plan share, from an operator's shapes and attributes; symbols as in `schema.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from sparsifiner_edge.ops.operator import AttributeValue
from sparsifiner_edge.ops.triton.plan import Buffer, Constant, power_of_two

LOG2_E = math.log2(math.e)
MARKS = 32
"""More sums of cells have no room in registers."""


@dataclasses.dataclass(frozen=True)
class LaunchSizes:
    """Of attention, and of the selection before it.

    Attributes:
        first: prefix tokens that every row reads. merged: whether sizes are read, since some are not 1.
        probe, channels, value_power: of KeySelect; probe 0 where there is none.
    """

    batch: int
    tokens: int
    heads: int
    width: int
    prefix: int
    first: int
    tile: int
    tiles: int
    keys: int
    cell: int
    scale: float
    dtype: str
    merged: bool = False
    probe: int = 0
    channels: int = 1
    value_power: float = 0.0

    @property
    def patches(self) -> int:
        """Tokens that are no prefix."""
        return self.tokens - self.prefix

    @property
    def columns(self) -> int:
        """What indices count: patches, or all tokens where the prefix is only read where listed."""
        return self.tokens - self.first

    @property
    def cells(self) -> int:
        """Cells of the background."""
        return math.ceil(self.columns / self.cell) if self.cell else 0

    @property
    def marks(self) -> int:
        """Rows that `attend` sums cells in, prefix keys behind them; 0 where there are no cells, or no registers."""
        return MARKS if self.cells and self.half and self.width <= 64 and self.cells + self.first <= MARKS else 0

    @property
    def summed(self) -> str:
        """Type of the sums of cells. Without sizes a cell's float16 mean is as exact as its keys and values are."""
        return self.dtype if self.dtype == "float16" and not self.merged else "float32"

    @property
    def unit(self) -> float:
        """Of the sums of cells: in float16 they are no greater in it than what is summed."""
        return float(power_of_two(self.run, least=1)) if self.summed == "float16" else 1.0

    @property
    def asking(self) -> int:
        """Probes."""
        return math.ceil(self.patches / self.probe)

    @property
    def depth(self) -> int:
        """From one row of what is projected to the next: its channels, in pieces of 16 bytes."""
        return math.ceil(self.channels / 8) * 8

    @property
    def pitch(self) -> int:
        """Bytes of a row of membership, so that rows start aligned."""
        return math.ceil(self.columns / 16) * 16

    @property
    def half(self) -> bool:
        """Whether elements have 16 bits."""
        return self.dtype != "float32"

    @property
    def wide(self) -> bool:
        """Whether rows are so wide that registers decide every other size."""
        return not self.half and self.width > 64

    @property
    def rows(self) -> int:
        """Rows of a program: a tile's, or fewer where float32 would not fit into registers."""
        return power_of_two(self.tile, most=128 if self.half else 16 if self.wide else 32)

    @property
    def chunks(self) -> int:
        """Programs of a tile."""
        return math.ceil(self.tile / self.rows)

    @property
    def entries(self) -> int:
        """Entries of a block: as many as leave accumulators and operands in registers."""
        if self.half:
            return 32 if self.width > 64 else 64
        return 16 if self.width > 64 else 32

    @property
    def block_p(self) -> int:
        """Patches of a block of `summarise`."""
        return self.entries

    @property
    def run(self) -> int:
        """Patches of a program of `summarise`: a cell's."""
        return self.cell or self.block_p

    @property
    def blocks(self) -> int:
        """Programs of `summarise` that have patches."""
        return math.ceil(self.patches / self.run)

    def constants(self, *names: str) -> dict[str, Constant]:
        """Constants of a kernel by name, and those that all have."""
        # Operands of three TF32 products, of float32 rows this wide, would spill.
        precision = "ieee" if self.width > 64 else "tf32x3"
        shared = {"heads": self.heads, "width": self.width, "block_d": power_of_two(self.width)}
        return shared | {name: getattr(self, name) for name in names} | {"precision": precision}


def sizes_of_selection(
    shapes: Sequence[Sequence[int]], attributes: Mapping[str, AttributeValue], dtype: str
) -> LaunchSizes:
    """Of KeySelect, whose shapes these are (of sizes where merged), before attention that reads the prefix."""
    a, (batch, tokens, packed) = attributes, shapes[0]
    heads, prefix = int(a["num_heads"]), int(a["num_prefix"])
    return LaunchSizes(
        batch=batch, tokens=tokens, heads=heads, width=packed // (3 * heads), prefix=prefix, first=prefix,
        tile=int(a["tile"]), tiles=math.ceil((tokens - prefix) / a["tile"]), keys=int(a["keys"]),
        cell=int(a["cell"]), scale=float(a["scale"]), dtype=dtype, merged=len(shapes) == 4,
        probe=int(a["probe"]), channels=shapes[-1][2], value_power=float(a["value_power"]),
    )  # fmt: skip


def sizes_of_attention(
    shapes: Sequence[Sequence[int]], attributes: Mapping[str, AttributeValue], dtype: str
) -> LaunchSizes:
    """Of SparseAttention, whose shapes these are (of sizes where merged)."""
    batch, tokens, packed = shapes[0]
    a = {name: int(value) for name, value in attributes.items() if name != "scale"}
    return LaunchSizes(
        batch=batch, tokens=tokens, heads=a["num_heads"], width=packed // (3 * a["num_heads"]), prefix=a["num_prefix"],
        first=a["num_prefix"] * a["prefix_keys"], tile=a["tile"], tiles=shapes[-1][2], keys=shapes[-1][3],
        cell=a["cell"], scale=float(attributes["scale"]), dtype=dtype, merged=len(shapes) == 3,
    )  # fmt: skip


def buffers_of(*buffers: Buffer) -> dict[str, Buffer]:
    """By name."""
    return {buffer.name: buffer for buffer in buffers}
