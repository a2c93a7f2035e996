"""Fits the constants of the estimate and measures its errors, from published and recorded figures.

    python benchmarks/estimate.py [-o FOLDER] [--threads N]

GPU: the four constants are fitted to `published_latency.toml`, first with all boards, then without each board and
without each chip (the two settings of one Orin Nano together) to predict the one left out. CPU: fitted to the models
that `model_cpu.py` recorded, with the matrix-product rate that `attention_cpu.py` recorded on the same machine.
`profiles/roofline.py` holds the constants that this prints. For a board file of your own, it prints the peak (a matrix
product) and the bandwidth (a triad) of this machine.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import estimate_fit as fitting
import numpy as np
from cpu_engines import gemm_peak, time_in_turn
from estimate_fit import HERE, PUBLISHED, Point, Values
from summary import RESULTS, write_summary

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import print_table
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.profiles.roofline import CPU_FIT
from sparsifiner_edge.results import Result, Subject

ROUNDS, BURST = 5, 3


def this_machine(threads: int) -> Values:
    """Return TFLOPS of a matrix product and GB/s of a triad, medians of alternating rounds."""
    (multiply, gflop), size = gemm_peak(threads), 1 << 24
    arrays = [[np.ones(size // threads, np.float32) for _ in range(3)] for _ in range(threads)]
    times = time_in_turn({"gemm": multiply, "triad": lambda: _triad(arrays)}, ROUNDS, BURST, lambda _: None)
    product_ms, triad_ms = (float(np.median(x)) for x in times.values())
    return {"tflops": gflop / product_ms, "gb_s": 3 * 4 * size / triad_ms / 1e6}


def _triad(arrays: Sequence[Sequence[Any]]) -> None:
    """Compute a = b + c in each thread: a triad without its product, for which NumPy would need a temporary."""
    workers = [threading.Thread(target=np.add, args=(b, c), kwargs={"out": a}) for a, b, c in arrays]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for estimate.json.")
@click.option("--threads", type=int, default=None, help="For this machine; by default the cores that may be used.")
def main(output: Path | None, threads: int | None) -> None:
    gpu, cpu = fitting.published(), fitting.recorded()
    by_board = fitting.left_out(gpu, fitting.gpu_ratio, fitting.START_GPU, fitting.board_of)
    by_chip = fitting.left_out(gpu, fitting.gpu_ratio, fitting.START_GPU, fitting.chip_of)
    by_model = fitting.left_out(cpu, fitting.cpu_ratio, fitting.START_CPU, fitting.model_of)
    statistics: dict[str, Any] = {
        "left_out_board": fitting.errors(by_board),
        "left_out_chip": fitting.errors(by_chip),
        "left_out_model_cpu": fitting.errors(by_model),
    }
    gpu_values = fitting.fit(gpu, fitting.gpu_ratio, fitting.START_GPU)
    cpu_values = fitting.fit(cpu, fitting.cpu_ratio, fitting.START_CPU)
    cpu_values["body_passes"] = fitting.body_passes(cpu_values)
    spread = statistics["left_out_chip"]["factor_nine_of_ten"]
    statistics["GPU"] = dataclasses.asdict(fitting.gpu_share(gpu_values, spread, len(gpu)))
    statistics["CPU"] = dataclasses.asdict(fitting.cpu_share(cpu_values, CPU_FIT.spread, len(cpu)))
    samples: dict[str, Any] = {
        "left_out_board": _rows(by_board),
        "left_out_chip": _rows(by_chip),
        "left_out_model_cpu": _rows(by_model),
        "checks": [_sample(p, fitting.gpu_ratio(p, gpu_values)) for p in fitting.published(fitted=False)],
    }
    _show("Left-out boards, ms", samples["left_out_board"] + samples["checks"])
    _show("Left-out models on the recorded CPU, ms", samples["left_out_model_cpu"])
    statistics["this_machine"] = this_machine(threads or available_cores())
    for name, value in statistics.items():
        click.echo(f"{name}: " + ", ".join(f"{key} {x:.4g}" for key, x in value.items()))
    if output:
        _write(output / "estimate.json", samples, statistics, threads)


def _rows(groups: Mapping[str, Sequence[tuple[Point, float]]]) -> list[dict[str, Any]]:
    return [_sample(point, ratio) for pairs in groups.values() for point, ratio in pairs]


def _sample(point: Point, ratio: float) -> dict[str, Any]:
    described = {"board": point.board.name, "model": point.model, "precision": point.precision}
    return described | {"published_ms": point.ms, "predicted_ms": point.ms * ratio, "error": ratio - 1}


def _show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    cells = [
        [
            f"{r['board']}, {r['model']}, {r['precision']}",
            *(f"{r[k]:.2f}" for k in ("published_ms", "predicted_ms")),
            f"{r['error']:+.0%}",
        ]
        for r in rows
    ]
    print_table(title, ["", "measured by others", "predicted", "error"], cells)


def _write(path: Path, samples: Mapping[str, Any], statistics: Mapping[str, Any], threads: int | None) -> None:
    files = [
        PUBLISHED,
        *(RESULTS / f"{name}.json" for name in ("attention_cpu/attention_cpu", "model_cpu/model_cpu")),
    ]
    subjects = [Subject(path=str(f.relative_to(HERE.parent)), sha256=sha256(f)) for f in files]
    method = {"threads": threads or available_cores(), "rounds": ROUNDS, "fit": "least mean squared log ratio"}
    result = Result("evaluation", subjects, method, {}, {**statistics, "rows": samples})
    write_summary(path, result)


if __name__ == "__main__":
    main()
