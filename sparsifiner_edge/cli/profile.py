"""`sparsifiner-edge profile`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from sparsifiner_edge.cli.common import json_option, output_option, print_json, print_table, progress


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", default="onnxruntime", show_default=True, help="What runs the bundle.")
@click.option("--against", type=click.Path(path_type=Path), help="Another bundle: measure the ratio of the two.")
@click.option("--rules", default="quick", show_default=True, help="How long and how often: quick.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; by default the cores this process may use.")
@click.option("--kernels", default="auto", show_default=True,
              help="auto, native or portable: what runs the sparse operators.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=10.0, show_default=True,
              help="Least time measured per bundle.")  # fmt: skip
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
    seconds: float,
    as_json: bool,
    output: Path | None,
) -> None:
    """Measure latency, throughput, load time and memory of BUNDLE, each bundle in a process of its own."""
    from sparsifiner_edge.profiles import profile_bundle
    from sparsifiner_edge.results import write_result

    if output is not None and output.is_dir():
        raise click.BadParameter(f"{output} is a folder; give a file's name.", param_hint="--output")
    with progress() as bar:
        task = bar.add_task("starting", total=None)

        def show(stage: str, done: float, planned: float) -> None:
            bar.update(task, description=stage, completed=int(done), total=max(1, int(planned)))

        result = profile_bundle(
            bundle,
            backend,
            against=against,
            rules=rules,
            threads=threads,
            kernels=kernels,
            seconds=seconds,
            progress=show,
        )
    if as_json:
        print_json(result)
    else:
        _print(result)
    if output is not None:  # Last: a full disk should not cost the reader the figures.
        write_result(output, result)


def _print(result: dict[str, Any]) -> None:
    roles = [subject["role"] for subject in result["subjects"]]
    names = [Path(subject["path"]).name for subject in result["subjects"]]
    figures = [result["statistics"][role] for role in roles]
    rows = [[label, *(_cell(figure, *path) for figure in figures)] for label, path in _ROWS]
    described = [result["method"]["runtime"][role] for role in roles]
    for what in ("backend", "device", "kernels", "precision", "threads"):
        rows.append([what, *(_described(description, what) for description in described)])
    print_table("Single stream, value (95 % interval)", ["", *map(escape, names)], rows)
    for role, name in zip(roles, names, strict=True):
        if not result["method"]["warm_up"][role]["settled"]:
            click.echo(f"{name}: latency did not settle in warm-up; the machine is busy or its clock varies.")
    if "cut_short" in result["method"]:
        click.echo(f"Cut short: {result['method']['cut_short']}.")
    if "comparison" in result["statistics"]:
        click.echo(result["statistics"]["comparison"]["sentence"])


_ROWS: list[tuple[str, tuple[str, ...]]] = [
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


def _cell(figure: dict[str, Any], *path: str) -> str:
    value: Any = figure
    for name in path:
        value = value[name]
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
    text = str(description[what])
    return f"{text} {description['version']}" if what == "backend" else text
