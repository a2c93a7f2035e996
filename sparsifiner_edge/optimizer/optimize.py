"""`optimize`: the fastest at a fidelity, or the most faithful within a latency, of plans by layer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple, TypeAlias

from torch import nn

from sparsifiner_edge.artifacts import kind_of
from sparsifiner_edge.bundle.store import bundle_hash, remember_execution
from sparsifiner_edge.config import SparsityConfig, keep_text, merge_text, require
from sparsifiner_edge.errors import BackendError, ConfigError, MissingExtraError
from sparsifiner_edge.export.export import ExportOptions
from sparsifiner_edge.export.gpu_layout import gpu_sparsity
from sparsifiner_edge.files import io_errors, replace_folder, scratch_folder
from sparsifiner_edge.front import Candidate, Deployment, Front, Point, SearchMethod, SearchResult
from sparsifiner_edge.images import evenly
from sparsifiner_edge.optimizer.clock import Clock
from sparsifiner_edge.optimizer.explore import LAST_SHARE, Search, explore
from sparsifiner_edge.optimizer.latency import PlanLatency, estimate_latency, measure_latency, takes_kernels
from sparsifiner_edge.optimizer.picture import draw_front
from sparsifiner_edge.optimizer.remarks import remarks_on
from sparsifiner_edge.optimizer.request import CHECKED, LEAST_IMAGES, OptimizeOptions, SearchRequest, read_request
from sparsifiner_edge.optimizer.trial import Trial
from sparsifiner_edge.optimizer.whole import Attempt, WholeModels, link_images
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.profiles.estimate import estimate_bundle
from sparsifiner_edge.profiles.stats import quantity, skewed_mean
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report import write_report
from sparsifiner_edge.results import Quantity, Subject, write_result
from sparsifiner_edge.sparse.defaults import fit_to_model
from sparsifiner_edge.sparse.model_options import ModelOptions
from sparsifiner_edge.sparse.outputs import check_names
from sparsifiner_edge.sparse.patch import set_budget
from sparsifiner_edge.sparse.source import load_source, normalisation_of
from sparsifiner_edge.sparse.student import (
    Student,
    calibrate_student,
    load_student,
    make_student,
    refuse_normalisation,
    save_student,
    teacher_of,
)

FRONT, PICTURE, PAGE, START, STUDENT, BUNDLE = "front.json", "front.png", "report.html", "start", "student", "bundle"
START_SHARE = 0.25
"""Of keys, of the student that plans are made from: each gives its own."""
PREDICTOR_IMAGES = 8
"""Images at most that predictors are calibrated with."""
LEARNING_IMAGES, LEARNING_SHARE = 60.0, 0.12
"""Learning takes as long as the dense model does for so many images, about; and what it may take of all time."""
DENSE_SHARE = 0.06
"""Of all time, what the dense model may take on all images."""
JUDGING_SHARE, DENSE_IMAGES, LEAST_JUDGES = 0.2, 14.0, 3
"""Of all time, what judging plans may take, which is as long as the dense model takes for so many times the judges."""
FINALISTS, HOSTS, LAST_S = 3, 2, 1.3
"""Bundles, and engines of the dense model, that are timed in the end, each as long as so many quick timings."""


def optimize(
    source: str | Path | nn.Module,
    images: str | Path | Sequence[str | Path],
    output: str | Path = "optimized",
    options: OptimizeOptions | None = None,
    *,
    model: ModelOptions | None = None,
    teacher: str | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Find the fastest plan at a fidelity on this machine, or the most faithful within a latency, as a bundle.

    Args:
        source: a model (see `load_source`), a student folder with predictors in the layers that may be sparse, or a
            module in memory that contains a vision transformer, on the CPU; it stays as it is.
        images: a folder of images like those that the model will see, or some of both; a fifth is kept for the check.
        output: new folder for `bundle/`, `student/` (not of a module in memory), `front.json`, and with the extra
            `report` `front.png` and `report.html`; as soon as there is one, `bundle/` holds the best so far.
        options: what for, and for how long. model: how the source is loaded, or the teacher.
        teacher: of a student that was trained: its dense model.
        progress: see `Progress`; counts seconds.

    Returns:
        A result of kind "search"; `answer` is unavailable where nothing meets the bound: the nearest is first of the
        finalists, and in `bundle/`.

    Raises:
        ConfigError: two bounds, or one out of range; too few images; a folder that holds something; no time for one
            bundle.
        SparsifinerError: model, student or images are unusable.

    Example:
        >>> few = OptimizeOptions(at_least=0.5, backends=["onnxruntime"], precisions=["fp32"], minutes=0.5)
        >>> result = optimize("student", "images", "found", few)
        >>> result.statistics.answer.fidelity > 0.5
        True
    """
    options, model = options or OptimizeOptions(), model or ModelOptions()
    clock, folder = Clock(60 * options.minutes, progress), _new(Path(output))
    request, search, dense = read_request(options, images), None, dict[Deployment, DenseTimes]()
    with scratch_folder() as scratch, contextlib.ExitStack() as stack:
        with clock.ending():
            clock.tell("loading")
            subject = _subject(source, model, teacher, takes_kernels(request.board))
            with io_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            request, trial, few = _judges(request, subject, clock)
            form = ExportOptions(fit=request.fit, labels=options.labels)
            whole = WholeModels(scratch, subject.student, subject.dense, request.images, request.board, clock, form)
            stack.enter_context(whole)
            search = Search(request, trial, whole, clock, few, lambda attempt: _keep(whole, attempt, folder / BUNDLE))
            _explore(search, subject, folder / START)
            _measure_last(search, dense)
        if search is None or not search.attempts:
            short = f"{options.minutes:g} minutes were not enough for one bundle."
            raise ConfigError(short, "Give more --minutes, or fewer images.")
        _write_answer(subject, search, folder, options)
        result = _result(subject, search, dense, options)
    write_result(folder / FRONT, result)
    _draw(result, folder)
    return result


