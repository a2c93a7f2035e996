"""Comparison of a file with the float32 file that it was made from, output by output and row by row.

If tokens merge, the float32 file's matches are used, and on average also the file's own: among similar tokens rounding
decides which merge, and that is no error of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.errors import GateError
from sparsifiner_edge.export.sessions import file_runner, results_of, with_matches, with_outputs
from sparsifiner_edge.metrics import POSITIONS, align, row_cosines

LEAST_FREE_COSINE = 0.98
"""Gate: mean cosine of every output's rows to the float32 file's, if the file's own matches decide what merges."""
OTHER_PATCHES = 0.1
"""Share of the patches that a file may keep in place of others if tokens are pruned."""


class Reference:
    """Outputs of a float32 file for some images.

    Attributes:
        merges: True if its tokens merge.
        outputs: For each image, its outputs and matches.
    """

    def __init__(self, model: onnx.ModelProto, images: Sequence[Array], kernels: str = "auto") -> None:
        """Run the file; for `kernels` see `sessions.file_session`."""
        self._images, self._kernels, self._matches = images, kernels, results_of(model, "MatchTokens")
        self.merges = bool(self._matches)
        run = file_runner(with_outputs(model, self._matches), kernels)
        self.outputs = [run(image) for image in images]

    def rows(self, model: onnx.ModelProto, free: bool = False, count: int | None = None) -> list[dict[str, Array]]:
        """Return for each image the cosines of a file's rows (see `rows_alike`).

        Args:
            model: A file with the same custom operators.
            free: The file's own matches decide what merges.
            count: Number of images; None for all.
        """
        run, rows = file_runner(model if free else with_matches(model), self._kernels), []
        for image, wanted in zip(self._images[:count], self.outputs, strict=False):
            matches = {} if free else {name: wanted[name] for name in self._matches}
            rows.append(rows_alike(run(image, matches), wanted))
        return rows


def rows_alike(got: Mapping[str, Array], wanted: Mapping[str, Array]) -> dict[str, Array]:
    """Return the cosine of each row of each output; NaN where something is NaN.

    If tokens are pruned, rows that both files keep count; if more than `OTHER_PATCHES` differ, those count as cosine 0.
    """
    outputs, _ = align(got, wanted)
    with np.errstate(all="ignore"):  # The gate finds overflows.
        rows = {name: row_cosines(name, x, wanted[name]).ravel() for name, x in outputs.items()}
    if POSITIONS in got and POSITIONS in wanted and "tokens" in rows:
        both = np.stack([np.isin(a, b) for a, b in zip(wanted[POSITIONS], got[POSITIONS], strict=True)])
        prefix = wanted["tokens"].shape[1] - both.shape[1]
        mask = np.pad(both, ((0, 0), (prefix, 0)), constant_values=True).ravel()
        few = 1 - both.mean() <= OTHER_PATCHES
        rows["tokens"] = rows["tokens"][mask] if few else np.where(mask, rows["tokens"], 0.0)
    return rows


def mean_cosines(compared: Sequence[dict[str, Array]]) -> dict[str, float]:
    """Return the mean over images and rows of each output; -1 if something is NaN."""
    names = compared[0] if compared else ()
    means = {name: float(np.concatenate([rows[name] for rows in compared]).mean()) for name in names}
    return {name: mean if math.isfinite(mean) else -1.0 for name, mean in means.items()}


def require_cosines(cosines: Mapping[str, float], least: float, kind: str, how: str, fix: str) -> None:
    """Refuse a file if an output's cosine is below `least`; the other arguments form the message.

    Raises:
        GateError: An output's cosine is too low.
    """
    for name, cosine in cosines.items():
        if cosine < least:
            what = f"Output {name!r} of the {kind} file has cosine {cosine:.5f} to float32, allowed {least}{how}."
            raise GateError(what, f"Nothing was written. {fix}")
