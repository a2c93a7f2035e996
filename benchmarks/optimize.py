"""Search against the best uniform setting, its predictions against what was measured, and its check against the truth.

    python benchmarks/optimize.py [--size 224] [--size 518] [--size 1036] -o FOLDER
    python benchmarks/optimize.py --seeds 10 -o FOLDER
    python benchmarks/optimize.py --saliency -o FOLDER

DINOv2 ViT-S/14, real weights, untrained. Searches see the development photographs and the calibration images; all that
is compared is measured over the publication photographs (`demo/split.py`). Uniform: one rate and one share of keys in
all layers, a grid of twenty, of which those around the answer's fidelity are exported and timed in the answer's engine,
beside it; "at equal fidelity" is on the way between the fastest of them (`fastest_at`). Predictions are those of
finalists at several bounds: of fidelity by all other plans that were measured, of latency by parts.

With --seeds the publication photographs are split anew for each search at 224 px: one half are the user's images, of
which a fifth is kept for the check, and the other half tells how often the printed lower bound holds on images like
them. No search sees what it is held against.

With --saliency the demonstration's model, decoder and all, is searched at 518 px for the fastest whose map overlaps
the dense model's (IoU at .5), in every backend and precision that runs here, beside the dense model in the fastest.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np
from fidelity_subject import weights_file
from summary import said, write_summary

import sparsifiner_edge as se
from sparsifiner_edge import Execution
from sparsifiner_edge.cli.common import err_console, print_table, progress_bar
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.files import scratch_folder
from sparsifiner_edge.front import Candidate, SearchResult
from sparsifiner_edge.images import evenly
from sparsifiner_edge.optimizer.latency import measure_latency
from sparsifiner_edge.optimizer.trial import Trial
from sparsifiner_edge.optimizer.whole import WholeModels, link_images, whole_ms
from sparsifiner_edge.plan import LayerPlan, plan_of
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.records import Unavailable, write_record
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.sparse.student import dense_twin, load_student

SEARCHES = {
    224: (("fp32", 0.95), ("fp32", 0.98), ("int8", 0.98)),
    518: (("fp32", 0.98), ("int8", 0.995), ("int8", 0.95), ("int8", 0.98)),
    1036: (("fp32", 0.98),),
}
"""The last one's answer is compared."""
BACKENDS = ("onnxruntime", "openvino")
GONE, SHARES = (0.25, 0.4, 0.55, 0.7, 0.85), (0.1, 0.2, 0.5, 1.0)
"""The grid: of the patches, what merges in all layers together; of the keys, what is read."""
JUDGES = {224: 33, 518: 33, 1036: 8}
"""Publication photographs, evenly taken."""
FEW = {224: 8, 518: 8, 1036: 4}
"""Of these, what decides which uniform settings are timed."""
EACH_SIDE = 2
"""Uniform settings around the answer's fidelity that are timed."""
MODULE, OVERLAP = "sparsifiner_edge.demo.saliency", 0.95
"""Of the demonstration's maps, at least."""


def searched(
    size: int, searches: Sequence[tuple[str, float]], data: Path, work: Path, backends: Sequence[str] = BACKENDS
) -> list[SearchResult]:  # fmt: skip
    """Searches by fidelity; the last one's answer stays in `work`/found."""
    found = []
    for precision, bound in searches:
        shutil.rmtree(work / "found", ignore_errors=True)
        with progress_bar(f"{size} px, {precision}, at least {bound}") as progress:
            found.append(
                se.optimize(
                    material.DINOV2, data, work / "found",
                    se.OptimizeOptions(at_least=bound, backends=backends, computes=["auto"], precisions=[precision]),
                    model=se.ModelOptions(weights=weights_file(), img_size=size), progress=progress,
                )
            )  # fmt: skip
    return found


