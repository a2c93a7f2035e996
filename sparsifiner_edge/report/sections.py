"""The sections that show what was measured: accuracy, latency, energy, memory and layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from sparsifiner_edge.report import charts
from sparsifiner_edge.report.blocks import Block, Figure, Note, Section, Table, commands_of
from sparsifiner_edge.report.compare import Group, metric_name, missing, signed
from sparsifiner_edge.report.read import Accuracy, Side, layers_of
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import Interval, clean, get, interval, mapping, number, plain, reason, shown

PROFILE = "sparsifiner-edge profile BUNDLE/ --against DENSE/ -o result.json"
EVALUATE = "sparsifiner-edge evaluate BUNDLE/ --against DENSE/ --data IMAGES/ -o accuracy.json"
MAX_LAYERS = 28


class Page(NamedTuple):
    """What sections draw from."""

    groups: Sequence[Group]
    sides: Sequence[Side]
    accuracies: Sequence[Accuracy]
    texts: Texts

    @property
    def measured(self) -> list[Side]:
        """The sides of all groups."""
        return [side for group in self.groups for side in group.sides]

    def titled(self, key: str, group: Group) -> str:
        """A chart's title, with what sets its group apart."""
        return self.texts(key) + (f" — {group.name}" if group.name else "")


def accuracy_section(page: Page) -> Section:
    """Accuracy against latency, and a table of all accuracies."""
    texts, blocks = page.texts, []  # type: tuple[Texts, list[Block]]
    tasks = list(dict.fromkeys((found.task, found.metric) for found in page.accuracies))
    for number_, (task, metric) in enumerate(tasks):
        asked = [found for found in page.accuracies if found.task == task]
        for group in page.groups:
            points = _points(asked, group)
            if points:
                name = f"accuracy-{number_ + 1}"
                blocks.append(_scatter(page, group, metric, points, name))
        blocks.append(_accuracy_table(asked, metric, texts))
        if page.groups and not any(_points(asked, group) for group in page.groups):
            blocks.append(Note(texts("accuracy.unmatched")))
    if not page.accuracies:
        blocks.append(Note(missing(None, texts, EVALUATE), True))
    sources = [found.source for found in page.accuracies]
    return Section("accuracy", blocks, commands_of([*sources, *(s.source for s in page.measured)] if sources else []))


def _points(asked: Sequence[Accuracy], group: Group) -> list[charts.Point]:
    """Evaluated bundles whose latency the group holds."""
    points = {}
    for index, side in enumerate(group.sides):
        latency = interval(get(side.figures, "latency_ms", "p50"))
        for found in asked:
            value = accuracy_of(found)
            if found.sha == side.sha and value is not None and latency is not None:
                points[side.label] = charts.Point(side.label, latency, value, index)
    return list(points.values())


def accuracy_of(found: Accuracy) -> Interval | None:
    """Mean cosine of the features, or percent; the interval of a share is Wilson's."""
    if found.metric == "cosine":  # The teacher's with itself is 1.
        return interval(get(found.figures, "features_cosine", "mean")) if found.role == "subject" else Interval(1.0)
    percent, queries = (number(found.figures.get(name)) for name in (f"{found.role}_percent", "queries"))
    if percent is None or not 0 <= percent <= 100:
        return None
    if queries is None or queries < 1:
        return Interval(percent)
    return _wilson(percent / 100, queries).times(100)


