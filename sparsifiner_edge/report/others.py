"""Sections besides the profile: accuracy, search, estimates, streams, stability, method and machine."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from sparsifiner_edge.outcomes import ALL, CLEAN, STREAM, RobustnessResult, ScoresResult, Stability, StreamResult
from sparsifiner_edge.pareto import SearchResult
from sparsifiner_edge.profiles.estimate import EstimateResult
from sparsifiner_edge.profiles.figures import ProfileResult
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report.blocks import Block, Note, Section, Table, course
from sparsifiner_edge.report.measured import bar_cells
from sparsifiner_edge.report.reading import ReportData, ResultFile
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import clean, quantity_of

MAX_ROWS = 60
"""Maximum rows of a table: a result may hold thousands."""
EVALUATE = "sparsifiner-edge evaluate BUNDLE/ --against DENSE/ --data IMAGES/ -o accuracy.json"
"""Command that measures accuracy."""
_FLOOR = 0.9
"""Cosine at the bottom of a stream's chart."""
MOST_SHOWN = 1 << 20
"""Maximum characters of a picture in a result."""
_BASE64 = re.compile(r"/9j/[A-Za-z0-9+/]+={0,2}")
"""Picture in a result: base64 that begins as JPEG does."""
_OF = ("subject", "teacher", "drop")


def accuracy_section(data: ReportData, pictures: Sequence[Block]) -> Section:
    """Return the figures of every evaluation, each model's runtime and latency if known, and pictures."""
    texts, blocks = data.texts, list[Block](pictures)
    for file in data.of(ScoresResult):
        rows = [
            [_score_name(name, texts), texts.figure(score.mean, digits=4), f"{score.least:.4f}", str(score.images)]
            for name, score in list(file.result.statistics.items())[:MAX_ROWS]
        ]
        blocks += [Note(_model(data, file, role)) for role in ("subject", "teacher")]
        blocks.append(Table(texts.heads("accuracy", ("figure", "value", "least", "images")), rows, _title(file, texts)))
    if data.sides and all(isinstance(file.result, ProfileResult) for file in data.files):
        blocks.append(Note(texts("not_measured", how=EVALUATE), True))
    return "accuracy", blocks


def _title(file: ResultFile[ScoresResult], texts: Texts) -> str:
    method = file.result.method
    metric = texts.get(f"metric.{method.metric}", clean(method.output or method.metric))
    return f"{file.name}: {metric} ({clean(method.truth, 120)})"


def _score_name(name: str, texts: Texts) -> str:
    of, _, figure = name.partition("_") if name.partition("_")[0] in _OF else ("", "", name.removesuffix("_cosine"))
    label = texts.get(f"score.{figure}", clean(figure, 40))
    return f"{texts(f'score.{of}')}: {label}" if of else label


def _model(data: ReportData, file: ResultFile[ScoresResult], role: str) -> str:
    """Return name, runtime, and latency if the bundle was profiled too."""
    subject, runtime = file.subject(role), file.result.method.runtime.get(role)
    latency = [side.figures.latency_ms.p50 for side in data.sides if side.subject.sha256 == subject.sha256]
    parts = (runtime.backend, runtime.version, runtime.precision) if runtime else ()
    runtime_text = " ".join(clean(part) for part in parts if isinstance(part, str)) or "–"
    latency_text = f" · {data.texts.figure(latency[0], 'ms')}" if latency else ""
    return f"{data.texts(f'score.{role}')}: {data.label_of(subject)} · {runtime_text}{latency_text}"


