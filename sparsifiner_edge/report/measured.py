"""The sections of measurements: accuracy, latency, energy, memory and layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report.blocks import BarCell, Block, Note, Section, Strip, Strips, Table
from sparsifiner_edge.report.reading import ReportData, ResultFile, Side
from sparsifiner_edge.report.records import ClassEvaluation, Robustness, ScoreEvaluation, SearchRecord
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import Figure, clean, exact, interval

EVALUATE = "sparsifiner-edge evaluate BUNDLE/ --against DENSE/ --data IMAGES/ -o accuracy.json"
Evaluation = ResultFile[ClassEvaluation] | ResultFile[ScoreEvaluation]


def accuracy_section(data: ReportData) -> Section:
    """Of every evaluation a table, with the latency of bundles whose latency is known."""
    files: list[Evaluation] = [*data.of(ClassEvaluation), *cosine_files(data)]
    blocks: list[Block] = [_accuracy_table(data, file) for file in files]
    others = [*data.of(ScoreEvaluation), *data.of(SearchRecord), *data.of(Robustness)]
    if data.sides and not files and not others:
        blocks.append(Note(data.texts("not_measured", how=EVALUATE), True))
    return Section("accuracy", blocks)


def cosine_files(data: ReportData) -> list[ResultFile[ScoreEvaluation]]:
    """Evaluations by cosines, not by a task."""
    return [file for file in data.of(ScoreEvaluation) if file.result.method.task is None]


def metric_name(metric: str | None, texts: Texts) -> str:
    """A metric in the page's language."""
    return texts.known(f"metric.{metric}", clean(metric))


def _accuracy_table(data: ReportData, file: Evaluation) -> Table:
    """A row for the subject and one for the teacher, of cosines for the subject alone."""
    texts, result = data.texts, file.result
    if isinstance(result, ScoreEvaluation):
        scores = [result.statistics.get(name) for name in ("features_cosine", "patches_cosine")]
        figures = [interval(score.mean if score else None) for score in scores]
        figures.append(interval(scores[0].least if scores[0] else None))
        heads = texts.heads("accuracy", ("model", "features", "patches", "least", "latency", "ran"))
        return Table(heads, [_row(data, file, "subject", [texts.figure(figure, digits=4) for figure in figures])])
    shares = result.statistics
    rows = {
        "subject": [f"{shares.subject_percent:.2f} %", texts.signed(exact(shares.difference_points))],
        "teacher": [f"{shares.teacher_percent:.2f} %", texts("accuracy.reference")],
    }
    heads = [texts("accuracy.model"), metric_name(result.method.metric, texts)]
    heads += texts.heads("accuracy", ("difference", "latency", "ran"))
    return Table(heads, [_row(data, file, role, cells) for role, cells in rows.items()])


def _row(data: ReportData, file: Evaluation, role: str, cells: list[str]) -> list[str]:
    """Name, figures, latency where the bundle was profiled too, and what ran it."""
    subject, runtime = file.subject(role), file.result.method.runtime.get(role)
    latency = [exact(side.figures.latency_ms.p50) for side in data.sides if side.sha == subject.sha256]
    parts = (runtime.backend, runtime.version, runtime.precision) if runtime else ()
    ran = " ".join(clean(part) for part in parts if isinstance(part, str)) or "–"
    return [data.label_of(subject), *cells, data.texts.figure(latency[0] if latency else None), ran]


def latency_section(data: ReportData) -> Section:
    """Distribution of the raw samples, and a table with intervals."""
    texts = data.texts
    strips = [Strip(side.label, side.samples, _percentiles(side)) for side in data.sides]
    rows = {texts(f"latency.{name}"): list(map(read, data.sides)) for name, read in _LATENCY.items()}
    blocks: list[Block] = [Strips(texts("latency.chart"), strips, texts("axis.latency")), _table("", rows, data)]
    return Section("latency", blocks if data.sides else [])


