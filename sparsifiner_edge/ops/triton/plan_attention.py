"""Plans of SparseAttention, forward and backward; see `plan.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from sparsifiner_edge.ops.schema import AttributeValue
from sparsifiner_edge.ops.triton.plan import _LOG2_E, PRECISION, Buffer, Constant, Launch, Plan, power_of_two


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes that the launches share; symbols as in `schema.py`. first: prefix tokens that every row reads."""

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
    cells: int
    scale: float
    dtype: str

    @property
    def columns(self) -> int:
        """What indices count: patches, or all tokens where the prefix is only read where listed."""
        return self.tokens - self.first

    @property
    def pitch(self) -> int:
        """Bytes of a row of membership, so that rows start aligned."""
        return math.ceil(self.columns / 16) * 16

    @property
    def wide(self) -> bool:
        """Whether rows are so wide that registers decide every other size."""
        return self.dtype == "float32" and self.width > 64

    @property
    def rows(self) -> int:
        """Rows of a program: a tile's, or fewer where float32 would not fit into registers."""
        return power_of_two(self.tile, most=128 if self.dtype != "float32" else 16 if self.wide else 32)

    @property
    def chunks(self) -> int:
        """Programs of a tile."""
        return math.ceil(self.tile / self.rows)

    def constants(self, *names: str) -> dict[str, Constant]:
        """Constants of a kernel by name, and those that all have."""
        shared = {"heads": self.heads, "width": self.width, "block_d": power_of_two(self.width)}
        # Operands of three TF32 products, of float32 rows this wide, would spill.
        precision = "ieee" if self.width > 64 else PRECISION
        return shared | {name: getattr(self, name) for name in names} | {"precision": precision}


def _sizes(shapes: Sequence[Sequence[int]], attributes: Mapping[str, AttributeValue], dtype: str) -> _Sizes:
    batch, tokens, packed = shapes[0]
    a = {name: int(value) for name, value in attributes.items() if name != "scale"}
    first = a["num_prefix"] * a["prefix_keys"]
    return _Sizes(
        batch=batch, tokens=tokens, heads=a["num_heads"], width=packed // (3 * a["num_heads"]), prefix=a["num_prefix"],
        first=first, tile=a["tile"], tiles=shapes[1][2], keys=shapes[1][3], cell=a["cell"],
        cells=math.ceil((tokens - first) / a["cell"]) if a["cell"] else 0, scale=float(attributes["scale"]),
        dtype=dtype,
    )  # fmt: skip


def plan_attend(
    shapes: Sequence[Sequence[int]],
    attributes: Mapping[str, AttributeValue],
    dtype: str,
    capability: int,  # noqa: ARG001
) -> Plan:
    """SparseAttention: qkv, indices -> output, lse (for the backward; an inference program ignores them)."""
    s = _sizes(shapes, attributes, dtype)
    launches = [*((_membership(s), _rest(s)) if s.cells else ()), _attend(s)]
    return Plan(_forward_buffers(s), tuple(launches))


def _forward_buffers(s: _Sizes) -> dict[str, Buffer]:
    lead, rest = (s.batch, s.heads), (s.batch, s.heads, s.tiles, s.cells)
    buffers = [
        Buffer("qkv", s.dtype, (s.batch, s.tokens, 3 * s.heads * s.width), "input"),
        Buffer("indices", "int32", (*lead, s.tiles, s.keys), "input"),
        Buffer("output", s.dtype, (s.batch, s.tokens, s.heads * s.width), "output"),
        Buffer("lse", "float32", (*lead, s.tokens), "scratch"),
    ]
    if s.cells:
        buffers += [
            Buffer("member", "int8", (*lead, s.tiles, s.pitch), "scratch"),
            Buffer("rest_keys", s.dtype, (*rest, s.width), "scratch"),
            Buffer("rest_values", s.dtype, (*rest, s.width), "scratch"),
            Buffer("rest_sizes", "float32", rest, "scratch"),
        ]
    return {buffer.name: buffer for buffer in buffers}


def _membership(s: _Sizes) -> Launch:
    constants = {name: getattr(s, name) for name in ("heads", "tiles", "keys", "columns", "pitch")}
    arguments: dict[str, str | None] = {"indices": "indices", "member": "member"}
    return Launch(
        "membership",
        (s.tiles, s.heads, s.batch),
        arguments,
        {**constants, "block_n": power_of_two(s.pitch, most=1024)},
    )


def _rest_arguments(s: _Sizes) -> dict[str, str | None]:
    return {name: name if s.cells else None for name in ("rest_keys", "rest_values", "rest_sizes")}


def _rest(s: _Sizes) -> Launch:
    small = s.width > 64 or s.dtype == "float32"
    block_m = power_of_two(s.tiles, most=32 if small else 64)
    constants = s.constants("tokens", "prefix", "tiles", "cell", "cells", "pitch")
    return Launch(
        "rest",
        (s.cells * math.ceil(s.tiles / block_m), s.heads, s.batch),
        {"qkv": "qkv", "member": "member", **_rest_arguments(s)},
        {
            **constants,
            "block_m": block_m,
            "block_n": power_of_two(s.cell, most=_entries(s)),
        },
    )