def predictions(results: list[SearchResult]) -> list[dict[str, Any]]:
    """Of every finalist, what was predicted over what was measured; a prediction is of the machine as it was when the
    dense model was first timed, and counts times what that took longer beside the finalist.
    """
    rows = []
    for result in results:
        drifts = {dense.engine: dense.ms.value / dense.predicted_ms for dense in result.statistics.dense}
        for one in result.statistics.finalists:
            drift = drifts[one.engine.dense_host]
            rows.append({
                "at_least": result.method.at_least, "drift": drift, "engine": str(one.engine),
                "merge": one.merge, "keep": one.keep, "ms": one.ms.value,
                "ms_off": one.predicted_ms * drift / one.ms.value - 1,
                "distance_off": (1 - one.predicted_fidelity) / (1 - one.fidelity) - 1,
            })  # fmt: skip
    return rows


def answer_of(result: SearchResult) -> Candidate:
    """What was found, or an error that says why nothing was."""
    answer = result.statistics.answer
    if isinstance(answer, Unavailable):
        raise click.ClickException(answer.why)
    return answer


def against_uniform(size: int, folder: Path, result: SearchResult, scratch: Path, tell: Any) -> dict[str, Any]:
    """The last search's answer beside uniform settings at its fidelity, over publication photographs."""
    answer = answer_of(result)
    engine = answer.engine
    student = load_student(folder / "start")
    photographs = evenly(split.images("publication"), JUDGES[size])
    few, trial = (
        Trial(student, dense_twin(student).model, paths, "patches")
        for paths in (evenly(photographs, FEW[size]), photographs)
    )

    def lost(bundle: Path) -> float:
        with open_session(bundle, Execution(backend=engine.backend, precision=engine.computes)) as session:
            return fmean(trial.distances_of(session.infer))

    tell("the answer over publication photographs")
    own, depth = lost(folder / "bundle"), len(student.backbone.layers)
    with open_session(folder / "bundle", Execution(backend=engine.backend, precision=engine.computes)) as session:
        by_few = fmean(few.distances_of(session.infer))
    plans = [
        plan_of(SparsityConfig(keep=share, merge=(round(trial.patches * gone / depth),)), depth, trial.patches)
        for gone in GONE
        for share in SHARES
    ]
    latency, judged = measure_latency(student, engine), {}
    for number, plan in enumerate(plans, 1):
        tell(f"uniform setting {number} of {len(plans)} over publication photographs")
        judged[plan] = fmean(few.distances(plan))
    chosen = around(judged, by_few, latency.of)
    images = linked_images(folder, result)
    dense_model = dense_twin(load_student(folder / "start"))
    models = WholeModels(scratch, folder / "start", dense_model, images, None, (), None)
    bundles = {plan: models.bundle(plan, engine) for plan in chosen}
    tell("timing")
    ours, *others = whole_ms([(path, engine) for path in (folder / "bundle", *bundles.values())])
    points = [(1 - lost(path), ms.value) for path, ms in zip(bundles.values(), others, strict=True)]
    at_equal = fastest_at(points, 1 - own)
    low, high = (bound if isinstance(bound, float) else ours.value for bound in (ours.low, ours.high))
    return {
        "engine": str(engine), "merge": answer.merge, "keep": answer.keep, "publication_fidelity": 1 - own,
        "ms": ours.value, "uniform_ms": at_equal,
        "ratio": write_record(stats.quantity(at_equal / ours.value, at_equal / high, at_equal / low, ours.interval)),
        "grid": [{"rate": plan.merge[0], "keep": plan.keep[0], "fidelity": 1 - judged[plan]} for plan in plans],
        "timed": [
            {"rate": plan.merge[0], "keep": plan.keep[0], "fidelity": point[0], "ms": point[1]}
            for plan, point in zip(bundles, points, strict=True)
        ],
    }  # fmt: skip


