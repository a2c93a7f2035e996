"""ONNX function bodies: the operators in standard operators, so that any runtime can run an exported file.

A body takes every size from `Shape`, gathers rows of a flattened [B H P, d] and holds no mask and no scatter. A file
holds one body per operator, so structure that attributes decide (prefix or none, cells or none) is fixed per file by
`Structure`; every number stays an attribute of the node.
"""

from __future__ import annotations

import dataclasses

import onnx
import onnx.parser

from sparsifiner_edge.ops.schema import DEVIATION_FLOOR, DOMAIN, OPERATORS, VERSION

OPSET = 20
_END = "9223372036854775807"


@dataclasses.dataclass(frozen=True)
class Structure:
    """What the attributes of every node in one file have in common.

    Attributes:
        prefix: num_prefix > 0.
        cells: cell > 0.
        prefix_keys: the attribute of SparseAttention.
    """

    prefix: bool = True
    cells: bool = True
    prefix_keys: bool = True


def function_body(name: str, structure: Structure | None = None) -> onnx.FunctionProto:
    """The function that a model file carries for operator `name`, in opset 20 operators.

    Raises:
        KeyError: no such operator.
    """
    op, structure = OPERATORS[name], structure or Structure()
    lines = {"KeySelect": _key_select, "SparseAttention": _sparse_attention, "DenseAttention": _dense_attention}[name](
        structure
    )
    attributes = ", ".join(a.name for a in op.attributes)
    inputs = ", ".join(t.name for t in op.inputs)
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>\n'
        f"{name} <{attributes}> ({inputs}) => ({op.output.name}) {{\n{_CONSTANTS}{lines}}}"
    )
    function = onnx.parser.parse_function(text)
    function.doc_string = f"{DOMAIN}::{name} version {VERSION}. {op.doc}"
    _drop_unused(function)
    # ONNX Runtime 1.21 names fused nodes after the first of them and refuses a file in which two bear one name.
    for node in function.node:
        node.name = f"{name}/{node.output[0]}"
    return function


def _drop_unused(function: onnx.FunctionProto) -> None:
    """Remove nodes whose outputs nobody reads, so that shared preludes cost nothing."""
    while True:
        read = {i for node in function.node for i in node.input} | set(function.output)
        unused = [node for node in function.node if not read.intersection(node.output)]
        if not unused:
            return
        for node in unused:
            function.node.remove(node)


def _attribute(name: str, kind: str = "int") -> str:
    """Lines that make attribute `name` a tensor of one element called `a_<name>`."""
    return f"""
        s_{name} = Constant <value_{kind}: {kind} = @{name}> ()
        a_{name} = Unsqueeze (s_{name}, c_axis0)"""


_CONSTANTS = f"""
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

_SPLIT = """
        heads_shape = Concat <axis = 0> (c0, c0, c3, a_num_heads, c_1)
        packed = Reshape (rows, heads_shape)
        q_rows = Gather <axis = 2> (packed, i0)
        k_rows = Gather <axis = 2> (packed, i1)
        v_rows = Gather <axis = 2> (packed, i2)
        q = Transpose <perm = [0, 2, 1, 3]> (q_rows)
        k = Transpose <perm = [0, 2, 1, 3]> (k_rows)
        v = Transpose <perm = [0, 2, 1, 3]> (v_rows)
        d = Shape <start = 3, end = 4> (q)"""


def _runs(source: str, run: str, patches: str, prefix: str) -> str:
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


def _mean(prefix: str) -> str:
    return f"""
        {prefix}_sum = ReduceSum <keepdims = 0> ({prefix}_runs, c3)
        {prefix}_mean = Div ({prefix}_sum, {prefix}_size)"""


def _key_select(structure: Structure) -> str:
    center = _runs("v", "a_cell", "patches", "cell") + _mean("cell") if structure.cells else ""
    deviation = (
        """
        cell_center = Unsqueeze (cell_mean, c3)
        apart_runs = Sub (cell_runs, cell_center)
        flat_shape = Concat <axis = 0> (c0, c0, c_1, d)
        apart_padded = Reshape (apart_runs, flat_shape)
        apart = Slice (apart_padded, c0, patches, c2)"""
        if structure.cells
        else """
        apart = Identity (v)"""
    )
    ints = "".join(_attribute(a) for a in ("num_heads", "num_prefix", "probe", "tile", "cell", "keys"))
    return f"""{ints}{_attribute("scale", "float")}{_attribute("value_power", "float")}
        single = Cast <to = 1> (qkv)
        rows = Slice (single, a_num_prefix, c_end, c1){_SPLIT}
        patches = Shape <start = 2, end = 3> (q){_runs("q", "a_probe", "patches", "probe")}{_mean("probe")}
        proj_q_f = Cast <to = 1> (proj_q)
        proj_k_f = Cast <to = 1> (proj_k)
        asking = MatMul (probe_mean, proj_q_f)
        asking_scaled = Mul (asking, a_scale)
        answering = MatMul (k, proj_k_f)
        answering_t = Transpose <perm = [0, 1, 3, 2]> (answering)
        logits = MatMul (asking_scaled, answering_t)
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
        best = ReduceMax <keepdims = 0> (by_tile, c3){center}{deviation}
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
        scores = Where (broken, f_inf, scores_raw)
        top, top_index = TopK <axis = -1, largest = 1, sorted = 0> (scores, a_keys)
        found = Cast <to = 6> (top_index)
        indices, order = TopK <axis = -1, largest = 0, sorted = 1> (found, a_keys)
