"""`search_model`: the fastest at a fidelity, or the most faithful within a latency, of plans by layer."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from sparsifiner_edge.artifacts import STUDENT_FILE, kind_of, read_json, sha256
from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.bundle.entries import ON_PROCESSOR
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.config import keep_text, merge_text
from sparsifiner_edge.errors import ConfigError, GateError, SparsifinerError
from sparsifiner_edge.files import scratch_folder
from sparsifiner_edge.images import evenly, list_images
from sparsifiner_edge.profiles.boards.board import Board, load_board
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import Unavailable, read_record, write_record
from sparsifiner_edge.results import Estimate, Subject, write_result
from sparsifiner_edge.runtime.open import find_backend
from sparsifiner_edge.runtime.processor import ProcessorBackend
from sparsifiner_edge.search.board import estimated
from sparsifiner_edge.search.entrants import (
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
from sparsifiner_edge.search.explore import STATE_SCHEMA, Bound, Engines, Search, State, explore
from sparsifiner_edge.search.finalists import Contender, Exports, Stopwatch, linked
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
from sparsifiner_edge.search.latency import Anchor, Deployment, PlanLatency, measured
from sparsifiner_edge.search.plan import LayerPlan, dense
from sparsifiner_edge.search.trial import FIDELITIES, Trial
from sparsifiner_edge.sparse.student import Student, dense_twin, load_dense, load_student, sparsify

START_SHARE = 0.25
"""Of keys, of the student that plans are made from: each gives its own."""
MOST_ASKED = 1e6
PREDICTED = 8
"""Images at most that predictors are calibrated with: a minute or two at 518 px."""
Value = TypeVar("Value")
FILE_PRECISIONS = ("fp32", "int8", "fp16")
"""Of files; the last for boards with a GPU, which do not compute in the first."""
LEAST_IMAGES, CHECKED, MOST_TRIED = 5, 5, 12
"""Images that a search takes at least; one of so many is kept for the check; those that plans are judged by."""


def search_model(
    source: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    at_least: float | None = None,
    at_most_ms: float | None = None,
    at_most_mj: float | None = None,
    metric: str = FIDELITIES[0],
    weights: str | Path | None = None,
    img_size: ImageSize | None = None,
    teacher: str | None = None,
    backends: Sequence[str] = (),
    precisions: Sequence[str] = (),
    board: str | Path | None = None,
    against: Sequence[str | Path] = (),
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
        metric: one of `FIDELITIES`.
        weights, img_size: for a model; weights: or of the teacher.
        teacher: of a student that was trained: its dense model.
        backends: of the processor; none: all that run here. precisions: of `FILE_PRECISIONS`; none: int8 and fp32, or
            on a board's GPU fp16.
        board: a board that is not here: its latency is estimated (see `estimate_bundle`), and nothing is measured but
            fidelity.
        against: bundles of the same images to stand beside what is found, such as the dense model in int8.
        minutes: how long to look, about, export and last measurement included.
        seed: of which images are kept for the check.
        trust: see `load_student`.
        progress: see `Progress`.

    Returns:
        A result of kind "search"; `answer` is unavailable where nothing meets the bound: the nearest is first of the
        finalists.

    Raises:
        ConfigError: not one bound, or one out of range; too few images; another search's folder.
        SparsifinerError: model, student or images are unusable.
    """
    bound, end = _bound(at_least, at_most_ms, at_most_mj, metric), time.monotonic() + 60 * minutes
    device = None if board is None else load_board(board)
    engines, images, folder = _engines(backends, precisions, device), _split(Path(data), seed), Path(output)
    rivals = [open_bundle(Path(path)).folder for path in against]
    about = {
        "source": str(source), "weights": None if weights is None else str(weights), "teacher": teacher,
        "img_size": img_size, "metric": metric, "images": [str(path) for path in images.tried],
    }  # fmt: skip
    state, file = _state(folder, about), folder / "search.json"
    start = _start(source, folder, weights, img_size, images.searched, progress)
    student = load_student(start, trust=trust)
    _require_searchable(student, start)
    dense_model = _dense_model(student, teacher, weights)
    search = Search(Trial(student, dense_model.model, images.tried, metric), state, file, progress)
    with scratch_folder() as scratch:
        exports = Exports(scratch, start, dense_model, images.searched, trust, progress)
        stopwatch = Stopwatch(device, progress)
        begun, left_out = _dense_ms(exports, engines, stopwatch)
        watts = None if at_most_mj is None else stopwatch.watts(Contender(exports.dense(), next(iter(begun))))
        bound = bound if at_most_mj is None or watts is None else Bound(None, at_most_mj / watts)
        found = Engines(
            _latencies(student, engines, begun, device, progress),
            lambda engine, plan: _now(exports, engine, plan, begun, stopwatch),
        )
        found.left_out.update(left_out)
        method = SearchMethod(
            metric=metric, at_least=at_least, at_most_ms=bound.at_most_ms, at_most_mj=at_most_mj,
            watts=watts, seed=seed,
            board=None if device is None else device.name,
            images={use: [path.name for path in paths] for use, paths in images._asdict().items()},
            tables={str(engine): latency.table.about for engine, latency in found.latencies.items()},
        )  # fmt: skip
        subject = Subject(path=str(source), name=student.name, sha256=sha256(start / STUDENT_FILE))

        def told(**known: Any) -> SearchResult:
            front = Front(
                points=_points(search, found.latencies),
                anchors=_anchors(found),
                left_out=_named(found.left_out),
                **known,
            )
            return SearchResult("search", [subject], method, _samples(search), front)

        try:
            model = explore(search, found, bound, student.sparsity.tile, end - 24 * minutes)
        except BaseException:  # Ctrl-C too: what was found so far stays.
            none = Unavailable("stopped before anything was exported; the same command goes on")
            _write(folder, told(finalists=[], rivals=[], answer=none, check=none, dense_ms=_named(begun), drift={}))
            raise
        choice = Shortlist(search, found, model, bound)
        subjects = entrants(exports, choice)
        fastest = min(begun, key=lambda host: begun[host].value)
        hosts = list(dict.fromkeys([fastest, *(subject.engine.dense_host for subject in subjects)]))
        whole = timed(subjects, exports, hosts, rivals, search.trial, stopwatch)
        ranked = judged(whole.entrants, bound)
        check: Checked | Unavailable = Unavailable("nothing meets the bound")
        finalists, values = [finalist(entrant, start) for entrant in ranked], list[float]()
        answer: Finalist | Unavailable = Unavailable(why_unmet(ranked[0], bound))
        if meets(ranked[0], bound):
            answer = finalists[0]
            check, values = checked(ranked[0], Trial(student, dense_model.model, images.checked, metric))
            keep_answer(ranked[0], start, folder, trust)
    drift = {host: ms.value / begun[host].value for host, ms in whole.dense_ms.items()}
    result = told(
        finalists=finalists, rivals=whole.rivals, answer=answer, check=check,
        dense_ms=_named(whole.dense_ms), drift=_named(drift),
    )  # fmt: skip
    result.samples["check"] = values
    _write(folder, result)
    return result


