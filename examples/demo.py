"""A model that finds what a photograph is of, made faster: `optimize`, then the task itself beside the dense model.

    python examples/demo.py -o demo/ --minutes 4      (`make demo`)

DINOv2 ViT-S/14 with a trained decoder, at 518 px, untrained for sparsity: what a user with a model and some photographs
gets in four minutes (`sparsifiner-edge optimize sparsifiner_edge.demo.saliency:saliency --data PHOTOGRAPHS/ --minutes 4
-o demo/found`), and, on photographs that nothing was searched or calibrated with, what both models find. Into the
folder go the bundles, results, maps.png and report.html. An earlier demonstration there is replaced, nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import sparsifiner_edge as se
from sparsifiner_edge.cli.common import progress_bar
from sparsifiner_edge.demo import split
from sparsifiner_edge.front import SearchResult
from sparsifiner_edge.images import load_image
from sparsifiner_edge.metrics import intersection_over_union, mean_absolute_error
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import write_result

MODEL, SIZE, AT_LEAST = "sparsifiner_edge.demo.saliency:saliency", 518, 0.98
MARK = ".demonstration"


def main(arguments: list[str] | None = None) -> SearchResult:
    """Of a command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder to write")
    parser.add_argument("--minutes", type=float, default=4.0, help="that the search may take")
    given = parser.parse_args(arguments)
    output, found = given.output, given.output / "found"
    begin(output)
    with progress_bar("starting") as progress:
        options = se.OptimizeOptions(at_least=AT_LEAST, minutes=given.minutes)
        result = se.optimize(MODEL, split.images("searched"), found, options, progress=progress)
    front, bundle = result.statistics, found / "bundle"
    if isinstance(front.answer, Unavailable):
        print(f"{front.answer.why}; give more --minutes")
    print("the task itself, beside the dense model ..", flush=True)
    dense = se.export_bundle(MODEL, output / "dense", model=se.ModelOptions(img_size=SIZE))
    judged = se.evaluate_student(
        bundle, split.images("shown"), options=se.EvaluationOptions(metric="task"), against=dense
    )
    write_result(output / "task.json", judged)
    draw({"dense": dense, "sparse": bundle}, output / "maps.png")
    pictures = [output / "maps.png", found / "front.png"]
    se.write_report([output / "task.json", found / "front.json"], output / "report.html", pictures=pictures)
    show(result, judged)
    print(f"{output}/report.html and {output}/maps.png written")
    return result


def begin(output: Path) -> None:
    """Refuse a folder that holds something else; drop what an earlier demonstration left."""
    if os.path.lexists(output) and (not output.is_dir() or (any(output.iterdir()) and not (output / MARK).exists())):
        sys.exit(f"{output} exists and holds no demonstration. Choose another -o.")
    for folder in ("dense", "found"):
        shutil.rmtree(output / folder, ignore_errors=True)
    for file in ("task.json", "maps.png", "report.html"):
        (output / file).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()


def show(result: SearchResult, judged: Any) -> None:
    """The dense model in what runs it fastest, and what was found."""
    front, scores = result.statistics, judged.statistics
    table = Table(f"saliency at {SIZE} px", "ms", "times", "cosine", "map's IoU", "map's error")
    fastest = min((one.ms.value for one in front.dense), default=front.finalists[0].ms.value)
    for one in front.dense[:1]:
        table.add_row(f"dense: {one.engine}", f"{one.ms.value:.0f}", "1.00", f"{one.check_fidelity:.4f}")
    one = front.finalists[0]
    task = [f"{scores['iou'].mean.value:.3f}", f"{scores['error'].mean.value:.4f}"]
    times = f"{fastest / one.ms.value:.2f}"
    table.add_row(f"found: {one.engine}", f"{one.ms.value:.0f}", times, f"{one.check_fidelity:.4f}", *task)
    Console().print(table)


def draw(bundles: dict[str, Path], path: Path) -> None:
    """A row for each of three photographs: itself, the dense map, the sparse one, and what differs."""
    from matplotlib.figure import Figure

    photographs = split.images("shown")[:3]
    maps = {name: answers(bundle, photographs) for name, bundle in bundles.items()}
    figure = Figure(figsize=(10, 2.55 * len(photographs) + 0.5), layout="constrained")
    for row, (axes, photograph) in enumerate(zip(figure.subplots(len(photographs), 4), photographs, strict=True)):
        dense, sparse = maps["dense"][row], maps["sparse"][row]
        overlap = intersection_over_union(sparse > 0.5, dense > 0.5)
        shown = (
            ("", load_image(photograph, dense.shape), "viridis"),
            ("dense", dense, "magma"),
            ("sparse", sparse, "magma"),
            (f"error {mean_absolute_error(sparse, dense):.3f}, IoU {overlap:.3f}", np.abs(sparse - dense), "gray"),
        )
        for axis, (title, picture, colours) in zip(axes, shown, strict=True):
            axis.set_axis_off()
            axis.imshow(picture, cmap=colours, vmin=0, vmax=1)
            axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=100)


def answers(bundle: Path, photographs: list[Path]) -> list[Any]:
    """The maps [H,W] of a bundle."""
    return [answer.outputs["saliency"][0] for path in photographs for answer in se.run(bundle, str(path))]


if __name__ == "__main__":
    try:
        main()
    except se.SparsifinerError as error:
        sys.exit(f"error: {error}")