"""


def _sparse_attention(structure: Structure) -> str:
    ints = "".join(_attribute(a) for a in ("num_heads", "num_prefix", "tile", "cell"))
    shared = structure.prefix and structure.prefix_keys
    first = "a_num_prefix" if shared else "c0"
    parts = [
        f"""{ints}{_attribute("scale", "float")}
        rows = Identity (qkv){_SPLIT}
        scale = CastLike (a_scale, qkv)
        q_scaled = Mul (q, scale)
        q_patch = Slice (q_scaled, {"a_num_prefix" if structure.prefix else "c0"}, c_end, c2)
        queries = Shape <start = 2, end = 3> (q_patch)
        k_patch = Slice (k, {first}, c_end, c2)
        v_patch = Slice (v, {first}, c_end, c2)
        patches = Shape <start = 2, end = 3> (k_patch){_runs("q_patch", "a_tile", "queries", "tile")}""",
        _SELECTED,
        _CELLS if structure.cells else "",
        _shared(shared, structure.cells),
        """
        out_rows = Concat <axis = 2> (prefix_out, patch_out)"""
        if structure.prefix
        else """
        out_rows = Identity (patch_out)""",
        _PREFIX_ROWS if structure.prefix else "",
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

_CELLS = f"""
        k_single = Cast <to = 1> (k_patch)
        v_single = Cast <to = 1> (v_patch){_runs("k_single", "a_cell", "patches", "kc")}{_mean("kc")}
        vc_padded = Pad (v_single, kc_pads)
        vc_runs = Reshape (vc_padded, kc_shape)
        vc_sum = ReduceSum <keepdims = 0> (vc_runs, c3)
        vc_mean = Div (vc_sum, kc_size)
        cell_sizes = Squeeze (kc_size, c1)
        list_cell = Div (lists, a_cell)
        list_cell_open = Unsqueeze (list_cell, c4)
        is_member = Equal (list_cell_open, kc_range)
        member = Cast <to = 1> (is_member)
        selected = ReduceSum <keepdims = 0> (member, c3)
        selected_open = Unsqueeze (selected, c3)
        rest = Sub (cell_sizes, selected_open)
        safe = Max (rest, f1)
        selected_logits = MatMul (listed_logits, member)"""


def _shared(prefix: bool, cells: bool) -> str:
    """Attention over what all tiles share (prefix, cells) and over each tile's list -> `patch_out` [B,H,P,d]."""
    keys, values = [], []
    if prefix:
        keys.append("k_prefix")
        values.append("v_prefix")
    if cells:
        keys.append("k_cells")
        values.append("v_cells")
    lines = ""
    if prefix:
        lines += """
        k_prefix = Slice (k, c0, a_num_prefix, c2)
        v_prefix = Slice (v, c0, a_num_prefix, c2)"""
    if cells:
        lines += """
        k_cells = CastLike (kc_mean, qkv)
        v_cells = CastLike (vc_mean, qkv)"""
    if not keys:
        return f"""
        weights = Softmax <axis = -1> (listed_logits)
        own = CastLike (weights, qkv)
        tiles_out = MatMul (own, v_listed){_CROP}"""
    lines += f"""
        k_shared = Concat <axis = 2> ({", ".join(keys)})
        v_shared = Concat <axis = 2> ({", ".join(values)})
        k_shared_t = Transpose <perm = [0, 1, 3, 2]> (k_shared)
        shared_typed = MatMul (tile_padded, k_shared_t)
        shared_single = Cast <to = 1> (shared_typed)
        shared_count = Shape <start = 2, end = 3> (k_shared)
        shared_shape = Concat <axis = 0> (c0, c0, c_1, a_tile, shared_count)
        shared_logits = Reshape (shared_single, shared_shape)"""
    cell_shift = """
        cell_whole = Slice (shared_logits, CELLS_FROM, c_end, c4)
        selected_share = Mul (selected_open, cell_whole)
        excess = Sub (selected_logits, selected_share)
        excess_mean = Div (excess, safe)
        cell_rest = Sub (cell_whole, excess_mean)
        log_rest = Log (safe)
        cell_raised = Add (cell_rest, log_rest)
        has_rest = Greater (rest, f0)
        cell_logits = Where (has_rest, cell_raised, f_inf)"""
    if prefix and cells:
        lines += (
            cell_shift.replace("CELLS_FROM", "a_num_prefix")
            + """
        prefix_logits = Slice (shared_logits, c0, a_num_prefix, c4)
        logits = Concat <axis = -1> (prefix_logits, cell_logits, listed_logits)"""
        )
    elif cells:
        lines += (
            cell_shift.replace("CELLS_FROM", "c0")
            + """
        logits = Concat <axis = -1> (cell_logits, listed_logits)"""
        )
    else:
        lines += """
        logits = Concat <axis = -1> (shared_logits, listed_logits)"""
    lines += """
        weights = Softmax <axis = -1> (logits)
        shared_raw = Slice (weights, c0, shared_count, c4)
        listed_raw = Slice (weights, shared_count, c_end, c4)"""
    if cells:
        lines += f"""
        cell_weights = Slice (weights, {"a_num_prefix" if prefix else "c0"}, shared_count, c4)
        cell_share = Div (cell_weights, safe)
        cell_full = Mul (cell_share, cell_sizes)
        member_t = Transpose <perm = [0, 1, 2, 4, 3]> (member)
        listed_less = MatMul (cell_share, member_t)
        listed_weights = Sub (listed_raw, listed_less)"""
        lines += (
            """
        prefix_weights = Slice (weights, c0, a_num_prefix, c4)
        shared_weights = Concat <axis = -1> (prefix_weights, cell_full)"""
            if prefix
            else """
        shared_weights = Identity (cell_full)"""
        )
    else:
        lines += """
        listed_weights = Identity (listed_raw)
        shared_weights = Identity (shared_raw)"""
    return f"""{lines}
        own = CastLike (listed_weights, qkv)
        listed_out = MatMul (own, v_listed)
        shared_cast = CastLike (shared_weights, qkv)
        shared_flat = Concat <axis = 0> (c0, c0, c_1, shared_count)
        shared_rows = Reshape (shared_cast, shared_flat)
        shared_matrix = MatMul (shared_rows, v_shared)
        shared_out = Reshape (shared_matrix, tile_shape)
        tiles_out = Add (listed_out, shared_out){_CROP}"""


