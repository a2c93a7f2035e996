"""Function bodies of SparseAttention, DenseAttention and CachedAttention."""

from __future__ import annotations

from sparsifiner_edge.ops.bodies.common import SPLIT, Structure, attribute, mean, runs, sized_mean


def sparse_attention(structure: Structure) -> str:
    """Return the lines of SparseAttention; the schema defines it."""
    merged, ints = structure.merged, "".join(attribute(a) for a in ("num_heads", "num_prefix", "tile", "key_pool"))
    shared = structure.prefix and structure.prefix_keys
    first = "a_num_prefix" if shared else "c0"
    rows = "Concat <axis = 2> (prefix_out, patch_out)" if structure.prefix else "Identity (patch_out)"
    parts = [
        f"""{ints}{attribute("scale", "float")}
        rows = Identity (qkv){SPLIT}
        q_scaled = Mul (q, CastLike (a_scale, qkv))
        q_patch = Slice (q_scaled, {"a_num_prefix" if structure.prefix else "c0"}, c_end, c2)
        queries = Shape <start = 2, end = 3> (q_patch)
        k_patch = Slice (k, {first}, c_end, c2)
        v_patch = Slice (v, {first}, c_end, c2)
        patches = Shape <start = 2, end = 3> (k_patch){runs("q_patch", "a_tile", "queries", "tile")}""",
        _SELECTED + (_listed_sizes(first) if merged else _LISTED),
        _pools(merged) if structure.background_tokens else "",
        _attend(shared, structure.background_tokens),
        _prefix_rows(merged) if structure.prefix else "",
        f"""
        out_rows = {rows}{_OUTPUT}""",
    ]
    return "".join(parts)


_OUTPUT = """
        output = Reshape (Transpose <perm = [0, 2, 1, 3]> (out_rows), Constant <value_ints: ints = [0, 0, -1]> ())
"""

_SELECTED = """
        flat = Concat <axis = 0> (c_1, d)
        lists = Cast <to = 7> (indices)
        groups = Slice (Shape (lists), c0, c2, c0)
        group_shape = Concat <axis = 0> (groups, c1, c1)
        group_offset = Reshape (Mul (Range (i0, ReduceProd <keepdims = 0> (groups), i1), patches), group_shape)
        flat_index = Add (lists, group_offset)
        k_listed = Gather <axis = 0> (Reshape (k_patch, flat), flat_index)
        v_listed = Gather <axis = 0> (Reshape (v_patch, flat), flat_index)
        listed_logits = Cast <to = 1> (MatMul (tile_runs, Transpose <perm = [0, 1, 2, 4, 3]> (k_listed)))"""

_LISTED = """
        listed_biased = Identity (listed_logits)"""


def _listed_sizes(first: str) -> str:
    """Return lines for the sizes of the listed keys, `listed_sizes` [B,H,T,K], and add their logs to the logits."""
    return f"""
        sizes_patch = Slice (sizes, {first}, c_end, c1)
        sizes_rows = Reshape (sizes_patch, Constant <value_ints: ints = [0, 1, -1, 1]> ())
        sizes_flat = Reshape (Expand (Unsqueeze (sizes_patch, c1), Shape <start = 0, end = 3> (k_patch)), c_1)
        listed_sizes = Gather <axis = 0> (sizes_flat, flat_index)
        listed_biased = Add (listed_logits, Log (Unsqueeze (listed_sizes, c3)))"""


