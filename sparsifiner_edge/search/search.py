"""`search_model`: the fastest at a fidelity, or the most faithful within a latency, of plans by layer."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from sparsifiner_edge.artifacts import STUDENT_FILE, read_json, sha256
from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import keep_text, merge_text
from sparsifiner_edge.errors import ConfigError, GateError
from sparsifiner_edge.files import io_errors, scratch_folder
from sparsifiner_edge.profiles.boards.board import Board
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import Unavailable, read_record, write_record
from sparsifiner_edge.results import Estimate, Subject, write_result
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.search.asked import Asked, what_is_asked
from sparsifiner_edge.search.board import estimated
from sparsifiner_edge.search.entrants import (
    Entrant,
    Judged,
    Shortlist,
    Whole,
    checked,
    entrants,
    finalist,
    judged,
    keep_answer,
    meets,
    rivals_in,
    timed,
    why_unmet,
)
from sparsifiner_edge.search.explore import AGAIN, STATE_SCHEMA, Bound, Engines, Search, State, explore
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
from sparsifiner_edge.search.plan import LayerPlan, dense
from sparsifiner_edge.search.start import require_searchable, start_of
from sparsifiner_edge.search.trial import Trial
from sparsifiner_edge.sparse.student import Student, load_student
from sparsifiner_edge.sparse.teacher import teacher_of

RESERVED = 0.4
"""Of the time asked for, what exports and the last measurement may take."""
Value = TypeVar("Value")
STATE_FILE, FRONT, STUDENT, BUNDLE = "search.json", "front.json", "student", "bundle"


def search_model(
    source: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    at_least: float | None = None,
    at_most_ms: float | None = None,
    at_most_mj: float | None = None,
    metric: str = FIDELITIES[0],
    task: str | None = None,
    weights: str | Path | None = None,
    img_size: ImageSize | None = None,
    teacher: str | None = None,
    backends: Sequence[str] = (),
    precisions: Sequence[str] = (),
    board: str | Path | None = None,
    against: Sequence[str | Path] = (),
    corruptions: str | None = None,
    severity: str | None = None,
    minutes: float = 20.0,
    seed: int = 0,
    trust: Sequence[str] = (),
    progress: Progress | None = None,
) -> SearchResult:
    """Find the fastest plan at a fidelity on this machine, or the most faithful within a latency, and export it.

    Args:
        source: a model (see `load_source`), or a student folder with predictors in the layers that may be sparse.
        data: folder of images like those that the model will see; a fifth of them is kept for the last check.
        output: folder for `front.json`, `front.png`, `student/`, `bundle/`; what an interrupted search of the same left
            there is gone on from.
        at_least: fidelity in (0, 1). at_most_ms: latency. at_most_mj: energy of an image, which the power of the dense
            model turns into a latency. One of them.
        metric: one of `FIDELITIES`. task: of "task" a `judge.TaskMetric` of yours with scores from 0 to 1, as
            package.module:class; None or "maps": IoU of a decoder's map.
        weights, img_size: for a model; weights: or the teacher's.
        teacher: of a student that was trained: its dense model.
        backends: of the processor; none: all that run here. precisions: none: fp32 and int8, or for a
            board's GPU fp16 and int8.
        board: a board that is not here: its latency is estimated (see `estimate_bundle`), and nothing is measured but
            fidelity.
        against: bundles of the same images to stand beside what is found, such as the dense model in int8.
        corruptions: judge plans by images that got worse, each under one of these, dealt out by the seed: "all",
            "common", "camera" or names; severity: as "3", "1,3,5" or "1..5"; None takes all. The last check's images
            suffer those that come next.
        minutes: how long to look, about, export and last measurement included.
        seed: of which images are kept for the check, and which corruption each suffers.
        trust: see `load_student`.
        progress: see `Progress`.

    Returns:
        A result of kind "search"; `answer` is unavailable where nothing meets the bound: the nearest is first of the
        finalists.

    Raises:
        ConfigError: not one bound, or one out of range; too few images; another search's folder.
        SparsifinerError: model, student or images are unusable.
    """
    end = time.monotonic() + 60 * minutes * (1 - RESERVED)
    bounds = at_least, at_most_ms, at_most_mj
    asked = what_is_asked(bounds, metric, task, backends, precisions, board, data, seed, corruptions, severity)
    images, folder = asked.images, Path(output)
    bundles = [open_bundle(Path(path)).folder for path in against]
    about = {
        "source": _place(source), "weights": _place(weights), "teacher": _place(teacher),
        "img_size": img_size, "metric": metric, "images": [str(path.resolve()) for path in images.searched],
    } | ({} if asked.task is None else {"task": asked.task})  # fmt: skip
    about |= {"corruptions": [one.label for one in asked.conditions]} if asked.conditions else {}
    state = _state(folder, about)
    start = start_of(source, folder, weights, img_size, teacher, images.searched, trust, progress)
    if start.parent == folder:
        state.save(folder / STATE_FILE)
    student = load_student(start, trust=trust)
    require_searchable(student, start)
    asked = asked.judged_by(student.backbone.patches)
    images = asked.images
    # A model's weights are those that its student was made of.
    dense_model = teacher_of(student, teacher, Path(weights) if weights and start == Path(source) else None)
    tried = Trial(student, dense_model.model, images.tried, metric, asked.task, asked.suffered(images.tried))
    search = Search(tried, state, folder / STATE_FILE, progress)
    with io_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    state.save(search.file)
    with scratch_folder() as scratch:
        exports = Exports(scratch, start, dense_model, images.searched, trust, progress)
        subject = Subject(path=str(source), name=student.name, sha256=sha256(start / STUDENT_FILE))
        stopwatch = Stopwatch(asked.board, progress)
        found, told = _begin(asked, student, exports, search.trial, stopwatch, subject, progress)
        rivals = rivals_in(bundles, list(told.begun), search.trial, stopwatch)
        try:
            model = explore(search, found, told.bound, student.sparsity.tile, end)
            ending = _ended(exports, Shortlist(search, found, model, told.bound), told.begun, rivals, stopwatch)
            if meets(ending.best, told.bound):
                others = asked.suffered(images.checked, len(images.tried))
                kept = Trial(student, dense_model.model, images.checked, metric, asked.task, others)
                ending = ending._replace(check=checked(ending.best, kept, search))
                keep_answer(ending.best, start, folder, trust)
        except BaseException:  # Ctrl-C too: what was found so far stays, and an earlier answer with its own front.
            if not (folder / BUNDLE).exists():
                _write(folder, _result(told, search, found))
            raise
    result = _result(told, search, found, ending)
    if ending.check is None:  # Nothing that lies there is an answer to this.
        for name in (STUDENT, BUNDLE):
            shutil.rmtree(folder / name, ignore_errors=True)
    _write(folder, result)
    return result


class Told(NamedTuple):
    """What is known before anything is looked for; bound: of fidelity or time; begun, losses: the dense model's times,
    and what precisions lose of it.
    """

    bound: Bound
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
        host: _lost(exports.dense_for(host), host, trial) if host.precision != "fp32" and host.is_here else 0.0
        for host in begun
    }
    bound, watts = _in_time(asked.bound, asked.at_most_mj, begun, exports, stopwatch)
    found = Engines(
        _latencies(student, asked.engines, begun, asked.board, progress),
        {engine: losses[engine.dense_host] for engine in asked.engines if engine.dense_host in losses},
        lambda engine, plan: _now(exports, engine, plan, trial, begun, stopwatch),
    )
    found.left_out.update(refused)
    method = SearchMethod(
        metric=asked.metric, task=asked.task, at_least=bound.at_least, at_most_ms=bound.at_most_ms,
        at_most_mj=asked.at_most_mj, watts=watts, seed=asked.seed,
        board=None if asked.board is None else asked.board.name,
        corruptions=list(dict.fromkeys(one.label for one in asked.suffered(asked.images.tried))) or None,
        images={use: [path.name for path in paths] for use, paths in asked.images._asdict().items()},
        tables={str(engine): latency.table.about for engine, latency in found.latencies.items()},
    )  # fmt: skip
    return found, Told(bound, subject, method, asked.left_out, begun, losses)


class Ending(NamedTuple):
    """What was measured whole, the best first; check: of the answer; None: nothing meets the bound, as unmet says."""

    ranked: list[Entrant]
    finalists: list[Finalist]
    whole: Whole
    unmet: str
    check: tuple[Checked, list[float]] | None = None

    @property
    def best(self) -> Entrant:
        """The answer, if it meets the bound."""
        return self.ranked[0]


def _ended(
    exports: Exports, choice: Shortlist, begun: dict[Deployment, Estimate], rivals: Sequence[Judged],
    stopwatch: Stopwatch,
) -> Ending:  # fmt: skip
    subjects = entrants(exports, choice, stopwatch)
    fastest = min(begun, key=lambda host: begun[host].value)
    hosts = list(dict.fromkeys([fastest, *(subject.engine.dense_host for subject in subjects)]))
    whole = timed(subjects, exports, hosts, rivals, stopwatch)
    ranked = judged(whole.entrants, choice.bound)
    finalists = [finalist(entrant, exports.start, exports.trust) for entrant in ranked]
    return Ending(ranked, finalists, whole, why_unmet(ranked[0], choice.bound))


def _result(told: Told, search: Search, found: Engines, ending: Ending | None = None) -> SearchResult:
    """ending: None: it was stopped before."""
    whole, check = Whole([], told.begun, []), None
    answer: Finalist | Unavailable = Unavailable("stopped before it ended; the same command goes on")
    if ending is not None:
        whole, check = ending.whole, ending.check
        answer = ending.finalists[0] if check else Unavailable(ending.unmet)
    front = Front(
        points=_points(search, found.latencies), finalists=[] if ending is None else ending.finalists, answer=answer,
        check=check[0] if check else Unavailable("there is no answer to check"), rivals=whole.rivals,
        dense_ms=_named(whole.dense_ms),
        dense_fidelity={
            str(host): 1 - told.losses[host] for host in whole.dense_ms if host.is_here or host.precision == "fp32"
        },
        losses=_named(found.losses),
        anchors=_anchors(found),
        drift={str(host): ms.value / told.begun[host].value for host, ms in whole.dense_ms.items()},
        left_out=told.left_out | _named(found.left_out),
    )  # fmt: skip
    samples = {named(seen.plan): [1 - distance for distance in seen.distances] for seen in search.state.seen}
    return SearchResult("search", [told.subject], told.method, samples | ({"check": check[1]} if check else {}), front)


def _now(
    exports: Exports, engine: Deployment, plan: LayerPlan, trial: Trial, begun: dict[Deployment, Estimate],
    stopwatch: Stopwatch,
) -> tuple[float, float]:  # fmt: skip
    """See `explore.MeasureWhole`: the dense model beside it tells what became of the machine's speed."""
    host = engine.dense_host
    contenders = [Contender(exports.of(plan, engine.precision), engine), Contender(exports.dense_for(host), host)]
    ours, again = stopwatch.times(contenders)
    return _lost(exports.of(plan, engine.precision), engine, trial), ours.value * begun[host].value / again.value


