"""`optimize`: the fastest plan that keeps a fidelity, or the most faithful one within a latency."""

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
from sparsifiner_edge.images import evenly
from sparsifiner_edge.optimizer.clock import Clock
from sparsifiner_edge.optimizer.explore import LAST_SHARE, Search, explore
from sparsifiner_edge.optimizer.latency import PlanLatency, estimate_latency, measure_latency, takes_kernels
from sparsifiner_edge.optimizer.picture import draw_pareto_front
from sparsifiner_edge.optimizer.remarks import remarks_on
from sparsifiner_edge.optimizer.request import CHECKED, LEAST_IMAGES, OptimizeOptions, SearchRequest, read_request
from sparsifiner_edge.optimizer.trial import Trial
from sparsifiner_edge.optimizer.whole import Attempt, WholeModels, link_images
from sparsifiner_edge.pareto import Candidate, Deployment, ParetoFront, Point, SearchMethod, SearchResult
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

FRONT = "front.json"
PICTURE = "front.png"
PAGE = "report.html"
START = "start"
STUDENT = "student"
BUNDLE = "bundle"
START_SHARE = 0.25
"""Share of keys of the model from which plans are made; each plan sets its own."""
PREDICTOR_IMAGES = 8
"""Maximum number of images for fitting the predictors."""
LEARNING_IMAGES = 60.0
"""Fitting the predictors takes about as long as the dense model does for this many images."""
LEARNING_SHARE = 0.12
"""Maximum share of the whole time for fitting the predictors."""
DENSE_SHARE = 0.06
"""Maximum share of the whole time for running the dense model on all images."""
EVALUATION_SHARE = 0.2
"""Maximum share of the whole time for evaluating plans."""
DENSE_IMAGES = 14.0
"""Cost of evaluating all plans, in runs of the dense model per selection image."""
MIN_SELECTION = 3
"""Minimum number of selection images."""
FINALISTS = 3
"""Number of bundles that are timed at the end."""
HOSTS = 2
"""Number of deployments in which the dense model is timed at the end."""
LAST_S = 1.3
"""Duration of the last timing of each, relative to a quick timing."""


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
    """Find the fastest plan that keeps a fidelity here, or the most faithful one within a latency, as a bundle.

    Args:
        source: A model (see `load_source`), a sparse model's folder with predictors in the layers that may be sparse,
            or a module in memory that contains a vision transformer, on the CPU; it is not changed.
        images: A folder of images like those that the model will see, or several paths; a fifth is held out for the
            check.
        output: New folder for `bundle/`, `student/` (not for a module in memory), `front.json`, and with the extra
            `report` `front.png` and `report.html`. During the search, `bundle/` holds the best so far.
        options: Bound, deployments and time.
        model: How the source, or the teacher, is loaded.
        teacher: Dense model of a sparse model that was trained.
        progress: Progress callback; counts seconds.

    Returns:
        A result of kind "search". `answer` is unavailable if nothing meets the bound: the closest candidate is then the
        first finalist and in `bundle/`.

    Raises:
        ConfigError: There are two bounds or one is out of range, too few images, an output folder that holds something,
            or no time for one bundle.
        SparsifinerError: The model or the images are unusable.

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
            request, trial, few = _open_trial(request, subject, clock)
            form = ExportOptions(fit=request.fit, labels=options.labels)
            whole = WholeModels(scratch, subject.student, subject.dense, request.images, request.board, clock, form)
            stack.enter_context(whole)
            search = Search(request, trial, whole, clock, few, lambda attempt: _keep(whole, attempt, folder / BUNDLE))
            _explore(search, subject, folder / START)
            _measure_last(search, dense)
        if search is None or not search.attempts:
            short = f"{options.minutes:g} minutes were not enough to produce a bundle."
            raise ConfigError(short, "Give more --minutes, or fewer images.")
        _write_answer(subject, search, folder, options)
        result = _result(subject, search, dense, options)
    write_result(folder / FRONT, result)
    _draw(result, folder)
    return result


def _write_answer(subject: _Subject, search: Search, folder: Path, options: OptimizeOptions) -> None:
    """Write the best plan as `bundle/` and `student/`; for a board, add a remark if function bodies run it."""
    best, board = search.ranked()[0], search.request.board
    if search.current is None or best[:2] != search.current[:2]:
        _keep(search.models, best, folder / BUNDLE)
    if subject.path is not None:
        student = search.models.student_of(best.plan)
        save_student(dataclasses.replace(student, labels=(*options.labels,) or student.labels), folder / STUDENT)
    if board is not None:
        method = estimate_bundle(folder / BUNDLE, board, compute_precision=best.deployment.precision).method
        if method.kernels == "portable":
            search.remarks.append(
                f"The custom operators are estimated as ONNX function bodies, which are slow: {method.because}."
            )


def _new(folder: Path) -> Path:
    """Return the folder if nothing is there.

    Raises:
        ConfigError: Something is there.
    """
    require(folder.is_dir() or not folder.exists(), f"{folder} is a file.", "Give a new folder.")
    empty = not folder.exists() or not any(folder.iterdir())
    require(empty, f"{folder} is not empty.", "Give a new folder, or delete the files of the earlier search.")
    return folder


class _Subject(NamedTuple):
    """The model that is searched.

    Attributes:
        student: Model with predictors, which plans change.
        dense: Its dense model.
        path: Path as given; None for a module in memory.
        ready: True if its predictors are fitted.
    """

    student: Student
    dense: Student
    path: str | None
    ready: bool


def _subject(source: str | Path | nn.Module, options: ModelOptions, teacher: str | None, kernels: bool) -> _Subject:
    """Load the subject (see `optimize`); `kernels`: a new model is for GPU kernels.

    Raises:
        ConfigError: A size or a teacher does not fit the source, or plans cannot be made from the model.
    """
    if not isinstance(source, nn.Module) and Path(source).is_dir() and kind_of(Path(source)) == "student":
        require(options.img_size is None, "A sparse model has a fixed image size.", "Leave --img-size out.")
        refuse_normalisation(options.normalise)
        student = load_student(source, trust=options.trust)
        usable = not student.sparsity.is_dense and not student.sparsity.token_keep and student.sparsity.preset == "edge"
        what = f"{source} is dense, prunes tokens, or uses another preset than edge."
        require(usable, what, "Give the dense model, or a sparse model made by `sparsify MODEL --keep 0.25`.")
        return _Subject(student, teacher_of(student, teacher, options.file), str(source), ready=True)
    require(teacher is None, "--teacher requires a sparse model.", "Leave it out: a dense model is its own teacher.")
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


def _open_trial(request: SearchRequest, subject: _Subject, clock: Clock) -> tuple[SearchRequest, Trial, int]:
    """Return what evaluates plans, and the number of selection images.

    If the dense model is too slow for the time limit, fewer images are used.
    """
    student, teacher, paths = subject.student, subject.dense.model, [*request.images, *request.reserved]
    for _ in range(2):  # The first run is a warm-up.
        with clock.step("dense image", "the dense model on the images"):
            Trial(student, teacher, paths[:1], request.metric, fit=request.fit)
    most = max(LEAST_IMAGES, int(DENSE_SHARE * clock.seconds / clock.took("dense image")))
    if len(paths) > most:
        reserved = max(1, most // CHECKED)
        request = request._replace(
            images=evenly(request.images, most - reserved), reserved=evenly(request.reserved, reserved)
        )
        paths = [*request.images, *request.reserved]
    selection = int(EVALUATION_SHARE * clock.seconds / DENSE_IMAGES / clock.took("dense image"))
    trial = Trial(student, teacher, paths, request.metric, request.fit)
    return request, trial, max(MIN_SELECTION, min(len(request.images), selection))


def _explore(search: Search, subject: _Subject, start: Path) -> None:
    """Search with latencies of this machine or of a board; `start` keeps the model from which plans are made."""
    student, board, trial, tell = subject.student, search.request.board, search.trial, search.clock.tell

    def latency_of(deployment: Deployment) -> PlanLatency:
        if board is not None:
            return estimate_latency(student, board, deployment.precision)
        return measure_latency(student, deployment, any(trial.selects), tell)

    explore(search, lambda: _learn(search, subject, start), latency_of, student.sparsity.tile)


def _learn(search: Search, subject: _Subject, start: Path) -> None:
    """Fit the predictors and keep the model from which all plans are made; without predictors, plans read all keys."""
    clock, trial, student = search.clock, search.trial, subject.student
    selects = trial.selects  # Later layers see so few tokens after merging that dense attention is cheap.
    trial.selects = [selected and 2 * layer < len(selects) for layer, selected in enumerate(selects)]
    if not subject.ready and LEARNING_IMAGES * clock.took("dense image") > LEARNING_SHARE * clock.seconds:
        trial.selects = [False] * len(selects)
        search.remarks.append("There was no time to train predictors, so plans only merge tokens. Give more --minutes.")
    elif not subject.ready:
        set_budget(student.model, student.sparsity, keep_predictors=True)  # A plan changed it.
        with scratch_folder() as scratch, clock.step("learning", "training the predictors"):
            images = link_images(scratch / "images", evenly(search.request.images, PREDICTOR_IMAGES))
            student = calibrate_student(student, images, clock.tell)
    if subject.path is not None:
        save_student(student, start)


DenseTimes: TypeAlias = tuple[Quantity, list[float]]
"""Milliseconds of the dense model in a deployment, and its error there on each held-out image."""


def _measure_last(search: Search, dense: dict[Deployment, DenseTimes]) -> None:
    """Measure the best bundles and the dense model in turn, which replaces measurements against the reference.

    Args:
        search: State of the search.
        dense: Filled with the dense model's times.
    """
    nothing, models, clock = LayerPlan.dense(len(search.trial.selects)), search.models, search.clock
    best = sorted(search.attempts, key=search.order)[:FINALISTS]
    hosts = [host for plan, host in search.ms if plan == nothing]
    hosts.sort(key=lambda host: (host != best[0].deployment.dense_host, search.ms[nothing, host].value))
    most = max(2, int(clock.remaining / max(1e-3, LAST_S * clock.took("timing"))))
    try:
        for host in hosts[: min(HOSTS, most - 1)]:
            dense[host] = search.ms[nothing, host], models.errors(nothing, host, search.trial, search.count)
        best = best[: max(1, most - len(dense))]
        subjects = [*((one.plan, one.deployment) for one in best), *((nothing, host) for host in dense)]
        times = models.times(subjects, LAST_SHARE * clock.seconds / len(subjects))
    except BackendError as error:  # Several processes at once may be too many; earlier measurements stand.
        search.remarks.append(
            f"The last measurement failed: {error.what} The times are those measured during the search."
        )
        return
    for one, ms in zip(best, times, strict=False):
        search.attempts[search.attempts.index(one)] = one._replace(ms=ms, again=True)
    for host, ms in zip(dense, times[len(best) :], strict=True):
        dense[host] = ms, dense[host][1]


def _keep(whole: WholeModels, attempt: Attempt, target: Path) -> None:
    """Keep a bundle as the answer so far."""
    bundle = whole.bundle(attempt.plan, attempt.deployment)
    if attempt.deployment.is_here:  # Before copying, so that `target` is complete when it appears.
        remember_execution(bundle, attempt.deployment.backend, attempt.deployment.compute_precision)
    with replace_folder(target) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)


def _result(
    subject: _Subject, search: Search, dense: dict[Deployment, DenseTimes], options: OptimizeOptions
) -> SearchResult:
    bound, request = search.bound, search.request
    ranked = search.ranked()
    nothing = LayerPlan.dense(len(search.trial.selects))
    drifts = {host: ms.value / search.ms[nothing, host].value for host, (ms, _) in dense.items()}

    def drift(deployment: Deployment) -> float:
        return drifts.get(deployment.dense_host, fmean(drifts.values()) if drifts else 1.0)

    def candidate(attempt: Attempt) -> Candidate:
        return Candidate(
            merge=merge_text(attempt.plan.merge),
            keep=keep_text(attempt.plan.short_keep),
            **attempt.deployment._asdict(),
            fidelity=1 - fmean(attempt.errors),
            check_fidelity=1 - fmean(attempt.reserved),
            predicted_fidelity=1 - attempt.predicted[0],
            predicted_ms=attempt.predicted[1] * drift(attempt.deployment),
            ms=attempt.ms,
            file_bytes=search.models.file_bytes(attempt.plan, attempt.deployment),
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
        dense_text = f"{dense_rows[0].ms.value:.1f} ms in {dense_rows[0].deployment}"
        remarks.append(
            f"The dense model is at least as fast: {dense_text}"
            f"{' (estimated)' if request.board else ''}. Use the dense model, or a larger --img-size."
        )
    met = search.bounded(best) <= search.limit if bound.by_fidelity else best.ms.value <= bound.value
    tried = [search.trial.paths[number] for number in search.trial.selection]
    images = {"searched": request.images, "tried": tried, "checked": request.reserved}
    method = SearchMethod(
        metric=request.metric,
        at_least=bound.value if bound.by_fidelity else None,
        at_most_ms=None if bound.by_fidelity else bound.value,
        board=None if request.board is None else request.board.name,
        images={use: [path.name for path in paths] for use, paths in images.items()},
        minutes=options.minutes,
        seconds=round(search.clock.elapsed_s, 1),
    )
    front = ParetoFront(
        points=_points(search, drift),
        finalists=finalists,
        answer=finalists[0] if met else Unavailable(why),
        check=_check(search, best),
        dense=dense_rows,
        left_out=request.unavailable | {str(deployment): why for deployment, why in search.excluded.items()},
        remarks=remarks,
    )
    samples = {
        f"{merge_text(plan.merge)} | {keep_text(plan.short_keep)}": [1 - lost for lost in errors]
        for plan, errors in search.errors.items()
    }
    file = Subject(
        path=subject.path or Unavailable("it was in memory"),
        name=subject.student.name,
        sha256=bundle_hash(search.models.bundle(best.plan, best.deployment)),
    )
    return SearchResult("search", [file], method, samples | {"check": [1 - lost for lost in best.reserved]}, front)


def _check(search: Search, best: Attempt) -> Quantity:
    """Return the fidelity of the answer on held-out images; its spread is estimated from all images of the search."""
    least = search.trial.least
    shape = (max(fmean(best.errors), least) / max(stdev(best.errors), least)) ** 2  # Shape of a gamma distribution.
    mean_error = skewed_mean(best.reserved, min(1.0, shape))
    low, high = (1 - x if isinstance(x, float) and x < 1 else None for x in (mean_error.high, mean_error.low))
    return quantity(1 - mean_error.value, low, high, f"1 - error, {mean_error.interval}")


def _points(search: Search, drift: Callable[[Deployment], float]) -> list[Point]:
    plans, latencies = sorted(search.errors, key=search.mean), search.latencies
    rows = [
        (search.mean(plan), *(latency.of(plan) * drift(deployment) for deployment, latency in latencies.items()))
        for plan in plans
    ]
    return [
        Point(
            merge=merge_text(plan.merge),
            keep=keep_text(plan.short_keep),
            fidelity=1 - row[0],
            predicted_ms=dict(zip(map(str, latencies), row[1:], strict=True)),
            pareto_optimal=undominated,
        )
        for plan, row, undominated in zip(plans, rows, _pareto_front(rows), strict=True)
    ]


def _pareto_front(rows: Sequence[tuple[float, ...]]) -> list[bool]:
    """Return for each row whether no other row is at most as large everywhere and smaller somewhere."""
    return [
        not any(all(a <= b for a, b in zip(other, row, strict=True)) and other != row for other in rows) for row in rows
    ]


def _draw(result: SearchResult, folder: Path) -> None:
    """Draw the Pareto front and write the page, unless a package for them is missing."""
    with contextlib.suppress(MissingExtraError):
        draw_pareto_front(result, folder / PICTURE)
        write_report([folder / FRONT], folder / PAGE, pictures=[folder / PICTURE])
