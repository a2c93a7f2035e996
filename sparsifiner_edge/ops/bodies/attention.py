"""Bodies of SparseAttention and DenseAttention."""

from __future__ import annotations

from sparsifiner_edge.ops.bodies.common import SPLIT, Structure, attribute, mean, runs, sized_mean


def sparse_attention(structure: Structure) -> str:
    """Lines of SparseAttention; see the schema."""
    merged = structure.merged
    ints = "".join(attribute(a) for a in ("num_heads", "num_prefix", "tile", "cell"))
    shared = structure.prefix and structure.prefix_keys
    first = "a_num_prefix" if shared else "c0"
    parts = [
        f"""{ints}{attribute("scale", "float")}
        rows = Identity (qkv){SPLIT}
        scale = CastLike (a_scale, qkv)
        q_scaled = Mul (q, scale)
        q_patch = Slice (q_scaled, {"a_num_prefix" if structure.prefix else "c0"}, c_end, c2)
        queries = Shape <start = 2, end = 3> (q_patch)
        k_patch = Slice (k, {first}, c_end, c2)
        v_patch = Slice (v, {first}, c_end, c2)
        patches = Shape <start = 2, end = 3> (k_patch){runs("q_patch", "a_tile", "queries", "tile")}""",
        _SELECTED + (_listed_sizes(first) if merged else _LISTED),
        _cells(merged) if structure.cells else "",
        _shared(shared, structure.cells),
        """
        out_rows = Concat <axis = 2> (prefix_out, patch_out)"""
        if structure.prefix
        else """
        out_rows = Identity (patch_out)""",
        _prefix_rows(merged) if structure.prefix else "",
    ]
    # The prefix rows come before the concatenation that reads them.
    body = "".join([*parts[:4], parts[5], parts[4]])
    return f"""{body}
        out_tokens = Transpose <perm = [0, 2, 1, 3]> (out_rows)
        merge = Constant <value_ints: ints = [0, 0, -1]> ()
        output = Reshape (out_tokens, merge)
"""


_SELECTED = """
        flat = Concat <axis = 0> (c_1, d)
        k_flat = Reshape (k_patch, flat)
        v_flat = Reshape (v_patch, flat)
        lists = Cast <to = 7> (indices)
        list_shape = Shape (lists)
        groups = Slice (list_shape, c0, c2, c0)
        group_count = ReduceProd <keepdims = 0> (groups)
        group_range = Range (i0, group_count, i1)
        group_start = Mul (group_range, patches)
        group_shape = Concat <axis = 0> (groups, c1, c1)
        group_offset = Reshape (group_start, group_shape)
        flat_index = Add (lists, group_offset)
        k_listed = Gather <axis = 0> (k_flat, flat_index)
        v_listed = Gather <axis = 0> (v_flat, flat_index)
        k_listed_t = Transpose <perm = [0, 1, 2, 4, 3]> (k_listed)
        listed_typed = MatMul (tile_runs, k_listed_t)
        listed_logits = Cast <to = 1> (listed_typed)
        listed_count = Shape <start = 4, end = 5> (listed_logits)"""

_LISTED = """
        listed_biased = Identity (listed_logits)"""


def _listed_sizes(first: str) -> str:
    """Sizes of the listed keys: `listed_sizes` [B,H,T,K], and their logits raised by them."""
    return f"""
        sizes_patch = Slice (sizes, {first}, c_end, c1)
        sizes_shape = Constant <value_ints: ints = [0, 1, -1, 1]> ()
        sizes_rows = Reshape (sizes_patch, sizes_shape)
        sizes_open = Unsqueeze (sizes_patch, c1)
        sizes_lead = Shape <start = 0, end = 3> (k_patch)
        sizes_heads = Expand (sizes_open, sizes_lead)
        sizes_flat = Reshape (sizes_heads, c_1)
        listed_sizes = Gather <axis = 0> (sizes_flat, flat_index)
        listed_sizes_open = Unsqueeze (listed_sizes, c3)
        listed_log_sizes = Log (listed_sizes_open)
        listed_biased = Add (listed_logits, listed_log_sizes)"""


