"""`sparsifiner-edge profile`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from msgspec.structs import replace

from sparsifiner_edge.bounds import MOST_SECONDS
from sparsifiner_edge.cli import common
from sparsifiner_edge.execution import AUTO, PRECISIONS, Execution
from sparsifiner_edge.records import MISSING, Unavailable
from sparsifiner_edge.results import Quantity
from sparsifiner_edge.text import printable

if TYPE_CHECKING:
    from sparsifiner_edge.profiles.figures import Figures, ProfileResult
    from sparsifiner_edge.profiles.sensors.conditions import Observation

Cell: TypeAlias = Quantity | float | str | Unavailable | None


@click.command()
@common.bundle_argument
@common.execution_options
@click.option("--against", type=common.PATH, help="Another bundle: measure the ratio of the two.")
@click.option("--against-backend", help="What runs that, where it is not what runs BUNDLE.")
@click.option("--against-precision", type=click.Choice(PRECISIONS), help="What it computes in, likewise.")
@common.threads_option
@click.option("--seconds", type=common.FiniteRange(0, MOST_SECONDS, min_open=True),
              help="Minimum measuring time per bundle.  [default: 10]")  # fmt: skip
@common.json_option
@common.result_option
def command(
    *, bundle: Path, against_backend: str | None, against_precision: str | None, as_json: bool, output: Path | None,
    **options: Any,
) -> None:  # fmt: skip
    """Measure latency, throughput, energy, memory and layers of BUNDLE, each bundle in a process of its own."""
    import sparsifiner_edge as se

    groups = common.group(options, execution=se.Execution, options=se.ProfileOptions)
    other = _other(groups["execution"], against_backend, against_precision)
    with common.progress_bar("starting") as progress:
        result = se.profile_bundle(bundle, against_execution=other, progress=progress, **groups)
    common.print_result(result, as_json, _print, output)


def _other(execution: Execution, backend: str | None, precision: str | None) -> Execution | None:
    """What runs the other side, where anything is said of it: of another backend nothing else was asked for."""
    if backend is not None:
        return replace(execution, backend=backend, precision=precision or AUTO, provider="cpu")
    return None if precision is None else replace(execution, precision=precision)


def _print(result: ProfileResult) -> None:
    names = [Path(str(subject.path)).name for subject in result.subjects]
    figures, roles = result.statistics.sides(), [str(subject.role) for subject in result.subjects]
    rows = [[label, *(_cell(read(figure)) for figure in figures)] for label, read in _ROWS]
    rows += _layer_rows(figures)
    conditions = [result.method.conditions[role] for role in roles]
    rows += [[label, *(_cell(read(each)) for each in conditions)] for label, read in _CONDITIONS]
    rows.append(["governor", *[_cell(result.machine.governor)] * len(names)])
    described = [result.method.runtime[role] for role in roles]
    rows.append(["backend", *(f"{_cell(runtime.backend)} {_cell(runtime.version)}" for runtime in described)])
    for what in ("device", "kernels", "precision", "threads"):
        rows.append([what, *(_cell(getattr(runtime, what)) for runtime in described)])
    # No device memory without a device, no clock where none is reported.
    known = [row for row in rows if set(row[1:]) != {"?"}]
    common.print_table("Single stream, value (95 % interval)", ["", *names], known)
    for name, figure in zip(names, figures, strict=True):
        for remark in _remarks(figure):
            click.echo(f"{printable(name)}: {printable(remark, 2000)}")
    for name, runtime in zip(names, described, strict=True):
        if runtime.chosen is not None:
            click.echo(f"{printable(name)}: {printable(runtime.chosen, 2000)}")
    for problem in result.method.problems:
        click.echo(f"Sensor: {printable(problem, 2000)}.")
    if result.statistics.comparison is not None:
        click.echo(printable(result.statistics.comparison.sentence, 2000))


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
    ("memory of the device, MB", lambda f: _megabytes(f.device_bytes)),
    ("energy per inference, gross, J", lambda f: getattr(f.energy, "gross_j_per_inference", None)),
    ("energy per inference, net, J", lambda f: getattr(f.energy, "net_j_per_inference", None)),
    ("power while measuring, W", lambda f: getattr(f.energy, "mean_w", None)),
)
_CONDITIONS: tuple[tuple[str, Callable[[Observation], Cell]], ...] = (
    ("processor's clock, MHz", lambda conditions: _median(conditions, "cpu_mhz")),
    ("GPU's clock, MHz", lambda conditions: _median(conditions, "gpu_mhz")),
    ("power mode", lambda conditions: conditions.before.power_mode),
)


def _median(conditions: Observation, name: str) -> float | None:
    return statistics.median(conditions.during[name]) if name in conditions.during else None


def _layer_rows(figures: list[Figures]) -> list[list[str]]:
    """Milliseconds by kind of layer, and what share of all layers that is."""
    from sparsifiner_edge.profiles.measure.layers import LAYER_KINDS, ms_by_kind

    times = [ms_by_kind(figure.layers) if isinstance(figure.layers, list) else {} for figure in figures]
    rows = []
    for kind in LAYER_KINDS:
        cells = [f"{_cell(ms[kind])} ({ms[kind] / sum(ms.values()):.0%})" if ms.get(kind) else "?" for ms in times]
        rows.append([f"layers, {kind}, ms", *cells])
    return rows


def _remarks(figure: Figures) -> list[str]:
    remarks = [f"{flag.flag}: {flag.what}. {flag.do}" for flag in figure.flags]
    for what, value in (("layers", figure.layers), ("energy", figure.energy)):
        if isinstance(value, Unavailable):
            remarks.append(f"{what} {MISSING}: {value.why.partition(':')[0]} (--json tells all)")
    return remarks


def _megabytes(size: int | Unavailable) -> float | Unavailable:
    return size / 1e6 if isinstance(size, int) else size


def _cell(value: Cell) -> str:
    if isinstance(value, Quantity):
        return f"{_cell(value.value)} ({_cell(value.low)} to {_cell(value.high)})"
    if value is None or isinstance(value, Unavailable):
        return "?"
    if isinstance(value, int | str):
        return str(value)
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}" if value < 0.1 else f"{value:.3f}"
