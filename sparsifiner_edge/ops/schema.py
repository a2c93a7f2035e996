"""Schemas of the operators: types, shapes, limits and tolerances.

The ONNX function bodies, the test matrix and the documentation are derived from them.

Symbols of axes:
    B: Batch size.
    N: Number of tokens.
    C: Number of channels.
    H: Number of heads.
    d: Channels per head, C / H.
    P: Number of patches, N - num_prefix.
    T: Number of query tiles, ceil(P / tile).
    K: Number of selected keys.
    c: Number of predictor channels.
    L: Number of landmarks.
    S: Number of cached tokens.
    M: Number of tokens after merging.

`qkv` is taken after bias, qk-norm and RoPE. Its last axis is the concatenation of q, k and v, each H x d.
"""

from __future__ import annotations

import dataclasses

from sparsifiner_edge.ops.operator import FLOATS, QKV, Attribute, Operator, Tensor

DOMAIN = "sparsifiner"
"""ONNX domain of the operators."""
VERSION = 4
"""Version of the domain, shared by all operators. Files with another version are rejected."""
TOPK_LIMIT = 3840
"""Largest K of TensorRT's TopK layer (TensorRT operator documentation, TopK)."""
DEVIATION_FLOOR = 1e-6
"""Lower bound of the value deviation in KeySelect. It keeps the logarithm finite for pools of equal values."""

_HEADS = Attribute("num_heads", int, 1, (1, 3), "number of heads H")
_PREFIX = Attribute(
    "num_prefix", int, 0, (1, 0, 5), "number of prefix tokens (class, distillation, register tokens) before the patches"
)
_TILE = Attribute("tile", int, 1, (16, 8, 64), "number of consecutive patch queries that share one key list")
_KEY_POOL = Attribute(
    "key_pool",
    int,
    0,
    (55, 0, 7),
    "number of consecutive patches averaged into one background token; 0: no background tokens",
)
_SCALE = Attribute("scale", float, 0.0, (0.125,), "scale of the logits, normally d ** -0.5")
_SIZES = Tensor(
    "sizes",
    ("float32",),
    ("B", "N"),
    "number of patches that each token represents, at least 1; above 1 for merged tokens, 1 for prefix tokens",
)
_INDICES = Tensor(
    "indices", ("int32",), ("B", "H", "T", "K"), "key list of each tile (0-based patch indices, strictly ascending)"
)

KEY_SELECT = Operator(
    name="KeySelect",
    checks=lambda a, sizes: [
        (a["tile"] % a["query_pool"] != 0, f"tile {a['tile']} is not a multiple of query_pool {a['query_pool']}"),
        (a["keys"] > sizes["P"], f"keys {a['keys']} exceed the {sizes['P']} patches"),
    ],
    inputs=(
        QKV,
        _SIZES,
        Tensor("proj_q", FLOATS, ("H", "d", "c"), "low-rank projection of the pooled queries"),
        Tensor("proj_k", FLOATS, ("H", "d", "c"), "low-rank projection of the keys"),
    ),
    attributes=(
        _HEADS,
        _PREFIX,
        Attribute(
            "query_pool",
            int,
            1,
            (4, 1, 8),
            "number of consecutive patch queries averaged into one pooled query; divides `tile`",
        ),
        _TILE,
        _KEY_POOL,
        Attribute("keys", int, 1, (5, 1, 40), "number of keys K that each head selects for each tile; at most P"),
        _SCALE,
        Attribute("value_power", float, 0.0, (2.0, 0.0), "weight of the value deviation in the score; 0: unused"),
    ),
    output=_INDICES,
    tolerances={"float32": 1e-4, "float16": 1e-4, "bfloat16": 1e-4},
    doc=(
        "Selects the K keys that the queries of a tile attend to, with a low-rank predictor:\n\n"
        "- Pooled queries: `a_g = (mean of q over query pool g) proj_q`, a pool being `query_pool` consecutive\n"
        "  patches.\n"
        "- Projected keys: `b_j = k_j proj_k` for each patch j.\n"
        "- Log-probabilities: `l[g, j] = log_softmax over j of (scale a_g . b_j + log s_j)`, with the size s_j of\n"
        "  patch j.\n"
        "- Value deviation: `r_j = max(|v_j - m_j|, 1e-6)`, with the mean value m_j of the key pool of j (0 if\n"
        "  `key_pool` is 0).\n"
        "- Score of key j for tile t:\n"
        "  `score[t, j] = (max over the pooled queries g of t of l[g, j]) + value_power log r_j`.\n\n"
        "Both means are weighted by size: a token of size s counts like s tokens (ToMe, ICLR 2023, section 3). The\n"
        "K keys with the highest scores are selected. Ties go to the lower index, and NaN counts as -inf. Scores\n"
        "are computed in float32 for every element type, because float16 probabilities underflow into ties."
    ),
)