def _cells(merged: bool) -> str:
    """Means of the cells, and of each tile what is left of them: `rest`, `safe`, `has_rest` [B,H,T,1,R]."""
    lines = f"""
        k_single = Cast <to = 1> (k_patch)
        v_single = Cast <to = 1> (v_patch){runs("k_single", "a_cell", "patches", "kc")}
        vc_padded = Pad (v_single, kc_pads)
        vc_runs = Reshape (vc_padded, kc_shape){sized_mean("kc", "a_cell") if merged else mean("kc")}
        cell_counts = Squeeze (kc_size, c1)
        list_cell = Div (lists, a_cell)
        list_cell_open = Unsqueeze (list_cell, c4)
        is_member = Equal (list_cell_open, kc_range)
        is_member_f = Cast <to = 1> (is_member)
        selected_counts = ReduceSum <keepdims = 0> (is_member_f, c3)
        selected_counts_open = Unsqueeze (selected_counts, c3)
        left_counts = Sub (cell_counts, selected_counts_open)
        has_rest = Greater (left_counts, f0)"""
    if merged:
        lines += """
        vc_weighted = Mul (vc_runs, kc_sizes)
        vc_sum = ReduceSum <keepdims = 0> (vc_weighted, c3)
        vc_mean = Div (vc_sum, kc_total)
        cell_sizes_shape = Constant <value_ints: ints = [0, 1, 1, 1, -1]> ()
        cell_sizes = Reshape (kc_total, cell_sizes_shape)
        listed_sizes_column = Unsqueeze (listed_sizes, c4)
        member = Mul (is_member_f, listed_sizes_column)
        selected = ReduceSum <keepdims = 0> (member, c3)
        selected_open = Unsqueeze (selected, c3)
        rest = Sub (cell_sizes, selected_open)"""
    else:
        lines += """
        vc_sum = ReduceSum <keepdims = 0> (vc_runs, c3)
        vc_mean = Div (vc_sum, kc_size)
        cell_sizes = Identity (cell_counts)
        member = Identity (is_member_f)
        selected_open = Identity (selected_counts_open)
        rest = Identity (left_counts)"""
    return f"""{lines}
        safe = Where (has_rest, rest, f1)
        selected_logits = MatMul (listed_logits, member)"""


def _shared(prefix: bool, cells: bool) -> str:
    """Attention over what all tiles share (prefix, cells) and over each tile's list -> `patch_out` [B,H,P,d]."""
    if not prefix and not cells:
        return f"""
        weights = Softmax <axis = -1> (listed_biased)
        own = CastLike (weights, qkv)
        tiles_out = MatMul (own, v_listed){_CROP}"""
    lines = _shared_logits(prefix, cells) + _all_logits(prefix, cells)
    lines += """
        weights = Softmax <axis = -1> (logits)
        shared_raw = Slice (weights, c0, shared_count, c4)
        listed_raw = Slice (weights, shared_count, c_end, c4)"""
    return lines + _weights(prefix, cells) + _WEIGHTED + _CROP


def _shared_logits(prefix: bool, cells: bool) -> str:
    """Keys and values of prefix and cells, `k_shared`, `v_shared` [B,H,S,d], and `shared_logits` [B,H,T,tile,S]."""
    present = [name for name, there in (("prefix", prefix), ("cells", cells)) if there]
    lines = ""
    if prefix:
        lines += """
        k_prefix = Slice (k, c0, a_num_prefix, c2)
        v_prefix = Slice (v, c0, a_num_prefix, c2)"""
    if cells:
        lines += """
        k_cells = CastLike (kc_mean, qkv)
        v_cells = CastLike (vc_mean, qkv)"""
    return f"""{lines}
        k_shared = Concat <axis = 2> ({", ".join(f"k_{name}" for name in present)})
        v_shared = Concat <axis = 2> ({", ".join(f"v_{name}" for name in present)})
        k_shared_t = Transpose <perm = [0, 1, 3, 2]> (k_shared)
        shared_typed = MatMul (tile_padded, k_shared_t)
        shared_single = Cast <to = 1> (shared_typed)
        shared_count = Shape <start = 2, end = 3> (k_shared)
        shared_shape = Concat <axis = 0> (c0, c0, c_1, a_tile, shared_count)
        shared_logits = Reshape (shared_single, shared_shape)"""


