"""`search_model`: the fastest at a fidelity, or the most faithful within a latency, of plans by layer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, TypeVar

from sparsifiner_edge.artifacts import STUDENT_FILE, sha256
from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.config import keep_text, merge_text
from sparsifiner_edge.errors import BackendError, ConfigError, GateError, SparsifinerError
from sparsifiner_edge.files import io_errors, scratch_folder
from sparsifiner_edge.images import Normalise
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.profiles.boards.board import Board
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.results import Estimate, Subject, write_result
from sparsifiner_edge.runtime.open import checked_bundle, open_checked
from sparsifiner_edge.search.asked import Asked, what_is_asked
from sparsifiner_edge.search.board import estimated
from sparsifiner_edge.search.entrants import (
    Entrant,
    Shortlist,
    checked,
    entrants,
    finalist,
    judged,
    keep_answer,
    meets,
    timed,
    why_unmet,
)
from sparsifiner_edge.search.explore import Bound, Engines, Search, explore
from sparsifiner_edge.search.finalists import Contender, Exports, Stopwatch
from sparsifiner_edge.search.front import (
    Checked,
    Finalist,
    Front,
    Point,
    SearchMethod,
    SearchResult,
    draw_front,
    named,
    not_dominated,
)
from sparsifiner_edge.search.judge import FIDELITIES
from sparsifiner_edge.search.latency import Anchor, Deployment, PlanLatency, measured
from sparsifiner_edge.search.start import require_searchable, start_of
from sparsifiner_edge.search.trial import Trial
from sparsifiner_edge.sparse.student import Student, load_student
from sparsifiner_edge.sparse.teacher import teacher_of

RESERVED = 0.4
"""Of the time asked for, what exports and the last measurement may take."""
Value = TypeVar("Value")
FRONT, STUDENT, BUNDLE = "front.json", "student", "bundle"


def search_model(
    source: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    at_least: float | None = None,
    at_most_ms: float | None = None,
    metric: str = FIDELITIES[0],
    task: str | None = None,
    weights: str | Path | None = None,
    img_size: ImageSize | None = None,
    teacher: str | None = None,
    backends: Sequence[str] = (),
    computes: Sequence[str] = (),
    precisions: Sequence[str] = (),
    board: str | Path | None = None,
    minutes: float = 20.0,
    seed: int = 0,
    trust: Sequence[str] = (),
    normalise: Normalise = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Find the fastest plan at a fidelity on this machine, or the most faithful within a latency, and export it.

    Args:
        source: a model (see `load_source`), or a student folder with predictors in the layers that may be sparse.
        data: folder of images like those that the model will see; a fifth of them is kept for the last check.
        output: new folder for `front.json`, `front.png`, `student/`, `bundle/`.
        at_least: fidelity in (0, 1). at_most_ms: latency. One of them.
        metric: one of `FIDELITIES`. task: of "task" a `judge.TaskMetric` of yours with scores from 0 to 1, as
            package.module:class; None or "maps": IoU of a decoder's map.
        weights, img_size: for a model; weights: or the teacher's.
        teacher: of a student that was trained: its dense model.
        backends: of the processor; computes: what of a file that is not int8 they compute in, of "auto" (as stored),
            "bf16" and "fp16"; none: all that run here.
        precisions: that files store; none: fp32 and int8, or for a board's GPU fp16 and int8.
        board: a board that is not here: its latency is estimated (see `estimate_bundle`), and nothing is measured but
            fidelity.
        minutes: how long to look, about, export and last measurement included. Ctrl-C ends the looking: the best that
            was found by then is measured whole and exported, as if the time were over.
        seed: of which images are kept for the check.
        trust: see `load_student`. normalise: for a model, what it expects of pixels; see `sparsify`.
        progress: see `Progress`.

    Returns:
        A result of kind "search"; `answer` is unavailable where nothing meets the bound: the nearest is first of the
        finalists.

    Raises:
        ConfigError: not one bound, or one out of range; too few images; a folder that holds something.
        SparsifinerError: model, student or images are unusable.
    """
    end = time.monotonic() + 60 * minutes * (1 - RESERVED)
    runs = backends, computes, precisions
    asked = what_is_asked(Bound(at_least, at_most_ms), metric, task, runs, board, data, seed)
    folder = _new(Path(output))
    start = start_of(source, folder, weights, img_size, teacher, asked.images.searched, trust, normalise, progress)
    student = load_student(start, trust=trust)
    require_searchable(student, start)
    asked = asked.judged_by(student.backbone.patches)
    images = asked.images
    # A model's weights are those that its student was made of.
    dense_model = teacher_of(student, teacher, Path(weights) if weights and start == Path(source) else None)
    search = Search(Trial(student, dense_model.model, images.tried, metric, asked.task), progress)
    with io_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder() as scratch:
        exports = Exports(scratch, start, dense_model, images.searched, trust, progress)
        subject = Subject(path=str(source), name=student.name, sha256=sha256(start / STUDENT_FILE))
        stopwatch = Stopwatch(asked.board, progress)
        found, told = _begin(asked, student, exports, search.trial, stopwatch, subject, progress)
        model = explore(search, found, asked.bound, student.sparsity.tile, end)
        ending = _ended(exports, Shortlist(search, found, model, asked.bound), told.begun, stopwatch)
        if meets(ending.best, asked.bound):
            kept = Trial(student, dense_model.model, images.checked, metric, asked.task)
            ending = ending._replace(check=checked(ending.best, kept, search))
            keep_answer(ending.best, start, folder, trust)
    result = _result(told, search, found, ending)
    write_result(folder / FRONT, result)
    draw_front(result, folder / "front.png")
    return result


