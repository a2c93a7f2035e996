"""`optimize`: the fastest plan that keeps a fidelity, or the most faithful one within a latency."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from sparsifiner_edge.bundle.store import remember_execution
from sparsifiner_edge.config import require
from sparsifiner_edge.errors import ConfigError, MissingExtraError
from sparsifiner_edge.export.export import ExportOptions
from sparsifiner_edge.files import io_errors, replace_folder, scratch_folder
from sparsifiner_edge.optimizer.clock import Clock
from sparsifiner_edge.optimizer.loading import calibration_images, fit_predictors, load, open_trial
from sparsifiner_edge.optimizer.models import Models, Stopwatch, takes_kernels
from sparsifiner_edge.optimizer.outcome import close, outcome
from sparsifiner_edge.optimizer.picture import draw_pareto_front
from sparsifiner_edge.optimizer.request import OptimizeOptions, read_request
from sparsifiner_edge.optimizer.search import Attempt, Search, run
from sparsifiner_edge.optimizer.subject import Subject
from sparsifiner_edge.pareto import Deployment, Interim, SearchResult
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.profiles.estimate import estimate_bundle
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.report import write_report
from sparsifiner_edge.results import write_result
from sparsifiner_edge.sparse.model_options import ModelOptions
from sparsifiner_edge.sparse.student import save_student

FRONT = "front.json"
PICTURE = "front.png"
PAGE = "report.html"
START = "start"
STUDENT = "student"
BUNDLE = "bundle"


def optimize(
    source: str | Path | nn.Module,
    images: str | Path | Sequence[str | Path],
    output: str | Path = "optimized",
    options: OptimizeOptions | None = None,
    *,
    model: ModelOptions | None = None,
    progress: Progress | None = None,
    better: Callable[[Interim], None] | None = None,
    stop: threading.Event | None = None,
) -> SearchResult:
    """Find the fastest plan that keeps a fidelity here, or the most faithful one within a latency, as a bundle.

    It works in any thread and sets no signal handlers. Ctrl-C ends the search with the best result so far.

    Args:
        source: A model (see `load_source`), a sparse model's folder with predictors in the layers that may be sparse,
            or a module in memory that contains a vision transformer, on the CPU; it is not changed.
        images: A folder of images like those that the model will see, or several paths. A fifth, and at least four, are
            held out to check the answer.
        output: New folder for `bundle/`, `student/` (not for a module in memory), `front.json`, and with the extra
            `report` `front.png` and `report.html`. During the search, `bundle/` holds the best so far.
        options: Bound, deployments and time.
        model: How the source, or the teacher, is loaded.
        progress: Progress callback; counts seconds.
        better: Called with the first model that was measured against the dense model, and with each better one.
        stop: Event that ends the search with the best result so far, after the current step.

    Returns:
        A result of kind "search". `answer` is unavailable if nothing meets the bound: the closest candidate is then the
        first finalist and in `bundle/`. `unverified` names what keeps an answer from being relied on.

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
    clock, folder = Clock(60 * options.minutes, progress, stop), _new(Path(output))
    request, search, kept = read_request(options, images), None, list[tuple[LayerPlan, Deployment]]()

    def keep(attempt: Attempt) -> None:
        _keep(models, attempt, folder / BUNDLE)
        kept.append((attempt.plan, attempt.deployment))

    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder())
        with clock.searching():
            clock.tell("loading")
            found = load(source, model, options.teacher, takes_kernels(request.board))
            with io_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            request, trial = open_trial(request, found, clock)
            found, fitted, remark = fit_predictors(request, found, clock)
            if found.path is not None:
                save_student(found.student, folder / START)
            calibrating = calibration_images(request, clock)
            form = ExportOptions(fit=request.fit, labels=options.labels)
            models = Models(scratch, found.student, found.dense, clock, calibrating, form, request.board)
            stopwatch = stack.enter_context(Stopwatch(clock))
            subject = Subject(trial, models, stopwatch, clock, request.board, max(len(calibrating), fitted))
            search = Search(request, subject, clock, keep, better)
            search.remarks += [remark] if remark else []
            run(search)
        if search is None or not search.attempts:
            short = f"{options.minutes:g} minutes were not enough to produce a bundle."
            raise ConfigError(short, "Give more --minutes, or fewer images.")
        closing = close(search)
        best = closing.ranked[0]
        if kept[-1:] != [(best.plan, best.deployment)]:
            keep(best)
        if found.path is not None:
            student = models.student_of(best.plan)
            save_student(dataclasses.replace(student, labels=(*options.labels,) or student.labels), folder / STUDENT)
        _remark_on_kernels(search, best.deployment.precision, folder)
        result = outcome(search, closing, models, found, options)
    write_result(folder / FRONT, result)
    _draw(result, folder)
    return result


def _remark_on_kernels(search: Search, precision: str, folder: Path) -> None:
    """For a board, add a remark if function bodies run the answer."""
    board = search.request.board
    if board is None:
        return
    method = estimate_bundle(folder / BUNDLE, board, compute_precision=precision).method
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


def _keep(models: Models, attempt: Attempt, target: Path) -> None:
    """Keep a bundle as the answer so far."""
    bundle = models.export(attempt.plan, attempt.deployment.precision)
    if attempt.deployment.is_here:  # Before copying, so that `target` is complete when it appears.
        remember_execution(bundle, attempt.deployment.backend, attempt.deployment.compute_precision)
    with replace_folder(target) as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)


def _draw(result: SearchResult, folder: Path) -> None:
    """Draw the Pareto front and write the page, unless a package for them is missing."""
    with contextlib.suppress(MissingExtraError):
        draw_pareto_front(result, folder / PICTURE)
        write_report([folder / FRONT], folder / PAGE, pictures=[folder / PICTURE])
