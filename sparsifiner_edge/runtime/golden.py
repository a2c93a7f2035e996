"""The golden check: a bundle carries one input and its output; a session must give that output."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsifiner_edge.artifacts import open_bundle
from sparsifiner_edge.errors import ArtifactError, GateError
from sparsifiner_edge.metrics import OTHER_TOKENS, POSITIONS, aligned
from sparsifiner_edge.runtime.session import Array, Session

Pair = tuple[dict[str, Array], dict[str, Array]]


def check_golden(session: Session, bundle: str | Path) -> dict[str, dict[str, float]]:
    """Run the bundle's golden input and compare every golden output.

    Where a session takes only larger batches (its `least_batch`), the input is repeated, and each answer must agree.

    Returns:
        Per output: `max_abs_difference`, `range_relative_error` (that difference over the output's range: its
        maximum minus its minimum) and `tolerance` (the largest `range_relative_error` allowed).

    Raises:
        ArtifactError: `golden.npz` or a tolerance is missing or corrupt.
        GateError: an output is missing, has another shape, or differs beyond its tolerance; the worst element is named.
    """
    folder = Path(bundle)
    tolerances = open_bundle(folder).get("tolerances")
    inputs, expected = _repeated(_read_golden(folder / "golden.npz"), getattr(session, "least_batch", 1))
    outputs = session.infer(inputs)
    if POSITIONS in expected:
        if POSITIONS not in outputs or outputs[POSITIONS].shape != expected[POSITIONS].shape:
            raise GateError(f"Output {POSITIONS!r} is missing or of another shape.", "Export it again.")
        outputs, missing = aligned(outputs, expected)
        total = expected.pop(POSITIONS).size
        if missing > OTHER_TOKENS * total:
            raise GateError(
                f"{missing} of {total} tokens that golden keeps are pruned.",
                f"Do not trust {session.backend} with this bundle on this machine; export it again or report it.",
            )
    report = {}
    for name, wanted in expected.items():
        tolerance = tolerances.get(name) if isinstance(tolerances, Mapping) else None
        if not isinstance(tolerance, (int, float)) or isinstance(tolerance, bool):
            raise ArtifactError(f"{folder} has no tolerance for output {name!r}.", "Export the bundle again.")
        if name not in outputs:
            raise GateError(f"Output {name!r} is missing; the model has {', '.join(outputs)}.", "Export it again.")
        report[name] = _compare(name, outputs[name], wanted, float(tolerance), session)
    return report


def _read_golden(path: Path) -> Pair:
    try:
        # Opened here: np.load leaves its own file open when the archive is bad.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays: dict[str, Array] = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.", "Export the bundle again.") from error
    inputs = {key.removeprefix("input."): value for key, value in arrays.items() if key.startswith("input.")}
    outputs = {key.removeprefix("output."): value for key, value in arrays.items() if key.startswith("output.")}
    if not inputs or not outputs:
        raise ArtifactError(f"{path} holds no golden input or no output.", "Export the bundle again.")
    return inputs, outputs


def _repeated(pair: Pair, least: int) -> Pair:
    inputs, outputs = pair
    times = max(1, math.ceil(least / min(len(array) if array.ndim else 1 for array in inputs.values())))
    if times == 1:
        return pair
    inputs, outputs = ({k: np.concatenate([v] * times) for k, v in arrays.items()} for arrays in (inputs, outputs))
    return inputs, outputs


def _compare(name: str, got: Array, wanted: Array, tolerance: float, session: Session) -> dict[str, float]:
    if got.shape != wanted.shape:
        raise GateError(f"Output {name!r} has shape {got.shape}; golden is {wanted.shape}.", "Export the bundle again.")
    reference: Any = wanted.astype(np.float64)
    difference = np.abs(got.astype(np.float64) - reference)
    worst = float(difference.max())
    relative = worst / _range(reference)
    if not relative <= tolerance:  # Written so that NaN fails.
        at = tuple(int(i) for i in np.unravel_index(int(np.argmax(difference)), difference.shape))
        raise GateError(
            f"Output {name!r} differs from golden by {relative:.3g} of its range (tolerance {tolerance:.3g}); "
            f"worst at {list(at)}: {got[at]} instead of {wanted[at]}.",
            f"Do not trust {session.backend} with this bundle on this machine; export it again or report it.",
        )
    return {"max_abs_difference": worst, "range_relative_error": relative, "tolerance": tolerance}


def _range(values: Any) -> float:
    """Maximum minus minimum; for a constant its magnitude, and 1 for zeros, so that there is always a yardstick."""
    return float(values.max() - values.min()) or float(np.abs(values).max()) or 1.0