def _new(folder: Path) -> Path:
    """The same, if nothing lies there.

    Raises:
        ConfigError: something does.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file.", "Give a new folder.")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty.", "Give a new folder, or delete what an earlier search left there.")
    return folder


class Told(NamedTuple):
    """What is known before anything is looked for; begun, losses: the dense model's times, and what precisions lose of
    it.
    """

    subject: Subject
    method: SearchMethod
    left_out: dict[str, str]
    begun: dict[Deployment, Estimate]
    losses: dict[Deployment, float]


def _begin(
    asked: Asked, student: Student, exports: Exports, trial: Trial, stopwatch: Stopwatch, subject: Subject,
    progress: Progress | None,
) -> tuple[Engines, Told]:  # fmt: skip
    """The dense model timed, and every engine's parts."""
    begun, refused = _dense_ms(exports, asked.engines, stopwatch)
    # Of the dense model float32 and a board that is not here lose nothing.
    losses = {
        host: _lost(exports.dense_for(host), host, trial) if host.stored != "fp32" and host.is_here else 0.0
        for host in begun
    }
    found = Engines(
        _latencies(student, asked.engines, begun, asked.board, progress),
        {engine: losses[engine.dense_host] for engine in asked.engines if engine.dense_host in losses},
        lambda engine, plan: _now(exports, engine, plan, trial, begun, stopwatch),
    )
    found.left_out.update(refused)
    method = SearchMethod(
        metric=asked.metric, task=asked.task, at_least=asked.bound.at_least, at_most_ms=asked.bound.at_most_ms,
        seed=asked.seed, board=None if asked.board is None else asked.board.name,
        images={use: [path.name for path in paths] for use, paths in asked.images._asdict().items()},
        tables={str(engine): latency.table.about for engine, latency in found.latencies.items()},
    )  # fmt: skip
    return found, Told(subject, method, asked.left_out, begun, losses)


class Ending(NamedTuple):
    """What was measured whole, the best first; check: of the answer; None: nothing meets the bound, as unmet says."""

    ranked: list[Entrant]
    finalists: list[Finalist]
    dense_ms: dict[Deployment, Estimate]
    unmet: str
    check: tuple[Checked, list[float]] | None = None

    @property
    def best(self) -> Entrant:
        """The answer, if it meets the bound."""
        return self.ranked[0]


def _ended(
    exports: Exports, choice: Shortlist, begun: dict[Deployment, Estimate], stopwatch: Stopwatch
) -> Ending:  # fmt: skip
    subjects = entrants(exports, choice, stopwatch)
    fastest = min(begun, key=lambda host: begun[host].value)
    hosts = list(dict.fromkeys([fastest, *(subject.engine.dense_host for subject in subjects)]))
    whole, dense_ms = timed(subjects, exports, hosts, stopwatch)
    ranked = judged(whole, choice.bound)
    finalists = [finalist(entrant, exports.start, exports.trust) for entrant in ranked]
    return Ending(ranked, finalists, dense_ms, why_unmet(ranked[0], choice.bound))


