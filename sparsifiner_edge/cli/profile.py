"""`sparsifiner-edge profile`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from sparsifiner_edge.bounds import MOST_SECONDS
from sparsifiner_edge.cli import common
from sparsifiner_edge.records import MISSING, Unavailable
from sparsifiner_edge.results import Estimate
from sparsifiner_edge.text import shown

if TYPE_CHECKING:
    from sparsifiner_edge.profiles.figures import Figures, ProfileResult

Cell: TypeAlias = Estimate | float | Unavailable | None


@click.command()
@common.bundle_argument
@common.execution_options
@click.option("--against", type=common.PATH, help="Another bundle: measure the ratio of the two.")
@common.threads_option
@click.option("--seconds", type=common.FiniteRange(0, MOST_SECONDS, min_open=True),
              help="Minimum measuring time per bundle.  [default: 10]")  # fmt: skip
@click.option("--layers/--no-layers", "layers", default=None,
              help="Print the time of each kind of layer, which JSON always has; or time none.")  # fmt: skip
@common.json_option
@common.result_option
def command(
    *,
    bundle: Path,
    against: Path | None,
    layers: bool | None,
    as_json: bool,
    output: Path | None,
    **options: Any,
) -> None:
    """Measure latency, throughput, energy, memory and layers of BUNDLE, each bundle in a process of its own."""
    from sparsifiner_edge.profiles import profile_bundle

    with common.progress_bar("starting") as progress:
        result = profile_bundle(bundle, against=against, layers=layers is not False, progress=progress, **options)
    common.print_result(result, as_json, lambda found: _print(found, with_layers=bool(layers)), output)


def _print(result: ProfileResult, with_layers: bool) -> None:
    names = [Path(str(subject.path)).name for subject in result.subjects]
    figures = result.statistics.sides()
    rows = _rows(figures)
    described = [result.method.runtime[str(subject.role)] for subject in result.subjects]
    rows.append(["backend", *(f"{_text(found.backend)} {_text(found.version)}" for found in described)])
    for what in ("device", "kernels", "precision", "threads"):
        rows.append([what, *(_text(getattr(found, what)) for found in described)])
    common.print_table("Single stream, value (95 % interval)", ["", *names], rows)
    for name, figure in zip(names, figures, strict=True):
        if with_layers:
            _print_layers(name, figure)
        for remark in _remarks(figure):
            click.echo(f"{shown(name)}: {shown(remark, 2000)}")
    for problem in result.method.problems:
        click.echo(f"Sensor: {shown(problem, 2000)}.")
    if result.statistics.comparison is not None:
        click.echo(shown(result.statistics.comparison.sentence, 2000))


_ROWS: tuple[tuple[str, Callable[[Figures], Cell]], ...] = (
    ("latency p50, ms", lambda f: f.latency_ms.p50),
    ("latency p90, ms", lambda f: f.latency_ms.p90),
    ("latency p99, ms", lambda f: f.latency_ms.p99),
    ("throughput, queries/s", lambda f: f.throughput_per_s),
    ("queries measured", lambda f: f.queries),
    ("load, ms", lambda f: f.load_ms),
    ("first inference, ms", lambda f: f.first_inference_ms),
    ("peak memory of the process, MB", lambda f: _megabytes(f.peak_rss_bytes)),
    ("memory before loading, MB", lambda f: _megabytes(f.rss_before_load_bytes)),
    ("memory of the device, MB", lambda f: _megabytes(f.memory.device_bytes)),
    ("energy per inference, gross, J", lambda f: getattr(f.energy, "gross_j_per_inference", None)),
    ("energy per inference, net, J", lambda f: getattr(f.energy, "net_j_per_inference", None)),
    ("power while measuring, W", lambda f: getattr(f.energy, "mean_w", None)),
)


def _rows(figures: list[Figures]) -> list[list[str]]:
    """The rows that have something to show: no device's memory without a device, no energy without a sensor."""
    rows = [[label, *(_cell(read(figure)) for figure in figures)] for label, read in _ROWS]
    return [row for row in rows if set(row[1:]) != {"?"}]


def _remarks(figure: Figures) -> list[str]:
    remarks = [f"{flag.flag}: {flag.what}. {flag.do}" for flag in figure.flags]
    if isinstance(figure.energy, Unavailable):
        reason = figure.energy.why.partition(":")[0]
        remarks.append(f"energy {MISSING}: {reason} (--json tells what was looked for)")
    return remarks


def _print_layers(name: str, figure: Figures) -> None:
    from sparsifiner_edge.profiles.measure.layers import ms_by_kind

    rows, total, compared = figure.layers, figure.layers_total_ms, figure.layers_compared
    if isinstance(rows, Unavailable):
        click.echo(f"{shown(name)}: layers {MISSING}: {shown(rows.why, 2000)}")
    elif rows is not None and isinstance(total, float) and compared and not isinstance(compared, Unavailable):
        times = sorted(ms_by_kind(rows).items(), key=lambda item: -item[1])
        cells = [[kind, _cell(ms), f"{ms / total:.1%}" if total else "?"] for kind, ms in times]
        cells.append(["sum", _cell(total), f"{compared.total_over_latency:.0%} of the latency"])
        common.print_table(f"{name}: time by kind of layer", ["", "ms", "share"], cells)


def _megabytes(size: int | Unavailable) -> float | Unavailable:
    return size / 1e6 if isinstance(size, int) else size


def _cell(value: Cell) -> str:
    if isinstance(value, Estimate):
        return f"{_cell(value.value)} ({_cell(value.low)} to {_cell(value.high)})"
    if value is None or isinstance(value, Unavailable):
        return "?"
    if isinstance(value, int):
        return str(value)
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}" if value < 0.1 else f"{value:.3f}"


def _text(value: object) -> str:
    return "?" if isinstance(value, Unavailable) else str(value)
