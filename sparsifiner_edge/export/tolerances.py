"""How far a session's outputs may lie from a bundle's golden ones."""

from __future__ import annotations

from sparsifiner_edge.bundle.entries import Check
from sparsifiner_edge.export.check import MAPS_OTHERS, OTHERS, SAME
from sparsifiner_edge.sparse.outputs import ALONE

INT8_TOLERANCE = 5e-2
"""Greatest difference of a session's outputs from the golden ones, of their range: processors round int8 otherwise."""
INT8_HALF_TOLERANCE = 2e-1
"""The same where the rest is float16: two versions of ONNX Runtime differ by .11 on a sparse DINOv2."""
HALF_TOLERANCE, HALF_TOLERANCE_FREE = 2e-2, 5e-2
"""In float16, which processors add up in different orders; the second where each session chooses keys or tokens."""
FREE_TOLERANCE = 2e-2
"""In fp32, where keys or tokens are chosen."""


def tolerances_of(check: Check, precision: str, int8_target: str, selects: bool) -> dict[str, float]:
    """By output, the greatest difference relative to its range.

    Args:
        check: what the file was found to give. precision, int8_target: see `export_bundle`.
        selects: whether it chooses keys or tokens.
    """
    general = {
        "int8": INT8_HALF_TOLERANCE if int8_target == "tensorrt" else INT8_TOLERANCE,
        "fp16": HALF_TOLERANCE_FREE if selects else HALF_TOLERANCE,
    }.get(precision, SAME.error)
    if precision == "fp32" and selects:  # The wide one only where the check itself met as much.
        general = FREE_TOLERANCE if max(check.errors.values(), default=0) <= FREE_TOLERANCE else OTHERS.error
    # A decoder's map may differ by as much as the check allowed it, where it met that.
    wide = {name for name, error in check.errors.items() if name not in ALONE and error > FREE_TOLERANCE}
    return {name: max(general, MAPS_OTHERS.error) if name in wide else general for name in check.errors}
