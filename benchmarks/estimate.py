"""Where the estimate's constants come from, and how far it is off: published figures, recorded ones, and this machine.

    python benchmarks/estimate.py [-o FOLDER] [--threads N] [--no-machine]

GPU: the four constants are fitted to `published_latency.toml`, all boards; then again without each board, and without
each chip (the two settings of one Orin Nano together), to predict what was left out. CPU: fitted to the models that
`model_cpu.py` recorded, with the matrix product's speed that `attention_cpu.py` recorded on the same machine, and
judged on this machine, from peak (a matrix product) and bandwidth (a triad) measured now. `profiles/roofline.py` holds
the constants that this prints.
"""

from __future__ import annotations

import dataclasses
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import estimate_fit as fitting
import msgspec
import numpy as np
from estimate_fit import HERE, PUBLISHED, Point, Values
from msgspec.structs import asdict
from summary import RESULTS, write_summary

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.profiles.boards.board import Board, load_board
from sparsifiner_edge.profiles.estimate import estimate_bundle
from sparsifiner_edge.profiles.measure.timing import call_ms
from sparsifiner_edge.profiles.roofline import CPU_FIT
from sparsifiner_edge.results import Result, Subject

MODEL = "vit_small_patch14_dinov2.lvd142m"
ROUNDS, BURST, PAUSE_S = 5, 3, 0.05


def measured_board(threads: int) -> Callable[[], Board]:
    """A function that measures this machine's matrix product and triad, now, as a board."""
    multiply = _matmul(threads)
    size = 1 << 24
    arrays = [[np.ones(size // threads, np.float32) for _ in range(3)] for _ in range(threads)]

    def measure() -> Board:
        flops = 2 * 1024**3 / _seconds(multiply)
        moved = 3 * 4 * size / _seconds(lambda: _triad(arrays))
        base = load_board("cpu-generic")
        return dataclasses.replace(
            base, name="this-machine", cores=threads, fp32_tflops=flops / 1e12, bandwidth_gb_s=moved / 1e9
        )

    return measure


def _matmul(threads: int) -> Callable[[], Any]:
    import onnxruntime
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1024, 1024]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "matmul", values[:2], values[2:])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = dict.fromkeys("ab", np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32))
    return lambda: session.run(None, feeds)


def _triad(arrays: Sequence[Sequence[Any]]) -> None:
    """a = b + c in each thread: a triad less its product, which NumPy would need a temporary for."""
    workers = [threading.Thread(target=np.add, args=(b, c), kwargs={"out": a}) for a, b, c in arrays]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _seconds(function: Callable[[], Any]) -> float:
    """Median of a burst, after a pause and one call: threads of the session before may still spin."""
    time.sleep(PAUSE_S)
    return float(np.median(call_ms(function, BURST, warm_up=1))) / 1e3


def this_machine(threads: int) -> tuple[Board, list[dict[str, Any]]]:
    """Dense, sparse native and sparse portable bundles of a ViT-S, measured and estimated in turn."""
    from sparsifiner_edge.export.export import export_bundle
    from sparsifiner_edge.runtime import open_session
    from sparsifiner_edge.sparse.student import sparsify

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = _random_weights(folder / "weights.safetensors")
        cases = []
        for size, keep, cells in ((224, 0.25, 16), (392, 0.1, 25)):
            options: dict[str, Any] = {"weights": weights, "img_size": size}
            student = sparsify(MODEL, folder / f"student{size}", keep=keep, cells=cells, **options)
            dense = export_bundle(MODEL, folder / f"dense {size} px", **options)
            sparse = export_bundle(student, folder / f"keep {keep} {size} px")
            cases += [(dense, "auto"), (sparse, "native"), (sparse, "portable")]
        measure = measured_board(threads)
        sessions = [open_session(bundle, threads=threads, kernels=kernels) for bundle, kernels in cases]
        images = [{"image": _random_image(session.inputs[0].shape)} for session in sessions]
        boards, times = [], []
        for _ in range(ROUNDS + 1):  # The first one warms up.
            boards.append(measure())
            times.append([_seconds(partial(s.infer, i)) * 1e3 for s, i in zip(sessions, images, strict=True)])
        board = _median_board(boards[1:])
        rows = []
        for (bundle, kernels), ms in zip(cases, np.transpose(times[1:]).tolist(), strict=True):
            guess = estimate_bundle(bundle, board, kernels=kernels).statistics.latency_ms
            rows.append(
                {"name": f"{bundle.name}, {kernels}", "samples_ms": ms, "ms": float(np.median(ms)), **asdict(guess)}
            )
        return board, rows


