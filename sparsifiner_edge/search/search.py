"""`search_model`: the fastest at a fidelity, or the most faithful within a latency, of plans by layer."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from sparsifiner_edge.artifacts import STUDENT_FILE, kind_of, read_json, sha256
from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.bundle.entries import ON_PROCESSOR
from sparsifiner_edge.config import keep_text, merge_text
from sparsifiner_edge.errors import ConfigError, SparsifinerError
from sparsifiner_edge.files import scratch_folder
from sparsifiner_edge.images import evenly, list_images
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import Unavailable, read_record, write_record
from sparsifiner_edge.results import Subject, write_result
from sparsifiner_edge.runtime.open import find_backend
from sparsifiner_edge.runtime.processor import ProcessorBackend
from sparsifiner_edge.search.entrants import (
    Shortlist,
    checked,
    entrants,
    finalist,
    judged,
    keep_answer,
    measured_whole,
    meets,
    why_unmet,
)
from sparsifiner_edge.search.explore import STATE_SCHEMA, Bound, Search, State, explore
from sparsifiner_edge.search.finalists import CALIBRATED, Contender, Exports, linked, times
from sparsifiner_edge.search.front import (
    Checked,
    Front,
    Point,
    SearchMethod,
    SearchResult,
    draw_front,
    named,
    not_dominated,
)
from sparsifiner_edge.search.latency import Deployment, PlanLatency, measured
from sparsifiner_edge.search.plan import dense
from sparsifiner_edge.search.trial import FIDELITIES, Trial
from sparsifiner_edge.sparse.student import Student, dense_twin, load_dense, load_student, sparsify

START_SHARE = 0.25
"""Of keys, of the student that plans are made from: each gives its own."""
FILE_PRECISIONS = ("fp32", "int8")
LEAST_IMAGES, CHECKED, MOST_TRIED = 5, 5, 12
"""Images that a search takes at least; one of so many is kept for the check; those that plans are judged by."""


def search_model(
    source: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    at_least: float | None = None,
    at_most_ms: float | None = None,
    metric: str = FIDELITIES[0],
    weights: str | Path | None = None,
    img_size: ImageSize | None = None,
    teacher: str | None = None,
    backends: Sequence[str] = (),
    precisions: Sequence[str] = FILE_PRECISIONS,
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
        at_least: fidelity in (0, 1). at_most_ms: latency. One of them.
        metric: one of `FIDELITIES`.
        weights, img_size: for a model; weights: or of the teacher.
        teacher: of a student that was trained: its dense model.
        backends: of the processor; none: all that run here. precisions: of `FILE_PRECISIONS`.
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
    bound, end = _bound(at_least, at_most_ms, metric), time.monotonic() + 60 * minutes
    engines, images, folder = _engines(backends, precisions), _split(Path(data), seed), Path(output)
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
        latencies = _latencies(exports, student, engines, progress)
        model = explore(search, latencies, bound, student.sparsity.tile, end - 24 * minutes)
        found, dense_ms = measured_whole(
            exports, entrants(exports, Shortlist(search, latencies, model, bound)), engines, progress
        )
        ranked = judged(found, bound)
        samples = _samples(search)
        check: Checked | Unavailable = Unavailable("nothing meets the bound")
        finalists = [finalist(entrant, start) for entrant in ranked]
        if meets(ranked[0], bound):
            check, samples["check"] = checked(ranked[0], Trial(student, dense_model.model, images.checked, metric))
            keep_answer(ranked[0], start, folder, trust)
    method = SearchMethod(
        metric=metric, at_least=at_least, at_most_ms=at_most_ms, seed=seed,
        images={use: [path.name for path in paths] for use, paths in images._asdict().items()},
        tables={str(engine): latency.table.about for engine, latency in latencies.items()},
    )  # fmt: skip
    answer = finalists[0] if meets(ranked[0], bound) else Unavailable(why_unmet(ranked[0], bound))
    front = Front(points=_points(search, latencies), finalists=finalists, answer=answer, check=check, dense_ms=dense_ms)
    subject = Subject(path=str(source), name=student.name, sha256=sha256(start / STUDENT_FILE))
    result = SearchResult("search", [subject], method, samples, front)
    write_result(folder / "front.json", result)
    draw_front(result, folder / "front.png")
    return result


class ImageSplit(NamedTuple):
    """searched: what predictors and int8 are calibrated with; tried: of those, what plans are judged by; checked: of
    no use before the last check.
    """

    searched: list[Path]
    tried: list[Path]
    checked: list[Path]


def _bound(at_least: float | None, at_most_ms: float | None, metric: str) -> Bound:
    if metric not in FIDELITIES:
        raise ConfigError(f"metric is {metric!r}.", f"Choose one of: {', '.join(FIDELITIES)}.")
    if (at_least is None) == (at_most_ms is None):
        raise ConfigError("A search needs one bound.", "Give --at-least FIDELITY or --at-most-ms MS.")
    if at_least is not None and not 0 < at_least < 1:
        raise ConfigError(f"at least is {at_least}.", "Give a fidelity between 0 and 1, such as 0.98.")
    if at_most_ms is not None and not 0 < at_most_ms < 1e6:
        raise ConfigError(f"at most is {at_most_ms} ms.", "Give milliseconds, more than 0.")
    return Bound(at_least, at_most_ms)


def _engines(backends: Sequence[str], precisions: Sequence[str]) -> list[Deployment]:
    """Those asked for; of those that were not, those that run here."""
    for precision in precisions:
        if precision not in FILE_PRECISIONS:
            raise ConfigError(f"precision is {precision!r}.", f"Choose of: {', '.join(FILE_PRECISIONS)}.")
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
    return [Deployment(name, precision) for name in found for precision in precisions]


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
            pictures = linked(scratch / "images", evenly(images, CALIBRATED))
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


def _latencies(
    exports: Exports, student: Student, engines: Sequence[Deployment], progress: Progress | None
) -> dict[Deployment, PlanLatency]:
    """Of each engine; the rest is what the dense model takes more, as a whole, than its layers, which int8 leaves."""
    tables = {e: measured(student, e, progress) for e in dict.fromkeys([*engines, *(e.plain for e in engines)])}
    backends = list(dict.fromkeys(engine.backend for engine in engines))
    whole = dict(zip(backends, times([Contender(exports.dense(), name) for name in backends], progress), strict=True))
    nothing, patches = dense(exports.depth), student.backbone.patches
    found = {}
    for engine in engines:
        plain = PlanLatency(tables[engine.plain]).calibrated(nothing, patches, whole[engine.backend].value)
        found[engine] = PlanLatency(tables[engine], plain.rest)
    return found


def _samples(search: Search) -> dict[str, list[float]]:
    return {named(seen.plan): [1 - distance for distance in seen.distances] for seen in search.state.seen}


def _points(search: Search, latencies: dict[Deployment, PlanLatency]) -> list[Point]:
    patches, seen = search.trial.patches, sorted(search.state.seen, key=lambda x: fmean(x.distances))
    rows = [(fmean(x.distances), *(latency.of(x.plan, patches) for latency in latencies.values())) for x in seen]
    return [
        Point(
            merge=merge_text(x.merge), keep=keep_text(x.plan.short_keep), fidelity=1 - row[0],
            predicted_fidelity=None if x.predicted is None else 1 - x.predicted,
            predicted_ms=dict(zip(map(str, latencies), row[1:], strict=True)), on_front=kept,
        )
        for x, row, kept in zip(seen, rows, not_dominated(rows), strict=True)
    ]  # fmt: skip
