"""The sections behind the figures: what was sparse, costs, estimates, other figures, method and machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sparsifiner_edge.bounds import finite_number
from sparsifiner_edge.bundle.manifest import Manifest
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.report import charts
from sparsifiner_edge.report.blocks import Block, Note, Picture, Section, Table
from sparsifiner_edge.report.conditions import ReportData, board_of, conditions_of
from sparsifiner_edge.report.result_files import MEASURED_KINDS, LabelledManifest, ResultFile, ResultSide
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import Interval, clean, get, interval, mapping, number, plain, reason

MAX_ROWS, MAX_BARS = 200, 24
_MILLION, _MOST_PRICE = 1e6, 1e12
_JOULES_PER_KWH, _MS_PER_HOUR = 3.6e6, 3.6e6


class Prices(NamedTuple):
    """What a kilowatt-hour and an hour of the device cost, None where not given; `currency`: as printed."""

    kwh: float | None = None
    device_hour: float | None = None
    currency: str = ""

    def checked(self) -> Prices:
        """The same.

        Raises:
            ConfigError: a price is negative, NaN or infinite, or a currency is without a price, or long.
        """
        for name, price in (("price-kwh", self.kwh), ("price-device-hour", self.device_hour)):
            if price is not None:
                finite_number(price, name, 0.0, _MOST_PRICE)
        if len(self.currency) > 12:
            raise ConfigError(f"currency is {self.currency!r}.", "Give a code or sign of at most 12 characters.")
        if self.currency and self.kwh is None and self.device_hour is None:
            raise ConfigError("There is a currency but no price.", "Give --price-kwh or --price-device-hour.")
        return self


_OF = ("subject", "teacher", "lost")


def task_section(data: ReportData, pictures: Sequence[Picture]) -> Section:
    """How models did their own task, and pictures of it."""
    texts, blocks = data.texts, list(pictures)  # type: tuple[Texts, list[Block]]
    files = data.task_files
    for file in files:
        method, table = file.result.method, []
        for name, found in list(file.result.statistics.items())[:MAX_ROWS]:
            of, _, figure = name.partition("_") if name.partition("_")[0] in _OF else ("", "", name)
            told = texts.known(f"task.{figure}", clean(figure, 40))
            count = number(get(found, "images"))
            table.append([
                f"{texts(f'task.{of}')}: {told}" if of else told, texts.figure(interval(found, "mean"), digits=4),
                "–" if count is None else str(int(count)),
            ])  # fmt: skip
        blocks.append(Note(f"{file.name}: {clean(method.get('output') or method.get('task', '?'), 80)}"))
        blocks.append(Table(texts.heads("task", ("figure", "value", "images")), table))
    return Section("task", blocks, files)


def sparsity_section(data: ReportData, manifests: Sequence[LabelledManifest]) -> Section:
    """Settings, the computation that is left, and the layers that were kept dense by measurement."""
    texts, blocks = data.texts, []  # type: tuple[Texts, list[Block]]
    if manifests:
        blocks += [_settings_table(manifests, texts), Note(texts("sparsity.computed"))]
        choices = [row for manifest in manifests for row in _choices(manifest, texts)]
        if choices:
            head = texts.heads("sparsity", ("model", "layers", "sparse_ms", "dense_ms", "decision"))
            blocks.append(Table(head, choices))
    known = {manifest.sha for manifest in manifests}
    away = list(dict.fromkeys(side.bundle_name for side in data.sides if side.sha not in known))
    if away or not manifests:
        text = f"{texts.listed(away) or '–'}: {texts('sparsity.away')}"
        blocks.append(Note(text, True, "sparsifiner-edge report RESULT.json --bundle BUNDLE/"))
    return Section("sparsity", blocks)


_SETTINGS = (
    "preset", "keep", "tile", "probe", "channels", "cells", "token_keep",
    "merged",
)  # fmt: skip


def _settings_table(manifests: Sequence[LabelledManifest], texts: Texts) -> Table:
    kinds = [texts("sparsity.sparse" if m.manifest.sparsity else "sparsity.plain") for m in manifests]
    precisions = [clean(m.manifest.precision or "?") for m in manifests]
    table = [[texts("sparsity.attention"), *kinds], [texts("field.precision"), *precisions]]
    for name in _SETTINGS:
        cells = [_setting(one.manifest, name, texts) for one in manifests]
        if any(cell != "–" for cell in cells):
            table.append([texts(f"sparsity.{name}"), *cells])
    table.append([texts("sparsity.macs"), *(_macs(one.manifest) for one in manifests)])
    return Table([texts("sparsity.setting"), *(manifest.label for manifest in manifests)], table)


def _setting(manifest: Manifest, name: str, texts: Texts) -> str:
    value: Any = manifest.sparsity.to_dict().get(name) if manifest.sparsity else None
    if name == "merged":
        value = list(manifest.plan.merge) if manifest.plan and any(manifest.plan.merge) else None
    if name == "keep" and value is not None:
        return texts.listed([f"{100 * share:.3g} %" for share in (value if isinstance(value, list) else [value])])
    if name == "token_keep" and value is not None:
        return texts.listed([f"{layer}: {100 * share:.3g} %" for layer, share in value]) or texts("none")
    if isinstance(value, list):
        return ", ".join(clean(item, 8) for item in value) or texts("none")
    if isinstance(value, bool):
        return texts("yes" if value else "no")
    return "–" if value is None else clean(value, 40)


def _macs(manifest: Manifest) -> str:
    """Millions of multiply-accumulates per image, and their share of the dense model's."""
    macs, dense = (number(costs.get("total_macs")) for costs in (manifest.costs, manifest.dense_costs))
    share = f" ({100 * macs / dense:.0f} %)" if macs and dense else ""
    return f"{plain(macs / 1e6)}{share}" if macs else "–"