def _wilson(share: float, count: float, z: float = 1.96) -> Interval:
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * ((share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5) / (1 + z * z / count)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def _scatter(page: Page, group: Group, metric: str, points: list[charts.Point], name: str) -> Figure:
    texts = page.texts
    y_title = texts("axis.cosine") if metric == "cosine" else texts("axis.percent", metric=metric_name(metric, texts))
    most = 1.0 if metric == "cosine" else 100.0
    label = texts("accuracy.alt", points=texts.listed([f"{p.label}: {shown(p.x)} ms, {shown(p.y)}" for p in points]))
    draw = partial(charts.scatter, points, texts("axis.p50"), y_title, most=most)
    return Figure(name + _suffix(page, group), page.titled("accuracy.chart", group), label, draw)


def _suffix(page: Page, group: Group) -> str:
    """Charts of several groups have a number each."""
    return f"-{list(page.groups).index(group) + 1}" if len(page.groups) > 1 else ""


def _accuracy_table(asked: Sequence[Accuracy], metric: str, texts: Texts) -> Table:
    rows, to = [], texts("interval")
    if metric == "cosine":
        for found in (found for found in asked if found.role == "subject"):
            cells = [interval(get(found.figures, name, "mean")) for name in ("features_cosine", "patches_cosine")]
            least = number(get(found.figures, "features_cosine", "least"))
            ends = ["–" if least is None else f"{least:.4f}", _ran_on(found)]
            rows.append([found.label, *("–" if c is None else shown(c, to, digits=4) for c in cells), *ends])
        return Table([texts(f"accuracy.{name}") for name in ("model", "features", "patches", "least", "ran")], rows)
    for found in asked:
        value, points = accuracy_of(found), interval(found.figures.get("difference_points"))
        difference = signed(points, texts) if points and found.role == "subject" else texts("accuracy.reference")
        rows.append([found.label, "–" if value is None else shown(value, to, "%", 2), difference, _ran_on(found)])
    head = [texts("accuracy.model"), metric_name(metric, texts), texts("accuracy.difference"), texts("accuracy.ran")]
    return Table(head, rows)


def _ran_on(found: Accuracy) -> str:
    parts = (found.runtime.get(name) for name in ("backend", "version", "precision"))
    return " ".join(clean(part) for part in parts if isinstance(part, str)) or "–"


def latency_section(page: Page) -> Section:
    """Distribution from the raw samples, and a table with intervals."""
    texts, blocks = page.texts, []  # type: tuple[Texts, list[Block]]
    for group in page.groups:
        rows = [_strip(side) for side in group.sides if len(side.samples)]
        if rows:
            alt = texts.listed(
                [f"{r.label}: " + ", ".join(f"{n} {plain(v)} ms" for n, v in r.marks.items()) for r in rows]
            )
            draw = partial(charts.strips, rows, texts("axis.latency"), texts("axis.latency.log"))
            blocks.append(Figure("latency" + _suffix(page, group), page.titled("latency.chart", group), alt, draw))
        bare = [side.label for side in group.sides if not len(side.samples)]
        if bare:
            blocks.append(Note(texts("latency.no_samples", names=texts.listed(bare)), True))
        blocks.append(_latency_table(group, texts))
    if not page.groups:
        blocks.append(Note(missing(None, texts, PROFILE), True))
    return Section("latency", blocks, commands_of(side.source for side in page.measured))


_MARKS = ("p50", "p90", "p99")


def _strip(side: Side) -> charts.Strip:
    recorded = {name: interval(get(side.figures, "latency_ms", name)) for name in _MARKS}
    return charts.Strip(side.label, side.samples, {n: found.value for n, found in recorded.items() if found})


def _latency_table(group: Group, texts: Texts) -> Table:
    rows = []
    for name in (*_MARKS, "mean"):
        label = texts(f"latency.{name}")
        rows.append([label, *(_cell(get(side.figures, "latency_ms", name), texts) for side in group.sides)])
    for name in ("throughput_per_s", "queries", "load_ms", "first_inference_ms"):
        rows.append([texts(f"latency.{name}"), *(_cell(side.figures.get(name), texts) for side in group.sides)])
    if any("mlperf" in side.figures for side in group.sides):
        rows.append([texts("latency.mlperf"), *(_mlperf(side, texts) for side in group.sides)])
    return Table(["", *(side.label for side in group.sides)], rows)


def _mlperf(side: Side, texts: Texts) -> str:
    found = mapping(side.figures, "mlperf")
    valid = texts("latency.valid" if found.get("valid") is True else "latency.invalid")
    return f"{_cell(found.get('early_stopping_p90_ms'), texts)} ({valid})" if found else "–"


def _cell(content: Any, texts: Texts) -> str:
    found = interval(content)
    if found is None:
        return texts("reason.short") if reason(content) else "–"
    if isinstance(content, int):
        return f"{content:,}"
    return shown(found, texts("interval"))


def energy_of(side: Side, kind: str) -> Interval | None:
    """Joules per inference, "gross" or "net"."""
    return interval(get(side.figures, "energy", f"{kind}_j_per_inference"))


def energy_section(page: Page) -> Section:
    """Joules per inference, gross and net."""
    texts, blocks, used = page.texts, [], []  # type: tuple[Texts, list[Block], list[Side]]
    for group in page.groups:
        bars = []
        for index, side in enumerate(group.sides):
            for kind in ("net", "gross"):
                found = energy_of(side, kind)
                if found is not None:
                    milli = found.times(1000)
                    text = shown(milli, texts("interval"), "mJ")
                    bars.append(charts.Bar(f"{side.label} · {texts(f'energy.{kind}')}", milli, index, text))
                    used.append(side)
        if bars:
            title = page.titled("energy.chart", group)
            blocks.append(charts.bar_chart("energy" + _suffix(page, group), title, bars, texts))
            blocks.append(_power_table(group, texts))
    blocks += _not_measured(page, used, "energy")
    return Section("energy", blocks, commands_of(side.source for side in used))


def _power_table(group: Group, texts: Texts) -> Table:
    rows = []
    for side in group.sides:
        energy = mapping(side.figures, "energy")
        source = " · ".join(clean(energy[key]) for key in ("sensor", "total") if isinstance(energy.get(key), str))
        rows.append([side.label, *(_cell(energy.get(name), texts) for name in ("mean_w", "idle_w")), source or "–"])
    return Table([texts(f"energy.{name}") for name in ("model", "mean_w", "idle_w", "source")], rows)


def _not_measured(page: Page, used: Sequence[Side], name: str) -> list[Block]:
    """Why sides that are not `used` have no such figures: one note per reason, with their names."""
    texts, reasons = page.texts, {}  # type: tuple[Texts, dict[str, list[str]]]
    for side in (side for side in page.measured if not any(side is other for other in used)):
        found = side.figures.get(name)
        if name == "energy" and reason(found) is None:
            found = get(found, "gross_j_per_inference")
        reasons.setdefault(missing(found, texts, texts(f"how.{name}")), []).append(side.label)
    return [Note(f"{texts.listed(names)}: {why}", True) for why, names in reasons.items()]


def memory_section(page: Page) -> Section:
    """Peak memory of the process at each stage, and of the device."""
    texts, blocks = page.texts, []  # type: tuple[Texts, list[Block]]
    for group in page.groups:
        peaks = [(index, side, peak_of(side)) for index, side in enumerate(group.sides)]
        bars = [
            charts.Bar(side.label, peak.times(1e-6), index, f"{plain(peak.value / 1e6)} MB")
            for index, side, peak in peaks
            if peak is not None
        ]
        if bars:
            title = page.titled("memory.chart", group)
            blocks.append(charts.bar_chart("memory" + _suffix(page, group), title, bars, texts))
            blocks.append(_memory_table(group, texts))
        blocks += [
            Note(f"{side.label}: {missing(None, texts, PROFILE)}", True) for _, side, peak in peaks if peak is None
        ]
    if not page.groups:
        blocks.append(Note(missing(None, texts, PROFILE), True))
    return Section("memory", blocks, commands_of(side.source for side in page.measured))


def peak_of(side: Side) -> Interval | None:
    """Peak resident bytes of the process."""
    steady = interval(get(side.figures, "memory", "steady", "peak_rss_bytes"))
    return steady or interval(side.figures.get("peak_rss_bytes"))


_STAGES: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("before", (("memory", "before", "rss_bytes"), ("rss_before_load_bytes",))),
    ("load", (("memory", "load", "peak_rss_bytes"), ("rss_after_load_bytes",))),
    ("first", (("memory", "first_inference", "peak_rss_bytes"), ("rss_after_first_inference_bytes",))),
    ("peak", (("memory", "steady", "peak_rss_bytes"), ("peak_rss_bytes",))),
    ("pss", (("memory", "steady", "pss_bytes"), ("pss_bytes",))),
    ("device", (("memory", "device_bytes"),)),
)


