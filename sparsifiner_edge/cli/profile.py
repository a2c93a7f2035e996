"""`sparsifiner-edge profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sparsifiner_edge.bounds import MOST_SECONDS, MOST_THREADS
from sparsifiner_edge.cli.common import FiniteRange, json_option, output_option, print_json, print_table, progress_bar
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.text import shown


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
              help="Least time measured per bundle, or per point of a sweep.  [default: 10, in a sweep 3]")  # fmt: skip
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
    from sparsifiner_edge.results import write_result

    if output is not None and output.is_dir():
        raise click.BadParameter(f"{output} is a folder; give a file's name.", param_hint="--output")
    common: dict[str, Any] = {"threads": threads, "kernels": kernels, "seconds": seconds}
    if sweeps:
        _refuse_with_sweep(against, rules, layers)
        axes = parse_axes(sweeps)
        with progress_bar("starting") as progress:
            result = sweep_bundle(bundle, axes, backend, **common, progress=progress)
    else:
        if rules == "mlperf" and seconds is not None:
            raise ConfigError("--seconds does not go with --rules mlperf.", "Those rules fix how long it lasts.")
        extra: dict[str, Any] = {"against": against, "rules": rules, "layers": layers is not False}
        with progress_bar("starting") as progress:
            result = profile_bundle(bundle, backend, **common, **extra, progress=progress)
    if as_json:
        print_json(result)
    elif sweeps:
        _print_sweep(result)
    else:
        _print(result, with_layers=bool(layers))
    if output is not None:  # Last: a full disk should not cost the reader the figures.
        write_result(output, result)


def _refuse_with_sweep(against: Path | None, rules: str, layers: bool | None) -> None:
    for given, name in ((against is not None, "--against"), (rules != "quick", "--rules"), (bool(layers), "--layers")):
        if given:
            raise ConfigError(f"{name} does not go with --sweep.", "Run profile without the sweep for it.")


def _print(result: dict[str, Any], with_layers: bool) -> None:
    roles = [subject["role"] for subject in result["subjects"]]
    names = [Path(subject["path"]).name for subject in result["subjects"]]
    figures = [result["statistics"][role] for role in roles]
    rows = [[label, *(_cell(figure, *path) for figure in figures)] for label, path in _rows(figures)]
    described = [result["method"]["runtime"][role] for role in roles]
    for what in ("backend", "device", "kernels", "precision", "threads"):
        rows.append([what, *(_described(description, what) for description in described)])
    print_table("Single stream, value (95 % interval)", ["", *names], rows)
    for name, figure in zip(names, figures, strict=True):
        if with_layers:
            _print_layers(name, figure)
        for remark in _remarks(figure):
            click.echo(f"{shown(name)}: {shown(remark, 2000)}")
    for problem in result["method"]["problems"]:
        click.echo(f"Sensor: {shown(problem, 2000)}.")
    if "comparison" in result["statistics"]:
        click.echo(shown(result["statistics"]["comparison"]["sentence"], 2000))


_Row = tuple[str, tuple[str, ...]]
_ROWS: list[_Row] = [
    ("latency p50, ms", ("latency_ms", "p50")),
    ("latency p90, ms", ("latency_ms", "p90")),
    ("latency p99, ms", ("latency_ms", "p99")),
    ("throughput, queries/s", ("throughput_per_s",)),
    ("queries measured", ("queries",)),
    ("load, ms", ("load_ms",)),
    ("first inference, ms", ("first_inference_ms",)),
    ("peak memory of the process, MB", ("peak_rss_bytes",)),
    ("memory before loading, MB", ("rss_before_load_bytes",)),
]
_MLPERF_ROW: _Row = ("p90 by early stopping, ms", ("mlperf", "early_stopping_p90_ms"))
_DEVICE_ROW: _Row = ("memory of the device, MB", ("memory", "device_bytes"))
_ENERGY_ROWS: list[_Row] = [
    ("energy per inference, gross, J", ("energy", "gross_j_per_inference")),
    ("energy per inference, net, J", ("energy", "net_j_per_inference")),
    ("power while measuring, W", ("energy", "mean_w")),
]


def _rows(figures: list[dict[str, Any]]) -> list[_Row]:
    """The rows that have something to show: no device's memory without a device, no energy without a sensor."""
    rows = list(_ROWS)
    if all("mlperf" in figure for figure in figures):
        rows.insert(2, _MLPERF_ROW)
    if any(isinstance(figure["memory"]["device_bytes"], int) for figure in figures):
        rows.append(_DEVICE_ROW)
    return rows + (_ENERGY_ROWS if any("unavailable" not in figure["energy"] for figure in figures) else [])


def _remarks(figure: dict[str, Any]) -> list[str]:
    remarks = [f"{flag['flag']}: {flag['what']}. {flag['do']}" for flag in figure["flags"]]
    if "unavailable" in figure["energy"]:
        reason = figure["energy"]["unavailable"].partition(":")[0]
        remarks.append(f"energy unavailable: {reason} (--json tells what was looked for)")
    if "mlperf" in figure:
        remarks.append(f"mlperf: {'valid' if figure['mlperf']['valid'] else 'INVALID'}, {figure['mlperf']['why']}")
    return remarks


def _print_layers(name: str, figure: dict[str, Any]) -> None:
    from sparsifiner_edge.profiles.kinds import by_kind

    if isinstance(figure["layers"], dict):
        click.echo(f"{shown(name)}: layers unavailable: {shown(figure['layers']['unavailable'], 2000)}")
        return
    total, compared = figure["layers_total_ms"], figure["layers_compared"]
    times = sorted(by_kind(figure["layers"]).items(), key=lambda item: -item[1])
    rows = [[kind, _number(ms), f"{ms / total:.1%}" if total else "?"] for kind, ms in times]
    rows.append(["sum", _number(total), f"{compared['total_over_latency']:.0%} of the latency"])
    print_table(f"{name}: time by kind of layer", ["", "ms", "share"], rows)


def _print_sweep(result: dict[str, Any]) -> None:
    name = Path(result["subjects"][0]["path"]).name
    rows = []
    for point in result["statistics"]["sweep"]:
        marks = ", ".join(dict.fromkeys(flag["flag"] for flag in point["flags"]))
        cells = [_cell(point, "latency_ms", "p50"), _cell(point, "throughput_per_s"), marks]
        rows.append([f"{point['threads']} x {point['batch']}", *cells])
    columns = ["threads x batch", "latency p50 of a batch, ms", "images/s", "flags"]
    print_table(f"{name}, value (95 % interval)", columns, rows)


def _cell(figure: dict[str, Any], *path: str) -> str:
    value: Any = figure
    for name in path:
        value = value.get(name, {}) if isinstance(value, dict) else {}
    if isinstance(value, dict) and "value" in value:
        return f"{_number(value['value'])} ({_number(value['low'])} to {_number(value['high'])})"
    return _number(value / 1e6 if path[-1].endswith("_bytes") and isinstance(value, int) else value)


def _number(value: Any) -> str:
    if isinstance(value, dict):
        return "?"
    if isinstance(value, int):
        return str(value)
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}" if value < 0.1 else f"{value:.3f}"


def _described(description: dict[str, Any], what: str) -> str:
    if isinstance(description[what], dict):
        return "?"
    text = str(description[what])
    return f"{text} {description['version']}" if what == "backend" else text