_LATENCY: dict[str, Callable[[Side], Figure]] = {
    "p50": lambda side: side.figures.latency_ms.p50,
    "p90": lambda side: side.figures.latency_ms.p90,
    "p99": lambda side: side.figures.latency_ms.p99,
    "mean": lambda side: side.figures.latency_ms.mean,
    "throughput_per_s": lambda side: side.figures.throughput_per_s,
    "queries": lambda side: side.figures.queries,
    "load_ms": lambda side: side.figures.load_ms,
    "first_inference_ms": lambda side: side.figures.first_inference_ms,
}
_MEMORY: dict[str, Callable[[Side], Figure]] = {
    "before": lambda side: side.figures.rss_before_load_bytes,
    "peak": lambda side: side.figures.memory.steady.peak_rss_bytes,
    "device": lambda side: side.figures.memory.device_bytes,
}


def _percentiles(side: Side) -> dict[str, float]:
    latency = side.figures.latency_ms
    return {"p50": latency.p50.value, "p90": latency.p90.value, "p99": latency.p99.value}


def _table(title: str, rows: dict[str, list[Figure]], data: ReportData, factor: float = 1.0) -> Table:
    """A row for each figure, a column for each side. factor: to the unit that the table says."""
    cells = [[name, *bar_cells(row, data, factor)] for name, row in rows.items()]
    return Table(["", *(side.label for side in data.sides)], cells, title)


def bar_cells(row: Sequence[Figure], data: ReportData, factor: float, digits: int | None = None) -> list[str | BarCell]:
    """Figures, with bars where they may be compared; where there is none, whether the result gives a reason."""
    figures = [(each, interval(each)) for each in row]
    top = max((found.value for _, found in figures if found), default=0.0)
    percent = 100 / top if top > 0 and not data.differences else 0.0
    return [
        (data.texts("reason.short") if isinstance(each, Unavailable) else "–") if found is None else
        BarCell(data.texts.figure(found.times(factor), "", digits), percent * max(found.value, 0.0))
        for each, found in figures
    ]  # fmt: skip


def energy_section(data: ReportData) -> Section:
    """Joules per inference, gross and net, and mean power; where there is none, why."""
    texts, blocks = data.texts, list[Block]()
    joules, watts = (
        {texts(f"energy.{name}"): [_energy(side, name + unit) for side in data.sides] for name in names}
        for names, unit in ((("gross", "net"), "_j_per_inference"), (("mean_w", "idle_w"), ""))
    )
    if not all(isinstance(side.figures.energy, Unavailable) for side in data.sides):
        blocks += [_table(texts("energy.chart"), joules, data, 1e3), _table("", watts, data)]
    for side in data.sides:
        energy, gross = side.figures.energy, _energy(side, "gross_j_per_inference")
        missing = texts.missing(gross, "") if isinstance(gross, Unavailable) else ""
        source = (
            missing if isinstance(energy, Unavailable) else f"{clean(energy.sensor)} · {clean(energy.total)} {missing}"
        )
        blocks.append(Note(f"{side.label}: {source}", bool(missing)))
    return Section("energy", blocks)


def _energy(side: Side, name: str) -> Any:
    """A figure of its energy, or why there is none."""
    energy = side.figures.energy
    return energy if isinstance(energy, Unavailable) else getattr(energy, name)


def memory_section(data: ReportData) -> Section:
    """Memory of the process before loading and at its peak, and of the device."""
    rows = {data.texts(f"memory.{name}"): list(map(read, data.sides)) for name, read in _MEMORY.items()}
    return Section("memory", [_table(data.texts("memory.chart"), rows, data, 1e-6)] if data.sides else [])


def layers_section(data: ReportData) -> Section:
    """Time by kind of operator, the choice of keys apart from attention."""
    texts, blocks, times = data.texts, list[Block](), dict[str, list[Figure]]()
    for column, side in enumerate(data.sides):
        layers = side.figures.layers
        if layers is None or isinstance(layers, Unavailable):
            blocks.append(Note(f"{side.label}: {texts.missing(layers, texts('how.layers'))}", True))
            continue
        for kind in dict.fromkeys(layer.kind for layer in layers):
            row = times.setdefault(texts.known(f"kind.{kind}", clean(kind, 40)), [None] * len(data.sides))
            row[column] = sum(layer.ms for layer in layers if layer.kind == kind)
    if times:
        blocks.insert(0, _table(texts("layers.chart"), times, data))
    return Section("layers", blocks)