def _entries(s: _Sizes) -> int:
    """Entries of a block: as many as leave accumulators and operands in registers."""
    large = s.width > 64 or s.dtype == "float32"
    if s.dtype == "float32":
        return 16 if s.width > 64 else 32
    return 32 if large else 64


def _tile_grid(s: _Sizes) -> tuple[int, int, int]:
    return math.ceil(s.prefix / s.rows) + s.tiles * s.chunks, s.heads, s.batch


def _attend(s: _Sizes) -> Launch:
    block_n = _entries(s)
    constants = s.constants("tokens", "prefix", "first", "tile", "tiles", "keys", "cells", "chunks")
    return Launch(
        "attend",
        _tile_grid(s),
        {"qkv": "qkv", "indices": "indices", **_rest_arguments(s), "output": "output", "lse": "lse"},
        constants
        | {"factor": s.scale * _LOG2_E, "block_m": s.rows, "block_n": block_n}
        | {"block_r": power_of_two(s.cells, most=block_n)},
        warps=8 if s.rows > 64 or s.wide else 4,
        # Three stages: a block's list is fetched one block ahead of its keys and values.
        stages=2 if s.dtype == "float32" else 3,
    )


def plan_backward(
    shapes: Sequence[Sequence[int]],
    attributes: Mapping[str, AttributeValue],
    dtype: str,
    capability: int,  # noqa: ARG001
) -> Plan:
    """Gradient of SparseAttention: qkv, indices, output, lse, grad [B,N,C] -> grad_qkv [B,N,3C]."""
    s = _sizes(shapes, attributes, dtype)
    buffers = _forward_buffers(s) | _backward_buffers(s)
    buffers |= {name: dataclasses.replace(buffers[name], role="input") for name in ("output", "lse")}
    cells = (_rest(s), _queries(s), _cells(s)) if s.cells else (_queries(s),)
    return Plan(buffers, (_membership(s), *cells, _keys(s)))


def _backward_buffers(s: _Sizes) -> dict[str, Buffer]:
    lead, rest = (s.batch, s.heads), (s.batch, s.heads, s.tiles * s.chunks, s.cells, s.width)
    buffers = [
        Buffer("member", "int8", (*lead, s.tiles, s.pitch), "scratch"),
        Buffer("grad", s.dtype, (s.batch, s.tokens, s.heads * s.width), "input"),
        Buffer("grad_qkv", s.dtype, (s.batch, s.tokens, 3 * s.heads * s.width), "output"),
        Buffer("delta", "float32", (*lead, s.tokens), "scratch"),
    ]
    if s.cells:
        buffers += [
            Buffer("grad_rest_keys", "float32", rest, "scratch"),
            Buffer("grad_rest_values", "float32", rest, "scratch"),
            Buffer("grad_cells", "float32", (*lead, s.columns, 2, s.width), "scratch"),
        ]
    return {buffer.name: buffer for buffer in buffers}


def _owed(s: _Sizes) -> dict[str, str | None]:
    return {name: name if s.cells else None for name in ("grad_rest_keys", "grad_rest_values")}


def _queries(s: _Sizes) -> Launch:
    block_n = 16 if s.dtype == "float32" else max(_entries(s) // 2, 16)
    shared = ("output", "lse", "grad", "grad_qkv", "delta")
    return Launch(
        "queries",
        _tile_grid(s),
        {"qkv": "qkv", "indices": "indices", **_rest_arguments(s), **{n: n for n in shared}, **_owed(s)},
        s.constants("tokens", "prefix", "first", "tile", "tiles", "keys", "cells", "scale", "chunks")
        | {"factor": s.scale * _LOG2_E, "block_m": s.rows, "block_n": block_n}
        | {"block_r": power_of_two(s.cells, most=block_n)},
        warps=8 if s.rows > 32 or s.dtype == "float32" else 4,
        stages=1,
    )


def _cells(s: _Sizes) -> Launch:
    block_n = power_of_two(s.cell, most=32)
    return Launch(
        "cells",
        (s.cells * math.ceil(s.cell / block_n), s.heads, s.batch),
        {"member": "member", **_owed(s), "grad_cells": "grad_cells"},
        s.constants("tiles", "cell", "cells", "pitch", "chunks")
        | {"patches": s.columns, "block_m": 16, "block_n": block_n},
        stages=1,
    )


def _keys(s: _Sizes) -> Launch:
    block = 16 if s.wide else 32
    block_n = power_of_two(s.tokens, most=block)
    owed = "grad_cells" if s.cells else None
    same = ("qkv", "member", "lse", "grad", "delta")
    return Launch(
        "keys",
        (math.ceil(s.tokens / block_n), s.heads, s.batch),
        {**{n: n for n in same}, "grad_cells": owed, "grad_qkv": "grad_qkv"},
        s.constants("tokens", "prefix", "first", "tile", "tiles", "cells", "pitch", "scale")
        | {"factor": s.scale * _LOG2_E, "block_m": block, "block_n": block_n},
        warps=8,
        stages=1,
    )
