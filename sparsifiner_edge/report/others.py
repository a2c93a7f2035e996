"""The sections beside the measurements: task, search, stability, method and machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report.blocks import BarCell, Block, Note, Picture, Section, Table
from sparsifiner_edge.report.measured import bar_cells
from sparsifiner_edge.report.reading import ReportData, ResultFile, conditions_of
from sparsifiner_edge.report.records import Loss, Robustness, ScoreEvaluation, SearchRecord
from sparsifiner_edge.report.values import clean, exact

MAX_ROWS = 60
"""Of a table: a result may hold thousands, a page that is read does not."""
ALL = "all"
_OF = ("subject", "teacher", "lost")


def task_files(data: ReportData) -> list[ResultFile[ScoreEvaluation]]:
    """Evaluations of models by their own task."""
    return [file for file in data.of(ScoreEvaluation) if file.result.method.task is not None]


def task_section(data: ReportData, pictures: Sequence[Picture]) -> Section:
    """How models did their own task, and pictures of it."""
    texts, blocks = data.texts, list[Block](pictures)
    for file in task_files(data):
        rows = []
        for name, score in list(file.result.statistics.items())[:MAX_ROWS]:
            of, _, figure = name.partition("_") if name.partition("_")[0] in _OF else ("", "", name)
            label = texts.known(f"task.{figure}", clean(figure, 40))
            label = f"{texts(f'task.{of}')}: {label}" if of else label
            rows.append([label, texts.figure(exact(score.mean), digits=4), str(score.images)])
        blocks.append(Note(f"{file.name}: {clean(file.result.method.output or file.result.method.task)}"))
        blocks.append(Table(texts.heads("task", ("figure", "value", "images")), rows))
    return Section("task", blocks)


def search_section(data: ReportData) -> Section:
    """Of every search: finalists beside the dense model, and how the answer did on images kept for the check."""
    texts, blocks = data.texts, list[Block]()
    for file in data.of(SearchRecord):
        front = file.result.statistics
        models = [(f"merge {one.merge}, keep {one.keep}", one) for one in front.finalists]
        models += [(texts("search.dense"), one) for one in front.dense]
        rows = [
            [clean(name), clean(one.engine), f"{one.fidelity:.4f}", texts.figure(exact(one.ms))]
            for name, one in models[:MAX_ROWS]
        ]
        blocks.append(Table(texts.heads("search", ("model", "engine", "fidelity", "ms")), rows, file.name))
        if file.result.method.board is not None:
            blocks.append(Note(texts("search.board", board=clean(file.result.method.board)), True))
        if isinstance(front.answer, Unavailable):
            blocks.append(Note(texts.missing(front.answer, ""), True))
        if not isinstance(front.check, Unavailable):
            value = texts.figure(exact(front.check.fidelity), digits=4)
            blocks.append(Note(texts("search.check", value=value, images=front.check.images)))
    return Section("search", blocks)


def stability_section(data: ReportData) -> Section:
    """Of every result and score, what is lost under each corruption, and what sparsity adds to it."""
    texts, blocks = data.texts, list[Block]()
    for file in data.of(Robustness):
        method, statistics = file.result.method, file.result.statistics
        for score, losses in statistics.stability.items():
            rows = [(name, losses[name]) for name in (*method.corruptions[:MAX_ROWS], ALL) if name in losses]
            means = statistics.clean.get(score, {})
            dense, sparse = (f"{100 * means[role]:.2f}" if role in means else "–" for role in ("teacher", "subject"))
            severities = texts.listed([str(severity) for severity in method.severities[:MAX_ROWS]])
            count = max((loss.images for _, loss in rows), default=0)
            blocks.append(Note(texts(
                "stability.held", file=file.name, images=count, severities=severities, truth=clean(method.truth, 120),
                dense=dense, sparse=sparse,
            )))  # fmt: skip
            title = f"{texts('stability.chart')} — {texts.known(f'task.{score}', clean(score, 40))}, {file.name}"
            heads = texts.heads("stability", ("corruption", "dense", "sparse", "dense_lost", "sparse_lost", "extra"))
            blocks.append(Table(heads, [_losses(name, loss, data) for name, loss in rows], title))
    return Section("stability", blocks)


def _losses(name: str, loss: Loss, data: ReportData) -> list[str | BarCell]:
    """In points of 100; bars compare what was lost."""
    lost = (loss.teacher_lost, loss.subject_lost, loss.extra_lost)
    shares = [f"{100 * share:.2f}" for share in (loss.teacher, loss.subject)]
    return [data.texts.known(f"corruption.{name}", clean(name, 60)), *shares, *bar_cells(lost, data, 100, 2)]


def method_section(data: ReportData) -> Section:
    """Machine, software and conditions of every result, and its file's hash."""
    tables = [Table([file.name, file.result.kind], _method_rows(file, data), words=True) for file in data.files]
    return Section("method", tables)


def _method_rows(file: ResultFile[Any], data: ReportData) -> list[list[str]]:
    texts, result = data.texts, file.result
    rows = [[texts("method.created"), result.created]]
    for subject in result.subjects[:12]:
        named = f"{_said(subject.path)} · {_said(subject.sha256)}"
        rows.append([f"{texts('method.subject')}: {clean(subject.role or '–', 20)}", named])
    for side in (side for side in data.sides if side.file is file):
        conditions = conditions_of(side).items()
        rows += [[f"{texts(f'field.{field}')} · {side.role}", value] for field, value in conditions if value != "?"]
    for name in ("os", "kernel", "architecture", "cpu_model"):
        rows.append([texts(f"method.{name}"), _said(getattr(result.machine, name))])
    for name, between in (("packages", " "), ("variables", "=")):
        pairs = list(getattr(result.environment, name).items())[:MAX_ROWS]
        listed = ", ".join(f"{clean(key, 40)}{between}{_said(value)}" for key, value in pairs)
        rows.append([texts(f"method.{name}"), listed])
    return [*rows, [texts("method.file"), file.sha256], [texts("method.command"), file.command]]


def _said(content: object) -> str:
    return "–" if isinstance(content, Unavailable) else clean(content, 120)
