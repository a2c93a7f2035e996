"""Generator of `docs/operators.md` from the operator schemas.

Run `python -m sparsifiner_edge.ops.document > docs/operators.md`.
"""

from __future__ import annotations

import textwrap

from sparsifiner_edge.ops.operator import Operator
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS, TOPK_LIMIT, VERSION

_HEAD = f"""# Operators

Reference for running, porting or checking an exported model. ONNX domain `{DOMAIN}`, version {VERSION}.

An exported model contains a function body of standard operators (opset 20) for each operator that it uses. A
runtime that supports ONNX local functions can run it; for others, inline the functions (docs/cpu.md lists the
runtimes). A runtime with a registered native library runs the native kernels instead. Each operator has exactly one
output, and no optional inputs or outputs.

| symbol | meaning |
| --- | --- |
| `B` | batch size |
| `N` | number of tokens |
| `C` | number of channels |
| `H` | number of heads |
| `d` | channels per head, `C / H` |
| `P` | number of patches, `N - num_prefix` |
| `T` | number of query tiles, `ceil(P / tile)` |
| `K` | number of selected keys |
| `c` | number of predictor channels |
| `L` | number of landmarks |
| `S` | number of cached tokens |
| `M` | number of tokens after merging |

`qkv` is taken after bias, qk-norm and rotary embedding. Its last axis is the concatenation of q, k and v, each `H x d`.

- **Ragged ends.** The last query pool, tile and key pool may be shorter than the others. Means, softmax, maxima and
  counts include only existing tokens.
- **Indices** are strictly ascending, ties between scores go to the lower index, and NaN counts as -inf. For
  unsorted or out-of-range indices, a kernel returns unspecified values but never accesses memory outside its tensors.
- **Sizes** are all 1 unless tokens were merged. If no node of a model has other sizes, its function bodies do not read
  them. The native kernels check once per call whether all sizes are 1.
- **Limit.** K is at most {TOPK_LIMIT}, the limit of TensorRT's TopK layer. The export checks it.
- **Tolerance.** The error of an attention output, relative to the range of the output, is within the tolerance below. A
  selection is correct if the score of every selected key is at least the K-th highest score of the reference minus the
  tolerance. The Triton kernels have a wider
  tolerance for selection scores (docs/nvidia.md). Each backend is deterministic: two runs give the same bits.

This page is generated from `sparsifiner_edge/ops/schema.py` with `python -m sparsifiner_edge.ops.document`.
"""


def operators_markdown() -> str:
    """Return the page in Markdown, with one section per operator."""
    return "\n".join([_HEAD, *(_section(op) for op in OPERATORS.values())])


def _section(op: Operator) -> str:
    """Return the section of one operator."""
    inputs = "\n".join(f"| `{t.name}` | {', '.join(t.dtypes)} | [{', '.join(t.axes)}] | {t.doc} |" for t in op.inputs)
    rows = "\n".join(f"| `{a.name}` | {a.type.__name__} | {a.minimum:g} | {a.doc} |" for a in op.attributes)
    attributes = f"| attribute | type | minimum | description |\n| --- | --- | --- | --- |\n{rows}\n\n" if rows else ""
    tolerances = ", ".join(f"{dtype} {value:g}" for dtype, value in op.tolerances.items())
    output = op.output
    result = (
        f"Output `{output.name}` ({', '.join(output.dtypes)}) [{', '.join(output.axes)}]: {output.doc}. "
        f"Tolerance: {tolerances}."
    )
    return (
        f"## {op.name}\n\n{op.doc}\n\n"
        f"| input | types | shape | description |\n| --- | --- | --- | --- |\n{inputs}\n\n"
        f"{attributes}"
        f"{textwrap.fill(result, 120, break_on_hyphens=False)}\n"
    )


if __name__ == "__main__":
    print(operators_markdown(), end="")
