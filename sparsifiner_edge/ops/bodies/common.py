"""Lines shared by several function bodies, in the textual syntax of ONNX functions."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Structure:
    """Properties that the nodes of one model share and that determine the structure of the bodies.

    Attributes:
        prefix: True if `num_prefix` is above 0.
        background_tokens: True if `key_pool` is above 0.
        prefix_keys: Attribute `prefix_keys` of SparseAttention.
        merged: True if some node gets sizes other than 1. Otherwise the bodies do not read the sizes.
    """

    prefix: bool = True
    background_tokens: bool = True
    prefix_keys: bool = True
    merged: bool = True


def attribute(name: str, kind: str = "int") -> str:
    """Return lines that make attribute `name` a scalar `s_<name>` and a tensor of one element `a_<name>`."""
    return f"""
        s_{name} = Constant <value_{kind}: {kind} = @{name}> ()
        a_{name} = Unsqueeze (s_{name}, c_axis0)"""


_VALUES = {"c_axis0": 0, "c0": 0, "c1": 1, "c2": 2, "c3": 3, "c4": 4, "c_1": -1, "c_end": 2**63 - 1}
CONSTANTS = "".join(f"{name} = Constant <value_ints: ints = [{value}]> ()\n" for name, value in _VALUES.items())
CONSTANTS += "".join(f"i{value} = Constant <value_int: int = {value}> ()\n" for value in range(3))
CONSTANTS += "".join(f"f{value} = Constant <value_float: float = {value}.0> ()\n" for value in range(2))
CONSTANTS += "f_inf = Log (f0)\n"
"""Constants of all bodies: `c*` are tensors of one integer, `i*` and `f*` scalars, `f_inf` is -inf."""

SPLIT = """
        packed = Reshape (rows, Concat <axis = 0> (c0, c0, c3, a_num_heads, c_1))
        k_rows = Gather <axis = 2> (packed, i1)
        q = Transpose <perm = [0, 2, 1, 3]> (Gather <axis = 2> (packed, i0))
        k = Transpose <perm = [0, 2, 1, 3]> (k_rows)
        v = Transpose <perm = [0, 2, 1, 3]> (Gather <axis = 2> (packed, i2))
        d = Shape <start = 3, end = 4> (q)"""
"""Split of `rows` [B,N,3C] into `q`, `k` and `v`, each [B,H,N,d]."""


def runs(source: str, run: str, patches: str, prefix: str) -> str:
    """Return lines that split `source` [B,H,P,d] into R runs of `run` rows.

    They define `<prefix>_runs` [B,H,R,run,d], padded with zeros, and the run lengths `<prefix>_size` [R,1] as float.
    """
    return f"""
        {prefix}_count = Div (Sub (Add ({patches}, {run}), c1), {run})
        {prefix}_extra = Sub (Mul ({prefix}_count, {run}), {patches})
        {prefix}_pads = Concat <axis = 0> (c0, c0, c0, c0, c0, c0, {prefix}_extra, c0)
        {prefix}_padded = Pad ({source}, {prefix}_pads)
        {prefix}_shape = Concat <axis = 0> (c0, c0, c_1, {run}, d)
        {prefix}_runs = Reshape ({prefix}_padded, {prefix}_shape)
        {prefix}_range = Range (i0, Squeeze ({prefix}_count, c_axis0), i1)
        {prefix}_real = Min (Sub ({patches}, Mul ({prefix}_range, {run})), {run})
        {prefix}_size = Unsqueeze (Cast <to = 1> ({prefix}_real), c1)"""


def mean(prefix: str) -> str:
    """Return lines that average each run of `runs`: `<prefix>_mean` [B,H,R,d]."""
    return f"""
        {prefix}_mean = Div (ReduceSum <keepdims = 0> ({prefix}_runs, c3), {prefix}_size)"""


MERGED_SIZES = """
        sizes_patch = Slice (sizes, a_num_prefix, c_end, c1)
        sizes_rows = Reshape (sizes_patch, Constant <value_ints: ints = [0, 1, -1, 1]> ())"""
"""Sizes of merged tokens: `sizes_patch` [B,P] and `sizes_rows` [B,1,P,1]."""


def sized_mean(prefix: str, run: str) -> str:
    """Return lines that average each run of `runs`, weighted by the sizes of the tokens.

    They define `<prefix>_mean` [B,H,R,d] and the total sizes `<prefix>_total` [B,1,R,1].
    """
    return f"""
        {prefix}_sizes_shape = Concat <axis = 0> (c0, c0, c_1, {run}, c1)
        {prefix}_sizes = Reshape (Pad (sizes_rows, {prefix}_pads), {prefix}_sizes_shape)
        {prefix}_total = ReduceSum <keepdims = 0> ({prefix}_sizes, c3)
        {prefix}_mean = Div (ReduceSum <keepdims = 0> (Mul ({prefix}_runs, {prefix}_sizes), c3), {prefix}_total)"""
