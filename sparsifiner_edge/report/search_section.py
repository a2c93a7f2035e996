"""What a search found: its finalists beside the dense model, and the front."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from sparsifiner_edge.execution import precision_text
from sparsifiner_edge.report import charts
from sparsifiner_edge.report.blocks import Block, Figure, Note, Section, Table
from sparsifiner_edge.report.conditions import ReportData
from sparsifiner_edge.report.result_files import ResultFile
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import Interval, clean, get, interval, mapping, number, reason, rows, with_interval

MAX_ROWS = 40


class _Found(NamedTuple):
    """A whole model in a search's result; predicted: of fidelity and milliseconds."""

    label: str
    engine: str
    fidelity: Interval
    ms: Interval
    colour: int
    predicted: tuple[Interval | None, Interval | None] = (None, None)


def search_section(data: ReportData) -> Section:
    """Of every search: a chart, a table, and how the answer did on images kept for the check."""
    texts, files, blocks = data.texts, data.search_files, list[Block]()
    for index, file in enumerate(files, 1):
        found = list(_models(file.result.statistics, texts))[:MAX_ROWS]
        if found:
            blocks.append(_chart(found, file, f"search-{index}", texts))
            head = texts.heads("search", ("model", "engine", "fidelity", "ms", "predicted_fidelity", "predicted_ms"))
            blocks.append(Table(head, [_row(one, texts) for one in found]))
        board = file.result.method.get("board")
        if isinstance(board, str):
            blocks.append(Note(texts("search.board", board=clean(board, 60)), True))
        check = interval(file.result.statistics, "check", "fidelity")
        if check is not None:
            images = number(get(file.result.statistics, "check", "images")) or 0
            blocks.append(Note(texts("search.check", value=texts.figure(check, digits=4), images=str(int(images)))))
        why = reason(get(file.result.statistics, "answer"))
        blocks += [Note(texts("reason", why=why), True)] if why else []
    return Section("search", blocks, files)


def _models(statistics: Any, texts: Texts) -> Iterator[_Found]:
    """Finalists and the dense model, as far as they are whole."""
    for place, row in enumerate(rows(statistics, "finalists")):
        label = texts("search.merged", merge=clean(row.get("merge"), 60), keep=clean(row.get("keep"), 60))
        predicted = interval(row, "predicted_fidelity"), interval(row, "predicted_ms")
        yield from _whole(row, label, _engine(row), 0 if place == 0 else 1, predicted)
    for row in rows(statistics, "dense"):
        yield from _whole(row, texts("search.dense"), _engine(row), 3)


def _whole(
    row: Mapping[str, Any], label: str, engine: str, colour: int,
    predicted: tuple[Interval | None, Interval | None] = (None, None),
) -> Iterator[_Found]:  # fmt: skip
    fidelity, ms = interval(row, "fidelity"), interval(row, "ms")
    if fidelity is not None and ms is not None:
        yield _Found(label, engine, fidelity, ms, colour, predicted)


def _engine(row: Mapping[str, Any]) -> str:
    stored, computed = (clean(row.get(name), 40) for name in ("stored", "computes"))
    return f"{clean(row.get('backend'), 40)}, {stored if computed == 'auto' else precision_text(stored, computed)}"


def _chart(found: list[_Found], file: ResultFile, name: str, texts: Texts) -> Figure:
    points = [charts.ScatterPoint(f"{one.label}, {one.engine}", one.ms, one.fidelity, one.colour) for one in found]
    places = [f"{p.label}: {with_interval(p.x)} ms, {with_interval(p.y)}" for p in points]
    draw = partial(charts.scatter, points, texts("axis.latency"), texts("axis.fidelity"), most=1.0)
    title = f"{texts('search.chart')} — {file.name}"
    return Figure(name, title, texts("search.alt", points=texts.listed(places)), draw)


def _row(one: _Found, texts: Texts) -> list[str]:
    fidelity, ms = one.predicted
    return [
        one.label, one.engine, texts.figure(one.fidelity, digits=4), texts.figure(one.ms),
        "–" if fidelity is None else texts.figure(fidelity, digits=4), "–" if ms is None else texts.figure(ms),
    ]  # fmt: skip


def search_sentence(file: ResultFile, texts: Texts) -> str | None:
    """The answer in a sentence, None where there is none."""
    answer, dense = mapping(file.result.statistics, "answer"), rows(file.result.statistics, "dense")
    ms, fidelity = interval(answer, "ms"), interval(answer, "fidelity")
    denses = [found for row in dense if (found := interval(row, "ms")) is not None]
    if ms is None or fidelity is None or not denses:
        return None
    least = min(denses, key=lambda found: found.value)
    key = "verdict.search_board" if isinstance(file.result.method.get("board"), str) else "verdict.search"
    return texts(
        key, ms=texts.figure(ms, "ms"), engine=_engine(answer), dense=texts.figure(least, "ms"),
        fidelity=texts.figure(fidelity, digits=4),
    )  # fmt: skip