def fastest_at(points: list[tuple[float, float]], wanted: float) -> float:
    """Milliseconds that settings (fidelity, ms) take at a fidelity, in their user's favour.

    Rates are whole numbers and close: of two settings the way between them, linear in log(1 - fidelity), can be had. So
    what counts is the lower convex hull, cut where it ends to fall; infinite beyond the best.
    """
    hull: list[tuple[float, float]] = []
    for x, y in sorted((math.log(1 - fidelity), ms) for fidelity, ms in points):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], (x, y)):
            hull.pop()
        hull.append((x, y))
    errors, times = zip(*hull, strict=True)
    return float(np.interp(math.log(1 - wanted), errors, times, left=math.inf))


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def around(judged: dict[LayerPlan, float], wanted: float, ms: Any) -> list[LayerPlan]:
    """Of the uniform settings that no other betters, as predicted, some on either side of a distance."""
    front: list[LayerPlan] = []
    for plan in sorted(judged, key=lambda plan: (judged[plan], ms(plan))):
        if not front or ms(plan) < ms(front[-1]):
            front.append(plan)
    place = next((i for i, plan in enumerate(front) if judged[plan] > wanted), len(front))
    return front[max(0, place - EACH_SIDE) : place + EACH_SIDE]


def linked_images(folder: Path, result: SearchResult) -> list[Path]:
    """The images that the search calibrated with."""
    names = set(result.method.images["searched"])
    return sorted(path for path in (folder.parent / "images").iterdir() if path.name in names)