def _result(told: Told, search: Search, found: Engines, ending: Ending) -> SearchResult:
    check = ending.check
    front = Front(
        points=_points(search, found.latencies), finalists=ending.finalists,
        answer=ending.finalists[0] if check else Unavailable(ending.unmet),
        check=check[0] if check else Unavailable("there is no answer to check"),
        dense_ms=_named(ending.dense_ms),
        dense_fidelity={
            str(host): 1 - told.losses[host] for host in ending.dense_ms if host.is_here or host.stored == "fp32"
        },
        losses=_named(found.losses),
        anchors=_anchors(found),
        drift={str(host): ms.value / told.begun[host].value for host, ms in ending.dense_ms.items()},
        left_out=told.left_out | _named(found.left_out),
    )  # fmt: skip
    samples = {named(seen.plan): [1 - distance for distance in seen.distances] for seen in search.known.values()}
    return SearchResult("search", [told.subject], told.method, samples | ({"check": check[1]} if check else {}), front)


def _now(
    exports: Exports, engine: Deployment, plan: LayerPlan, trial: Trial, begun: dict[Deployment, Estimate],
    stopwatch: Stopwatch,
) -> tuple[float, float]:  # fmt: skip
    """See `explore.MeasureWhole`: the dense model beside it tells what became of the machine's speed."""
    host = engine.dense_host
    contenders = [Contender(exports.of(plan, engine.stored), engine), Contender(exports.dense_for(host), host)]
    ours, again = stopwatch.times(contenders)
    return _lost(exports.of(plan, engine.stored), engine, trial), ours.value * begun[host].value / again.value


def _anchors(found: Engines) -> dict[str, dict[str, float]]:
    return {str(engine): {named(anchor.plan): anchor.ms} for engine, anchor in found.anchors.items()}


def _named(found: dict[Deployment, Value]) -> dict[str, Value]:
    return {str(engine): value for engine, value in found.items()}


def _dense_ms(
    exports: Exports, engines: Sequence[Deployment], stopwatch: Stopwatch
) -> tuple[dict[Deployment, Estimate], dict[Deployment, str]]:
    """The dense model as a whole, by what runs it; and engines that refuse it, or whose precision loses too much of it.

    Raises:
        GateError, BackendError: all do.
    """
    contenders, refused = list[Contender](), dict[Deployment, SparsifinerError]()
    hosts = list(dict.fromkeys(engine.dense_host for engine in engines))
    for host in hosts:
        try:
            bundle = exports.dense_for(host)
            if host.is_here:  # A processor may have a precision that an engine does not take for this model.
                open_checked(checked_bundle(bundle), host.execution).close()
            contenders.append(Contender(bundle, host))
        except (GateError, BackendError) as error:
            refused[host] = error
    if not contenders:
        raise refused[hosts[0]]
    begun = dict(zip((x.engine for x in contenders), stopwatch.times(contenders), strict=True))
    return begun, {x: refused[x.dense_host].what for x in engines if x.dense_host in refused}


def _lost(bundle: Path, engine: Deployment, trial: Trial) -> float:
    """The distance of a bundle in an engine."""
    with open_checked(checked_bundle(bundle), engine.execution) as session:
        return fmean(trial.distances_of(session.infer))


def _latencies(
    student: Student, engines: Sequence[Deployment], begun: dict[Deployment, Estimate], board: Board | None,
    progress: Progress | None,
) -> dict[Deployment, PlanLatency]:  # fmt: skip
    """Of each engine that runs the dense model, which tells what the sum of a model's layers leaves out."""
    nothing, patches = LayerPlan.dense(len(student.backbone.layers)), student.backbone.patches
    return {
        engine: estimated(student, board, engine.stored)
        if board is not None
        else PlanLatency(measured(student, engine, progress), patches).calibrated(
            Anchor(nothing, begun[engine.dense_host].value)
        )
        for engine in engines
        if engine.dense_host in begun
    }


def _points(search: Search, latencies: dict[Deployment, PlanLatency]) -> list[Point]:
    seen = sorted(search.known.values(), key=lambda x: fmean(x.distances))
    rows = [(fmean(x.distances), *(latency.of(x.plan) for latency in latencies.values())) for x in seen]
    return [
        Point(
            merge=merge_text(x.plan.merge), keep=keep_text(x.plan.short_keep), fidelity=1 - row[0],
            predicted_fidelity=None if x.predicted is None else 1 - x.predicted,
            predicted_ms=dict(zip(map(str, latencies), row[1:], strict=True)), on_front=kept,
        )
        for x, row, kept in zip(seen, rows, not_dominated(rows), strict=True)
    ]  # fmt: skip