def search_section(data: ReportData) -> Section:
    """Return the finalists of every search with the dense model, and the answer's result on held-out images."""
    texts, blocks = data.texts, list[Block]()
    for file in data.of(SearchResult):
        front = file.result.statistics
        models = [(f"merge {one.merge}, keep {one.keep}", one) for one in front.finalists]
        models += [(texts("search.dense"), one) for one in front.dense]
        rows = [
            [clean(name), clean(one.deployment), f"{one.fidelity:.4f}", texts.figure(one.ms)]
            for name, one in models[:MAX_ROWS]
        ]
        blocks.append(Table(texts.heads("search", ("model", "engine", "fidelity", "ms")), rows, file.name))
        if front.levers:
            rows = [
                [clean(lever.change), clean(one.deployment), f"{one.held_out_fidelity:.4f}", texts.figure(one.ms)]
                for lever in front.levers
                for one in [lever.candidate]
            ]
            blocks.append(Table(texts.heads("search", ("change", "engine", "fidelity", "ms")), rows, file.name))
        if file.result.method.board is not None:
            blocks.append(Note(texts("search.board", board=clean(file.result.method.board)), True))
        if isinstance(front.answer, Unavailable):
            blocks.append(Note(texts.missing(front.answer, ""), True))
        if not isinstance(front.check, Unavailable):
            value, images = texts.figure(front.check, digits=4), len(file.result.method.images["held_out"])
            blocks.append(Note(texts("search.check", value=value, images=images)))
    return "search", blocks


def estimate_section(data: ReportData) -> Section:
    """Return the figures of every estimate, for one bundle or two, and its assumptions."""
    texts, blocks = data.texts, list[Block]()
    for file in data.of(EstimateResult):
        statistics, method, board = file.result.statistics, file.result.method, file.result.method.board
        sides = [side for side in (statistics, statistics.against) if side is not None]
        rows = [
            [texts(f"estimate.{name}"), *bar_cells([getattr(side, name) for side in sides], data, factor)]
            for name, factor in (("latency_ms", 1.0), ("peak_memory_bytes", 1e-6), ("energy_j", 1e3))
            if any(quantity_of(getattr(side, name)) for side in sides)
        ]
        jetpack = method.jetpack and f"JetPack {method.jetpack.version}, TensorRT {method.jetpack.tensorrt}"
        parts = [part for part in (board.title, method.power_mode, jetpack) if isinstance(part, str)]
        names = [clean(subject.path) for subject in file.result.subjects]
        blocks.append(Table(["", *names], rows, clean(f"{texts('estimate.of')} {' · '.join(parts)}", 200)))
        for name, how, side in zip(names, (method, method.against or method), sides, strict=False):
            assumptions = {
                key: clean(getattr(how, key), 200) for key in ("linear", "other", "precision", "kernels", "because")
            }
            fits = texts.get(f"fits.{side.fits_memory}", clean(side.fits_memory))
            blocks.append(
                Note(texts("estimate.runs", name=name, **assumptions, memory=f"{board.memory_gb:g}", fits=fits))
            )
        blocks.append(Note(texts("estimate.how", how=clean(statistics.latency_ms.interval, 200))))
        if board.unverified:
            blocks.append(Note(texts("estimate.unverified", keys=clean(", ".join(board.unverified), 300))))
    return "estimate", blocks


def stream_section(data: ReportData) -> Section:
    """Return for every video each way to answer its frames, the course of the stream, and frames to look at."""
    texts, blocks = data.texts, list[Block]()
    names = ("patches", "moving", "patches_least", "reached", "share", "ms", "ms_p99")
    for file in data.of(StreamResult):
        result, method = file.result, file.result.method
        maps = [name for name in result.statistics.get(STREAM, {}) if name.endswith("_iou")][:4]
        rows = [
            [texts.get(f"stream.way.{way}", clean(way)), *(_cell(figures.get(name), name) for name in (*names, *maps))]
            for way, figures in list(result.statistics.items())[:MAX_ROWS]
        ]
        heads = [*texts.heads("stream", ("way", *names)), *(clean(name.replace("_", " ")) for name in maps)]
        blocks.append(Table(heads, rows, f"{file.name}: {clean(method.video)}"))
        samples = result.samples.get(STREAM, {})
        patches, share = samples.get("patches", []), samples.get("share", [])
        if len(patches) == len(share) > 0:  # Otherwise they are for other frames.
            lines = [(texts("stream.fidelity", floor=_FLOOR), patches), (texts("stream.computed"), share)]
            blocks.append(course(texts("stream.chart"), texts("stream.frames"), lines, (_FLOOR, 0.0)))
        for title, content in list(result.pictures.items())[:4]:
            if len(content) < MOST_SHOWN and _BASE64.fullmatch(content):
                blocks.append(Note(clean(title), picture=f"data:image/jpeg;base64,{content}"))
        if method.every > 1:
            blocks.append(Note(texts("stream.every", every=method.every, frames=method.frames)))
    return "stream", blocks


