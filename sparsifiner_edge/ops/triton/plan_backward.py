"""Plan of SparseAttention's gradient; see `plan.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from sparsifiner_edge.ops.operator import AttributeValue
from sparsifiner_edge.ops.triton.plan import Buffer, Launch, Plan, power_of_two
from sparsifiner_edge.ops.triton.plan_forward import (
    membership,
    membership_buffers,
    plan_attend,
    rest,
    rest_arguments,
    rest_buffers,
)
from sparsifiner_edge.ops.triton.plan_sizes import LOG2_E, LaunchSizes, buffers_of, sizes_of_attention


def plan_backward(shapes: Sequence[Sequence[int]], attributes: Mapping[str, AttributeValue], dtype: str) -> Plan:
    """Gradient of SparseAttention: qkv, indices, output, lse, grad [B,N,C] -> grad_qkv [B,N,3C]."""
    s = sizes_of_attention(shapes, attributes, dtype)
    forward = plan_attend(shapes, attributes, dtype, gradient=True).buffers
    given = {name: dataclasses.replace(forward[name], role="input") for name in ("qkv", "indices", "output", "lse")}
    cells = (rest(s), _queries(s), _cells(s)) if s.cells else (_queries(s),)
    return Plan(given | _backward_buffers(s), (membership(s), *cells, _keys(s)))


def _backward_buffers(s: LaunchSizes) -> dict[str, Buffer]:
    lead, owed = (s.batch, s.heads), (s.batch, s.heads, s.tiles * s.chunks, s.cells, s.width)
    buffers = [
        Buffer("grad", s.dtype, (s.batch, s.tokens, s.heads * s.width), "input"),
        Buffer("grad_qkv", s.dtype, (s.batch, s.tokens, 3 * s.heads * s.width), "output"),
        Buffer("delta", "float32", (*lead, s.tokens), "scratch"),
    ]
    if s.cells:
        buffers += [
            Buffer("grad_rest_keys", "float32", owed, "scratch"),
            Buffer("grad_rest_values", "float32", owed, "scratch"),
            Buffer("grad_cells", "float32", (*lead, s.columns, 2, s.width), "scratch"),
        ]
    return buffers_of(*buffers) | membership_buffers(s) | (rest_buffers(s) if s.cells else {})


def _owed(s: LaunchSizes) -> dict[str, str | None]:
    return {name: name if s.cells else None for name in ("grad_rest_keys", "grad_rest_values")}


def _queries(s: LaunchSizes) -> Launch:
    block_n = 16 if s.dtype == "float32" else max(s.entries // 2, 16)
    shared = ("output", "lse", "grad", "grad_qkv", "delta")
    return Launch(
        "queries",
        (math.ceil(s.prefix / s.rows) + s.tiles * s.chunks, s.heads, s.batch),
        {"qkv": "qkv", "indices": "indices", **rest_arguments(s), **{n: n for n in shared}, **_owed(s)},
        s.constants("tokens", "prefix", "first", "tile", "tiles", "keys", "cells", "scale", "chunks")
        | {"factor": s.scale * LOG2_E, "block_m": s.rows, "block_n": block_n}
        | {"block_r": power_of_two(s.cells, most=block_n)},
        warps=8 if s.rows > 32 or s.dtype == "float32" else 4,
        stages=1,
    )


def _cells(s: LaunchSizes) -> Launch:
    block_n = power_of_two(s.cell, most=32)
    return Launch(
        "cells",
        (s.cells * math.ceil(s.cell / block_n), s.heads, s.batch),
        {"member": "member", **_owed(s), "grad_cells": "grad_cells"},
        s.constants("tiles", "cell", "cells", "pitch", "chunks")
        | {"patches": s.columns, "block_m": 16, "block_n": block_n},
        stages=1,
    )


def _keys(s: LaunchSizes) -> Launch:
    block = 16 if s.wide else 32
    block_n = power_of_two(s.tokens, most=block)
    owed = "grad_cells" if s.cells else None
    same = ("qkv", "member", "lse", "grad", "delta")
    return Launch(
        "keys",
        (math.ceil(s.tokens / block_n), s.heads, s.batch),
        {**{n: n for n in same}, "grad_cells": owed, "grad_qkv": "grad_qkv"},
        s.constants("tokens", "prefix", "first", "tile", "tiles", "cells", "pitch", "scale")
        | {"factor": s.scale * LOG2_E, "block_m": block, "block_n": block_n},
        warps=8,
        stages=1,
    )