def _anchors(found: Engines) -> dict[str, dict[str, float]]:
    return {str(engine): {named(anchor.plan): anchor.ms} for engine, anchor in found.anchors.items()}


def _named(found: dict[Deployment, Value]) -> dict[str, Value]:
    return {str(engine): value for engine, value in found.items()}


def _write(folder: Path, result: SearchResult) -> None:
    write_result(folder / FRONT, result)
    draw_front(result, folder / "front.png")


def _place(name: str | Path | None) -> str | None:
    """Where a file or folder lies, however it was spelt; any other name as it is."""
    return None if name is None else str(Path(name).resolve() if Path(name).exists() else name)


def _state(folder: Path, about: Any) -> State:
    """What an interrupted search left in its folder."""
    file = folder / STATE_FILE
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file.", "Give a new folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return State(about=about)
    if not file.is_file():
        raise ConfigError(f"{folder} holds something else.", "Give a new folder.")
    state = read_record(read_json(file, STATE_SCHEMA, AGAIN), State, file, AGAIN)
    if state.about != write_record(about):
        raise ConfigError(f"{folder} holds another search.", "Give a new folder, or the same model, images and metric.")
    return state


def _dense_ms(
    exports: Exports, engines: Sequence[Deployment], stopwatch: Stopwatch
) -> tuple[dict[Deployment, Estimate], dict[Deployment, str]]:
    """The dense model as a whole, by what runs it; and engines whose precision loses too much already of that.

    Raises:
        GateError: all do.
    """
    contenders, refused = list[Contender](), dict[Deployment, GateError]()
    hosts = list(dict.fromkeys(engine.dense_host for engine in engines))
    for host in hosts:
        try:
            contenders.append(Contender(exports.dense_for(host), host))
        except GateError as error:
            refused[host] = error
    if not contenders:
        raise refused[hosts[0]]
    begun = dict(zip((x.engine for x in contenders), stopwatch.times(contenders), strict=True))
    return begun, {x: refused[x.dense_host].what for x in engines if x.dense_host in refused}


