"""Function bodies of MatchTokens and MergeTokens.

Scatters only replace elements and never add, because every engine supports that.
"""

from __future__ import annotations

from sparsifiner_edge.ops.bodies.common import Structure, attribute


def match_tokens(_: Structure) -> str:
    """Return the lines of MatchTokens; the schema defines it.

    In the names, `seekers` are the even patches, which propose, and `sought` are the odd patches.
    """
    ints = "".join(attribute(a) for a in ("num_heads", "num_prefix", "window", "merged"))
    return f"""{ints}{_METRIC}{_PARTNERS}{_SUITORS}{_WINNERS}{_PAIRS}"""


_METRIC = """
        packed = Reshape (qkv, Concat <axis = 0> (c0, c0, c3, a_num_heads, c_1))
        k_rows = Cast <to = 1> (Gather <axis = 2> (packed, i1))
        k_mean = ReduceMean <keepdims = 0> (Slice (k_rows, a_num_prefix, c_end, c1), c2)
        metric = Div (k_mean, Sqrt (ReduceSum <keepdims = 1> (Mul (k_mean, k_mean), c2)))
        seek = Slice (metric, c0, c_end, c1, c2)
        sought = Slice (metric, c1, c_end, c1, c2)
        seekers = Shape <start = 1, end = 2> (seek)
        seekers_0 = Squeeze (seekers, c_axis0)
        places_sought = Shape <start = 1, end = 2> (sought)
        seekers_less = Sub (seekers, c1)
        places_less = Sub (places_sought, c1)
        half = Div (a_window, c2)
        ahead = Sub (Range (i0, s_window, i1), half)
        seeker_range = Range (i0, seekers_0, i1)
        sought_range = Range (i0, Squeeze (places_sought, c_axis0), i1)
        sought_column = Unsqueeze (sought_range, c1)
        least = Constant <value_float: float = -3e30> ()
        broken_score = Constant <value_float: float = -1e30> ()"""

_PARTNERS = """
        partner_places = Add (Unsqueeze (seeker_range, c1), ahead)
        partner_clamped = Min (Max (partner_places, c0), places_less)
        products_wide = Mul (Unsqueeze (seek, c2), Gather <axis = 1> (sought, partner_clamped))
        size_patch = Slice (sizes, a_num_prefix, c_end, c1)
        size_a = Unsqueeze (Slice (size_patch, c0, c_end, c1, c2), c2)
        size_b = Gather <axis = 1> (Slice (size_patch, c1, c_end, c1, c2), partner_clamped)
        size_root = Sqrt (Div (Mul (size_a, size_b), Add (size_a, size_b)))
        alike_raw = Mul (size_root, Sub (ReduceSum <keepdims = 0> (products_wide, c3), f1))
        alike_fine = Max (Where (IsNaN (alike_raw), broken_score, alike_raw), broken_score)
        alike = Where (Or (Less (partner_places, c0), Greater (partner_places, places_less)), least, alike_fine)
        best = ReduceMax <keepdims = 0> (alike, c2)
        partner = Add (ArgMax <axis = 2, keepdims = 0> (alike), Sub (seeker_range, half))"""

_SUITORS = """
        suitor_places = Add (sought_column, Add (ahead, c1))
        suitor_clamped = Min (Max (suitor_places, c0), seekers_less)
        not_outside = Not (Or (Less (suitor_places, c0), Greater (suitor_places, seekers_less)))
        is_suitor = And (Equal (Gather <axis = 1> (partner, suitor_clamped), sought_column), not_outside)
        suitor_scores = Where (is_suitor, Gather <axis = 1> (best, suitor_clamped), least)
        score = ReduceMax <keepdims = 0> (suitor_scores, c2)
        suitor = Add (ArgMax <axis = 2, keepdims = 0> (suitor_scores), Add (Sub (sought_range, half), c1))"""