def _write_answer(subject: _Subject, search: Search, folder: Path, options: OptimizeOptions) -> None:
    """The best as `bundle/`, where another is there, and as `student/`; for a board, a remark where bodies run it."""
    best, board = search.ranked()[0], search.request.board
    if search.current is None or best[:2] != search.current[:2]:
        _keep(search.models, best, folder / BUNDLE)
    if subject.path is not None:
        student = search.models.student_of(best.plan)
        save_student(dataclasses.replace(student, labels=(*options.labels,) or student.labels), folder / STUDENT)
    if board is not None:
        method = estimate_bundle(folder / BUNDLE, board, precision=best.engine.stored).method
        if method.kernels == "portable":
            search.remarks.append(
                f"Operators of ours are estimated as function bodies, which are slow: {method.because}."
            )


def _new(folder: Path) -> Path:
    """The same, if nothing lies there.

    Raises:
        ConfigError: something lies there.
    """
    require(folder.is_dir() or not folder.exists(), f"{folder} is a file.", "Give a new folder.")
    empty = not folder.exists() or not any(folder.iterdir())
    require(empty, f"{folder} is not empty.", "Give a new folder, or delete what an earlier search left there.")
    return folder


class _Subject(NamedTuple):
    """What is searched: a student with predictors, which plans change, and its dense model.

    Attributes:
        path: as given; None: it was in memory. ready: whether its predictors have learnt.
    """

    student: Student
    dense: Student
    path: str | None
    ready: bool


