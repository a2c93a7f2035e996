"""How far a session's outputs may lie from a bundle's golden ones."""

from __future__ import annotations

from sparsifiner_edge.bundle.entries import Check
from sparsifiner_edge.export.check import MAPS_OTHERS, OTHERS, SAME
from sparsifiner_edge.export.fp16 import HALF_TOLERANCE, HALF_TOLERANCE_FREE
from sparsifiner_edge.sparse.outputs import ALONE

INT8_TOLERANCE = 5e-2
"""Greatest difference of a session's outputs from the golden ones, of their range: processors round int8 otherwise."""
INT8_HALF_TOLERANCE = 2e-1
"""The same where the rest is float16: two versions of ONNX Runtime differ by .11 on a sparse DINOv2."""
FREE_TOLERANCE = 2e-2
"""The same in fp32, where keys or tokens are chosen."""


def tolerances_of(check: Check, precision: str, int8_target: str, selects: bool) -> dict[str, float]:
    """By output, the greatest difference relative to its range.

    Args:
        check: what the file was found to give. precision, int8_target: see `export_bundle`.
        selects: whether it chooses keys or tokens.
    """
    general = _general(check, precision, int8_target, selects)
    return {name: max(general, _of_map(name, check)) for name in check.outputs}


def _general(check: Check, precision: str, int8_target: str, selects: bool) -> float:
    """In fp32 the wide one only where the check itself met as much."""
    if precision == "int8":
        return INT8_HALF_TOLERANCE if int8_target == "tensorrt" else INT8_TOLERANCE
    if precision == "fp16":
        return HALF_TOLERANCE_FREE if selects else HALF_TOLERANCE
    if not selects:
        return SAME.error
    worst = max(output.error_relative_to_range or 0.0 for output in check.outputs.values())
    return FREE_TOLERANCE if worst <= FREE_TOLERANCE else OTHERS.error


def _of_map(name: str, check: Check) -> float:
    """What a decoder's map may differ by beyond the rest: as much as the check allowed it, where it met that."""
    found = check.outputs[name].error_relative_to_range or 0.0
    return MAPS_OTHERS.error if name not in ALONE and found > FREE_TOLERANCE else 0.0
