"""Function bodies of KeySelect and LandmarkKeySelect."""

from __future__ import annotations

from sparsifiner_edge.ops.bodies.common import MERGED_SIZES, SPLIT, Structure, attribute, mean, runs, sized_mean
from sparsifiner_edge.ops.schema import DEVIATION_FLOOR


def key_select(structure: Structure) -> str:
    """Return the lines of KeySelect; the schema defines it."""
    merged = structure.merged
    query_pool_mean = sized_mean("query_pool", "a_query_pool") if merged else mean("query_pool")
    query_pools = runs("q_patch", "a_query_pool", "patches", "query_pool") + query_pool_mean
    key_pool_mean = sized_mean("key_pool", "a_key_pool") if merged else mean("key_pool")
    deviation = (
        runs("v_patch", "a_key_pool", "patches", "key_pool") + key_pool_mean + _FROM_CENTER
        if structure.background_tokens
        else _ALONE
    )
    # Slice after the heads are split: TensorRT-RTX 1.7 fails to compile a product whose rows are sliced for this
    # operator and read in full by SparseAttention.
    patches = "".join(
        f"""
        {name}_patch = Slice ({name}, a_num_prefix, c_end, c2)"""
        for name in "qkv"
    )
    ints = "".join(attribute(a) for a in ("num_heads", "num_prefix", "query_pool", "tile", "key_pool", "keys"))
    logits = f"Add (products, {_LOG_SIZES})" if merged else "Identity (products)"
    return f"""{ints}{attribute("scale", "float")}{attribute("value_power", "float")}
        rows = Identity (Cast <to = 1> (qkv)){SPLIT}{patches}{MERGED_SIZES if merged else ""}
        patches = Shape <start = 2, end = 3> (q_patch){query_pools}
        projected_q = Mul (MatMul (query_pool_mean, Cast <to = 1> (proj_q)), a_scale)
        projected_k = MatMul (k_patch, Cast <to = 1> (proj_k))
        products = MatMul (projected_q, Transpose <perm = [0, 1, 3, 2]> (projected_k))
        logits = {logits}
        per_tile = Div (a_tile, a_query_pool)
        tiles = Div (Sub (Add (query_pool_count, per_tile), c1), per_tile)
        tile_pads = Concat <axis = 0> (c0, c0, c0, c0, c0, c0, Sub (Mul (tiles, per_tile), query_pool_count), c0)
        tile_shape = Concat <axis = 0> (c0, c0, c_1, per_tile, patches)
        by_tile = Reshape (Pad (LogSoftmax <axis = -1> (logits), tile_pads, f_inf), tile_shape)
        best = ReduceMax <keepdims = 0> (by_tile, c3){deviation}
        distance = ReduceSum <keepdims = 0> (Mul (apart, apart), c3)
        log_distance = Log (Max (distance, Constant <value_float: float = {DEVIATION_FLOOR**2}> ()))
        bonus = Mul (log_distance, Mul (a_value_power, Constant <value_float: float = 0.5> ()))
        scores_raw = Add (best, Unsqueeze (bonus, c2))
        scores = Where (IsNaN (scores_raw), f_inf, scores_raw){_TOP}"""


_FROM_CENTER = """
        apart_padded = Reshape (Sub (key_pool_runs, Unsqueeze (key_pool_mean, c3)), Concat <axis = 0> (c0, c0, c_1, d))
        apart = Slice (apart_padded, c0, patches, c2)"""
_ALONE = """
        apart = Identity (v_patch)"""
_LOG_SIZES = "Reshape (Log (sizes_patch), Constant <value_ints: ints = [0, 1, 1, -1]> ())"


def landmark_key_select(_: Structure) -> str:
    """Return the lines of LandmarkKeySelect; the schema defines it."""
    ints = "".join(attribute(a) for a in ("num_heads", "keys", "top_coefficients"))
    casts = "".join(
        f"""
        {name}_f = Cast <to = 1> ({name})"""
        for name in ("proj_q", "bias_q", "proj_k", "bias_k", "down", "up")
    )
    return f"""{ints}{attribute("scale", "float")}{attribute("basis_threshold", "float")}
        rows = Cast <to = 1> (qkv){SPLIT}{casts}
        q_patch = Slice (q, c1, c_end, c2)
        projected_q = Add (MatMul (q_patch, Transpose <perm = [1, 0]> (proj_q_f)), bias_q_f)
        projected_k = Add (MatMul (k, Transpose <perm = [1, 0]> (proj_k_f)), bias_k_f)
        landmarks = MatMul (Transpose <perm = [0, 1, 3, 2]> (projected_k), down_f)
        coefficients = Softmax <axis = -1> (MatMul (Mul (projected_q, a_scale), landmarks))
        largest, largest_index = TopK <axis = -1, largest = 1, sorted = 1> (coefficients, a_top_coefficients)
        least = ReduceMin <keepdims = 1> (largest, c_1){_TIED}
        up_size = Abs (up_f)
        basis_t = Transpose <perm = [1, 0]> (Where (Greater (up_size, a_basis_threshold), up_size, f0))
        scores_raw = MatMul (Where (dropped, f0, coefficients), basis_t)
        scores = Where (IsNaN (scores_raw), f_inf, scores_raw){_TOP}"""


# Of the coefficients equal to the smallest kept one, only the first are kept, until `top_coefficients` are reached.
_TIED = """
        above = ReduceSum <keepdims = 1> (Cast <to = 1> (Greater (coefficients, least)), c_1)
        room = Sub (Cast <to = 1> (a_top_coefficients), above)
        tied = Equal (coefficients, least)
        numbers = Range (i0, Squeeze (Shape <start = 3, end = 4> (coefficients), c_axis0), i1)
        not_after = Cast <to = 1> (LessOrEqual (Unsqueeze (numbers, c1), numbers))
        no_room = Greater (MatMul (Cast <to = 1> (tied), not_after), room)
        dropped = Or (Less (coefficients, least), And (tied, no_room))"""
_TOP = """
        top, top_index = TopK <axis = -1, largest = 1, sorted = 1> (scores, a_keys)
        indices, order = TopK <axis = -1, largest = 0, sorted = 1> (Cast <to = 6> (top_index), a_keys)
"""