def _subject(source: str | Path | nn.Module, options: ModelOptions, teacher: str | None, kernels: bool) -> _Subject:
    """See `optimize`; kernels: whether a new student is for those of GPUs.

    Raises:
        ConfigError: a size or a teacher that the source does not take; a student that plans cannot be made of.
    """
    if not isinstance(source, nn.Module) and Path(source).is_dir() and kind_of(Path(source)) == "student":
        require(options.img_size is None, "A student has a size of its own.", "Leave --img-size out.")
        refuse_normalisation(options.normalise)
        student = load_student(source, trust=options.trust)
        usable = not student.sparsity.is_dense and not student.sparsity.token_keep and student.sparsity.preset == "edge"
        what = f"{source} is dense, prunes tokens, or is of another preset than edge."
        require(usable, what, "Give the model itself, or a student made by `sparsify MODEL --keep 0.25`.")
        return _Subject(student, teacher_of(student, teacher, options.file), str(source), ready=True)
    require(teacher is None, "--teacher is for a student.", "Leave it out: a model is its own teacher.")
    if isinstance(source, nn.Module):
        pixels = normalisation_of(source, f"This {type(source).__name__}", options.normalisation)
        names = check_names(getattr(source, "output_names", None))
        module = copy.deepcopy(source).eval().float()
        dense = Student(module, type(source).__name__, pixels, outputs=names)
        require(dense.backbone.sparsity is None, "This module is sparse already.", "Call `restore_model` first.")
    else:
        dense = load_source(str(source), options.file, options.img_size, options.normalisation)
    sparsity = fit_to_model(SparsityConfig(keep=START_SHARE), dense.backbone, {"keep": START_SHARE})
    sparsity = gpu_sparsity(sparsity, dense.backbone.prefix, dense.backbone.patches) if kernels else sparsity
    student = make_student(dataclasses.replace(dense, model=copy.deepcopy(dense.model)), sparsity)
    return _Subject(student, dense, None if isinstance(source, nn.Module) else str(source), ready=False)


