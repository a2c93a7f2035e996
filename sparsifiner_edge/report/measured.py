"""Sections of a profile: latency, energy, memory, layers and conditions."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report.blocks import Block, Note, Section, Table, strips
from sparsifiner_edge.report.reading import ReportData, Side, conditions_of
from sparsifiner_edge.report.values import Figure, clean, quantity_of

_LATENCY = (
    *(f"latency_ms.{name}" for name in ("p50", "p90", "p99", "mean")),
    "throughput_per_s",
    "queries",
    "load_ms",
    "first_inference_ms",
)
"""Names of the latency figures in the table."""
_JOULES = ("energy.gross_j_per_inference", "energy.net_j_per_inference")
"""Names of the energy figures in the table."""
_WATTS = ("energy.mean_w", "energy.idle_w")
"""Names of the power figures in the table."""
_MEMORY = ("rss_before_load_bytes", "peak_memory_bytes", "device_bytes")
"""Names of the memory figures in the table."""


def latency_section(data: ReportData) -> Section:
    """Return the distribution of the raw samples, and a table with intervals."""
    texts, sides = data.texts, data.sides
    if not sides:
        return "latency", []
    marks = ("p50", "p90", "p99")
    chart = [(x.label, x.samples, {name: getattr(x.figures.latency_ms, name).value for name in marks}) for x in sides]
    table = _table("", _rows("latency", _LATENCY, data), data)
    return "latency", [strips(texts("latency.chart"), texts("axis.latency"), chart), table]


def _rows(section: str, names: Sequence[str], data: ReportData) -> dict[str, list[Figure]]:
    """Return figures of every side under the section's labels."""
    texts = {name: data.texts(f"{section}.{name.rpartition('.')[2]}") for name in names}
    return {text: [_figure(side, name) for side in data.sides] for name, text in texts.items()}


def _figure(side: Side, name: str) -> Any:
    """Return a figure such as "energy.mean_w", or why there is none."""
    figure: Any = side.figures
    for part in name.split("."):
        figure = figure if isinstance(figure, Unavailable) else getattr(figure, part)
    return figure


def _table(title: str, rows: dict[str, list[Figure]], data: ReportData, factor: float = 1.0) -> Table:
    """Return a table with a row per figure and a column per side; `factor` converts to the unit that it shows."""
    cells = [[name, *bar_cells(row, data, factor)] for name, row in rows.items()]
    return Table(["", *(side.label for side in data.sides)], cells, title)


def bar_cells(
    row: Sequence[Figure], data: ReportData, factor: float, digits: int | None = None
) -> list[str | tuple[str, float]]:
    """Return figures with bars where they may be compared, and the reason where there is none."""
    figures = [(each, quantity_of(each)) for each in row]
    top = max((quantity.value for _, quantity in figures if quantity), default=0.0)
    percent = 100 / top if top > 0 and not data.differences else 0.0
    return [
        (data.texts("reason.short") if isinstance(each, Unavailable) else "–")
        if quantity is None
        else (data.texts.figure(quantity.times(factor), "", digits), percent * max(quantity.value, 0.0))
        for each, quantity in figures
    ]


def energy_section(data: ReportData) -> Section:
    """Return joules per inference, gross and net, and mean power; or why there are none."""
    texts, blocks = data.texts, list[Block]()
    if not all(isinstance(side.figures.energy, Unavailable) for side in data.sides):
        blocks.append(_table(texts("energy.chart"), _rows("energy", _JOULES, data), data, 1e3))
        blocks.append(_table("", _rows("energy", _WATTS, data), data))
    for side in data.sides:
        energy, gross = side.figures.energy, _figure(side, _JOULES[0])
        missing = texts.missing(gross, "") if isinstance(gross, Unavailable) else ""
        source = "" if isinstance(energy, Unavailable) else f"{clean(energy.sensor)} · {clean(energy.total)} "
        blocks.append(Note(f"{side.label}: {source}{missing}", bool(missing)))
    return "energy", blocks


def memory_section(data: ReportData) -> Section:
    """Return the memory of the process before loading and at its peak, and of the device."""
    rows = _rows("memory", _MEMORY, data)
    return "memory", [_table(data.texts("memory.chart"), rows, data, 1e-6)] if data.sides else []


def layers_section(data: ReportData) -> Section:
    """Return the time by kind of operator, with key selection apart from attention."""
    texts, blocks, times = data.texts, list[Block](), dict[str, list[Figure]]()
    for column, side in enumerate(data.sides):
        layers = side.figures.layers
        if layers is None or isinstance(layers, Unavailable):
            blocks.append(Note(f"{side.label}: {texts.missing(layers, texts('how.layers'))}", True))
            continue
        for kind in dict.fromkeys(layer.kind for layer in layers):
            row = times.setdefault(texts.get(f"kind.{kind}", clean(kind, 40)), [None] * len(data.sides))
            row[column] = sum(layer.ms for layer in layers if layer.kind == kind)
    if times:
        blocks.insert(0, _table(texts("layers.chart"), times, data))
    return "layers", blocks


def conditions_section(data: ReportData) -> Section:
    """Return the conditions of each side, and its median clocks, as far as they are known."""
    columns = []
    for side in data.sides:
        during = side.file.result.method.conditions[side.role].during
        clocks = {name: f"{median(during[name]):.0f}" for name in ("cpu_mhz", "gpu_mhz") if during.get(name)}
        columns.append(conditions_of(side) | {"kernels": clean(side.runtime.kernels or "?", 120)} | clocks)
    fields = dict.fromkeys(field for column in columns for field in column)
    rows = [[data.texts(f"field.{name}"), *(column.get(name, "?") for column in columns)] for name in fields]
    rows = [row for row in rows if set(row[1:]) != {"?"}]
    return "conditions", [Table(["", *(side.label for side in data.sides)], rows, words=True)] if columns else []
