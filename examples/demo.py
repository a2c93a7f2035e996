"""Demonstration on a saliency model: `optimize`, then a comparison with the dense model on the task.

    python examples/demo.py -o demo/ --minutes 4      (`make demo`)

The model is DINOv2 ViT-S/14 with a trained decoder, at 518 pixels and without training for sparsity. The demonstration
shows what a user with a model and some photographs gets in four minutes from `sparsifiner-edge optimize
sparsifiner_edge.demo.saliency:saliency --data PHOTOGRAPHS/ --minutes 4 -o demo/found`. It then evaluates both models on
photographs that were not used for the search or the calibration. The output folder receives the bundles, the results,
maps.png, keys.png (which keys one patch reads) and report.html. Results of an earlier demonstration in that folder are
replaced; other files stay.
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
from sparsifiner_edge.evaluate.explain import look
from sparsifiner_edge.images import load_image
from sparsifiner_edge.metrics import intersection_over_union, mean_absolute_error
from sparsifiner_edge.pareto import Interim, SearchResult
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import write_result
from sparsifiner_edge.sparse.student import load_student

MODEL = "sparsifiner_edge.demo.saliency:saliency"
"""Factory of the saliency model."""
SIZE = 518
"""Image size of the model in pixels."""
AT_LEAST = 0.982
"""Lowest fidelity (cosine to the dense model) that the search accepts."""
MARK = ".demonstration"
"""File that identifies a folder of the demonstration."""


def main(arguments: list[str] | None = None) -> SearchResult:
    """Run the demonstration with command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder to write")
    parser.add_argument("--minutes", type=float, default=4.0, help="time limit of the search [default: 4.0]")
    options = parser.parse_args(arguments)
    output, found = options.output, options.output / "found"
    begin(output)
    with progress_bar("starting") as progress:
        search_options = se.OptimizeOptions(at_least=AT_LEAST, minutes=options.minutes)
        images = split.images("searched")
        result = se.optimize(MODEL, images, found, search_options, progress=progress, better=show_interim)
    front, bundle = result.statistics, found / "bundle"
    for reason in front.unverified:
        print(f"Not verified: {reason}")
    if isinstance(front.answer, Unavailable):
        print(f"{front.answer.why}; increase --minutes")
    print("evaluating the sparse and the dense model on the task ..", flush=True)
    dense = se.export_bundle(MODEL, output / "dense", model=se.ModelOptions(img_size=SIZE))
    evaluation = se.evaluate_student(
        bundle, split.images("shown"), options=se.EvaluationOptions(metric="task"), against=dense
    )
    write_result(output / "task.json", evaluation)
    draw({"dense": dense, "sparse": bundle}, output / "maps.png")
    draw_keys(found / "student", output / "keys.png")
    pictures = [output / "maps.png", output / "keys.png", found / "front.png"]
    se.write_report([output / "task.json", found / "front.json"], output / "report.html", pictures=pictures)
    show(result, evaluation)
    print(f"{output}/report.html, {output}/maps.png and {output}/keys.png written")
    return result


def begin(output: Path) -> None:
    """Prepare the output folder and delete the results of an earlier demonstration.

    A folder that holds something else ends the program with an error.
    """
    if os.path.lexists(output) and (not output.is_dir() or (any(output.iterdir()) and not (output / MARK).exists())):
        sys.exit(f"{output} exists and is not a folder of the demonstration. Choose another -o.")
    for folder in ("dense", "found"):
        shutil.rmtree(output / folder, ignore_errors=True)
    for file in ("task.json", "maps.png", "keys.png", "report.html"):
        (output / file).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()


def show_interim(best: Interim) -> None:
    """Print the best model so far as a table."""
    table = Table(f"so far, saliency at {SIZE} px", "ms", "speedup", "cosine")
    table.add_row(f"dense: {best.dense}", f"{best.dense_ms:.0f}", "1.00", "")
    times = f"{best.dense_ms / best.ms:.2f}"
    table.add_row(f"sparse: {best.deployment}", f"{best.ms:.0f}", times, f"{best.fidelity:.4f}")
    Console(stderr=True).print(table)