def _judges(request: SearchRequest, subject: _Subject, clock: Clock) -> tuple[SearchRequest, Trial, int]:
    """What judges plans, and how many images do; fewer where the dense model is slow beside the time."""
    student, teacher, paths = subject.student, subject.dense.model, [*request.images, *request.reserved]
    for _ in range(2):  # The first time is of getting ready.
        with clock.step("dense image", "the dense model on the images"):
            Trial(student, teacher, paths[:1], request.metric, fit=request.fit)
    most = max(LEAST_IMAGES, int(DENSE_SHARE * clock.seconds / clock.took("dense image")))
    if len(paths) > most:
        reserved = max(1, most // CHECKED)
        request = request._replace(
            images=evenly(request.images, most - reserved), reserved=evenly(request.reserved, reserved)
        )
        paths = [*request.images, *request.reserved]
    judges = int(JUDGING_SHARE * clock.seconds / DENSE_IMAGES / clock.took("dense image"))
    trial = Trial(student, teacher, paths, request.metric, request.fit)
    return request, trial, max(LEAST_JUDGES, min(len(request.images), judges))


def _explore(search: Search, subject: _Subject, start: Path) -> None:
    """With latencies of this machine, or of a board. start: where the student that plans are made of is kept."""
    student, board, trial, tell = subject.student, search.request.board, search.trial, search.clock.tell

    def latency_of(engine: Deployment) -> PlanLatency:
        if board is not None:
            return estimate_latency(student, board, engine.stored)
        return measure_latency(student, engine, any(trial.selects), tell)

    explore(search, lambda: _learn(search, subject, start), latency_of, student.sparsity.tile)


def _learn(search: Search, subject: _Subject, start: Path) -> None:
    """Let predictors learn, and keep the student that all plans are made of; without, plans read all keys."""
    clock, trial, student = search.clock, search.trial, subject.student
    selects = trial.selects  # Later layers see so few tokens, merged, that plain attention is cheap.
    trial.selects = [selected and 2 * layer < len(selects) for layer, selected in enumerate(selects)]
    if not subject.ready and LEARNING_IMAGES * clock.took("dense image") > LEARNING_SHARE * clock.seconds:
        trial.selects = [False] * len(selects)
        search.remarks.append("There was no time for predictors to learn: plans merge alone. Give more --minutes.")
    elif not subject.ready:
        set_budget(student.model, student.sparsity, keep_predictors=True)  # A plan has changed it.
        with scratch_folder() as scratch, clock.step("learning", "predictors learn"):
            images = link_images(scratch / "images", evenly(search.request.images, PREDICTOR_IMAGES))
            student = calibrate_student(student, images, clock.tell)
    if subject.path is not None:
        save_student(student, start)


DenseTimes: TypeAlias = tuple[Quantity, list[float]]
"""Milliseconds of the dense model in what ran it, and what it loses there on each image kept back."""


def _measure_last(search: Search, dense: dict[Deployment, DenseTimes]) -> None:
    """Best bundles and the dense model, in turn: that takes the place of what was measured beside the reference.

    dense: is filled.
    """
    nothing, models, clock = LayerPlan.dense(len(search.trial.selects)), search.models, search.clock
    best = sorted(search.attempts, key=search.order)[:FINALISTS]
    hosts = [host for plan, host in search.ms if plan == nothing]
    hosts.sort(key=lambda host: (host != best[0].engine.dense_host, search.ms[nothing, host].value))
    most = max(2, int(clock.remaining / max(1e-3, LAST_S * clock.took("timing"))))
    try:
        for host in hosts[: min(HOSTS, most - 1)]:
            dense[host] = search.ms[nothing, host], models.distances(nothing, host, search.trial, search.count)
        best = best[: max(1, most - len(dense))]
        subjects = [*((one.plan, one.engine) for one in best), *((nothing, host) for host in dense)]
        times = models.times(subjects, LAST_SHARE * clock.seconds / len(subjects))
    except BackendError as error:  # Of several at once one may be too many; what was measured before stands.
        search.remarks.append(f"The last measurement failed: {error.what} Times are those taken on the way.")
        return
    for one, ms in zip(best, times, strict=False):
        search.attempts[search.attempts.index(one)] = one._replace(ms=ms, again=True)
    for host, ms in zip(dense, times[len(best) :], strict=True):
        dense[host] = ms, dense[host][1]


def _keep(whole: WholeModels, attempt: Attempt, target: Path) -> None:
    """A bundle as the answer so far."""
    ours = whole.bundle(attempt.plan, attempt.engine)
    if attempt.engine.is_here:  # Before it is copied: what takes the place of `target` lacks nothing then.
        remember_execution(ours, attempt.engine.backend, attempt.engine.computes)
    with replace_folder(target) as folder:
        shutil.copytree(ours, folder, dirs_exist_ok=True)


def _result(
    subject: _Subject, search: Search, dense: dict[Deployment, DenseTimes], options: OptimizeOptions
) -> SearchResult:
    bound, request = search.bound, search.request
    ranked = search.ranked()
    nothing = LayerPlan.dense(len(search.trial.selects))
    drifts = {host: ms.value / search.ms[nothing, host].value for host, (ms, _) in dense.items()}

    def drift(engine: Deployment) -> float:
        return drifts.get(engine.dense_host, fmean(drifts.values()) if drifts else 1.0)

    def candidate(attempt: Attempt) -> Candidate:
        return Candidate(
            merge=merge_text(attempt.plan.merge),
            keep=keep_text(attempt.plan.short_keep),
            **attempt.engine._asdict(),
            fidelity=1 - fmean(attempt.distances),
            check_fidelity=1 - fmean(attempt.reserved),
            predicted_fidelity=1 - attempt.predicted[0],
            predicted_ms=attempt.predicted[1] * drift(attempt.engine),
            ms=attempt.ms,
            file_bytes=search.models.file_bytes(attempt.plan, attempt.engine),
        )

    dense_rows = [
        Candidate(
            merge="0",
            keep="1",
            **host._asdict(),
            fidelity=1 - fmean(lost),
            check_fidelity=1 - fmean(lost),
            predicted_fidelity=1.0,
            predicted_ms=ms.value,
            ms=ms,
            file_bytes=search.models.file_bytes(nothing, host),
        )
        for host, (ms, lost) in dense.items()
    ]
    finalists, best = [candidate(one) for one in ranked], ranked[0]
    why = f"no plan meets {bound.text}; the nearest has {finalists[0].fidelity:.4f} at {best.ms.value:.1f} ms"
    dense_rows.sort(key=lambda one: one.ms.value)
    remarks = [*search.remarks, *remarks_on(search, best)]
    if dense_rows and dense_rows[0].ms.value <= best.ms.value:
        much = f"{dense_rows[0].ms.value:.1f} ms in {dense_rows[0].engine}"
        remarks.append(f"Dense is faster here: {much}. A sparse model of this size gains nothing on this machine.")
    met = search.bounded(best) <= search.limit if bound.by_fidelity else best.ms.value <= bound.value
    tried = [search.trial.paths[number] for number in search.trial.judges]
    images = {"searched": request.images, "tried": tried, "checked": request.reserved}
    method = SearchMethod(
        metric=request.metric,
        at_least=bound.value if bound.by_fidelity else None,
        at_most_ms=None if bound.by_fidelity else bound.value,
        board=None if request.board is None else request.board.name,
        images={use: [path.name for path in paths] for use, paths in images.items()},
        minutes=options.minutes,
        seconds=round(search.clock.gone, 1),
    )
    front = Front(
        points=_points(search, drift),
        finalists=finalists,
        answer=finalists[0] if met else Unavailable(why),
        check=_check(search, best),
        dense=dense_rows,
        left_out=request.unavailable | {str(engine): why for engine, why in search.excluded.items()},
        remarks=remarks,
    )
    samples = {
        f"{merge_text(plan.merge)} | {keep_text(plan.short_keep)}": [1 - lost for lost in distances]
        for plan, distances in search.distances.items()
    }
    file = Subject(
        path=subject.path or Unavailable("it was in memory"),
        name=subject.student.name,
        sha256=bundle_hash(search.models.bundle(best.plan, best.engine)),
    )
    return SearchResult("search", [file], method, samples | {"check": [1 - lost for lost in best.reserved]}, front)


def _check(search: Search, best: Attempt) -> Quantity:
    """Fidelity of the answer on images kept back; those that it was judged by tell how images differ."""
    least = search.trial.least
    shape = (max(fmean(best.distances), least) / max(stdev(best.distances), least)) ** 2  # Of a gamma distribution.
    lost = skewed_mean(best.reserved, min(1.0, shape))
    low, high = (1 - x if isinstance(x, float) and x < 1 else None for x in (lost.high, lost.low))
    return quantity(1 - lost.value, low, high, f"1 - distance, {lost.interval}")


def _points(search: Search, drift: Callable[[Deployment], float]) -> list[Point]:
    plans, latencies = sorted(search.distances, key=search.mean), search.latencies
    rows = [
        (search.mean(plan), *(latency.of(plan) * drift(engine) for engine, latency in latencies.items()))
        for plan in plans
    ]
    return [
        Point(
            merge=merge_text(plan.merge),
            keep=keep_text(plan.short_keep),
            fidelity=1 - row[0],
            predicted_ms=dict(zip(map(str, latencies), row[1:], strict=True)),
            on_front=undominated,
        )
        for plan, row, undominated in zip(plans, rows, _pareto_front(rows), strict=True)
    ]


def _pareto_front(rows: Sequence[tuple[float, ...]]) -> list[bool]:
    """Whether no other row is smaller or equal in everything and smaller in something."""
    return [
        not any(all(a <= b for a, b in zip(other, row, strict=True)) and other != row for other in rows) for row in rows
    ]


def _draw(result: SearchResult, folder: Path) -> None:
    """The front as a picture, and the page; where what they need is not installed they are left out."""
    with contextlib.suppress(MissingExtraError):
        draw_front(result, folder / PICTURE)
        write_report([folder / FRONT], folder / PAGE, pictures=[folder / PICTURE])
