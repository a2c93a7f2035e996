"""What models lose while images get worse: dense beside sparse, and what sparsity adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sparsifiner_edge.report import charts
from sparsifiner_edge.report.blocks import Block, Note, Section, Table
from sparsifiner_edge.report.conditions import ReportData
from sparsifiner_edge.report.result_files import ResultFile
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import Interval, clean, get, interval, mapping, number

MAX_CORRUPTIONS = 40
EVERY = "all"


def stability_section(data: ReportData) -> Section:
    """Of every result and score: a bar for the extra loss under each corruption, and a table of all losses."""
    texts, blocks = data.texts, list[Block]()
    for index, file in enumerate(data.robustness_files, 1):
        for score, found in _scores(file):
            clean_scores = mapping(file.result.statistics, "clean", score)
            named = [(name, row) for name in _names(file) if (row := mapping(found, name))]
            bars = [
                charts.Bar(
                    texts.known(f"corruption.{name}", name), extra, int(name == EVERY), texts.figure(extra, digits=2)
                )
                for name, row in named
                if (extra := _points(row, "extra_lost"))
            ]
            title = f"{texts('stability.chart')} — {texts.known(f'task.{score}', score)}, {file.name}"
            blocks.append(Note(_held(file, clean_scores, found, texts)))
            if bars:
                blocks.append(charts.bar_chart(f"stability-{index}-{score}", title, bars, texts))
            heads = ("corruption", "dense", "sparse", "dense_lost", "sparse_lost", "extra")
            blocks.append(Table(texts.heads("stability", heads), [_row(name, row, texts) for name, row in named]))
    return Section("stability", blocks, data.robustness_files)


def _scores(file: ResultFile) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, found in mapping(file.result.statistics, "stability").items():
        if mapping(found, EVERY):
            yield clean(name, 40), found


def _names(file: ResultFile) -> list[str]:
    """Corruptions, and all of them together."""
    corruptions = file.result.method.get("corruptions")
    named = [clean(name, 60) for name in corruptions] if isinstance(corruptions, list) else []
    return [*named[:MAX_CORRUPTIONS], EVERY]


def _points(row: Mapping[str, Any], name: str) -> Interval | None:
    found = interval(row, name)
    return None if found is None else found.times(100)


def _held(file: ResultFile, clean_scores: Mapping[str, Any], found: Mapping[str, Any], texts: Texts) -> str:
    """What was judged, on how many images, and how models do on clean ones."""
    severities = file.result.method.get("severities")
    of = [number(get(clean_scores, role)) for role in ("teacher", "subject")]
    dense, sparse = ("–" if x is None else f"{100 * x:.2f}" for x in of)
    return texts(
        "stability.held", file=file.name, truth=clean(file.result.method.get("truth", "?"), 120),
        images=str(int(number(get(found, EVERY, "images")) or 0)), dense=dense, sparse=sparse,
        severities=texts.listed([clean(x, 4) for x in severities] if isinstance(severities, list) else []),
    )  # fmt: skip


def _row(name: str, row: Mapping[str, Any], texts: Texts) -> list[str]:
    means = [number(get(row, role)) for role in ("teacher", "subject")]
    losses = [_points(row, f"{role}_lost") for role in ("teacher", "subject", "extra")]
    return [
        texts.known(f"corruption.{name}", name), *("–" if x is None else f"{100 * x:.2f}" for x in means),
        *(texts.figure(x, digits=2) for x in losses),
    ]  # fmt: skip


def stability_sentences(file: ResultFile, texts: Texts) -> list[str]:
    """What sparsity adds to the loss, by score."""
    found = []
    for score, rows in _scores(file):
        extra, dense = (_points(mapping(rows, EVERY), name) for name in ("extra_lost", "teacher_lost"))
        # Where the dense model is what is held against it loses nothing, which says nothing.
        if extra is not None and dense is not None and dense.reach != (0, 0):
            named = texts.known(f"task.{score}", score)
            found.append(
                texts(
                    "verdict.stability",
                    score=named,
                    dense=texts.figure(dense, digits=2),
                    extra=texts.figure(extra, digits=2),
                )
            )
    return found
