"""The sections behind the figures: what was sparse, costs, estimates, sweeps, other figures, method and machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sparsifiner_edge.bounds import finite_number
from sparsifiner_edge.bundle.manifest import Manifest
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.report import charts
from sparsifiner_edge.report.blocks import Block, Note, Section, Table, commands_of
from sparsifiner_edge.report.compare import board_of, context, machine_of
from sparsifiner_edge.report.read import MEASURED, SWEEP, Described, Side, Source
from sparsifiner_edge.report.sections import Page, energy_of
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import (
    Interval,
    clean,
    figures_in,
    get,
    interval,
    mapping,
    number,
    plain,
    reason,
    rows,
    shown,
)  # fmt: skip

MAX_ROWS, MAX_BARS = 200, 24
COST_KINDS = ("predictor", "attention", "cells", "pruning", "projections", "mlp", "embedding")
_MILLION = 1e6
_MOST_PRICE = 1e12
_JOULES_PER_KWH = 3.6e6


class Prices(NamedTuple):
    """What a kilowatt-hour and an hour of the device cost, None where not given; `currency`: as printed."""

    kwh: float | None = None
    device_hour: float | None = None
    currency: str = ""

    def checked(self) -> Prices:
        """The same.

        Raises:
            ConfigError: a price is negative or no number, a currency without a price, or a long one.
        """
        for name, price in (("price-kwh", self.kwh), ("price-device-hour", self.device_hour)):
            if price is not None:
                finite_number(price, name, 0.0, _MOST_PRICE)
        if len(self.currency) > 12:
            raise ConfigError(f"currency is {self.currency!r}.", "Give a code or sign of at most 12 characters.")
        if self.currency and self.kwh is None and self.device_hour is None:
            raise ConfigError("There is a currency but no price.", "Give --price-kwh or --price-device-hour.")
        return self


def sparsity_section(page: Page, manifests: Sequence[Described]) -> Section:
    """Settings, the computation that is left, and the layers that were kept dense by measurement."""
    texts, blocks = page.texts, []  # type: tuple[Texts, list[Block]]
    if manifests:
        blocks.append(_settings_table(manifests, texts))
        blocks += _cost_chart(manifests, texts)
        choices = [row for manifest in manifests for row in _choices(manifest, texts)]
        if choices:
            head = [texts(f"sparsity.{name}") for name in ("model", "layers", "sparse_ms", "dense_ms", "decision")]
            blocks.append(Table(head, choices))
    known = {manifest.sha for manifest in manifests}
    away = list(dict.fromkeys(s.label.partition(" · ")[0] for s in page.sides if s.sha not in known))
    if away or not manifests:
        names = texts.listed(away) or "–"
        blocks.append(
            Note(f"{names}: {texts('sparsity.away')}", True, "sparsifiner-edge report RESULT.json --bundle BUNDLE/")
        )
    return Section("sparsity", blocks)


_SETTINGS = ("preset", "keep", "tile", "probe", "channels", "cells", "dense_layers", "token_keep", "fuse_tokens")


def _settings_table(manifests: Sequence[Described], texts: Texts) -> Table:
    table = []
    for name in _SETTINGS:
        cells = [_setting(_sparsity(one.manifest), name, texts) for one in manifests]
        if any(cell != "–" for cell in cells):
            table.append([texts(f"sparsity.{name}"), *cells])
    kinds = [texts("sparsity.sparse" if m.manifest.sparsity else "sparsity.plain") for m in manifests]
    precision = [clean(m.manifest.precision or "?") for m in manifests]
    table = [[texts("sparsity.attention"), *kinds], [texts("field.precision"), *precision], *table]
    return Table([texts("sparsity.setting"), *(manifest.label for manifest in manifests)], table)


def _sparsity(manifest: Manifest) -> Mapping[str, Any]:
    return manifest.sparsity.to_dict() if manifest.sparsity else {}


def _setting(sparsity: Any, name: str, texts: Texts) -> str:
    value = sparsity.get(name)
    if name == "keep" and number(value) is not None:
        return f"{100 * float(value or 0):.3g} %"
    if name == "token_keep" and isinstance(value, list):
        pairs = [pair for pair in value if isinstance(pair, list) and len(pair) == 2 and number(pair[1]) is not None]
        return texts.listed([f"{clean(layer, 8)}: {100 * share:.3g} %" for layer, share in pairs]) or texts("none")
    if isinstance(value, list):
        return ", ".join(clean(item, 8) for item in value) or texts("none")
    if isinstance(value, bool):
        return texts("yes" if value else "no")
    return "–" if value is None else clean(value, 40)


def _cost_chart(manifests: Sequence[Described], texts: Texts) -> list[Block]:
    """Multiply-accumulates by kind, and those of dense models that no bundle on the page is."""
    stacks = []
    for manifest in manifests:
        costs, dense = _macs(manifest.manifest.costs), _macs(manifest.manifest.dense_costs)
        if costs:
            share = f" · {100 * sum(costs.values()) / sum(dense.values()):.0f} %" if dense else ""
            stacks.append(charts.Stack(manifest.label, costs, f"{plain(sum(costs.values()))} M{share}"))
            if dense and dense not in [stack.parts for stack in stacks] and not _has_dense(manifests, dense):
                label = texts("sparsity.dense_of", model=manifest.label)
                stacks.append(charts.Stack(label, dense, f"{plain(sum(dense.values()))} M · 100 %"))
    kinds = {k: texts.known(f"kind.{k}", k) for k in COST_KINDS if any(k in stack.parts for stack in stacks)}
    if not stacks:
        return []
    chart = charts.stack_chart("macs", texts("sparsity.chart"), stacks, kinds, texts)
    return [chart, Note(texts("sparsity.computed"))]


def _has_dense(manifests: Sequence[Described], dense: Mapping[str, float]) -> bool:
    return any(_macs(one.manifest.costs) == dense for one in manifests)


def _macs(costs: Any) -> dict[str, float]:
    found = {kind: number(costs.get(f"{kind}_macs")) for kind in COST_KINDS}
    return {kind: value / 1e6 for kind, value in found.items() if value}


def _choices(side: Described, texts: Texts) -> list[list[str]]:
    found = []
    for choice in side.manifest.measured.choices if side.manifest.measured else ():
        names = ", ".join(clean(layer, 6) for layer in choice.layers) or "?"
        times = [number(milliseconds) for milliseconds in (choice.sparse_ms, choice.dense_ms)]
        decision = texts("sparsity.kept_dense" if choice.kept_dense else "sparsity.stays_sparse")
        found.append([side.label, names, *("?" if t is None else plain(t) for t in times), decision])
    return found


def cost_section(page: Page, prices: Prices) -> Section:
    """What a million inferences cost, from the prices given."""
    texts, blocks = page.texts, []  # type: tuple[Texts, list[Block]]
    if prices.kwh is None and prices.device_hour is None:
        blocks.append(
            Note(texts("cost.none"), True, "sparsifiner-edge report RESULT.json --price-kwh 0.30 --currency EUR")
        )
        return Section("cost", blocks)
    table, money = [], prices.currency or texts("cost.units")
    sides = [side for side in page.sides if side.role != SWEEP]
    for side in sides:
        energy, hours = _energy_kwh(side), _device_hours(side)
        label = side.label + (f" ({texts('estimate.mark')})" if side.estimated else "")
        table.append([label, _price(energy, prices.kwh, texts), _price(hours, prices.device_hour, texts)])
    named = ((texts("cost.kwh"), prices.kwh), (texts("cost.device_hour"), prices.device_hour))
    given = [f"{name}: {price:g} {money}" for name, price in named if price is not None]
    blocks.append(
        Table([texts("cost.model"), texts("cost.energy", money=money), texts("cost.device", money=money)], table)
    )
    blocks.append(Note(texts("cost.prices", prices=texts.listed(given))))
    return Section("cost", blocks, commands_of(s.source for s in sides))


def _price(amount: Interval | None, price: float | None, texts: Texts) -> str:
    if price is None:
        return texts("cost.no_price")
    if amount is None:
        return texts("cost.no_amount")
    return shown(amount.times(price), texts("interval")) if price else "0"


def _energy_kwh(side: Side) -> Interval | None:
    """Of a million inferences, gross: what the meter counts."""
    joules = interval(side.figures.get("energy_j")) if side.estimated else energy_of(side, "gross")
    return joules and joules.times(_MILLION / _JOULES_PER_KWH)


def _device_hours(side: Side) -> Interval | None:
    """Of a million inferences one after another, at the mean latency."""
    latency = side.figures.get("latency_ms") if side.estimated else get(side.figures, "latency_ms", "mean")
    found = interval(latency)
    return found and found.times(_MILLION / 3.6e6)


def estimate_section(page: Page) -> Section | None:
    """What was computed for boards that were not at hand; None where there is no estimate."""
    texts = page.texts
    sides = [side for side in page.sides if side.estimated]
    if not sides:
        return None
    bars, table = [], []
    for index, side in enumerate(sides):
        latency = interval(side.figures.get("latency_ms"))
        name = f"{side.label} · {board_of(side)}"
        if latency is not None:
            text = shown(latency, texts("interval"), "ms")
            bars.append(charts.Bar(name, latency, index, text, hollow=True))
        memory, energy = (interval(side.figures.get(key)) for key in ("memory_bytes", "energy_j"))
        cells = [latency, memory and memory.times(1e-6), energy and energy.times(1e3)]
        figures = ["–" if cell is None else shown(cell, texts("interval")) for cell in cells]
        fits = texts.known(f"fits.{side.figures.get('fits_memory')}", "–")
        table.append([side.label, board_of(side), *figures, fits])
    blocks: list[Block] = [Note(texts("estimate.warning"))]
    if bars:
        blocks.append(charts.bar_chart("estimate", texts("estimate.chart"), bars, texts))
    head = [texts(f"estimate.{n}") for n in ("model", "board", "latency", "memory", "energy", "fits")]
    blocks.append(Table(head, table))
    blocks += _estimated_parts(sides, texts)
    methods = dict.fromkeys(clean(get(s.figures, "latency_ms", "method") or "", 400) for s in sides)
    blocks += [Note(texts("estimate.method", method=method)) for method in methods if method]
    return Section("estimate", blocks, commands_of(side.source for side in sides))


def _estimated_parts(sides: Sequence[Side], texts: Texts) -> list[Block]:
    """Where the estimated time goes, by kind of operator."""
    stacks = []
    for side in sides:
        operators = rows(side.figures, "operators")
        parts = {clean(row.get("kind", "?"), 40): value for row in operators if (value := number(row.get("ms")))}
        if parts and min(parts.values()) > 0:
            name = f"{side.label} · {board_of(side)}"
            stacks.append(charts.Stack(name, parts, f"{plain(sum(parts.values()))} ms"))
    if not stacks:
        return []
    kinds = {kind: texts.known(f"kind.{kind}", kind) for stack in stacks for kind in stack.parts}
    return [charts.stack_chart("estimate-parts", texts("estimate.parts"), stacks, kinds, texts)]


def sweep_section(page: Page) -> Section | None:
    """Throughput and latency over threads and batch sizes; None where there is no sweep."""
    texts, blocks = page.texts, []  # type: tuple[Texts, list[Block]]
    sides = [side for side in page.sides if side.role == SWEEP]
    for index, side in enumerate(sides):
        found = rows(side.figures, SWEEP)
        bars = [bar for row in found[:MAX_BARS] if (bar := _sweep_bar(row, index, texts)) is not None]
        if bars:
            title = f"{texts('sweep.chart')} — {side.label}, {machine_of(side.source.result)}"
            blocks.append(charts.bar_chart(f"sweep-{index + 1}", title, bars, texts))
        head = [texts(f"sweep.{name}") for name in ("threads", "batch", "p50", "p90", "throughput", "flags")]
        blocks.append(Table(head, [_sweep_row(row, texts) for row in found[:MAX_ROWS]]))
    if not sides:
        return None
    return Section("sweep", blocks, commands_of(side.source for side in sides))


def _sweep_bar(row: Any, colour: int, texts: Texts) -> charts.Bar | None:
    throughput = interval(row.get("throughput_per_s"))
    if throughput is None:
        return None
    values = {name: clean(row.get(name, "?"), 8) for name in ("threads", "batch")}
    return charts.Bar(texts("sweep.point", **values), throughput, colour, shown(throughput, texts("interval"), "/s"))


def _sweep_row(row: Any, texts: Texts) -> list[str]:
    figures = [get(row, "latency_ms", "p50"), get(row, "latency_ms", "p90"), row.get("throughput_per_s")]
    cells = ["–" if (found := interval(x)) is None else shown(found, texts("interval")) for x in figures]
    flags = [clean(flag.get("flag", "?")) for flag in rows(row, "flags")]
    names = texts.listed([texts.known(f"flag.{flag}", flag) for flag in dict.fromkeys(flags)])
    return [clean(row.get("threads", "–"), 8), clean(row.get("batch", "–"), 8), *cells, names or "–"]


def others_section(page: Page, sources: Sequence[Source]) -> Section | None:
    """Figures with intervals in results whose make-up this page does not know; None where all was shown."""
    texts, blocks, used = page.texts, [], []  # type: tuple[Texts, list[Block], list[Source]]
    known = {side.source.sha256 for side in page.sides} | {found.source.sha256 for found in page.accuracies}
    for source in (source for source in sources if source.sha256 not in known):
        used.append(source)
        found = list(figures_in(source.result.statistics))
        what = f"{source.about} ({source.kind}, {machine_of(source.result)})"
        blocks.append(Note(what if found else f"{what}: {texts('others.nothing')}"))
        if found:
            cells = [
                [clean(" · ".join(path), 120), shown(value, texts("interval"))] for path, value in found[:MAX_ROWS]
            ]
            blocks.append(Table([texts("others.name"), texts("others.value")], cells))
        if len(found) > MAX_ROWS:
            blocks.append(Note(texts("others.more", count=len(found) - MAX_ROWS)))
    return Section("others", blocks, commands_of(used)) if used else None


def method_section(page: Page, sources: Sequence[Source]) -> Section:
    """Machine, software and way of measuring of every result, and its file's hash."""
    texts, blocks = page.texts, []  # type: tuple[Texts, list[Block]]
    for source in sources:
        sides = [side for side in page.sides if side.source is source]
        blocks.append(Table([source.about, source.kind], _about(source, sides, texts), words=True))
    return Section("method", blocks, commands_of(sources))


