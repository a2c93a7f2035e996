"""The whole way in Python: a model, sparse by defaults, beside the dense one; then the fastest at a fidelity.

    python examples/demo.py -o demo/ --minutes 5      (`make demo`)

The model finds what a photograph is of: DINOv2 ViT-S/14 with a trained decoder, at 518 px, untrained for sparsity. Into
the folder go bundles, results, maps.png and report.html: first what the defaults give, then also what a search found in
the time that was left. A folder that holds an earlier demonstration is replaced.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import sparsifiner_edge as se
from sparsifiner_edge.demo import split
from sparsifiner_edge.images import load_image
from sparsifiner_edge.metrics import intersection_over_union, mean_absolute_error
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report import write_report
from sparsifiner_edge.results import write_result

MODULE, SIZE, AT_LEAST = "sparsifiner_edge.demo.saliency", 518, 0.98
AFTER_MINUTES, LEAST_MINUTES = 0.8, 1.0
"""What measuring and drawing takes after a search; what a search is worth beginning with."""
MARK = ".demonstration"
CONSOLE = Console()
Found = dict[str, tuple[Path, Any, float, float]]
"""Name -> a sparse bundle, how it does the task, and milliseconds: the dense model's beside it, and its own."""


def main(arguments: list[str] | None = None) -> Found:
    """Of a command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder to write")
    parser.add_argument("--minutes", type=float, default=5.0, help="about how long it may take, the search included")
    given = parser.parse_args(arguments)
    output, end = given.output, time.monotonic() + 60 * (given.minutes - AFTER_MINUTES)
    begin(output)
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch, "images")  # Photographs that are searched and calibrated with; others judge.
        images.mkdir()
        for path in split.images("searched"):
            shutil.copyfile(path, images / path.name)

        say("dense model, exported")
        dense = se.export_bundle(f"{MODULE}:saliency", output / "dense", model=se.ModelOptions(img_size=SIZE))
        say("sparse by defaults, exported and measured")
        student = se.sparsify(f"{MODULE}:saliency", Path(scratch, "student"), img_size=SIZE, calibrate=images)
        bundle = se.export_bundle(student, output / "default", model=se.ModelOptions(trust=[MODULE]))
        found: Found = {"defaults": (bundle, judged(bundle, dense), *timed(bundle, dense))}
        show(found, dense, output)

        minutes = (end - time.monotonic()) / 60
        if minutes < LEAST_MINUTES:
            return found
        say(f"the fastest at a fidelity of {AT_LEAST}, searched for {minutes:.1f} minutes")
        result = se.optimize(
            student, images, output / "found", model=se.ModelOptions(trust=[MODULE]), options=se.OptimizeOptions(
                at_least=AT_LEAST, backends=["onnxruntime"], computes=["auto"], precisions=["fp32"], minutes=minutes
            ),
        )  # fmt: skip
    if isinstance(result.statistics.answer, Unavailable):
        say(f"none was found: {result.statistics.answer.why}")
        return found
    bundle, front = output / "found" / "bundle", result.statistics  # It has timed the two in turn, at its end.
    ms = front.dense[0].ms.value, front.answer.ms.value
    found[f"fastest at {AT_LEAST}"] = (bundle, judged(bundle, dense), *ms)
    show(found, dense, output)
    return found


def begin(output: Path) -> None:
    """Refuse a folder that holds something else; drop what an earlier demonstration left."""
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / MARK).exists())):
        sys.exit(f"{output} exists and holds no demonstration. Choose another -o.")
    for name in ("dense", "default", "found"):
        shutil.rmtree(output / name, ignore_errors=True)
    for old in (*output.glob("*-task.json"), *output.glob("*-speed.json"), output / "report.html", output / "maps.png"):
        old.unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()
    answers.cache_clear()  # Of bundles that lay there.


def say(text: str) -> None:
    """What comes next."""
    print(f"{text} ..", flush=True)


def judged(bundle: Path, dense: Path) -> Any:
    """The task done beside the dense model, on photographs that nothing was searched or calibrated with."""
    task = se.evaluate_student(
        bundle, split.images("shown"), options=se.EvaluationOptions(metric="task"), against=dense
    )
    write_result(dense.with_name(f"{named(bundle)}-task.json"), task)
    return task


def timed(bundle: Path, dense: Path) -> tuple[float, float]:
    """Milliseconds of the dense model and of a bundle, in turn."""
    speed = se.profile_bundle(
        bundle, options=se.ProfileOptions(seconds=1.5, min_queries=10, layers=False, power=False), against=dense
    )
    write_result(dense.with_name(f"{named(bundle)}-speed.json"), speed)
    against = speed.statistics.against
    assert against is not None
    return against.latency_ms.p50.value, speed.statistics.subject.latency_ms.p50.value


def named(bundle: Path) -> str:
    """The folder in the demonstration's: "default" or "found"."""
    return bundle.name if bundle.name != "bundle" else bundle.parent.name


