"""`optimize`: the fastest at a fidelity, or the most faithful within a latency, of plans by layer."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from sparsifiner_edge.artifacts import STUDENT_FILE, kind_of, sha256
from sparsifiner_edge.config import keep_text, merge_text, require
from sparsifiner_edge.errors import BackendError, ConfigError, GateError
from sparsifiner_edge.files import io_errors, replace_folder, scratch_folder
from sparsifiner_edge.front import Candidate, Deployment, Front, Point, SearchMethod, SearchResult
from sparsifiner_edge.images import evenly
from sparsifiner_edge.optimizer.candidates import check, rank
from sparsifiner_edge.optimizer.explore import Search, explore
from sparsifiner_edge.optimizer.latency import estimate_latency, measure_latency
from sparsifiner_edge.optimizer.request import OptimizeOptions, SearchRequest, read_request
from sparsifiner_edge.optimizer.trial import Trial
from sparsifiner_edge.optimizer.whole import WholeModels, link_images
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Quantity, Subject, write_result
from sparsifiner_edge.sparse.model_options import ModelOptions
from sparsifiner_edge.sparse.student import (
    Student,
    load_student,
    refuse_normalisation,
    save_student,
    sparsify,
    teacher_of,
)

TIME_AFTERWARDS = 0.4
"""Of the time allowed, what exports and the last measurement may take."""
LEAST_TRIED, MOST_TRIED, PATCHES = 6, 24, 16_000
"""Images that plans are judged by: of large ones fewer, so that they have about this many patches together."""
FRONT, STUDENT, BUNDLE = "front.json", "student", "bundle"


def optimize(
    source: str | Path,
    data: str | Path,
    output: str | Path,
    options: OptimizeOptions,
    *,
    model: ModelOptions | None = None,
    teacher: str | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Find the fastest plan at a fidelity on this machine, or the most faithful within a latency, and export it.

    Args:
        source: a model (see `load_source`), or a student folder with predictors in the layers that may be sparse.
        data: folder of images like those that the model will see; a fifth of them is kept for the last check.
        output: new folder for `front.json`, `student/`, `bundle/`.
        options: what for. model: how the source is loaded, or the teacher.
        teacher: of a student that was trained: its dense model.
        progress: see `Progress`.

    Returns:
        A result of kind "search"; `answer` is unavailable where nothing meets the bound: the nearest is first of the
        finalists.

    Raises:
        ConfigError: not one bound, or one out of range; too few images; a folder that holds something.
        SparsifinerError: model, student or images are unusable.

    Example:
        >>> few = OptimizeOptions(at_least=0.5, backends=["onnxruntime"], precisions=["fp32"], minutes=0.1)
        >>> result = optimize("student", "images", "searched", few)
        >>> result.statistics.answer.fidelity > 0.5
        True
    """
    end, model = time.monotonic() + 60 * options.minutes * (1 - TIME_AFTERWARDS), model or ModelOptions()
    request, trust, folder = read_request(options, data), model.trust, _new(Path(output))
    start = start_of(source, folder, model, teacher, request.images, progress)
    student = load_student(start, trust=trust)
    require_searchable(student, start)
    # A model's weights are those that its student was made of.
    dense_model = teacher_of(student, teacher, model.file if start == Path(source) else None)
    with io_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder() as scratch:
        whole = WholeModels(scratch, start, dense_model, request.images, request.board, trust, progress)
        search = prepare(request, student, dense_model, whole, progress)
        explore(search, student.sparsity.tile, end)
        candidates, dense = rank(search)
        (plan, best), checked = candidates[0], None
        if request.bound.is_met(best.fidelity, best.ms.value):
            reserved = Trial(student, dense_model.model, request.reserved, options.metric)
            checked = check(search, plan, best.engine, reserved)
            _keep_answer(whole.bundle(plan, best.engine), start, plan, folder, trust)
    subject = Subject(path=str(source), name=student.name, sha256=sha256(start / STUDENT_FILE))
    result = _result(subject, request, search, [candidate for _, candidate in candidates], dense, checked)
    write_result(folder / FRONT, result)
    return result


def _new(folder: Path) -> Path:
    """The same, if nothing lies there.

    Raises:
        ConfigError: something lies there.
    """
    require(folder.is_dir() or not folder.exists(), f"{folder} is a file.", "Give a new folder.")
    empty = not folder.exists() or not any(folder.iterdir())
    require(empty, f"{folder} is not empty.", "Give a new folder, or delete what an earlier search left there.")
    return folder