def _choices(side: LabelledManifest, texts: Texts) -> list[list[str]]:
    found = []
    for choice in side.manifest.measured.choices if side.manifest.measured else ():
        names = ", ".join(clean(layer, 6) for layer in choice.layers) or "?"
        times = [number(milliseconds) for milliseconds in (choice.sparse_ms, choice.dense_ms)]
        decision = texts("sparsity.kept_dense" if choice.kept_dense else "sparsity.stays_sparse")
        found.append([side.label, names, *("?" if t is None else plain(t) for t in times), decision])
    return found


def cost_section(data: ReportData, prices: Prices) -> Section:
    """What a million inferences cost, from the prices given."""
    texts = data.texts
    if prices.kwh is None and prices.device_hour is None:
        command = "sparsifiner-edge report RESULT.json --price-kwh 0.30 --currency EUR"
        return Section("cost", [Note(texts("cost.none"), True, command)])
    table, money = [], prices.currency or texts("cost.units")
    for side in data.sides:
        # Gross energy is what the meter counts; one inference after another, at the mean latency.
        joules = side.figure("energy_j") if side.estimated else side.figure("energy", "gross_j_per_inference")
        latency = side.figure("latency_ms") if side.estimated else side.figure("latency_ms", "mean")
        label = side.label + (f" ({texts('estimate.mark')})" if side.estimated else "")
        energy, hours = joules and joules.times(1 / _JOULES_PER_KWH), latency and latency.times(1 / _MS_PER_HOUR)
        table.append([label, _price(energy, prices.kwh, texts), _price(hours, prices.device_hour, texts)])
    named = ((texts("cost.kwh"), prices.kwh), (texts("cost.device_hour"), prices.device_hour))
    given = [f"{name}: {price:g} {money}" for name, price in named if price is not None]
    head = [texts("cost.model"), texts("cost.energy", money=money), texts("cost.device", money=money)]
    note = Note(texts("cost.prices", prices=texts.listed(given)))
    return Section("cost", [Table(head, table), note], [side.file for side in data.sides])