def _about(source: Source, sides: Sequence[Side], texts: Texts) -> list[list[str]]:
    result, table = source.result, []
    table.append([texts("method.created"), clean(result.created)])
    for subject in result.subjects[:12]:
        name = f"{texts('method.subject')}: {clean(subject.role or '?', 20)}"
        table.append([name, f"{clean(subject.path, 160)} · {clean(subject.sha256, 64)}"])
    for side in sides:
        for field, value in context(side):
            if value != "?":
                table.append([f"{texts(f'field.{field}')} · {side.role}", value])
    machine = result.machine
    table += [
        [texts(f"method.{key}"), _plain_text(machine[key])] for key in ("os", "kernel", "architecture", "cpu_model")
    ]
    packages = mapping(result.environment, "packages")
    table.append([texts("method.packages"), ", ".join(f"{clean(n, 30)} {_plain_text(v)}" for n, v in packages.items())])
    variables = mapping(result.environment, "variables")
    if variables:
        text = " ".join(f"{clean(n, 40)}={clean(v, 40)}" for n, v in variables.items())
        table.append([texts("method.variables"), text])
    table += [
        [texts(f"method.{name}"), clean(result.method[name], 300)]
        for name in ("scenario", "isolation", "metric", "queries", "gallery", "preprocessing")
        if isinstance(result.method.get(name), str)
    ]
    if source.kind in MEASURED and isinstance(result.method.get("rules"), Mapping):
        pairs = (f"{clean(n, 30)} {clean(v, 30)}" for n, v in result.method["rules"].items())
        table.append([texts("method.rules"), ", ".join(pairs)])
    return [*table, [texts("method.file"), source.sha256]]


def _plain_text(content: Any) -> str:
    return "–" if reason(content) else clean(content, 120)