def _now(
    exports: Exports, engine: Deployment, plan: LayerPlan, begun: dict[Deployment, Estimate], stopwatch: Stopwatch
) -> float:
    """See `explore.MeasureWhole`: the dense model beside it tells what became of the machine's speed."""
    host = engine.dense_host
    contenders = [Contender(exports.of(plan, engine.precision), engine), Contender(exports.dense(host.precision), host)]
    ours, again = stopwatch.times(contenders)
    return ours.value * begun[host].value / again.value


def _anchors(found: Engines) -> dict[str, dict[str, float]]:
    return {str(engine): {named(anchor.plan): anchor.ms} for engine, anchor in found.anchors.items()}


def _named(found: dict[Deployment, Value]) -> dict[str, Value]:
    return {str(engine): value for engine, value in found.items()}


def _write(folder: Path, result: SearchResult) -> None:
    write_result(folder / "front.json", result)
    draw_front(result, folder / "front.png")


class ImageSplit(NamedTuple):
    """searched: what predictors and int8 are calibrated with; tried: of those, what plans are judged by; checked: of
    no use before the last check.
    """

    searched: list[Path]
    tried: list[Path]
    checked: list[Path]


def _bound(at_least: float | None, at_most_ms: float | None, at_most_mj: float | None, metric: str) -> Bound:
    if metric not in FIDELITIES:
        raise ConfigError(f"metric is {metric!r}.", f"Choose one of: {', '.join(FIDELITIES)}.")
    if sum(bound is not None for bound in (at_least, at_most_ms, at_most_mj)) != 1:
        raise ConfigError("A search needs one bound.", "Give --at-least FIDELITY, --at-most-ms MS or --at-most-mj MJ.")
    if at_least is not None and not 0 < at_least < 1:
        raise ConfigError(f"at least is {at_least}.", "Give a fidelity between 0 and 1, such as 0.98.")
    for most, unit in ((at_most_ms, "ms"), (at_most_mj, "mJ")):
        if most is not None and not 0 < most < MOST_ASKED:
            raise ConfigError(f"at most is {most} {unit}.", "Give more than 0, and less than a million.")
    return Bound(at_least, at_most_ms)


