"""`docs/operators.md` from the schemas: `python -m sparsifiner_edge.ops.document > docs/operators.md`."""

from __future__ import annotations

import textwrap

from sparsifiner_edge.ops.operator import Operator
from sparsifiner_edge.ops.schema import DOMAIN, OPERATORS, TOPK_LIMIT, VERSION

_HEAD = f"""# Operators

For those who run, port or check an exported file. ONNX domain `{DOMAIN}`, version {VERSION}.

A file that uses these operators carries a function body of standard operators (operator set 20) for each, so any
ONNX runtime can run it; a runtime in which a native library is registered runs that instead. Each operator has one
output, and no optional inputs or outputs. `B` batch, `N` tokens, `C` channels, `H` heads, `d = C / H`, `P = N -
num_prefix` patches, `T = ceil(P / tile)` tiles, `K` keys, `c` predictor channels, `L` landmarks, `S` cached tokens.
`qkv` is after bias, qk-norm and rotary embedding; its last axis is q, k, v, each H x d.

- **Ragged ends.** The last probe, tile and cell may be short: only real tokens enter means, softmax, maxima and counts.
- **Indices** are strictly ascending; ties go to the lower index; NaN counts as -inf. Given other indices a kernel
  returns unspecified values but never touches memory outside its tensors.
- **Sizes.** Where no token was merged they are ones. A file in which no node has others carries bodies that do not read
  them; a native kernel looks once whether all are 1.
- **Limit.** K at most {TOPK_LIMIT}, which is what TensorRT's TopK takes; export checks it.
- **Agreement.** Attention outputs lie within the tolerance below, relative to the range of the output. A selection
  agrees when every selected score is at least the reference's K-th score less the tolerance. Each backend repeats
  itself bit for bit.

This page is written from `sparsifiner_edge/ops/schema.py` (`python -m sparsifiner_edge.ops.document`).
"""


def operators_markdown() -> str:
    """The page, one section per operator."""
    return "\n".join([_HEAD, *(_section(op) for op in OPERATORS.values())])


def _section(op: Operator) -> str:
    inputs = "\n".join(f"| `{t.name}` | {', '.join(t.dtypes)} | [{', '.join(t.axes)}] | {t.doc} |" for t in op.inputs)
    rows = "\n".join(f"| `{a.name}` | {a.type.__name__} | {a.minimum:g} | {a.doc} |" for a in op.attributes)
    attributes = f"| attribute | type | least | |\n| --- | --- | --- | --- |\n{rows}\n\n" if rows else ""
    tolerances = ", ".join(f"{dtype} {value:g}" for dtype, value in op.tolerances.items())
    output = op.output
    result = (
        f"Output `{output.name}` ({', '.join(output.dtypes)}) [{', '.join(output.axes)}]: {output.doc}. "
        f"Tolerance: {tolerances}."
    )
    return (
        f"## {op.name}\n\n{op.doc}\n\n"
        f"| input | types | shape | |\n| --- | --- | --- | --- |\n{inputs}\n\n"
        f"{attributes}"
        f"{textwrap.fill(result, 120, break_on_hyphens=False)}\n"
    )


if __name__ == "__main__":
    print(operators_markdown(), end="")