def checks(count: int, work: Path, tell: Any) -> list[dict[str, Any]]:
    """By seed: the lower bound that a search printed, and what its answer has over the photographs it did not see."""
    rows = []
    for seed in range(count):
        shuffled = random.Random(seed).sample(split.images("publication"), len(split.images("publication")))
        users, others = shuffled[: len(shuffled) // 2], shuffled[len(shuffled) // 2 :]
        images = images_in(work / "seeds" / str(seed), users)
        folder = work / "seeds" / f"found-{seed}"
        (result,) = searched(224, [("fp32", 0.98)], images, folder, BACKENDS[:1])
        student = load_student(folder / "found" / "start")
        trial = Trial(student, dense_twin(student).model, others, "patches")
        with open_session(folder / "found" / "bundle", "onnxruntime") as session:
            truth = 1 - fmean(trial.distances_of(session.infer))
        answer_of(result)
        check = result.statistics.check
        assert not isinstance(check, Unavailable), "there is an answer"
        low = check.low if isinstance(check.low, float) else 0.0
        rows.append({"seed": seed, "low": low, "checked": check.value, "publication": truth})
        tell(f"seed {seed}: at least {low:.4f}, publication {truth:.4f}")
    return rows


def saliency(work: Path) -> dict[str, Any]:
    """The demonstration's model at a bound of its map, and over publication photographs."""
    images = images_in(work, [*split.images("development"), *split.images("calibration")])
    shutil.rmtree(work / "found", ignore_errors=True)
    with progress_bar("saliency") as progress:
        result = se.optimize(
            f"{MODULE}:saliency", images, work / "found", se.OptimizeOptions(at_least=OVERLAP, metric="maps"),
            model=se.ModelOptions(img_size=518, trust=[MODULE]), progress=progress,
        )  # fmt: skip
    answer = answer_of(result)
    student = load_student(work / "found" / "start", trust=[MODULE])
    trial = Trial(student, dense_twin(student).model, split.images("publication"), "maps")
    with open_session(
        work / "found" / "bundle", Execution(backend=answer.backend, precision=answer.computes)
    ) as session:
        overlaps = [1 - distance for distance in trial.distances_of(session.infer)]
    dense = min(result.statistics.dense, key=lambda one: one.ms.value)
    low, high = (bound if isinstance(bound, float) else answer.ms.value for bound in (answer.ms.low, answer.ms.high))
    ms = dense.ms.value
    ratio = stats.quantity(ms / answer.ms.value, ms / high, ms / low, answer.ms.interval)
    return {
        "answer": write_record(answer), "dense": {str(dense.engine): ms}, "ratio": write_record(ratio),
        "publication_overlap": write_record(stats.small_sample_mean(overlaps)),
    }  # fmt: skip


@click.command()
@click.option("--size", "sizes", type=click.Choice([str(size) for size in SEARCHES]), multiple=True)
@click.option("--seeds", default=0, help="Searches whose check is held against the truth.")
@click.option("--saliency", "on_saliency", is_flag=True, help="The demonstration's model, by its map.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False),
              help="Folder for results, and for work/.")  # fmt: skip
def main(sizes: tuple[str, ...], seeds: int, on_saliency: bool, output: Path) -> None:
    """See the module's documentation."""
    subject = Subject(path=Unavailable("computed here"), name=material.DINOV2, sha256=Unavailable("computed here"))
    for size in map(int, sizes):
        work = output / "work" / str(size)
        start = time.monotonic()
        results = searched(
            size, SEARCHES[size], images_in(work, [*split.images("development"), *split.images("calibration")]), work
        )
        minutes = (time.monotonic() - start) / 60
        rows = predictions(results)
        show_predictions(size, rows, minutes)
        with scratch_folder() as scratch:
            found = against_uniform(size, work / "found", results[-1], scratch, err_console.print)
        show_ratio(found)
        statistics = {**found, "predictions": rows, "minutes": minutes}
        result = Result("search", [subject], {"script": "benchmarks/optimize.py", "size": size}, {}, statistics)
        write_summary(output / f"search_{size}.json", result)
    if seeds:
        rows = checks(seeds, output / "work", err_console.print)
        held = sum(row["low"] <= row["publication"] for row in rows)
        click.echo(f"The bound held in {held} of {seeds}.")
        found = {"seeds": rows, "held": held}
        result = Result("search", [subject], {"script": "benchmarks/optimize.py --seeds"}, {}, found)
        write_summary(output / "search_seeds.json", result)
    if on_saliency:
        found = saliency(output / "work" / "saliency")
        answer, ratio, overlap = found["answer"], found["ratio"], found["publication_overlap"]
        click.echo(
            f"{answer['backend']}, {answer['stored']}, {answer['computes']}, "
            f"merge {answer['merge']}, keep {answer['keep']}: "
            f"{answer['ms']['value']:.1f} ms; dense {found['dense']}: {said(ratio)} times; IoU over publication "
            f"photographs {said(overlap, 4)}"
        )
        method = {"script": "benchmarks/optimize.py --saliency"}
        write_summary(output / "search_saliency.json", Result("search", [subject], method, {}, found))


def images_in(work: Path, paths: list[Path]) -> Path:
    """A folder of links to them, made once."""
    folder = work / "images"
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        link_images(folder, paths)
    return folder


def show_predictions(size: int, rows: list[dict[str, Any]], minutes: float) -> None:
    cells = [
        [str(r["at_least"]), r["engine"], f"{r['ms']:.1f}", f"{r['drift']:.2f}", f"{r['ms_off']:+.1%}",
         f"{r['distance_off']:+.1%}"]
        for r in rows
    ]  # fmt: skip
    columns = ["at least", "in", "ms", "drift", "ms off", "1 - cosine off"]
    print_table(f"{size} px: predicted over measured, {minutes:.1f} minutes", columns, cells)
    worst = {name: float(np.max(np.abs([row[name] for row in rows]))) for name in ("ms_off", "distance_off")}
    click.echo(f"worst: {worst['ms_off']:.1%} and {worst['distance_off']:.1%}")


def show_ratio(found: dict[str, Any]) -> None:
    click.echo(
        f"{found['engine']}, merge {found['merge']}, keep {found['keep']}: {found['ms']:.1f} ms at "
        f"{found['publication_fidelity']:.4f} over publication photographs; uniform {found['uniform_ms']:.1f}: "
        f"{said(found['ratio'])} times"
    )


if __name__ == "__main__":
    main()