def _pools(merged: bool) -> str:
    """Return lines for the mean of each key pool, and the size of what each tile left unselected in it.

    The latter is `rest` [B,H,T,1,R]. `safe` is the same with 1 where nothing is left, and `has_rest` is its mask.
    """
    means = sized_mean("kc", "a_key_pool") + _VALUES_SIZED if merged else mean("kc") + _VALUES
    return f"""
        k_single = Cast <to = 1> (k_patch){runs("k_single", "a_key_pool", "patches", "kc")}
        vc_runs = Reshape (Pad (Cast <to = 1> (v_patch), kc_pads), kc_shape)
        pool_counts = Squeeze (kc_size, c1)
        is_member = Cast <to = 1> (Equal (Unsqueeze (Div (lists, a_key_pool), c4), kc_range))
        selected_counts = Unsqueeze (ReduceSum <keepdims = 0> (is_member, c3), c3)
        left_counts = Sub (pool_counts, selected_counts)
        has_rest = Greater (left_counts, f0){means}
        safe = Where (has_rest, rest, f1)
        selected_logits = MatMul (listed_logits, member)"""


_VALUES_SIZED = """
        vc_mean = Div (ReduceSum <keepdims = 0> (Mul (vc_runs, kc_sizes), c3), kc_total)
        pool_sizes = Reshape (kc_total, Constant <value_ints: ints = [0, 1, 1, 1, -1]> ())
        member = Mul (is_member, Unsqueeze (listed_sizes, c4))
        selected = Unsqueeze (ReduceSum <keepdims = 0> (member, c3), c3)
        rest = Sub (pool_sizes, selected)"""
_VALUES = """
        vc_mean = Div (ReduceSum <keepdims = 0> (vc_runs, c3), kc_size)
        pool_sizes = Identity (pool_counts)
        member = Identity (is_member)
        selected = Identity (selected_counts)
        rest = Identity (left_counts)"""


def _attend(prefix: bool, background_tokens: bool) -> str:
    """Return lines for the attention of the patch queries: `patch_out` [B,H,P,d].

    The keys and values that all tiles share (prefix tokens and pool means) are `k_shared` and `v_shared` [B,H,S,d].
    Logits and weights are in the order prefix tokens, background tokens, key list. The logits of the background tokens
    are corrected from the mean of the pool to the mean of its unselected keys. For the values, the same correction is
    subtracted from the weights of the selected keys.
    """
    if not prefix and not background_tokens:
        return f"""
        tiles_out = MatMul (CastLike (Softmax <axis = -1> (listed_biased), qkv), v_listed){_CROP}"""
    keys = ["Slice (k, c0, a_num_prefix, c2)"] * prefix + ["CastLike (kc_mean, qkv)"] * background_tokens
    values = ["Slice (v, c0, a_num_prefix, c2)"] * prefix + ["CastLike (vc_mean, qkv)"] * background_tokens
    logits = (
        ["Slice (shared_logits, c0, a_num_prefix, c4)"] * prefix + ["pool_logits"]
        if background_tokens
        else ["shared_logits"]
    )
    weights = ["Slice (weights, c0, a_num_prefix, c4)"] * prefix + ["Mul (pool_share, pool_sizes)"] * background_tokens
    start = "a_num_prefix" if prefix else "c0"
    return f"""
        k_shared = Concat <axis = 2> ({", ".join(keys)})
        v_shared = Concat <axis = 2> ({", ".join(values)})
        shared_single = Cast <to = 1> (MatMul (tile_padded, Transpose <perm = [0, 1, 3, 2]> (k_shared)))
        shared_count = Shape <start = 2, end = 3> (k_shared)
        shared_logits = Reshape (shared_single, Concat <axis = 0> (c0, c0, c_1, a_tile, shared_count))
        {_pool_logits(start) if background_tokens else ""}
        weights = Softmax <axis = -1> (Concat <axis = -1> ({", ".join(logits)}, listed_biased))
        listed_raw = Slice (weights, shared_count, c_end, c4)
        {_pool_weights(start) if background_tokens else "listed_weights = Identity (listed_raw)"}
        own = CastLike (listed_weights, qkv)
        shared_weights = Concat <axis = -1> ({", ".join(weights)})
        shared_rows = Reshape (CastLike (shared_weights, qkv), Concat <axis = 0> (c0, c0, c_1, shared_count))
        tiles_out = Add (MatMul (own, v_listed), Reshape (MatMul (shared_rows, v_shared), tile_shape)){_CROP}"""


