"""The sections that show what was measured: accuracy, latency, energy, memory and layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from sparsifiner_edge.report import charts
from sparsifiner_edge.report.blocks import Block, Figure, Note, Section, Table
from sparsifiner_edge.report.conditions import ReportData, SideGroup
from sparsifiner_edge.report.result_files import Accuracy, ResultSide
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import clean, get, interval, mapping, number, plain, reason, rows, with_interval
from sparsifiner_edge.report.verdict import metric_name

PROFILE = "sparsifiner-edge profile BUNDLE/ --against DENSE/ -o result.json"
EVALUATE = "sparsifiner-edge evaluate BUNDLE/ --against DENSE/ --data IMAGES/ -o accuracy.json"
MAX_LAYERS = 28
PEAK_MEMORY = ("memory", "steady", "peak_rss_bytes")


def accuracy_section(data: ReportData) -> Section:
    """Accuracy against latency, and a table of all accuracies."""
    texts, blocks = data.texts, []  # type: tuple[Texts, list[Block]]
    tasks = dict.fromkeys((found.task, found.metric) for found in data.accuracies)
    for index, (task, metric) in enumerate(tasks, 1):
        asked = [found for found in data.accuracies if found.task == task]
        points = [(group, _points(asked, group)) for group in data.groups]
        drawn = [_scatter(data, group, metric, found, f"accuracy-{index}") for group, found in points if found]
        blocks += [*drawn, _accuracy_table(asked, metric, texts)]
        if data.groups and not drawn:
            blocks.append(Note(texts("accuracy.unmatched")))
    if not (data.accuracies or data.task_files or data.search_files or data.robustness_files or data.explanation_files):
        blocks.append(Note(texts.missing(None, EVALUATE), True))
        return Section("accuracy", blocks)
    return Section("accuracy", blocks, [*(a.file for a in data.accuracies), *(s.file for s in data.measured)])


def _points(asked: Sequence[Accuracy], group: SideGroup) -> list[charts.ScatterPoint]:
    """Evaluated bundles whose latency the group holds."""
    points = {}
    for index, side in enumerate(group.sides):
        latency = side.figure("latency_ms", "p50")
        for found in asked:
            if found.sha == side.sha and found.value is not None and latency is not None:
                points[side.label] = charts.ScatterPoint(side.label, latency, found.value, index)
    return list(points.values())


def _scatter(data: ReportData, group: SideGroup, metric: str, points: list[charts.ScatterPoint], name: str) -> Figure:
    texts, cosine = data.texts, metric == "cosine"
    y_title = texts("axis.cosine") if cosine else texts("axis.percent", metric=metric_name(metric, texts))
    places = [f"{p.label}: {with_interval(p.x)} ms, {with_interval(p.y)}" for p in points]
    label = texts("accuracy.alt", points=texts.listed(places))
    draw = partial(charts.scatter, points, texts("axis.p50"), y_title, most=1.0 if cosine else 100.0)
    return Figure(data.chart_name(name, group), data.title("accuracy.chart", group), label, draw)


def _accuracy_table(asked: Sequence[Accuracy], metric: str, texts: Texts) -> Table:
    table = []
    if metric == "cosine":
        for found in (found for found in asked if found.role == "subject"):
            cosines = [interval(found.figures, name, "mean") for name in ("features_cosine", "patches_cosine")]
            least = interval(found.figures, "features_cosine", "least")
            figures = [texts.figure(cosine, digits=4) for cosine in (*cosines, least)]
            table.append([found.label, *figures, _ran_on(found)])
        return Table(texts.heads("accuracy", ("model", "features", "patches", "least", "ran")), table)
    for found in asked:
        points = interval(found.figures, "difference_points")
        difference = texts.signed(points) if points and found.role == "subject" else texts("accuracy.reference")
        table.append([found.label, texts.figure(found.value, "%", 2), difference, _ran_on(found)])
    head = [texts("accuracy.model"), metric_name(metric, texts), texts("accuracy.difference"), texts("accuracy.ran")]
    return Table(head, table)


def _ran_on(found: Accuracy) -> str:
    parts = (found.runtime.get(name) for name in ("backend", "version", "precision"))
    return " ".join(clean(part) for part in parts if isinstance(part, str)) or "–"


def latency_section(data: ReportData) -> Section:
    """Distribution from the raw samples, and a table with intervals."""
    texts, blocks = data.texts, []  # type: tuple[Texts, list[Block]]
    for group in data.groups:
        strips = [_strip(side) for side in group.sides if len(side.samples)]
        if strips:
            alt = [f"{s.label}: " + ", ".join(f"{n} {plain(v)} ms" for n, v in s.marks.items()) for s in strips]
            draw = partial(charts.strips, strips, texts("axis.latency"), texts("axis.latency.log"))
            name, title = data.chart_name("latency", group), data.title("latency.chart", group)
            blocks.append(Figure(name, title, texts.listed(alt), draw))
        bare = [side.label for side in group.sides if not len(side.samples)]
        if bare:
            blocks.append(Note(texts("latency.no_samples", names=texts.listed(bare)), True))
        blocks.append(_latency_table(group, texts))
    return Section("latency", blocks or [Note(texts.missing(None, PROFILE), True)], [s.file for s in data.measured])


_MARKS = ("p50", "p90", "p99")
_LATENCY_ROWS = (
    *(("latency_ms", name) for name in (*_MARKS, "mean")),
    *((name,) for name in ("throughput_per_s", "queries", "load_ms", "first_inference_ms")),
)


def _strip(side: ResultSide) -> charts.Strip:
    recorded = {name: side.figure("latency_ms", name) for name in _MARKS}
    return charts.Strip(side.label, side.samples, {n: found.value for n, found in recorded.items() if found})


def _latency_table(group: SideGroup, texts: Texts) -> Table:
    table = []
    for path in _LATENCY_ROWS:
        table.append([texts(f"latency.{path[-1]}"), *(_cell(get(side.figures, *path), texts) for side in group.sides)])
    return Table(["", *(side.label for side in group.sides)], table)


def _cell(content: Any, texts: Texts, factor: float = 1.0) -> str:
    """A figure; where there is none, whether the result gives a reason."""
    found = interval(content)
    if found is None:
        return texts("reason.short") if reason(content) else "–"
    return f"{content:,}" if isinstance(content, int) and factor == 1 else texts.figure(found.times(factor))


def energy_section(data: ReportData) -> Section:
    """Joules per inference, gross and net."""
    texts, blocks, used = data.texts, [], []  # type: tuple[Texts, list[Block], list[ResultSide]]
    for group in data.groups:
        bars = []
        for index, side in enumerate(group.sides):
            for kind in ("net", "gross"):
                found = side.figure("energy", f"{kind}_j_per_inference")
                if found is not None:
                    milli, label = found.times(1000), f"{side.label} · {texts(f'energy.{kind}')}"
                    bars.append(charts.Bar(label, milli, index, texts.figure(milli, "mJ")))
                    used.append(side)
        blocks += _bars_and_table(data, group, "energy", bars, _power_table(group, texts))
    blocks += _not_measured(data, used, "energy", texts("how.energy"))
    return Section("energy", blocks, [side.file for side in used])


def _bars_and_table(
    data: ReportData, group: SideGroup, name: str, bars: Sequence[charts.Bar], table: Table
) -> list[Block]:
    title = data.title(f"{name}.chart", group)
    return [charts.bar_chart(data.chart_name(name, group), title, bars, data.texts), table] if bars else []


def _power_table(group: SideGroup, texts: Texts) -> Table:
    table = []
    for side in group.sides:
        energy = mapping(side.figures, "energy")
        sensor = " · ".join(clean(energy[key]) for key in ("sensor", "total") if isinstance(energy.get(key), str))
        table.append([side.label, *(_cell(energy.get(name), texts) for name in ("mean_w", "idle_w")), sensor or "–"])
    return Table(texts.heads("energy", ("model", "mean_w", "idle_w", "source")), table)


def _not_measured(data: ReportData, used: Sequence[ResultSide], name: str, how: str) -> list[Block]:
    """Why sides that are not `used` have no such figures: one note per reason, with their names."""
    texts, reasons = data.texts, {}  # type: tuple[Texts, dict[str, list[str]]]
    for side in (side for side in data.measured if not any(side is other for other in used)):
        found = side.figures.get(name)
        if name == "energy" and reason(found) is None:
            found = get(found, "gross_j_per_inference")
        reasons.setdefault(texts.missing(found, how), []).append(side.label)
    return [Note(f"{texts.listed(names)}: {why}", True) for why, names in reasons.items()]


def memory_section(data: ReportData) -> Section:
    """Peak memory of the process at each stage, and of the device."""
    texts, blocks, used = data.texts, [], []  # type: tuple[Texts, list[Block], list[ResultSide]]
    for group in data.groups:
        bars = []
        for index, side in enumerate(group.sides):
            peak = side.figure(*PEAK_MEMORY)
            if peak is not None:
                mega = peak.times(1e-6)
                bars.append(charts.Bar(side.label, mega, index, texts.figure(mega, "MB")))
                used.append(side)
        blocks += _bars_and_table(data, group, "memory", bars, _memory_table(group, texts))
    blocks += _not_measured(data, used, "memory", PROFILE)
    return Section("memory", blocks or [Note(texts.missing(None, PROFILE), True)], [s.file for s in data.measured])


_STAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("before", ("rss_before_load_bytes",)),
    ("load", ("memory", "load", "peak_rss_bytes")),
    ("first", ("memory", "first_inference", "peak_rss_bytes")),
    ("peak", PEAK_MEMORY),
    ("pss", ("memory", "steady", "pss_bytes")),
    ("device", ("memory", "device_bytes")),
)


def _memory_table(group: SideGroup, texts: Texts) -> Table:
    table = []
    for name, path in _STAGES:
        found = [get(side.figures, *path) for side in group.sides]
        if any(content is not None for content in found):
            table.append([texts(f"memory.{name}"), *(_cell(content, texts, 1e-6) for content in found)])
    return Table([texts("memory.unit"), *(side.label for side in group.sides)], table)


def layers_section(data: ReportData) -> Section:
    """Time per layer, the choice of keys apart."""
    texts, blocks, used = data.texts, [], []  # type: tuple[Texts, list[Block], list[ResultSide]]
    for side in data.measured:
        stacks = _layer_stacks(side, texts)
        if not stacks:
            continue
        used.append(side)
        present = {kind for stack in stacks for kind in stack.parts}
        kinds = {kind: texts.known(f"kind.{kind}", kind) for kind in sorted(present, key=_kind_order)}
        title = f"{texts('layers.chart')} — {side.label}"
        blocks.append(charts.stack_chart(f"layers-{len(used)}", title, stacks, kinds, texts))
        total, median = side.figure("layers_total_ms"), side.figure("latency_ms", "p50")
        if total is not None and median is not None:
            blocks.append(Note(texts("layers.sum", total=plain(total.value), median=plain(median.value))))
    blocks += _not_measured(data, used, "layers", texts("how.layers"))
    return Section("layers", blocks, [side.file for side in used])


_KIND_ORDER = ("selection", "attention", "projections", "mlp", "norms")


def _kind_order(kind: str) -> tuple[int, str]:
    return (_KIND_ORDER.index(kind) if kind in _KIND_ORDER else len(_KIND_ORDER) + (kind == "other"), kind)


def _layer_stacks(side: ResultSide, texts: Texts) -> list[charts.Stack]:
    """One bar per layer of the model, parts by kind, and one for all that lies outside.

    Where a backend names no layers, its operators take their place: the longest, the others in one bar.
    """
    layers, outside = rows(side.figures, "layers"), texts("layers.outside")
    numbered = any(isinstance(layer.get("layer"), int) for layer in layers)
    parts: dict[str, dict[str, float]] = {}
    for layer in layers:
        milliseconds, index = number(layer.get("ms")), layer.get("layer")
        if milliseconds is None or milliseconds <= 0:
            continue
        name = texts("layers.layer", number=index) if isinstance(index, int) else outside
        kinds = parts.setdefault(name if numbered else clean(layer.get("name", "?"), 40), {})
        kind = clean(layer.get("kind") or layer.get("op") or "other", 40)
        kinds[kind] = kinds.get(kind, 0.0) + milliseconds
    longest = sorted(parts, key=lambda name: -sum(parts[name].values()))
    rest = longest[MAX_LAYERS:]
    order = sorted(parts, key=lambda name: name == outside)
    stacks = [_stack(name, parts[name]) for name in order if name not in rest]
    if rest:
        total = sum(sum(parts[name].values()) for name in rest)
        stacks.append(_stack(texts("layers.rest", count=len(rest)), {"other": total}))
    return stacks


def _stack(label: str, parts: dict[str, float]) -> charts.Stack:
    return charts.Stack(label, parts, f"{plain(sum(parts.values()))} ms")