def _median_board(boards: Sequence[Board]) -> Board:
    peak, bandwidth = (float(np.median([getattr(b, n) for b in boards])) for n in ("fp32_tflops", "bandwidth_gb_s"))
    return msgspec.structs.replace(boards[0], fp32_tflops=peak, bandwidth_gb_s=bandwidth)


def _random_image(shape: Sequence[Any]) -> Any:
    sides = [side if isinstance(side, int) else 1 for side in shape]
    return np.random.default_rng(0).integers(0, 256, sides, dtype=np.uint8)


def _random_weights(path: Path) -> Path:
    import safetensors.torch
    import timm
    import torch

    torch.manual_seed(0)
    safetensors.torch.save_file(timm.create_model(MODEL, pretrained=False).state_dict(), path)
    return path


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for estimate.json.")
@click.option("--threads", type=int, default=None, help="For this machine; by default the cores that may be used.")
@click.option("--no-machine", is_flag=True, help="Leave this machine's own measurement out.")
def main(output: Path | None, threads: int | None, no_machine: bool) -> None:
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
        "left_out_board": _rows(by_board), "left_out_chip": _rows(by_chip), "left_out_model_cpu": _rows(by_model),
        "checks": [_sample(p, fitting.gpu_ratio(p, gpu_values)) for p in fitting.published(fitted=False)],
    }  # fmt: skip
    _show("Left-out boards, ms", samples["left_out_board"] + samples["checks"])
    _show("Left-out models on the recorded CPU, ms", samples["left_out_model_cpu"])
    if not no_machine:
        with err_console.status("exporting and measuring"):
            board, rows = this_machine(threads or available_cores())
        samples["this_machine"] = rows
        statistics["this_machine"] = {"tflops": board.fp32_tflops, "gb_s": board.bandwidth_gb_s} | _against(rows)
        cells = [[r["name"], f"{r['ms']:.1f}", f"{r['value']:.1f}", f"{r['value'] / r['ms'] - 1:+.0%}"] for r in rows]
        print_table("This machine, ms", ["", "measured", "estimate", "error"], cells)
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
        [f"{r['board']}, {r['model']}, {r['precision']}", *(f"{r[k]:.2f}" for k in ("published_ms", "predicted_ms")),
         f"{r['error']:+.0%}"]
        for r in rows
    ]  # fmt: skip
    print_table(title, ["", "measured by others", "predicted", "error"], cells)


def _against(rows: Sequence[Mapping[str, Any]]) -> Values:
    ratios = np.array([r["value"] / r["ms"] for r in rows])
    return {"median_error": float(np.median(np.abs(ratios - 1))), "greatest_error": float(np.max(np.abs(ratios - 1)))}


def _write(path: Path, samples: Mapping[str, Any], statistics: Mapping[str, Any], threads: int | None) -> None:
    files = [
        PUBLISHED,
        *(RESULTS / f"{name}.json" for name in ("attention_cpu/attention_cpu", "model_cpu/model_cpu")),
    ]
    subjects = [Subject(path=str(f.relative_to(HERE.parent)), sha256=sha256(f)) for f in files]
    method = {"threads": threads or available_cores(), "rounds": ROUNDS, "fit": "least mean squared log ratio"}
    rows = {of: [{k: x for k, x in row.items() if k != "samples_ms"} for row in found] for of, found in samples.items()}
    result = Result("evaluation", subjects, method, samples, statistics)
    write_summary(path, result, statistics={**statistics, "rows": rows})


if __name__ == "__main__":
    main()