LANDMARK_KEY_SELECT = Operator(
    name="LandmarkKeySelect",
    checks=lambda a, sizes: [
        (a["keys"] > sizes["N"], f"keys {a['keys']} exceed the {sizes['N']} tokens"),
        (
            a["top_coefficients"] > sizes["L"],
            f"top_coefficients {a['top_coefficients']} exceed the {sizes['L']} landmarks",
        ),
        (sizes["N"] < 2, f"{sizes['N']} tokens leave no patch after the class token"),
    ],
    inputs=(
        QKV,
        Tensor("proj_q", FLOATS, ("c", "d"), "channel reduction of the queries, shared by all heads"),
        Tensor("bias_q", FLOATS, ("c",), "bias of the query reduction"),
        Tensor("proj_k", FLOATS, ("c", "d"), "channel reduction of the keys, shared by all heads"),
        Tensor("bias_k", FLOATS, ("c",), "bias of the key reduction"),
        Tensor("down", FLOATS, ("N", "L"), "projection of the tokens to L landmarks"),
        Tensor("up", FLOATS, ("N", "L"), "projection of the landmarks back to the tokens (the connectivity basis)"),
    ),
    attributes=(
        _HEADS,
        Attribute("keys", int, 1, (5, 1, 40), "number of keys K selected for each query; at most N"),
        _SCALE,
        Attribute("top_coefficients", int, 1, (3, 1, 12), "number of coefficients kept for each query; at most L"),
        Attribute(
            "basis_threshold",
            float,
            0.0,
            (0.02, 0.0),
            "entries of `up` whose magnitude does not exceed this value count as 0",
        ),
    ),
    output=Tensor(
        "indices",
        ("int32",),
        ("B", "H", "N-1", "K"),
        "key list of each patch query (0-based token indices; 0 is the class token)",
    ),
    tolerances={"float32": 1e-5, "float16": 1e-5, "bfloat16": 1e-5},
    doc=(
        "Selects K keys for each patch query with the published predictor (Sparsifiner, CVPR 2023, section 3.2, in\n"
        "the inference form of its code). There is exactly one prefix token, the class token.\n\n"
        "- Reduced queries and keys: `a = q proj_q^T + bias_q` and `b = k proj_k^T + bias_k`.\n"
        "- Coefficients: `z = softmax over the landmarks of (scale a . (b^T down))` for each patch query. Only the\n"
        "  `top_coefficients` largest are kept (ties go to the lower index), the others are set to 0.\n"
        "- Scores: `score = z basis^T`, with `basis = |up|` where it exceeds `basis_threshold`, else 0.\n\n"
        "The K keys with the highest scores are selected. Ties go to the lower index, and NaN counts as -inf. The\n"
        "class token and the query's own token are not selected by default."
    ),
)

