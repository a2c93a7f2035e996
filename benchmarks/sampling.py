"""What reading sensors beside a measurement costs it: one worker, the recorder on and off in turn.

    python benchmarks/sampling.py [BUNDLE] [--sensor auto|files] [--rounds 30] [-o result.json]

Without BUNDLE, a dense DINOv2 ViT-S/14 at 224 px is exported first. `--sensor auto` takes the machine's own; `files`
a made-up INA3221 in a temporary folder: thread, files and looks at clocks as on a board, without the bus behind them.
Each round holds a block of either kind in an order drawn anew; the ratio is that of their medians, its interval from
order statistics over rounds.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors.numpy
from msgspec import to_builtins
from msgspec.structs import replace
from summary import write_summary

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.cli.common import err_console, output_option, print_table
from sparsifiner_edge.demo import material
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.profiles.measure.side import start_worker
from sparsifiner_edge.profiles.measure.worker import Load, Loaded, QueryBlock
from sparsifiner_edge.profiles.sensors import PowerSensor, Recorder, find_sensor
from sparsifiner_edge.results import Result
from sparsifiner_edge.runtime.child import Child

_LIMIT = 1.01
_TIMEOUT_S = 900.0
_LOOK_S = 0.25  # As often as `profile` looks at clocks in its shortest measurements.
_INA3221 = Path("sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1")
_RAILS = {"VDD_IN": (5040, 1132), "VDD_CPU_GPU_CV": (5040, 165), "VDD_SOC": (5040, 322)}
Blocks = dict[str, list[np.ndarray[Any, Any]]]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--sensor", type=click.Choice(["auto", "files"]), default="auto", show_default=True)
@click.option("--rounds", default=30, show_default=True)
@click.option("--block-seconds", default=1.0, show_default=True)
@click.option("--threads", type=int, help="By default all cores that this process may use.")
@output_option("Result JSON to write.", required=False)
def main(
    bundle: Path | None, sensor: str, rounds: int, block_seconds: float, threads: int | None, output: Path | None
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = _made_up(folder / "root") if sensor == "files" else Path("/")
        found = find_sensor(root)
        if not found.available:
            raise click.ClickException(f"{found.total}. Take --sensor files.")
        with err_console.status("exporting"):
            subject = bundle or _dense(folder)
        described = replace(open_bundle(subject).subject(), path=subject.name)
        with start_worker() as worker, err_console.status("measuring") as status:
            block = _ready(worker, subject, threads, block_seconds)
            blocks = _in_turn(block, root, rounds, status.update)
    figures = _figures(blocks)
    print_table("Latency with and without the recorder", ["", "p50 ms"], _rows(figures))
    click.echo(figures["sentence"])
    if output:
        method = {"sensor": found.describe(), "rounds": rounds, "block_seconds": block_seconds, "look_s": _LOOK_S}
        samples = {name: {"latency_ms": [b.tolist() for b in rows]} for name, rows in blocks.items()}
        write_summary(output, Result("comparison", [described], method, samples, figures))


def _made_up(root: Path) -> Path:
    for channel, (rail, (millivolts, milliamperes)) in enumerate(_RAILS.items(), 1):
        for name, value in (
            (f"in{channel}_label", rail),
            (f"in{channel}_input", millivolts),
            (f"curr{channel}_input", milliamperes),
        ):
            path = root / _INA3221 / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n", encoding="ascii")
    return root


def _dense(folder: Path) -> Path:
    weights = folder / "dinov2.safetensors"
    safetensors.numpy.save_file(material.dinov2_state(), weights)
    return export_bundle(material.DINOV2, folder / "dense", weights=weights, img_size=224)


def _ready(worker: Child, bundle: Path, threads: int | None, seconds: float) -> Callable[[], np.ndarray[Any, Any]]:
    """Load and warm up; what it returns measures a block of about so many seconds."""
    request = Load(bundle=str(bundle.resolve()), execution=Execution(threads=threads))
    worker.ask("load", _TIMEOUT_S, Loaded, **to_builtins(request))
    worker.ask("first", _TIMEOUT_S, float)
    query_ms = float(np.median(worker.ask("block", _TIMEOUT_S, QueryBlock, queries=10, rewarm=10).latency_ms))
    queries = max(5, round(seconds * 1000 / query_ms))
    return lambda: np.array(worker.ask("block", _TIMEOUT_S, QueryBlock, queries=queries, rewarm=2).latency_ms)


def _in_turn(
    block: Callable[[], np.ndarray[Any, Any]], root: Path, rounds: int, tell: Callable[[str], object]
) -> Blocks:
    blocks: Blocks = {"off": [], "on": []}
    draw = random.Random(0)
    for number in range(rounds):
        order = list(blocks)
        draw.shuffle(order)
        for name in order:
            tell(f"round {number + 1} of {rounds}: {name}")
            with _recording(find_sensor(root), root) if name == "on" else contextlib.nullcontext():
                blocks[name].append(block())
    return blocks


@contextlib.contextmanager
def _recording(sensor: PowerSensor, root: Path) -> Iterator[None]:
    with Recorder(sensor, root, conditions_period_s=_LOOK_S) as recorder:
        yield
    if not recorder.recording.readings:
        raise click.ClickException(f"{sensor.name} gave no reading: {'; '.join(recorder.recording.told())}")


def _figures(blocks: Blocks) -> dict[str, Any]:
    ratios = stats.round_ratios(blocks["off"], blocks["on"])
    low, high = stats.quantile_interval(ratios, 0.5)
    ratio = float(np.median(ratios))
    shown = "too few rounds to say" if low is None or high is None else f"95 % interval {low:.4f} to {high:.4f}"
    verdict = "within 1 %" if high is not None and high <= _LIMIT else "not shown to be within 1 %"
    return {
        "ratio": stats.estimate(ratio, low, high, "order statistics of paired rounds, effective sample size"),
        "p50_ms": {name: float(np.median(np.concatenate(rows))) for name, rows in blocks.items()},
        "sentence": f"Sampling multiplies the latency by {ratio:.4f} ({shown}): {verdict}.",
    }


def _rows(figures: dict[str, Any]) -> list[list[str]]:
    return [[f"recorder {name}", f"{ms:.3f}"] for name, ms in figures["p50_ms"].items()]


if __name__ == "__main__":
    main()