def show(result: SearchResult, evaluation: Any) -> None:
    """Print what each change contributes, and the dense model next to the sparse model that was found."""
    front, scores = result.statistics, evaluation.statistics
    table = Table(f"saliency at {SIZE} px", "ms", "speedup", "cosine", "map IoU", "map error")
    fastest = min((dense.ms.value for dense in front.dense), default=front.finalists[0].ms.value)
    for dense in front.dense[:1]:
        table.add_row(f"dense: {dense.deployment}", f"{dense.ms.value:.0f}", "1.00", f"{dense.held_out_fidelity:.4f}")
    sparse = front.finalists[0]
    task = [f"{scores['iou'].mean.value:.3f}", f"{scores['error'].mean.value:.4f}"]
    speedup = f"{fastest / sparse.ms.value:.2f}"
    table.add_row(
        f"sparse: {sparse.deployment}", f"{sparse.ms.value:.0f}", speedup, f"{sparse.held_out_fidelity:.4f}", *task
    )
    if front.levers:
        steps = Table("each change, added to those above it", "ms", "cosine")
        for lever in front.levers:
            one = lever.candidate
            steps.add_row(f"{lever.change} ({one.deployment})", f"{one.ms.value:.0f}", f"{one.held_out_fidelity:.4f}")
        Console().print(steps)
    Console().print(table)


def draw(bundles: dict[str, Path], path: Path) -> None:
    """Draw a row for each of three photographs: the photograph, the dense map, the sparse map and their difference."""
    from matplotlib.figure import Figure

    photographs = split.images("shown")[:3]
    maps = {name: answers(bundle, photographs) for name, bundle in bundles.items()}
    figure = Figure(figsize=(10, 2.55 * len(photographs) + 0.5), layout="constrained")
    for row, (axes, photograph) in enumerate(zip(figure.subplots(len(photographs), 4), photographs, strict=True)):
        dense, sparse = maps["dense"][row], maps["sparse"][row]
        overlap = intersection_over_union(sparse > 0.5, dense > 0.5)
        panels = (
            ("", load_image(photograph, dense.shape), "viridis"),
            ("dense", dense, "magma"),
            ("sparse", sparse, "magma"),
            (f"error {mean_absolute_error(sparse, dense):.3f}, IoU {overlap:.3f}", np.abs(sparse - dense), "gray"),
        )
        for axis, (title, picture, colours) in zip(axes, panels, strict=True):
            axis.set_axis_off()
            axis.imshow(picture, cmap=colours, vmin=0, vmax=1)
            axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=100)


def draw_keys(folder: Path, path: Path) -> None:
    """Draw which keys one patch reads in each sparse layer, on a photograph."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    student = load_student(folder, trust=[MODEL.partition(":")[0]])
    photograph = split.images("shown")[0]
    image = load_image(photograph, student.img_size)
    rows, columns = student.backbone.grid
    row, column = 2 * rows // 3, columns // 2
    layers = [each for each in look(student, image, row * columns + column) if each[2].keys]
    figure = Figure(figsize=(3.1 * (1 + len(layers)), 3.4), layout="constrained")
    panels = list(figure.subplots(1, 1 + len(layers), squeeze=False)[0])
    panels[0].set_title("the photograph and one patch", fontsize=9)
    panels[0].imshow(image)
    for axis, (places, read, summary) in zip(panels[1:], layers, strict=True):
        axis.set_title(f"layer {summary.layer + 1}: reads {summary.keys} of {summary.tokens} keys", fontsize=9)
        seen = (read[places] > 0).reshape(rows, columns)
        shade = np.kron(np.where(seen, 1.0, 0.15), np.ones((image.shape[0] // rows, image.shape[1] // columns)))
        axis.imshow((image[: shade.shape[0], : shade.shape[1]] * shade[..., None]).astype(np.uint8))
    for axis in panels:
        axis.set_axis_off()
        side = image.shape[0] / rows
        axis.add_patch(Rectangle((column * side, row * side), side, side, fill=False, color="red", linewidth=2))
    figure.savefig(path, dpi=100)


def answers(bundle: Path, photographs: list[Path]) -> list[Any]:
    """Return the maps [H,W] of a bundle for photographs."""
    return [answer.outputs["saliency"][0] for path in photographs for answer in se.run(bundle, str(path))]


if __name__ == "__main__":
    try:
        main()
    except se.SparsifinerError as error:
        sys.exit(f"error: {error}")
