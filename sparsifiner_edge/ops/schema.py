"""Schemas of the operators: types, shapes, limits, tolerances. Bodies, test matrix and documentation follow from here.

Symbols: B batch, N tokens, C channels, H heads, d = C / H, P = N - num_prefix patches, T = ceil(P / tile) tiles,
K keys, c predictor channels, S kept tokens. `qkv` is after bias, qk-norm and RoPE; its last axis is q|k|v, each H x d.
"""

from __future__ import annotations

import dataclasses

from sparsifiner_edge.ops.operator import FLOATS, QKV, Attribute, Operator, Tensor

DOMAIN = "sparsifiner"
VERSION = 3
"""Of the domain: all operators are of one version, and files of others are refused."""
TOPK_LIMIT = 3840
"""TensorRT's TopK layer accepts no larger K (TensorRT operator documentation, TopK)."""
DEVIATION_FLOOR = 1e-6
"""Least value deviation that enters the logarithm in KeySelect: keeps cells of equal values finite."""


_HEADS = Attribute("num_heads", int, 1, (1, 3), "H, number of heads")
_PREFIX = Attribute("num_prefix", int, 0, (1, 0, 5), "leading tokens: class, distillation, registers")
_TILE = Attribute("tile", int, 1, (16, 8, 64), "consecutive patch queries that share one key list")
_CELL = Attribute("cell", int, 0, (55, 0, 7), "consecutive patches that make one background cell; 0: none")
_SCALE = Attribute("scale", float, 0.0, (0.125,), "factor of the logits, normally d ** -0.5")
_SIZES = Tensor(
    "sizes",
    ("float32",),
    ("B", "N"),
    "patches that each token stands for, at least 1: merged ones for several; of the prefix 1",
)
_INDICES = Tensor(
    "indices", ("int32",), ("B", "H", "T", "K"), "patch keys read by each tile, counted from 0, strictly ascending"
)

KEY_SELECT = Operator(
    name="KeySelect",
    checks=lambda a, sizes: [
        (a["tile"] % a["probe"] != 0, f"tile {a['tile']} is not a multiple of probe {a['probe']}"),
        (a["keys"] > sizes["P"], f"keys {a['keys']} exceed the {sizes['P']} patches"),
    ],
    inputs=(
        QKV,
        _SIZES,
        Tensor("proj_q", FLOATS, ("H", "d", "c"), "low-rank projection of mean probe queries"),
        Tensor("proj_k", FLOATS, ("H", "d", "c"), "low-rank projection of keys"),
    ),
    attributes=(
        _HEADS,
        _PREFIX,
        Attribute("probe", int, 1, (4, 1, 8), "consecutive patch queries whose mean asks; divides tile"),
        _TILE,
        _CELL,
        Attribute("keys", int, 1, (5, 1, 40), "K, keys selected by each head and tile; at most P"),
        _SCALE,
        Attribute("value_power", float, 0.0, (2.0, 0.0), "weight of the value deviation in the score; 0: not used"),
    ),
    output=_INDICES,
    tolerances={"float32": 1e-4, "float16": 1e-4, "bfloat16": 1e-4},
    doc=(
        "For every probe g: a_g = (mean of q over its real patches) proj_q. For every patch key j: b_j = k_j proj_k.\n"
        "l[g, j] = log_softmax over j of (scale a_g . b_j + log s_j). For a tile t:\n"
        "score[t, j] = max over its probes of l[g, j] + value_power log max(|v_j - m_j|, 1e-6), where m_j is the mean\n"
        "value of the cell of j (0 without cells). A token of size s counts as s do (ToMe, ICLR 2023, section 3):\n"
        "both means are weighted by size. The K highest scores win, ties go to the lower index, NaN is -inf. Scores\n"
        "are computed in float32 whatever the element type: float16 probabilities underflow into ties."
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
        (sizes["N"] < 2, "a class token alone leaves no query"),
    ],
    inputs=(
        QKV,
        Tensor("proj_q", FLOATS, ("c", "d"), "channel reduction of queries, shared by the heads"),
        Tensor("bias_q", FLOATS, ("c",), "its bias"),
        Tensor("proj_k", FLOATS, ("c", "d"), "channel reduction of keys, shared by the heads"),
        Tensor("bias_k", FLOATS, ("c",), "its bias"),
        Tensor("down", FLOATS, ("N", "L"), "tokens to L landmarks"),
        Tensor("up", FLOATS, ("N", "L"), "landmarks back to tokens: the basis of connectivity"),
    ),
    attributes=(
        _HEADS,
        Attribute("keys", int, 1, (5, 1, 40), "K, keys selected for each query; at most N"),
        _SCALE,
        Attribute("top_coefficients", int, 1, (3, 1, 12), "coefficients kept for each query; at most L"),
        Attribute("basis_threshold", float, 0.0, (0.02, 0.0), "entries of |up| up to this count as 0"),
    ),
    output=Tensor("indices", ("int32",), ("B", "H", "N-1", "K"), "keys of each patch query, from 0 = the class token"),
    tolerances={"float32": 1e-5, "float16": 1e-5, "bfloat16": 1e-5},
    doc=(
        "The published predictor (Sparsifiner, CVPR 2023, section 3.2, with the steps of its code at inference). One\n"
        "class token. a = q proj_q^T + bias_q, b = k proj_k^T + bias_k, z = softmax over landmarks of\n"
        "(scale a . (b^T down)) for every query but the class token's. The top_coefficients largest count, ties go to\n"
        "the lower index; the others are 0. score = z basis^T, basis = |up| where it exceeds basis_threshold, else 0.\n"
        "The K highest scores win, ties go to the lower index, NaN is -inf. Neither class token nor query itself is\n"
        "forced in."
    ),
)