def _lost(bundle: Path, engine: Deployment, trial: Trial) -> float:
    """The distance of a bundle in an engine."""
    with open_session(bundle, engine.judged_in) as session:
        return fmean(trial.distances_of(session.infer))


def _in_time(
    bound: Bound, at_most_mj: float | None, begun: dict[Deployment, Estimate], exports: Exports, stopwatch: Stopwatch
) -> tuple[Bound, float | None]:
    """A bound of energy as one of time, and the power that makes it one."""
    if at_most_mj is None:
        return bound, None
    host = next(iter(begun))
    watts = stopwatch.watts(Contender(exports.dense_for(host), host))
    return Bound(None, at_most_mj / watts), watts


def _latencies(
    student: Student, engines: Sequence[Deployment], begun: dict[Deployment, Estimate], board: Board | None,
    progress: Progress | None,
) -> dict[Deployment, PlanLatency]:  # fmt: skip
    """Of each engine that runs the dense model, which tells what the sum of a model's layers leaves out."""
    nothing, patches = dense(len(student.backbone.layers)), student.backbone.patches
    return {
        engine: estimated(student, board, engine.precision)
        if board is not None
        else PlanLatency(measured(student, engine, progress), patches).calibrated(
            Anchor(nothing, begun[engine.dense_host].value)
        )
        for engine in engines
        if engine.dense_host in begun
    }


def _points(search: Search, latencies: dict[Deployment, PlanLatency]) -> list[Point]:
    seen = sorted(search.state.seen, key=lambda x: fmean(x.distances))
    rows = [(fmean(x.distances), *(latency.of(x.plan) for latency in latencies.values())) for x in seen]
    return [
        Point(
            merge=merge_text(x.merge), keep=keep_text(x.plan.short_keep), fidelity=1 - row[0],
            predicted_fidelity=None if x.predicted is None else 1 - x.predicted,
            predicted_ms=dict(zip(map(str, latencies), row[1:], strict=True)), on_front=kept,
        )
        for x, row, kept in zip(seen, rows, not_dominated(rows), strict=True)
    ]  # fmt: skip