SPARSE_ATTENTION = Operator(
    name="SparseAttention",
    checks=lambda a, sizes: [
        (a["prefix_keys"] not in (0, 1), f"prefix_keys must be 0 or 1, got {a['prefix_keys']}"),
        (
            a["prefix_keys"] == 0 and (a["tile"] != 1 or a["key_pool"] != 0),
            "prefix_keys 0 requires tile 1 and key_pool 0",
        ),
        (
            sizes["K"] > sizes["P" if a["prefix_keys"] else "N"],
            f"indices has {sizes['K']} keys per tile, more than {sizes['P' if a['prefix_keys'] else 'N']}",
        ),
    ],
    inputs=(QKV, _SIZES, _INDICES),
    attributes=(
        _HEADS,
        _PREFIX,
        _TILE,
        _KEY_POOL,
        _SCALE,
        Attribute(
            "prefix_keys",
            int,
            0,
            (1, 0),
            "1: every patch query attends to the prefix tokens, and `indices` count patches; 0: patch queries attend "
            "only to listed keys, `indices` count all tokens, `tile` must be 1 and `key_pool` 0",
        ),
    ),
    output=Tensor("output", FLOATS, ("B", "N", "C"), "attention output, heads concatenated"),
    tolerances={"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2},
    doc=(
        "Prefix queries attend to all N tokens. A patch query of tile t attends to:\n\n"
        "- the prefix tokens (if `prefix_keys` is 1),\n"
        "- the K keys listed in `indices[t]`,\n"
        "- one background token per key pool. It represents the patches of the pool that tile t did not select, by\n"
        "  their mean key and mean value, both weighted by size. The log of the sum of their sizes is added to its\n"
        "  logit.\n\n"
        "A key pool consists of `key_pool` consecutive patches, whatever their sizes. A pool whose patches are all\n"
        "selected has no background token. The log of a token's size is added to its logit, for prefix queries\n"
        "too. The softmax is computed in float32."
    ),
)

DENSE_ATTENTION = Operator(
    name="DenseAttention",
    inputs=(QKV, _SIZES),
    attributes=(_HEADS, _SCALE),
    output=SPARSE_ATTENTION.output,
    tolerances=SPARSE_ATTENTION.tolerances,
    doc=(
        "`softmax(scale q k^T + log s) v` per head, over all N tokens, with their sizes s. The softmax is computed\n"
        "in float32."
    ),
)


CACHED_ATTENTION = Operator(
    name="CachedAttention",
    inputs=(
        QKV,
        Tensor(
            "cache",
            FLOATS,
            ("B", "S", "2C"),
            "cached keys and values of S other tokens, concatenated along the last axis as k, v; of the type of `qkv`, "
            "or float16",
            stored=True,
        ),
        Tensor("counts", ("float32",), ("B", "S"), "weight of each cached token: 1, or 0 if it is ignored"),
    ),
    attributes=(_HEADS, _SCALE),
    output=SPARSE_ATTENTION.output,
    tolerances=SPARSE_ATTENTION.tolerances,
    doc=(
        "`softmax(scale q k^T + log c) v` per head, over the N tokens of `qkv`, each with c = 1, and the S cached\n"
        "tokens, with c from `counts`. The softmax is computed in float32."
    ),
)

_PAIRS = Tensor(
    "pairs",
    ("int32",),
    ("B", "M", "2"),
    "indices of the two tokens that form each new token; equal if the token was not merged",
)

MATCH_TOKENS = Operator(
    name="MatchTokens",
    checks=lambda a, sizes: [
        (a["window"] % 2 != 0, f"window {a['window']} is odd; it must be even"),
        (a["merged"] > sizes["P"] // 2, f"merged {a['merged']} exceeds half of the {sizes['P']} patches"),
    ],
    inputs=(QKV, _SIZES),
    attributes=(
        _HEADS,
        _PREFIX,
        Attribute("window", int, 2, (16, 2, 8), "number of candidate partners of a token along the token order; even"),
        Attribute("merged", int, 1, (5, 1, 18), "number of pairs to merge; at most half the patches"),
    ),
    output=dataclasses.replace(_PAIRS, axes=("B", "N-merged", "2")),
    tolerances={"float32": 1e-5, "float16": 1e-5, "bfloat16": 1e-5},
    doc=(
        "Selects the pairs of tokens to merge by bipartite soft matching (ToMe, ICLR 2023, section 3), restricted\n"
        "to a window of the token order and with at most one partner per token.\n\n"
        "- Metric: `m_j` is the mean of k_j over the heads, divided by its length.\n"
        "- Similarity of tokens i and j with sizes a and b: `sqrt(a b / (a + b)) (m_i . m_j - 1)`. Among equally\n"
        "  close pairs, the one with smaller sizes merges first, as in Ward's method (1963), whose factor is the\n"
        "  square of this one. The similarity is at least -1e30, and NaN counts as -1e30.\n"
        "- Proposals: each even patch 2e proposes to the most similar odd patch 2(e + o) + 1, with\n"
        "  `-window / 2 <= o < window / 2`.\n"
        "- Pairs: each odd patch accepts the most similar of its proposals. The `merged` odd patches with the\n"
        "  highest similarity merge with their partner. If fewer odd patches have a proposal, the first odd\n"
        "  patches without one merge with the first even patches that are still free, in order.\n\n"
        "Ties go to the lower index in every step. A merged token takes the position of its odd patch. The order\n"
        "of the tokens is otherwise kept, and prefix tokens never merge. `pairs[i]` is (remaining token, its\n"
        "partner or itself). Computed in float32 for every element type."
    ),
)

MERGE_TOKENS = Operator(
    name="MergeTokens",
    checks=lambda _, sizes: [
        (
            sizes["M"] > sizes["N"],
            f"pairs must have shape [{sizes['B']}, at most {sizes['N']}, 2], got {sizes['M']} pairs",
        )
    ],
    inputs=(Tensor("x", FLOATS, ("B", "N", "C"), "tokens before merging"), _SIZES, _PAIRS),
    attributes=(),
    output=Tensor("output", FLOATS, ("B", "M", "C"), "tokens after merging"),
    tolerances={"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2},
    doc=(
        "Replaces each pair (a, b) by the mean of its tokens, weighted by their sizes:\n"
        "`(s_a x[a] + s_b x[b]) / (s_a + s_b)`, or `x[a]` if a = b. Computed in float32. The graph computes the\n"
        "new sizes and positions with standard operators: the sum of the sizes of a pair, and for each old token\n"
        "the index of its pair."
    ),
)

OPERATORS = {
    op.name: op
    for op in (
        KEY_SELECT,
        LANDMARK_KEY_SELECT,
        SPARSE_ATTENTION,
        DENSE_ATTENTION,
        CACHED_ATTENTION,
        MATCH_TOKENS,
        MERGE_TOKENS,
    )
}
"""All operators by name."""