SPARSE_ATTENTION = Operator(
    name="SparseAttention",
    checks=lambda a, sizes: [
        (a["prefix_keys"] not in (0, 1), f"prefix_keys must be 0 or 1, got {a['prefix_keys']}"),
        (a["prefix_keys"] == 0 and (a["tile"] != 1 or a["cell"] != 0), "prefix_keys 0 goes with tile 1 and cell 0"),
        (
            sizes["K"] > sizes["P" if a["prefix_keys"] else "N"],
            f"indices list {sizes['K']} keys of {sizes['P']} patches",
        ),
    ],
    inputs=(QKV, _SIZES, _INDICES),
    attributes=(
        _HEADS,
        _PREFIX,
        _TILE,
        _CELL,
        _SCALE,
        Attribute(
            "prefix_keys",
            int,
            0,
            (1, 0),
            "1: every patch query attends to the prefix, and indices count patches from 0; "
            "0: only where listed, indices count all tokens, tile is 1 and cell 0",
        ),
    ),
    output=Tensor("output", FLOATS, ("B", "N", "C"), "attention output, heads concatenated"),
    tolerances={"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2},
    doc=(
        "Prefix queries attend to all N tokens. A patch query of tile t attends to the prefix, to the K patches in\n"
        "indices[t], and to one entry per cell r that stands for the patches of r that t did not select: mean key,\n"
        "mean value, both weighted by size, and a logit raised by the log of the sum of their sizes. The log of its\n"
        "size is added to a key's logit, for prefix queries too. A cell is `cell` consecutive tokens, whatever their\n"
        "sizes; a fully selected one drops out. Softmax in float32."
    ),
)

DENSE_ATTENTION = Operator(
    name="DenseAttention",
    inputs=(QKV, _SIZES),
    attributes=(_HEADS, _SCALE),
    output=SPARSE_ATTENTION.output,
    tolerances=SPARSE_ATTENTION.tolerances,
    doc="softmax(scale q k^T + log s) v per head, over all N tokens, s their sizes. Softmax in float32.",
)


CACHED_ATTENTION = Operator(
    name="CachedAttention",
    inputs=(
        QKV,
        Tensor(
            "cache",
            FLOATS,
            ("B", "S", "2C"),
            "keys and values of other tokens, from before: k|v along the last axis; of qkv's type, or float16",
            stored=True,
        ),
        Tensor("counts", ("float32",), ("B", "S"), "what each of these counts as: 1, or 0 where it is not read"),
    ),
    attributes=(_HEADS, _SCALE),
    output=SPARSE_ATTENTION.output,
    tolerances=SPARSE_ATTENTION.tolerances,
    doc=(
        "softmax(scale q k^T + log c) v per head, over the N tokens, each of which counts as c = 1, and the S kept\n"
        "ones. Softmax in float32."
    ),
)

_PAIRS = Tensor(
    "pairs",
    ("int32",),
    ("B", "M", "2"),
    "the one or two tokens that make each new token; twice the same where one does",
)

MATCH_TOKENS = Operator(
    name="MatchTokens",
    checks=lambda a, sizes: [
        (a["window"] % 2 != 0, f"window {a['window']} is odd: as many partners lie before as behind"),
        (a["merged"] > sizes["P"] // 2, f"merged {a['merged']} exceeds half of the {sizes['P']} patches"),
    ],
    inputs=(QKV, _SIZES),
    attributes=(
        _HEADS,
        _PREFIX,
        Attribute("window", int, 2, (16, 2, 8), "partners that a token looks at along the curve; even"),
        Attribute("merged", int, 1, (5, 1, 18), "pairs that become one token; at most half the patches"),
    ),
    output=dataclasses.replace(_PAIRS, axes=("B", "N-merged", "2")),
    tolerances={"float32": 1e-5, "float16": 1e-5, "bfloat16": 1e-5},
    doc=(
        "Which tokens merge: bipartite soft matching as in ToMe (ICLR 2023, section 3), within a window of the\n"
        "curve and with one suitor for each. m_j = mean over the heads of k_j, divided by its length. Tokens of\n"
        "sizes a and b are as alike as sqrt(ab / (a + b)) (m . m - 1): of pairs as close the smaller merges, as in\n"
        "Ward's method (1963), whose factor is the square; at least -1e30, which NaN counts as. Even patches seek,\n"
        "odd ones are sought: the patch 2e takes the odd patch 2(e + o) + 1, o from -window / 2 to window / 2 - 1,\n"
        "that is most alike; ties go to the lower index. Of its suitors an odd patch takes the one most alike (lower\n"
        "index), and the `merged` odd patches most like theirs (lower index) merge with them. Where fewer have a\n"
        "suitor, the first others take the first seekers that nobody took, in order. The merged token stands at the\n"
        "odd patch's place; order is kept otherwise, and prefix tokens never merge. pairs[i] = (token that stays, its\n"
        "suitor or itself). Computed in float32 whatever the element type."
    ),
)

MERGE_TOKENS = Operator(
    name="MergeTokens",
    checks=lambda _, sizes: [
        (sizes["M"] > sizes["N"], f"pairs must have shape [{sizes['B']}, at most {sizes['N']}, 2], got {sizes['M']}")
    ],
    inputs=(Tensor("x", FLOATS, ("B", "N", "C"), "tokens"), _SIZES, _PAIRS),
    attributes=(),
    output=Tensor("output", FLOATS, ("B", "M", "C"), "new tokens"),
    tolerances={"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2},
    doc=(
        "x[a] where a pair is (a, a), else (s_a x[a] + s_b x[b]) / (s_a + s_b). Computed in float32. Sizes and places\n"
        "that go on are plain operators: the sum of a pair's sizes, and for each old token the pair that holds it."
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