def _engines(backends: Sequence[str], precisions: Sequence[str], board: Board | None) -> list[Deployment]:
    """Those asked for; of those that were not, those that run here, or the board."""
    gpu = board is not None and board.kind == "gpu"
    for precision in precisions:
        if precision not in FILE_PRECISIONS or (precision == "fp16" and not gpu):
            known = FILE_PRECISIONS if gpu else FILE_PRECISIONS[:2]
            raise ConfigError(f"precision is {precision!r}.", f"Choose of: {', '.join(known)}.")
    if board is not None:
        if backends:
            raise ConfigError("A board's latency is estimated for no backend.", "Leave one of the two out.")
        chosen = precisions or tuple(x for x in (("fp16", "int8") if gpu else ("fp32", "int8")) if board.has_peak(x))
        return [Deployment(board.name, precision) for precision in chosen]
    found = []
    for name in backends or ON_PROCESSOR:
        backend = find_backend(name)
        if not isinstance(backend, ProcessorBackend):
            raise ConfigError(f"{name} does not run on the processor.", f"Choose of: {', '.join(ON_PROCESSOR)}.")
        try:
            backend.load()
        except SparsifinerError:
            if backends:
                raise
            continue
        found.append(name)
    return [Deployment(name, precision) for name in found for precision in precisions or FILE_PRECISIONS[:2]]


def _split(data: Path, seed: int) -> ImageSplit:
    paths = list_images(data)
    if len(paths) < LEAST_IMAGES:
        raise ConfigError(
            f"{data} has {len(paths)} images.", f"Give at least {LEAST_IMAGES}: one is kept for the last check."
        )
    shuffled = random.Random(seed).sample(paths, len(paths))  # noqa: S311
    count = max(1, len(paths) // CHECKED)
    searched = sorted(shuffled[count:])
    return ImageSplit(searched, evenly(searched, MOST_TRIED), sorted(shuffled[:count]))


def _state(folder: Path, about: Any) -> State:
    """What an interrupted search left in its folder."""
    file = folder / "search.json"
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        return State(about=about)
    if not file.is_file():
        raise ConfigError(f"{folder} holds something else.", "Give a new folder.")
    state = read_record(read_json(file, STATE_SCHEMA), State, file, "Delete the folder.")
    if state.about != write_record(about):
        raise ConfigError(f"{folder} holds another search.", "Give a new folder, or the same model, images and metric.")
    return state


def _start(
    source: str | Path, folder: Path, weights: str | Path | None, img_size: ImageSize | None, images: Sequence[Path],
    progress: Progress | None,
) -> Path:  # fmt: skip
    """The student that is searched: the user's, or one with a predictor in every layer."""
    given = Path(source)
    if given.is_dir() and kind_of(given) == "student":
        if img_size is not None:
            raise ConfigError("A student has a size of its own.", "Leave --img-size out.")
        return given
    start = folder / "start"
    if not start.exists():
        with scratch_folder() as scratch:
            pictures = linked(scratch / "images", evenly(images, PREDICTED))
            sparsify(
                str(source), start, weights=weights, img_size=img_size, keep=START_SHARE, calibrate=pictures,
                progress=progress,
            )  # fmt: skip
    return start


def _require_searchable(student: Student, start: Path) -> None:
    sparsity = student.sparsity
    if sparsity.is_dense or sparsity.token_keep or sparsity.preset != "edge":
        raise ConfigError(
            f"{start} is dense, prunes tokens, or is of another preset than edge.",
            "Give the model itself, or a student made by `sparsify MODEL --keep 0.25`.",
        )


def _dense_model(student: Student, teacher: str | None, weights: str | Path | None) -> Student:
    if teacher is not None:
        return load_dense(teacher, None if weights is None else Path(weights), student.img_size)
    if student.provenance.training is not None:
        raise ConfigError(
            "This student was trained: its weights are no longer its teacher's.", "Name the teacher: --teacher MODEL."
        )
    return dense_twin(student)


def _dense_ms(
    exports: Exports, engines: Sequence[Deployment], stopwatch: Stopwatch
) -> tuple[dict[Deployment, Estimate], dict[Deployment, str]]:
    """The dense model as a whole, by what runs it; and engines whose precision loses too much already of that.

    Raises:
        GateError: all do.
    """
    contenders, left_out = list[Contender](), dict[Deployment, str]()
    for host in dict.fromkeys(engine.dense_host for engine in engines):
        try:
            contenders.append(Contender(exports.dense(host.precision if host.is_here else "fp32"), host))
        except GateError as error:
            left_out[host] = error.what
            if len(left_out) == len({engine.dense_host for engine in engines}):
                raise
    found = stopwatch.times(contenders)
    return {x.engine: ms for x, ms in zip(contenders, found, strict=True)}, left_out


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


def _samples(search: Search) -> dict[str, list[float]]:
    return {named(seen.plan): [1 - distance for distance in seen.distances] for seen in search.state.seen}


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
