"""What a model's map looks like beside its dense model's: photograph, both, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.files import import_matplotlib
from sparsifiner_edge.images import load_image
from sparsifiner_edge.metrics import intersection_over_union, mean_absolute_error
from sparsifiner_edge.runtime import open_session


class Drawn(NamedTuple):
    """A bundle, what its column is called, and its median time for an image."""

    bundle: Path
    title: str
    milliseconds: float


def draw_maps(dense: Drawn, others: Sequence[Drawn], photographs: Sequence[Path], name: str, output: Path) -> None:
    """One row for each photograph: itself, the dense model's map, and of each other model its map and what differs.

    Args:
        name: of the output [B,H,W], 0 to 1.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    import_matplotlib("demo")
    from matplotlib.figure import Figure

    maps = {drawn: _maps(drawn.bundle, photographs, name) for drawn in (dense, *others)}
    figure = Figure(figsize=(2.5 * (2 + 2 * len(others)), 2.55 * len(photographs) + 0.5), layout="constrained")
    axes = figure.subplots(len(photographs), 2 + 2 * len(others), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    axes[0][1].set_title(f"{dense.title}\n{dense.milliseconds:.0f} ms", fontsize=9)
    for place, drawn in enumerate(others):
        axes[0][2 + 2 * place].set_title(f"{drawn.title}\n{drawn.milliseconds:.0f} ms", fontsize=9)
    for number, (row, path) in enumerate(zip(axes, photographs, strict=True)):
        wanted = maps[dense][number]
        height, width = wanted.shape
        row[0].imshow(load_image(path, (height, width)))
        row[1].imshow(wanted, cmap="magma", vmin=0, vmax=1)
        for place, drawn in enumerate(others):
            found = maps[drawn][number]
            row[2 + 2 * place].imshow(found, cmap="magma", vmin=0, vmax=1)
            row[3 + 2 * place].imshow(np.abs(found - wanted), cmap="gray", vmin=0, vmax=1)
            overlap = intersection_over_union(found > 0.5, wanted > 0.5)
            said = f"error {mean_absolute_error(found, wanted):.3f}\nIoU {overlap:.3f}"
            box = row[3 + 2 * place]
            box.text(0.03, 0.97, said, color="w", fontsize=8, va="top", transform=box.transAxes)
    figure.savefig(output, dpi=100)


def _maps(bundle: Path, photographs: Sequence[Path], name: str) -> list[Array]:
    with open_session(bundle) as session:
        height, width = session.inputs[0].shape[1:3]
        size = int(str(height)), int(str(width))
        return [session.infer({"image": load_image(path, size)[None]})[name][0] for path in photographs]