def _cell(value: float | None, name: str) -> str:
    return "–" if value is None else f"{value:.1f}" if name.startswith("ms") else f"{value:.4f}"


def stability_section(data: ReportData) -> Section:
    """Return for every result and score the drop under each corruption, and what sparsity adds to it."""
    texts, blocks = data.texts, list[Block]()
    for file in data.of(RobustnessResult):
        method = file.result.method
        for score, stabilities in file.result.statistics.items():
            rows = [(name, stabilities[name]) for name in (*method.corruptions[:MAX_ROWS], ALL) if name in stabilities]
            means = (
                (stabilities[CLEAN].teacher, stabilities[CLEAN].subject)
                if CLEAN in stabilities
                else (math.nan, math.nan)
            )
            count = max((stability.images for _, stability in rows), default=0)
            blocks.append(
                Note(
                    texts(
                        "stability.held",
                        file=file.name,
                        images=count,
                        severity=method.severity,
                        truth=clean(method.truth, 120),
                        dense=f"{100 * means[0]:.2f}",
                        sparse=f"{100 * means[1]:.2f}",
                    )
                )
            )
            title = f"{texts('stability.chart')} — {texts.get(f'score.{score}', clean(score, 40))}, {file.name}"
            heads = texts.heads("stability", ("corruption", "dense", "sparse", "dense_drop", "sparse_drop", "extra"))
            blocks.append(Table(heads, [_losses(name, stability, data) for name, stability in rows], title))
    return "stability", blocks


def _losses(name: str, loss: Stability, data: ReportData) -> list[str | tuple[str, float]]:
    """Return drops in points of 100, with bars."""
    drops = (loss.teacher_drop, loss.subject_drop, loss.extra_drop)
    shares = [f"{100 * share:.2f}" for share in (loss.teacher, loss.subject)]
    return [data.texts.get(f"corruption.{name}", clean(name, 60)), *shares, *bar_cells(drops, data, 100, 2)]


def method_section(data: ReportData) -> Section:
    """Return machine, software and conditions of every result, and its file's hash."""
    return "method", [Table([file.name, file.result.kind], _method_rows(file, data), words=True) for file in data.files]


def _method_rows(file: ResultFile[Any], data: ReportData) -> list[list[str]]:
    texts, result = data.texts, file.result
    rows = [[texts("method.created"), result.created]]
    for subject in result.subjects[:12]:
        named = f"{_text(subject.path)} · {_text(subject.sha256)}"
        rows.append([f"{texts('method.subject')}: {clean(subject.role or '–', 20)}", named])
    for name in ("os", "kernel", "architecture", "cpu_model"):
        rows.append([texts(f"method.{name}"), _text(getattr(result.machine, name))])
    for name, between in (("packages", " "), ("variables", "=")):
        pairs = list(getattr(result.environment, name).items())[:MAX_ROWS]
        listed = ", ".join(f"{clean(key, 40)}{between}{_text(value)}" for key, value in pairs)
        rows.append([texts(f"method.{name}"), listed])
    return [*rows, [texts("method.file"), file.sha256], [texts("method.command"), file.command]]


def _text(content: object) -> str:
    return "–" if isinstance(content, Unavailable) else clean(content, 120)