def _price(amount: Interval | None, price: float | None, texts: Texts) -> str:
    """Of a million times an amount."""
    if price is None:
        return texts("cost.no_price")
    if amount is None:
        return texts("cost.no_amount")
    return texts.figure(amount.times(_MILLION).times(price)) if price else "0"


def estimate_section(data: ReportData) -> Section:
    """What was computed for boards that were not available."""
    texts, bars, table = data.texts, [], []
    sides = [side for side in data.sides if side.estimated]
    for index, side in enumerate(sides):
        latency, memory, energy = (side.figure(name) for name in ("latency_ms", "memory_bytes", "energy_j"))
        if latency is not None:
            label = f"{side.label} · {board_of(side)}"
            bars.append(charts.Bar(label, latency, index, texts.figure(latency, "ms"), hollow=True))
        figures = [latency, memory and memory.times(1e-6), energy and energy.times(1e3)]
        fits = texts.known(f"fits.{side.figures.get('fits_memory')}", "–")
        table.append([side.label, board_of(side), *map(texts.figure, figures), fits])
    blocks: list[Block] = [Note(texts("estimate.warning"))]
    if bars:
        blocks.append(charts.bar_chart("estimate", texts("estimate.chart"), bars, texts))
    blocks.append(Table(texts.heads("estimate", ("model", "board", "latency", "memory", "energy", "fits")), table))
    methods = dict.fromkeys(clean(get(side.figures, "latency_ms", "method") or "", 400) for side in sides)
    blocks += [Note(texts("estimate.method", method=method)) for method in methods if method]
    return Section("estimate", blocks if sides else [], [side.file for side in sides])


def method_section(data: ReportData) -> Section:
    """Machine, software and way of measuring of every result, and its file's hash."""
    texts, blocks = data.texts, []  # type: tuple[Texts, list[Block]]
    for file in data.files:
        sides = [side for side in data.sides if side.file is file]
        blocks.append(Table([file.name, file.result.kind], _method_rows(file, sides, texts), words=True))
        elsewhere = [*data.task_files, *data.search_files, *(found.file for found in data.accuracies)]
        if not sides and not any(found is file for found in elsewhere):
            blocks.append(Note(f"{file.name}: {texts('method.not_shown')}", True))
    return Section("method", blocks, data.files)


_MACHINE = ("os", "kernel", "architecture", "cpu_model")
_METHOD = ("scenario", "isolation", "metric", "queries", "gallery", "preprocessing")


def _method_rows(file: ResultFile, sides: Sequence[ResultSide], texts: Texts) -> list[list[str]]:
    result, method = file.result, file.result.method
    table = [[texts("method.created"), clean(result.created)]]
    for subject in result.subjects[:12]:
        name = f"{texts('method.subject')}: {clean(subject.role or '?', 20)}"
        table.append([name, f"{clean(subject.path, 160)} · {clean(subject.sha256, 64)}"])
    for side in sides:
        conditions = [(field, value) for field, value in conditions_of(side) if value != "?"]
        table += [[f"{texts(f'field.{field}')} · {side.role}", value] for field, value in conditions]
    table += [[texts(f"method.{name}"), _plain_text(result.machine[name])] for name in _MACHINE]
    table.append([texts("method.packages"), _pairs(result.environment, "packages", " ", ", ")])
    variables = _pairs(result.environment, "variables", "=", " ")
    table += [[texts("method.variables"), variables]] if variables else []
    stated = [name for name in _METHOD if isinstance(method.get(name), str)]
    table += [[texts(f"method.{name}"), clean(method[name], 300)] for name in stated]
    if result.kind in MEASURED_KINDS and isinstance(method.get("rules"), Mapping):
        table.append([texts("method.rules"), _pairs(method, "rules", " ", ", ")])
    return [*table, [texts("method.file"), file.sha256]]


def _pairs(content: Any, name: str, between: str, separator: str) -> str:
    pairs = mapping(content, name).items()
    return separator.join(f"{clean(key, 40)}{between}{_plain_text(value)}" for key, value in pairs)


def _plain_text(content: Any) -> str:
    return "–" if reason(content) else clean(content, 120)
