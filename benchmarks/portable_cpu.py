"""The portable file against the dense export in ONNX Runtime on this CPU, and where the time goes.

    python benchmarks/portable_cpu.py [--img-size 518 --keep 0.1 --cells 25] [-o result.json]

DINOv2 ViT-S/14 with its real weights. The two run interleaved in one session of measurement (`sparsifiner-edge
profile --against`); ONNX Runtime's own profiler then tells the time of each kind of operator.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import safetensors.numpy
from msgspec.structs import replace
from summary import brief, write_summary

from sparsifiner_edge.cli.common import err_console, output_option, print_table
from sparsifiner_edge.demo import material
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.profiles.profile import profile_bundle
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result
from sparsifiner_edge.sparse.student import sparsify

RUNS = 10


@click.command()
@click.option("--img-size", default=518, show_default=True)
@click.option("--keep", default=0.10, show_default=True)
@click.option("--cells", default=25, show_default=True)
@click.option("--seconds", default=20.0, show_default=True, help="Least time measured per bundle.")
@output_option("Result JSON to write.", required=False)
def main(img_size: int, keep: float, cells: int, seconds: float, output: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name, err_console.status("exporting and measuring"):
        folder = Path(name)
        weights = folder / "dinov2.safetensors"
        safetensors.numpy.save_file(material.dinov2_state(), weights)
        options = {"weights": weights, "img_size": img_size}
        student = sparsify(material.DINOV2, folder / "student", keep=keep, cells=cells, **options)
        sparse = export_bundle(student, folder / "sparse")
        dense = export_bundle(material.DINOV2, folder / "dense", **options)
        result = profile_bundle(sparse, against=dense, seconds=seconds, kernels="portable")
        # The folder is gone when this is read.
        subjects = [replace(subject, path=Path(str(subject.path)).name) for subject in result.subjects]
        operators = {b.name: operator_times(b, img_size) for b in (sparse, dense)}
    statistics = write_record(result.statistics) | {"operators": operators}
    click.echo(statistics["comparison"]["sentence"])
    for bundle, times in operators.items():
        total = sum(times.values())
        rows = [[kind, f"{ms:.1f}", f"{ms / total:.1%}"] for kind, ms in list(times.items())[:10]]
        print_table(f"{bundle}: ms per inference by operator (profiler on)", ["", "ms", "share"], rows)
    if output:
        found = Result("comparison", subjects, result.method, result.samples, statistics)
        write_summary(output, found, method=brief(write_record(result.method)))


def operator_times(bundle: Path, img_size: int) -> dict[str, float]:
    """Milliseconds per inference of each kind of operator, by ONNX Runtime's profiler, most first."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.enable_profiling = True
    options.profile_file_prefix = str(bundle / "profile")
    session = onnxruntime.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])
    image = smooth_images(img_size)
    for _ in range(RUNS):
        session.run(None, {"image": image})
    events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text())
    times: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[_kind(event["args"])] += event["dur"] / 1000 / RUNS
    return dict(times.most_common())


def _kind(arguments: dict[str, Any]) -> str:
    """The operator's name; matrix products apart by what they multiply: tokens by weights, or tokens by tokens."""
    name = str(arguments["op_name"])
    if "MatMul" not in name and name != "Gemm":
        return name
    shapes = [next(iter(s.values())) for s in arguments.get("input_type_shape", []) if s]
    linear = name == "Gemm" or any(len(s) <= 2 and np.prod(s) > 0 for s in shapes[:2])
    return "linear layers" if linear else "attention and predictor products"


if __name__ == "__main__":
    main()