def prepare(
    request: SearchRequest, student: Student, dense_model: Student, whole: WholeModels, progress: Progress | None
) -> Search:
    """The dense model judged and timed in every engine, and every engine's parts.

    Raises:
        GateError, BackendError: every engine refuses the dense model, or its precision loses too much of it.
    """
    backbone = student.backbone
    judges = evenly(request.images, min(MOST_TRIED, max(LEAST_TRIED, PATCHES // backbone.patches)))
    trial = Trial(student, dense_model.model, judges, request.metric)
    nothing, losses, refused = LayerPlan.dense(len(backbone.layers)), dict[Deployment, float](), dict[Deployment, str]()
    for host in dict.fromkeys(engine.dense_host for engine in request.engines):
        try:  # A processor may have a precision that an engine does not take for this model.
            losses[host] = fmean(whole.distances(nothing, host, trial))
        except (GateError, BackendError) as error:
            refused[host], last = error.what, error
    if not losses:
        raise last
    times = zip(losses, whole.times([(nothing, host) for host in losses]), strict=True)
    dense = {
        host: Candidate(
            merge="0", keep="1", **host._asdict(), fidelity=1 - losses[host], predicted_fidelity=1.0,
            predicted_ms=ms.value, ms=ms,
        ) for host, ms in times
    }  # fmt: skip
    latencies = {
        engine: estimate_latency(student, request.board, engine.stored)
        if request.board is not None
        else measure_latency(student, engine, progress).calibrate(nothing, dense[engine.dense_host].predicted_ms)
        for engine in request.engines
        if engine.dense_host in dense
    }
    excluded = {x: refused[x.dense_host] for x in request.engines if x.dense_host in refused}
    return Search(request.bound, trial, whole, dense, latencies, excluded, progress)


def _keep_answer(bundle: Path, start: Path, plan: LayerPlan, folder: Path, trust: Sequence[str]) -> None:
    """The answer as student and bundle."""
    save_student(load_student(start, budget=plan.budget, trust=trust), folder / STUDENT)
    with replace_folder(folder / BUNDLE) as target:
        shutil.copytree(bundle, target, dirs_exist_ok=True)


def _result(
    subject: Subject, request: SearchRequest, search: Search, finalists: list[Candidate], dense: list[Candidate],
    checked: tuple[Quantity, list[float]] | None,
) -> SearchResult:  # fmt: skip
    bound = request.bound
    nearest = f"{finalists[0].fidelity:.4f} at {finalists[0].ms.value:.1f} ms"
    images = {"searched": request.images, "tried": search.trial.paths, "checked": request.reserved}
    method = SearchMethod(
        metric=request.metric, at_least=bound.value if bound.by_fidelity else None,
        at_most_ms=None if bound.by_fidelity else bound.value,
        board=None if request.board is None else request.board.name,
        images={use: [path.name for path in paths] for use, paths in images.items()},
    )  # fmt: skip
    front = Front(
        points=_points(search), finalists=finalists,
        answer=finalists[0] if checked else Unavailable(f"no plan meets {bound.text}; the nearest has {nearest}"),
        check=checked[0] if checked else Unavailable("there is no answer to check"),
        dense=dense, left_out=request.unavailable | {str(engine): why for engine, why in search.excluded.items()},
    )  # fmt: skip
    samples = {
        f"{merge_text(plan.merge)} | {keep_text(plan.short_keep)}": [1 - lost for lost in distances]
        for plan, distances in search.distances.items()
    }
    return SearchResult("search", [subject], method, samples | ({"check": checked[1]} if checked else {}), front)


def _points(search: Search) -> list[Point]:
    plans, latencies = sorted(search.distances, key=search.mean), search.latencies
    rows = [(search.mean(plan), *(latency.of(plan) for latency in latencies.values())) for plan in plans]
    return [
        Point(
            merge=merge_text(plan.merge), keep=keep_text(plan.short_keep), fidelity=1 - row[0],
            predicted_ms=dict(zip(map(str, latencies), row[1:], strict=True)), on_front=undominated,
        )
        for plan, row, undominated in zip(plans, rows, _pareto_front(rows), strict=True)
    ]  # fmt: skip


def _pareto_front(rows: Sequence[tuple[float, ...]]) -> list[bool]:
    """Whether no other row is smaller or equal in everything and smaller in something."""
    return [
        not any(all(a <= b for a, b in zip(other, row, strict=True)) and other != row for other in rows) for row in rows
    ]


START = "start"
START_SHARE = 0.25
"""Of keys, of the student that plans are made from: each gives its own."""
PREDICTOR_IMAGES = 8
"""Images at most that predictors are calibrated with: a minute or two at 518 px."""


def start_of(
    source: str | Path, folder: Path, options: ModelOptions, teacher: str | None, images: Sequence[Path],
    progress: Progress | None,
) -> Path:  # fmt: skip
    """The user's student, or one with a predictor in every layer, which is made in `folder`; see `optimize`.

    Raises:
        ConfigError: a size or a teacher that the source does not take.
    """
    path = Path(source)
    if path.is_dir() and kind_of(path) == "student":
        if options.img_size is not None:
            raise ConfigError("A student has a size of its own.", "Leave --img-size out.")
        refuse_normalisation(options.normalise)
        return path
    if teacher is not None:
        raise ConfigError("--teacher is for a student.", "Leave it out: a model is its own teacher.")
    with scratch_folder() as scratch:
        return sparsify(
            str(source), folder / START, weights=options.weights, img_size=options.img_size, keep=START_SHARE,
            calibrate=link_images(scratch / "images", evenly(images, PREDICTOR_IMAGES)), normalise=options.normalise,
            progress=progress,
        )  # fmt: skip


def require_searchable(student: Student, start: Path) -> None:
    """Refuse a student that plans cannot be made of.

    Raises:
        ConfigError: it is dense, prunes tokens, or is of another preset.
    """
    sparsity = student.sparsity
    if sparsity.is_dense or sparsity.token_keep or sparsity.preset != "edge":
        raise ConfigError(
            f"{start} is dense, prunes tokens, or is of another preset than edge.",
            "Give the model itself, or a student made by `sparsify MODEL --keep 0.25`.",
        )