def _memory_table(group: Group, texts: Texts) -> Table:
    rows = []
    for name, paths in _STAGES:
        found = [
            next((x for path in paths if (x := get(side.figures, *path)) is not None), None) for side in group.sides
        ]
        if any(content is not None for content in found):
            rows.append([texts(f"memory.{name}"), *(_megabytes(content, texts) for content in found)])
    return Table([texts("memory.unit"), *(side.label for side in group.sides)], rows)


def _megabytes(content: Any, texts: Texts) -> str:
    found = interval(content)
    return _cell(content, texts) if found is None else plain(found.value / 1e6)


def layers_section(page: Page) -> Section:
    """Time per layer, the choice of keys apart."""
    texts, blocks, used = page.texts, [], []  # type: tuple[Texts, list[Block], list[Side]]
    for side in page.measured:
        stacks = _layer_stacks(layers_of(side), texts)
        if not stacks:
            continue
        used.append(side)
        present = {kind for stack in stacks for kind in stack.parts}
        kinds = {kind: texts.known(f"kind.{kind}", kind) for kind in sorted(present, key=_kind_order)}
        title = f"{texts('layers.chart')} — {side.label}"
        blocks.append(charts.stack_chart(f"layers-{len(used)}", title, stacks, kinds, texts))
        blocks += _layer_sum(side, texts)
    blocks += _not_measured(page, used, "layers")
    return Section("layers", blocks, commands_of(side.source for side in used))


