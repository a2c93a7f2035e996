"""`sparsifiner-edge profile`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import click

from sparsifiner_edge.bounds import MOST_SECONDS, MOST_THREADS
from sparsifiner_edge.cli.common import FiniteRange, json_option, output_option, print_json, print_table, progress_bar
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.records import MISSING, Unavailable
from sparsifiner_edge.results import Estimate
from sparsifiner_edge.text import shown

if TYPE_CHECKING:
    from sparsifiner_edge.profiles.figures import Figures, ProfileResult
    from sparsifiner_edge.profiles.sweep import SweepResult

Value: TypeAlias = Estimate | float | Unavailable | None


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", default="onnxruntime", show_default=True, help="What runs the bundle.")
@click.option("--against", type=click.Path(path_type=Path), help="Another bundle: measure the ratio of the two.")
@click.option("--rules", default="quick", show_default=True,
              help="How long and how often: quick, or mlperf (single stream: 600 s or 24,576 queries).")  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), help="Threads; by default the cores this process may use."
)
@click.option("--kernels", default="auto", show_default=True,
              help="auto, native or portable: what runs the sparse operators.")  # fmt: skip
@click.option("--seconds", type=FiniteRange(0, MOST_SECONDS, min_open=True),
              help="Minimum measuring time per bundle, or per point of a sweep.  [default: 10; sweep: 3]")  # fmt: skip
@click.option("--layers/--no-layers", "layers", default=None,
              help="Print the time of each kind of layer, which JSON always has; or time none.")  # fmt: skip
@click.option("--sweep", "sweeps", multiple=True, metavar="AXIS=N,N,...",
              help="Measure at each of threads=1,2 or batch=1,2,4 instead; may be given for both.")  # fmt: skip
@json_option
@output_option("Also write the result, raw samples included, to this JSON file.", required=False)
def command(
    *,
    bundle: Path,
    backend: str,
    against: Path | None,
    rules: str,
    threads: int | None,
    kernels: str,
    seconds: float | None,
    layers: bool | None,
    sweeps: tuple[str, ...],
    as_json: bool,
    output: Path | None,
) -> None:
    """Measure latency, throughput, energy, memory and layers of BUNDLE, each bundle in a process of its own."""
    from sparsifiner_edge.profiles import parse_axes, profile_bundle, sweep_bundle
    from sparsifiner_edge.profiles.sweep import SweepResult
    from sparsifiner_edge.records import write_record
    from sparsifiner_edge.results import write_result

    if output is not None and output.is_dir():
        raise click.BadParameter(f"{output} is a folder; give a file's name.", param_hint="--output")
    result: ProfileResult | SweepResult
    if sweeps:
        _refuse_with_sweep(against, rules, layers)
        axes = parse_axes(sweeps)
        with progress_bar("starting") as progress:
            result = sweep_bundle(
                bundle, axes, backend, threads=threads, kernels=kernels, seconds=seconds, progress=progress
            )
    else:
        if rules == "mlperf" and seconds is not None:
            raise ConfigError("--seconds cannot be combined with --rules mlperf.", "Those rules fix how long it lasts.")
        with progress_bar("starting") as progress:
            result = profile_bundle(
                bundle,
                backend,
                against=against,
                rules=rules,
                threads=threads,
                kernels=kernels,
                seconds=seconds,
                layers=layers is not False,
                progress=progress,
            )
    if as_json:
        print_json(write_record(result))
    elif isinstance(result, SweepResult):
        _print_sweep(result)
    else:
        _print(result, with_layers=bool(layers))
    if output is not None:  # Last: a full disk should not cost the reader the figures.
        write_result(output, result)


def _refuse_with_sweep(against: Path | None, rules: str, layers: bool | None) -> None:
    for given, name in ((against is not None, "--against"), (rules != "quick", "--rules"), (bool(layers), "--layers")):
        if given:
            raise ConfigError(f"{name} cannot be combined with --sweep.", "Run profile without the sweep for it.")


def _print(result: ProfileResult, with_layers: bool) -> None:
    names = [Path(str(subject.path)).name for subject in result.subjects]
    figures = result.statistics.sides()
    rows = [[label, *map(_cell, values)] for label, values in _rows(figures)]
    described = [result.method.runtime[str(subject.role)] for subject in result.subjects]
    rows.append(["backend", *(f"{_text(found.backend)} {_text(found.version)}" for found in described)])
    for what in ("device", "kernels", "precision", "threads"):
        rows.append([what, *(_text(getattr(found, what)) for found in described)])
    print_table("Single stream, value (95 % interval)", ["", *names], rows)
    for name, figure in zip(names, figures, strict=True):
        if with_layers:
            _print_layers(name, figure)
        for remark in _remarks(figure):
            click.echo(f"{shown(name)}: {shown(remark, 2000)}")
    for problem in result.method.problems:
        click.echo(f"Sensor: {shown(problem, 2000)}.")
    if result.statistics.comparison is not None:
        click.echo(shown(result.statistics.comparison.sentence, 2000))


def _rows(figures: list[Figures]) -> list[tuple[str, list[Value]]]:
    """The rows that have something to show: no device's memory without a device, no energy without a sensor."""

    def row(label: str, read: Callable[[Figures], Value]) -> tuple[str, list[Value]]:
        return label, [read(figure) for figure in figures]

    rows = [
        row("latency p50, ms", lambda f: f.latency_ms.p50),
        row("latency p90, ms", lambda f: f.latency_ms.p90),
        row("latency p99, ms", lambda f: f.latency_ms.p99),
        row("throughput, queries/s", lambda f: f.throughput_per_s),
        row("queries measured", lambda f: f.queries),
        row("load, ms", lambda f: f.load_ms),
        row("first inference, ms", lambda f: f.first_inference_ms),
        row("peak memory of the process, MB", lambda f: _megabytes(f.peak_rss_bytes)),
        row("memory before loading, MB", lambda f: _megabytes(f.rss_before_load_bytes)),
    ]
    if all(figure.mlperf for figure in figures):
        rows.insert(2, row("p90 by early stopping, ms", lambda f: f.mlperf.early_stopping_p90_ms if f.mlperf else None))
    if any(isinstance(figure.memory.device_bytes, int) for figure in figures):
        rows.append(row("memory of the device, MB", lambda f: _megabytes(f.memory.device_bytes)))
    for label, name in _ENERGY if any(not isinstance(figure.energy, Unavailable) for figure in figures) else ():
        rows.append((label, [getattr(figure.energy, name, None) for figure in figures]))
    return rows