def show(found: Found, dense: Path, output: Path) -> None:
    """Table, picture and page of what is known."""
    table = Table("saliency at 518 px, ONNX Runtime", *found)
    for label, figure in (
        ("map's error", lambda task, *_: f"{task.statistics['error'].mean.value:.4f}"),
        ("map's IoU", lambda task, *_: f"{task.statistics['iou'].mean.value:.3f}"),
        ("dense ms", lambda _, dense_ms, __: f"{dense_ms:.0f}"),
        ("sparse ms", lambda _, __, ms: f"{ms:.0f}"),
        ("times as fast", lambda _, dense_ms, ms: f"{dense_ms / ms:.2f}"),
        ("kernels", lambda task, *_: str(task.method.runtime["subject"].kernels)),
    ):
        table.add_row(label, *(figure(*figures) for _, *figures in found.values()))
    CONSOLE.print(table)
    draw({"dense": dense} | {name: bundle for name, (bundle, *_) in found.items()}, output / "maps.png")
    results = [*sorted(output.glob("*-*.json")), *output.glob("found/front.json")]
    write_report(results, output / "report.html", pictures=[output / "maps.png"])
    say(f"{output}/report.html and {output}/maps.png written")


def draw(bundles: dict[str, Path], path: Path) -> None:
    """A row for each of three photographs: itself, the dense map, and of each sparse model its map and what differs."""
    from matplotlib.figure import Figure

    photographs = tuple(split.images("shown")[:3])
    maps = {name: answers(bundle, photographs) for name, bundle in bundles.items()}
    columns = 2 * len(bundles)
    figure = Figure(figsize=(2.5 * columns, 2.55 * len(photographs) + 0.5), layout="constrained")
    for row, (axes, photograph) in enumerate(zip(figure.subplots(len(photographs), columns), photographs, strict=True)):
        for axis in axes:
            axis.set_axis_off()
        dense = maps["dense"][row]
        axes[0].imshow(load_image(photograph, dense.shape))
        for place, (name, found) in enumerate(maps.items()):
            axes[max(1, 2 * place)].imshow(found[row], cmap="magma", vmin=0, vmax=1)
            axes[max(1, 2 * place)].set_title("" if row else name, fontsize=9)
            if place:
                error = mean_absolute_error(found[row], dense)
                overlap = intersection_over_union(found[row] > 0.5, dense > 0.5)
                axes[2 * place + 1].imshow(np.abs(found[row] - dense), cmap="gray", vmin=0, vmax=1)
                axes[2 * place + 1].set_title(f"error {error:.3f}, IoU {overlap:.3f}", fontsize=8)
    figure.savefig(path, dpi=100)


@functools.cache
def answers(bundle: Path, photographs: tuple[Path, ...]) -> list[Any]:
    """The maps [H,W] of a bundle."""
    with se.open_session(bundle) as session:
        _, height, width, _ = session.inputs[0].shape
        return [
            session.infer({"image": load_image(path, (height, width))[None]})["saliency"][0] for path in photographs
        ]


if __name__ == "__main__":
    try:
        main()
    except se.SparsifinerError as error:
        sys.exit(f"error: {error}")