_KIND_ORDER = ("selection", "attention", "projections", "mlp", "norms")


def _kind_order(kind: str) -> tuple[int, str]:
    return (_KIND_ORDER.index(kind) if kind in _KIND_ORDER else len(_KIND_ORDER) + (kind == "other"), kind)


def _layer_stacks(layers: Sequence[Mapping[str, Any]], texts: Texts) -> list[charts.Stack]:
    """One bar per layer of the model, parts by kind, and one for all that lies outside.

    Where a backend names no layers, its operators take their place: the longest, the others in one bar.
    """
    numbered = any(isinstance(layer.get("layer"), int) for layer in layers)
    parts: dict[str, dict[str, float]] = {}
    for layer in layers:
        milliseconds = number(layer.get("ms"))
        if milliseconds is not None and milliseconds > 0:
            kinds = parts.setdefault(_layer_name(layer, numbered, texts), {})
            kind = clean(layer.get("kind") or layer.get("op") or "other", 40)
            kinds[kind] = kinds.get(kind, 0.0) + milliseconds
    outside = texts("layers.outside")
    order = sorted(parts, key=lambda name: name == outside)
    kept = sorted(order, key=lambda name: -sum(parts[name].values()))[:MAX_LAYERS]
    rest = [name for name in order if name not in kept]
    stacks = [_stack(name, parts[name]) for name in order if name in kept]
    if rest:
        total = sum(sum(parts[name].values()) for name in rest)
        stacks.append(_stack(texts("layers.rest", count=len(rest)), {"other": total}))
    return stacks


def _layer_name(layer: Any, numbered: bool, texts: Texts) -> str:
    if not numbered:
        return clean(layer.get("name", "?"), 40)
    index = layer.get("layer")
    return texts("layers.layer", number=index) if isinstance(index, int) else texts("layers.outside")


def _layer_sum(side: Side, texts: Texts) -> list[Block]:
    """The layers' sum beside the latency: a profiler takes time of its own."""
    total, median = number(side.figures.get("layers_total_ms")), interval(get(side.figures, "latency_ms", "p50"))
    if total is None or median is None:
        return []
    return [Note(texts("layers.sum", total=plain(total), median=plain(median.value)))]


def _stack(label: str, parts: dict[str, float]) -> charts.Stack:
    return charts.Stack(label, parts, f"{plain(sum(parts.values()))} ms")