_ENERGY = (
    ("energy per inference, gross, J", "gross_j_per_inference"),
    ("energy per inference, net, J", "net_j_per_inference"),
    ("power while measuring, W", "mean_w"),
)


def _remarks(figure: Figures) -> list[str]:
    remarks = [f"{flag.flag}: {flag.what}. {flag.do}" for flag in figure.flags]
    if isinstance(figure.energy, Unavailable):
        reason = figure.energy.why.partition(":")[0]
        remarks.append(f"energy {MISSING}: {reason} (--json tells what was looked for)")
    if figure.mlperf is not None:
        remarks.append(f"mlperf: {'valid' if figure.mlperf.valid else 'INVALID'}, {figure.mlperf.why}")
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
        print_table(f"{name}: time by kind of layer", ["", "ms", "share"], cells)


def _print_sweep(result: SweepResult) -> None:
    name = Path(str(result.subjects[0].path)).name
    rows = []
    for point in result.statistics.sweep:
        marks = ", ".join(dict.fromkeys(flag.flag for flag in point.flags))
        cells = [_cell(point.latency_ms.p50), _cell(point.throughput_per_s), marks]
        rows.append([f"{point.threads} x {point.batch}", *cells])
    columns = ["threads x batch", "latency p50 of a batch, ms", "images/s", "flags"]
    print_table(f"{name}, value (95 % interval)", columns, rows)


def _megabytes(size: int | Unavailable) -> float | Unavailable:
    return size / 1e6 if isinstance(size, int) else size


def _cell(value: Value) -> str:
    if isinstance(value, Estimate):
        return f"{_cell(value.value)} ({_cell(value.low)} to {_cell(value.high)})"
    if value is None or isinstance(value, Unavailable):
        return "?"
    if isinstance(value, int):
        return str(value)
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}" if value < 0.1 else f"{value:.3f}"


def _text(value: object) -> str:
    return "?" if isinstance(value, Unavailable) else str(value)