def _pool_logits(start: str) -> str:
    """Return lines for the logits of the background tokens, which exclude the selected keys."""
    return f"""
        pool_whole = Slice (shared_logits, {start}, c_end, c4)
        pool_rest = Sub (pool_whole, Div (Sub (selected_logits, Mul (selected, pool_whole)), safe))
        log_rest = Log (safe)
        pool_logits = Where (has_rest, Add (pool_rest, log_rest), f_inf)"""


def _pool_weights(start: str) -> str:
    """Return lines for the weights of the listed keys, reduced by their share of the pool means."""
    return f"""
        pool_share = Div (Slice (weights, {start}, shared_count, c4), safe)
        listed_weights = Sub (listed_raw, MatMul (pool_share, Transpose <perm = [0, 1, 2, 4, 3]> (member)))"""


_CROP = """
        patch_out = Slice (Reshape (tiles_out, Concat <axis = 0> (c0, c0, c_1, d)), c0, queries, c2)"""

_LOG_SIZES = """
        log_sizes = Reshape (Log (sizes), Constant <value_ints: ints = [0, 1, 1, -1]> ())"""


def _prefix_rows(merged: bool) -> str:
    """Return lines for the attention of the prefix queries to all tokens."""
    return f"""{_LOG_SIZES if merged else ""}
        prefix_typed = MatMul (Slice (q_scaled, c0, a_num_prefix, c2), Transpose <perm = [0, 1, 3, 2]> (k))
        prefix_bare = Cast <to = 1> (prefix_typed)
        prefix_logits = {"Add (prefix_bare, log_sizes)" if merged else "Identity (prefix_bare)"}
        prefix_out = MatMul (CastLike (Softmax <axis = -1> (prefix_logits), qkv), v)"""


def dense_attention(structure: Structure) -> str:
    """Return the lines of DenseAttention; the schema defines it."""
    return f"""{attribute("num_heads")}{attribute("scale", "float")}{_LOG_SIZES if structure.merged else ""}
        rows = Identity (qkv){SPLIT}
        q_scaled = Mul (q, CastLike (a_scale, qkv))
        bare = Cast <to = 1> (MatMul (q_scaled, Transpose <perm = [0, 2, 3, 1]> (k_rows)))
        logits = {"Add (bare, log_sizes)" if structure.merged else "Identity (bare)"}
        out_rows = MatMul (CastLike (Softmax <axis = -1> (logits), qkv), v){_OUTPUT}"""


def cached_attention(_: Structure) -> str:
    """Return the lines of CachedAttention; the schema defines it."""
    return f"""{attribute("num_heads")}{attribute("scale", "float")}
        rows = Identity (qkv){SPLIT}
        q_scaled = Mul (q, CastLike (a_scale, qkv))
        cached_parts = Reshape (CastLike (cache, qkv), Concat <axis = 0> (c0, c0, c2, a_num_heads, d))
        cached_keys = Transpose <perm = [0, 2, 3, 1]> (Gather <axis = 2> (cached_parts, i0))
        cached_values = Transpose <perm = [0, 2, 1, 3]> (Gather <axis = 2> (cached_parts, i1))
        cached_bare = Cast <to = 1> (MatMul (q_scaled, cached_keys))
        cached_logits = Add (cached_bare, Unsqueeze (Log (counts), Constant <value_ints: ints = [1, 2]> ()))
        own_logits = Cast <to = 1> (MatMul (q_scaled, Transpose <perm = [0, 2, 3, 1]> (k_rows)))
        weights = CastLike (Softmax <axis = -1> (Concat <axis = -1> (cached_logits, own_logits)), qkv)
        stored = Shape <start = 3, end = 4> (cached_logits)
        cached_out = MatMul (Slice (weights, c0, stored, c3), cached_values)
        out_rows = Add (cached_out, MatMul (Slice (weights, stored, c_end, c3), v)){_OUTPUT}"""
