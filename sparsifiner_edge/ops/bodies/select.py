"""Bodies of KeySelect and LandmarkKeySelect."""

from __future__ import annotations

from sparsifiner_edge.ops.bodies.common import MERGED_SIZES, SPLIT, Structure, attribute, mean, runs, sized_mean
from sparsifiner_edge.ops.schema import DEVIATION_FLOOR


def key_select(structure: Structure) -> str:
    """Lines of KeySelect; see the schema."""
    merged = structure.merged
    probe_mean = sized_mean("probe", "a_probe") if merged else mean("probe")
    cell_mean = sized_mean("cell", "a_cell") if merged else mean("cell")
    deviation = runs("v_patch", "a_cell", "patches", "cell") + cell_mean + _FROM_CENTER if structure.cells else _ALONE
    # Sliced after the heads are apart: TensorRT-RTX 1.7 fails to compile a product whose rows are sliced for this
    # operator and read whole by SparseAttention.
    patches = "".join(
        f"""
        {name}_patch = Slice ({name}, a_num_prefix, c_end, c2)"""
        for name in "qkv"
    )
    ints = "".join(attribute(a) for a in ("num_heads", "num_prefix", "probe", "tile", "cell", "keys"))
    logits = _SIZED_LOGITS if merged else _LOGITS
    return f"""{ints}{attribute("scale", "float")}{attribute("value_power", "float")}
        single = Cast <to = 1> (qkv)
        rows = Identity (single){SPLIT}{patches}{MERGED_SIZES if merged else ""}
        patches = Shape <start = 2, end = 3> (q_patch){runs("q_patch", "a_probe", "patches", "probe")}{probe_mean}
        proj_q_f = Cast <to = 1> (proj_q)
        proj_k_f = Cast <to = 1> (proj_k)
        projected_q = MatMul (probe_mean, proj_q_f)
        projected_q_scaled = Mul (projected_q, a_scale)
        projected_k = MatMul (k_patch, proj_k_f)
        projected_k_t = Transpose <perm = [0, 1, 3, 2]> (projected_k){logits}
        log_weights = LogSoftmax <axis = -1> (logits)
        per_tile = Div (a_tile, a_probe)
        tiles_up = Add (probe_count, per_tile)
        tiles_less = Sub (tiles_up, c1)
        tiles = Div (tiles_less, per_tile)
        tiles_full = Mul (tiles, per_tile)
        tiles_extra = Sub (tiles_full, probe_count)
        tile_pads = Concat <axis = 0> (c0, c0, c0, c0, c0, c0, tiles_extra, c0)
        log_weights_padded = Pad (log_weights, tile_pads, f_inf)
        tile_shape = Concat <axis = 0> (c0, c0, c_1, per_tile, patches)
        by_tile = Reshape (log_weights_padded, tile_shape)
        best = ReduceMax <keepdims = 0> (by_tile, c3){deviation}
        squares = Mul (apart, apart)
        distance = ReduceSum <keepdims = 0> (squares, c3)
        floor = Constant <value_float: float = {DEVIATION_FLOOR**2}> ()
        distance_floored = Max (distance, floor)
        log_distance = Log (distance_floored)
        half = Constant <value_float: float = 0.5> ()
        power = Mul (a_value_power, half)
        bonus_flat = Mul (log_distance, power)
        bonus = Unsqueeze (bonus_flat, c2)
        scores_raw = Add (best, bonus)
        broken = IsNaN (scores_raw)
        scores = Where (broken, f_inf, scores_raw){_TOP}"""


_FROM_CENTER = """
        cell_center = Unsqueeze (cell_mean, c3)
        apart_runs = Sub (cell_runs, cell_center)
        flat_shape = Concat <axis = 0> (c0, c0, c_1, d)
        apart_padded = Reshape (apart_runs, flat_shape)
        apart = Slice (apart_padded, c0, patches, c2)"""
_ALONE = """
        apart = Identity (v_patch)"""
_LOGITS = """
        logits = MatMul (projected_q_scaled, projected_k_t)"""
_SIZED_LOGITS = """
        log_sizes_flat = Log (sizes_patch)
        log_sizes_shape = Constant <value_ints: ints = [0, 1, 1, -1]> ()
        log_sizes = Reshape (log_sizes_flat, log_sizes_shape)
        logits_bare = MatMul (projected_q_scaled, projected_k_t)
        logits = Add (logits_bare, log_sizes)"""


def landmark_key_select(_: Structure) -> str:
    """Lines of LandmarkKeySelect; see the schema."""
    ints = "".join(attribute(a) for a in ("num_heads", "keys", "top_coefficients"))
    casts = "".join(
        f"""
        {name}_f = Cast <to = 1> ({name})"""
        for name in ("proj_q", "bias_q", "proj_k", "bias_k", "down", "up")
    )
    return f"""{ints}{attribute("scale", "float")}{attribute("basis_threshold", "float")}
        rows = Cast <to = 1> (qkv){SPLIT}{casts}
        q_patch = Slice (q, c1, c_end, c2)
        proj_q_t = Transpose <perm = [1, 0]> (proj_q_f)
        projected_q_bare = MatMul (q_patch, proj_q_t)
        projected_q = Add (projected_q_bare, bias_q_f)
        projected_q_scaled = Mul (projected_q, a_scale)
        proj_k_t = Transpose <perm = [1, 0]> (proj_k_f)
        projected_k_bare = MatMul (k, proj_k_t)
        projected_k = Add (projected_k_bare, bias_k_f)
        projected_k_t = Transpose <perm = [0, 1, 3, 2]> (projected_k)
        landmarks = MatMul (projected_k_t, down_f)
        logits = MatMul (projected_q_scaled, landmarks)
        coefficients = Softmax <axis = -1> (logits)
        largest, largest_index = TopK <axis = -1, largest = 1, sorted = 1> (coefficients, a_top_coefficients)
        least = ReduceMin <keepdims = 1> (largest, c_1){_TIED}
        kept = Where (dropped, f0, coefficients)
        up_size = Abs (up_f)
        up_counts = Greater (up_size, a_basis_threshold)
        basis = Where (up_counts, up_size, f0)
        basis_t = Transpose <perm = [1, 0]> (basis)
        scores_raw = MatMul (kept, basis_t)
        broken = IsNaN (scores_raw)
        scores = Where (broken, f_inf, scores_raw){_TOP}"""


# Of coefficients as large as the least that counts, the first count, as many as there is room for.
_TIED = """
        below = Less (coefficients, least)
        above = Greater (coefficients, least)
        above_f = Cast <to = 1> (above)
        room_taken = ReduceSum <keepdims = 1> (above_f, c_1)
        top_f = Cast <to = 1> (a_top_coefficients)
        room = Sub (top_f, room_taken)
        tied = Equal (coefficients, least)
        tied_f = Cast <to = 1> (tied)
        many = Shape <start = 3, end = 4> (coefficients)
        many_n = Squeeze (many, c_axis0)
        numbers = Range (i0, many_n, i1)
        numbers_column = Unsqueeze (numbers, c1)
        not_after = LessOrEqual (numbers_column, numbers)
        not_after_f = Cast <to = 1> (not_after)
        rank_among_tied = MatMul (tied_f, not_after_f)
        no_room = Greater (rank_among_tied, room)
        tied_out = And (tied, no_room)
        dropped = Or (below, tied_out)"""
_TOP = """
        top, top_index = TopK <axis = -1, largest = 1, sorted = 0> (scores, a_keys)
        found = Cast <to = 6> (top_index)
        indices, order = TopK <axis = -1, largest = 0, sorted = 1> (found, a_keys)
"""