_CROP = """
        crop_shape = Concat <axis = 0> (c0, c0, c_1, d)
        patch_rows = Reshape (tiles_out, crop_shape)
        patch_out = Slice (patch_rows, c0, queries, c2)"""

_PREFIX_ROWS = """
        q_prefix = Slice (q_scaled, c0, a_num_prefix, c2)
        k_all_t = Transpose <perm = [0, 1, 3, 2]> (k)
        prefix_typed = MatMul (q_prefix, k_all_t)
        prefix_single = Cast <to = 1> (prefix_typed)
        prefix_soft = Softmax <axis = -1> (prefix_single)
        prefix_cast = CastLike (prefix_soft, qkv)
        prefix_out = MatMul (prefix_cast, v)"""


def _dense_attention(_: Structure) -> str:
    return f"""{_attribute("num_heads")}{_attribute("scale", "float")}
        rows = Identity (qkv){_SPLIT}
        scale = CastLike (a_scale, qkv)
        q_scaled = Mul (q, scale)
        k_t = Transpose <perm = [0, 2, 3, 1]> (k_rows)
        typed = MatMul (q_scaled, k_t)
        logits = Cast <to = 1> (typed)
        weights = Softmax <axis = -1> (logits)
        own = CastLike (weights, qkv)
        out = MatMul (own, v)
        out_tokens = Transpose <perm = [0, 2, 1, 3]> (out)
        merge = Constant <value_ints: ints = [0, 0, -1]> ()
        output = Reshape (out_tokens, merge)
"""