def _all_logits(prefix: bool, cells: bool) -> str:
    """`logits` of prefix, cells and list, in this order; those of cells moved to the mean of what is not selected."""
    if not cells:
        return """
        logits = Concat <axis = -1> (shared_logits, listed_biased)"""
    lines = f"""
        cell_whole = Slice (shared_logits, {_cells_from(prefix)}, c_end, c4)
        selected_share = Mul (selected_open, cell_whole)
        excess = Sub (selected_logits, selected_share)
        excess_mean = Div (excess, safe)
        cell_rest = Sub (cell_whole, excess_mean)
        log_rest = Log (safe)
        cell_raised = Add (cell_rest, log_rest)
        cell_logits = Where (has_rest, cell_raised, f_inf)"""
    if not prefix:
        return f"""{lines}
        logits = Concat <axis = -1> (cell_logits, listed_biased)"""
    return f"""{lines}
        prefix_logits = Slice (shared_logits, c0, a_num_prefix, c4)
        logits = Concat <axis = -1> (prefix_logits, cell_logits, listed_biased)"""


def _weights(prefix: bool, cells: bool) -> str:
    """`listed_weights` and `shared_weights`; what a cell gives to its mean is taken from its selected keys again."""
    if not cells:
        return """
        listed_weights = Identity (listed_raw)
        shared_weights = Identity (shared_raw)"""
    lines = f"""
        cell_weights = Slice (weights, {_cells_from(prefix)}, shared_count, c4)
        cell_share = Div (cell_weights, safe)
        cell_full = Mul (cell_share, cell_sizes)
        member_t = Transpose <perm = [0, 1, 2, 4, 3]> (member)
        listed_less = MatMul (cell_share, member_t)
        listed_weights = Sub (listed_raw, listed_less)"""
    if not prefix:
        return f"""{lines}
        shared_weights = Identity (cell_full)"""
    return f"""{lines}
        prefix_weights = Slice (weights, c0, a_num_prefix, c4)
        shared_weights = Concat <axis = -1> (prefix_weights, cell_full)"""


def _cells_from(prefix: bool) -> str:
    return "a_num_prefix" if prefix else "c0"


_WEIGHTED = """
        own = CastLike (listed_weights, qkv)
        listed_out = MatMul (own, v_listed)
        shared_cast = CastLike (shared_weights, qkv)
        shared_flat = Concat <axis = 0> (c0, c0, c_1, shared_count)
        shared_rows = Reshape (shared_cast, shared_flat)
        shared_matrix = MatMul (shared_rows, v_shared)
        shared_out = Reshape (shared_matrix, tile_shape)
        tiles_out = Add (listed_out, shared_out)"""

_CROP = """
        crop_shape = Concat <axis = 0> (c0, c0, c_1, d)
        patch_rows = Reshape (tiles_out, crop_shape)
        patch_out = Slice (patch_rows, c0, queries, c2)"""

_LOG_SIZES = """
        log_sizes_flat = Log (sizes)
        log_sizes_shape = Constant <value_ints: ints = [0, 1, 1, -1]> ()
        log_sizes = Reshape (log_sizes_flat, log_sizes_shape)"""


def _prefix_rows(merged: bool) -> str:
    biased = "Add (prefix_bare, log_sizes)" if merged else "Identity (prefix_bare)"
    return f"""{_LOG_SIZES if merged else ""}
        q_prefix = Slice (q_scaled, c0, a_num_prefix, c2)
        k_all_t = Transpose <perm = [0, 1, 3, 2]> (k)
        prefix_typed = MatMul (q_prefix, k_all_t)
        prefix_bare = Cast <to = 1> (prefix_typed)
        prefix_single = {biased}
        prefix_soft = Softmax <axis = -1> (prefix_single)
        prefix_cast = CastLike (prefix_soft, qkv)
        prefix_out = MatMul (prefix_cast, v)"""


def dense_attention(structure: Structure) -> str:
    """Lines of DenseAttention; see the schema."""
    biased = "Add (bare, log_sizes)" if structure.merged else "Identity (bare)"
    return f"""{attribute("num_heads")}{attribute("scale", "float")}{_LOG_SIZES if structure.merged else ""}
        rows = Identity (qkv){SPLIT}
        scale = CastLike (a_scale, qkv)
        q_scaled = Mul (q, scale)
        k_t = Transpose <perm = [0, 2, 3, 1]> (k_rows)
        typed = MatMul (q_scaled, k_t)
        bare = Cast <to = 1> (typed)
        logits = {biased}
        weights = Softmax <axis = -1> (logits)
        own = CastLike (weights, qkv)
        out = MatMul (own, v)
        out_tokens = Transpose <perm = [0, 2, 1, 3]> (out)
        merge = Constant <value_ints: ints = [0, 0, -1]> ()
        output = Reshape (out_tokens, merge)
"""