# Winners are sorted by score, so those without a suitor come last.
_WINNERS = """
        won, winners = TopK <axis = 1, largest = 1, sorted = 1> (score, a_merged)
        wooer = GatherElements <axis = 1> (suitor, winners)
        alone = Less (won, Constant <value_float: float = -2e30> ())
        batch = Shape <start = 0, end = 1> (qkv)
        more = Add (seekers_0, i1)
        all_seekers = Expand (Range (i0, more, i1), Concat <axis = 0> (batch, Unsqueeze (more, c_axis0)))
        zeros = Mul (winners, i0)
        free_marked = ScatterElements <axis = 1> (all_seekers, Where (alone, seekers_0, wooer), Add (zeros, seekers_0))
        free, free_order = TopK <axis = 1, largest = 0, sorted = 1> (free_marked, a_merged)
        alone_first = Sub (a_merged, Cast <to = 7> (ReduceSum <keepdims = 1> (Cast <to = 1> (alone), c1)))
        free_pick = GatherElements <axis = 1> (free, Max (Sub (Range (i0, s_merged, i1), alone_first), i0))
        chosen = Where (alone, free_pick, wooer)"""

# The prefix sum over tokens is computed with two triangular matrix products: within blocks of 128 tokens and over the
# blocks. TensorRT runs CumSum as a loop with one iteration per token. Integers below 2^24 are exact in float32.
_PAIRS = """
        gone = Add (Mul (chosen, i2), s_num_prefix)
        tokens = Shape <start = 1, end = 2> (qkv)
        places = Expand (Range (i0, Squeeze (tokens, c_axis0), i1), Concat <axis = 0> (batch, tokens))
        others = ScatterElements <axis = 1> (places, Add (Add (Mul (winners, i2), i1), s_num_prefix), gone)
        zero_places = Mul (places, i0)
        stays = ScatterElements <axis = 1> (Add (zero_places, i1), gone, zeros)
        new_count = Sub (tokens, a_merged)
        c_128 = Constant <value_ints: ints = [128]> ()
        blocks = Div (Add (tokens, Constant <value_ints: ints = [127]> ()), c_128)
        blocks_pads = Concat <axis = 0> (c0, c0, c0, Sub (Mul (blocks, c_128), tokens))
        padded = Pad (Cast <to = 1> (stays), blocks_pads)
        by_block = Reshape (padded, Constant <value_ints: ints = [0, -1, 128]> ())
        in_block = Range (i0, Constant <value_int: int = 128> (), i1)
        within_block = MatMul (by_block, Cast <to = 1> (LessOrEqual (Unsqueeze (in_block, c1), in_block)))
        block_range = Range (i0, Squeeze (blocks, c_axis0), i1)
        earlier = Cast <to = 1> (Less (Unsqueeze (block_range, c1), block_range))
        before_block = Unsqueeze (MatMul (ReduceSum <keepdims = 0> (by_block, c2), earlier), c2)
        sums_padded = Reshape (Add (within_block, before_block), Constant <value_ints: ints = [0, -1]> ())
        new_place = Sub (Cast <to = 7> (Slice (sums_padded, c0, tokens, c1)), i1)
        target = Where (Less (stays, i1), Squeeze (new_count, c_axis0), new_place)
        first = Slice (ScatterElements <axis = 1> (zero_places, target, places), c0, new_count, c1)
        second = GatherElements <axis = 1> (others, first)
        pairs = Cast <to = 6> (Concat <axis = 2> (Unsqueeze (first, c2), Unsqueeze (second, c2)))
"""


def merge_tokens(_: Structure) -> str:
    """Return the lines of MergeTokens; the schema defines it."""
    return """
        places = Cast <to = 7> (pairs)
        first = Gather <axis = 2> (places, i0)
        second = Gather <axis = 2> (places, i1)
        size_a = GatherElements <axis = 1> (sizes, first)
        size_b = GatherElements <axis = 1> (sizes, second)
        share = Unsqueeze (Where (Equal (first, second), f1, Div (size_a, Add (size_a, size_b))), c2)
        batch = Shape <start = 0, end = 1> (x)
        tokens = Shape <start = 1, end = 2> (x)
        batch_column = Unsqueeze (Mul (Range (i0, Squeeze (batch, c_axis0), i1), tokens), c1)
        flat = Concat <axis = 0> (c_1, Shape <start = 2, end = 3> (x))
        rows = Reshape (x, flat)
        weighted_a = Mul (share, Cast <to = 1> (Gather <axis = 0> (rows, Add (first, batch_column))))
        weighted_b = Mul (Sub (f1, share), Cast <to = 1> (Gather <axis = 0> (rows, Add (second, batch_column))))
        output = CastLike (Add (weighted_a, weighted_b), x)
"""
