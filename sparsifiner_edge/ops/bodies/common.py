"""Lines that several bodies share, in the textual syntax of ONNX functions."""

from __future__ import annotations

import dataclasses

_END = "9223372036854775807"


@dataclasses.dataclass(frozen=True)
class Structure:
    """What the attributes of every node in one file have in common.

    Attributes:
        prefix: num_prefix > 0.
        cells: cell > 0.
        prefix_keys: the attribute of SparseAttention.
        merged: some node gets sizes other than ones. Where none does, bodies do not read them.
    """

    prefix: bool = True
    cells: bool = True
    prefix_keys: bool = True
    merged: bool = True


def attribute(name: str, kind: str = "int") -> str:
    """Lines that make attribute `name` a tensor of one element called `a_<name>`."""
    return f"""
        s_{name} = Constant <value_{kind}: {kind} = @{name}> ()
        a_{name} = Unsqueeze (s_{name}, c_axis0)"""


CONSTANTS = f"""
        c_axis0 = Constant <value_ints: ints = [0]> ()
        c0 = Constant <value_ints: ints = [0]> ()
        c1 = Constant <value_ints: ints = [1]> ()
        c2 = Constant <value_ints: ints = [2]> ()
        c3 = Constant <value_ints: ints = [3]> ()
        c4 = Constant <value_ints: ints = [4]> ()
        c_1 = Constant <value_ints: ints = [-1]> ()
        c_end = Constant <value_ints: ints = [{_END}]> ()
        i0 = Constant <value_int: int = 0> ()
        i1 = Constant <value_int: int = 1> ()
        i2 = Constant <value_int: int = 2> ()
        f0 = Constant <value_float: float = 0.0> ()
        f1 = Constant <value_float: float = 1.0> ()
        f_inf = Log (f0)"""

SPLIT = """
        heads_shape = Concat <axis = 0> (c0, c0, c3, a_num_heads, c_1)
        packed = Reshape (rows, heads_shape)
        q_rows = Gather <axis = 2> (packed, i0)
        k_rows = Gather <axis = 2> (packed, i1)
        v_rows = Gather <axis = 2> (packed, i2)
        q = Transpose <perm = [0, 2, 1, 3]> (q_rows)
        k = Transpose <perm = [0, 2, 1, 3]> (k_rows)
        v = Transpose <perm = [0, 2, 1, 3]> (v_rows)
        d = Shape <start = 3, end = 4> (q)"""


def runs(source: str, run: str, patches: str, prefix: str) -> str:
    """Split `source` [B,H,P,d] into runs of `run` rows: `<prefix>_runs` [B,H,R,run,d], `<prefix>_size` float [R,1]."""
    return f"""
        {prefix}_up = Add ({patches}, {run})
        {prefix}_less = Sub ({prefix}_up, c1)
        {prefix}_count = Div ({prefix}_less, {run})
        {prefix}_full = Mul ({prefix}_count, {run})
        {prefix}_extra = Sub ({prefix}_full, {patches})
        {prefix}_pads = Concat <axis = 0> (c0, c0, c0, c0, c0, c0, {prefix}_extra, c0)
        {prefix}_padded = Pad ({source}, {prefix}_pads)
        {prefix}_shape = Concat <axis = 0> (c0, c0, c_1, {run}, d)
        {prefix}_runs = Reshape ({prefix}_padded, {prefix}_shape)
        {prefix}_n = Squeeze ({prefix}_count, c_axis0)
        {prefix}_range = Range (i0, {prefix}_n, i1)
        {prefix}_start = Mul ({prefix}_range, {run})
        {prefix}_left = Sub ({patches}, {prefix}_start)
        {prefix}_real = Min ({prefix}_left, {run})
        {prefix}_real_f = Cast <to = 1> ({prefix}_real)
        {prefix}_size = Unsqueeze ({prefix}_real_f, c1)"""


def mean(prefix: str) -> str:
    """Mean of each run of `runs`: `<prefix>_mean` [B,H,R,d]."""
    return f"""
        {prefix}_sum = ReduceSum <keepdims = 0> ({prefix}_runs, c3)
        {prefix}_mean = Div ({prefix}_sum, {prefix}_size)"""


MERGED_SIZES = """
        sizes_patch = Slice (sizes, a_num_prefix, c_end, c1)
        sizes_shape = Constant <value_ints: ints = [0, 1, -1, 1]> ()
        sizes_rows = Reshape (sizes_patch, sizes_shape)"""
"""`sizes_patch` [B,P] and `sizes_rows` [B,1,P,1] of merged tokens."""


def sized_mean(prefix: str, run: str) -> str:
    """Mean of each run of `runs` where tokens count by their sizes: `<prefix>_mean` [B,H,R,d], `<prefix>_total`
    [B,1,R,1].
    """
    return f"""
        {prefix}_sizes_padded = Pad (sizes_rows, {prefix}_pads)
        {prefix}_sizes_shape = Concat <axis = 0> (c0, c0, c_1, {run}, c1)
        {prefix}_sizes = Reshape ({prefix}_sizes_padded, {prefix}_sizes_shape)
        {prefix}_total = ReduceSum <keepdims = 0> ({prefix}_sizes, c3)
        {prefix}_weighted = Mul ({prefix}_runs, {prefix}_sizes)
        {prefix}_sum = ReduceSum <keepdims = 0> ({prefix}_weighted, c3)
        {prefix}_mean = Div ({prefix}_sum, {prefix}_total)"""
