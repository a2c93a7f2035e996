"""Runs a merged model without our kernels in ExecuTorch (`torch.export`, XNNPACK delegate) and in ONNX Runtime.

    python -m venv other && other/bin/pip install ".[cpu,train]" executorch
    other/bin/python benchmarks/executorch_cpu.py [--size 224] [--merge 20..0] -o FOLDER

The models are DINOv2 ViT-S/14, real weights, untrained, all keys read, and the dense model. Each is exported by
`torch.export`, lowered to XNNPACK and run by ExecuTorch. Each is also a bundle in ONNX Runtime, with function bodies of
standard operators and with our kernels. All run in one process, in turn. ExecuTorch pins versions of its dependencies,
hence the separate environment.
"""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from accuracy_images import linked
from cpu_engines import ort_session, ratio, time_in_turn
from fidelity_subject import weights_file
from summary import write_summary

import sparsifiner_edge as se
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.config import merge_text, parse_merge
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.deployed_model import deploy
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.results import Result, Subject

ROUNDS, BURST = 11, 2


def lowered(model: torch.nn.Module, image: torch.Tensor, path: Path) -> Any:
    """Return a module lowered for ExecuTorch; operators that the delegate does not support run as portable kernels."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = to_edge_transform_and_lower(torch.export.export(model, (image,)), partitioner=[XnnpackPartitioner()])
    path.write_bytes(program.to_executorch().buffer)
    return Runtime.get().load_program(path).load_method("forward")


def measure(size: int, merge: tuple[int, ...], folder: Path, tell: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure samples and statistics."""
    threads, images = available_cores(), smooth_images(size)
    torch.set_num_threads(threads)
    image, runs, fidelity = torch.from_numpy(images), {}, {}
    se.sparsify(
        material.DINOV2,
        folder / "student",
        weights=weights_file(),
        img_size=size,
        keep=1.0,
        merge=merge,
        calibrate=linked(folder / "calibration", split.images("calibration")),
    )
    for name, budget in (("dense", se.Budget(merge=())), ("merged", se.Budget())):
        tell(f"export {name}")
        model = deploy(se.load_student(folder / "student", budget=budget)).eval()
        with torch.no_grad():
            expected = model(image)
        bundle = se.export_bundle(folder / "student", folder / name, budget=budget)
        method = lowered(model, image, folder / f"{name}.pte")
        for output, wanted in zip(method.execute([image]), expected, strict=True):
            found = cosine(
                output[0].numpy().reshape(-1, wanted.shape[-1]), wanted[0].numpy().reshape(-1, wanted.shape[-1])
            )
            fidelity[name] = min(fidelity.get(name, 1.0), float(np.min(found)))
        runs[f"{name}, ExecuTorch"] = lambda method=method: method.execute([image])
        for kernels in (False, True):
            session = ort_session(str(bundle / "model.onnx"), threads, kernels)
            of = "our kernels" if kernels else "bodies"
            runs[f"{name}, ONNX Runtime, {of}"] = lambda session=session: session.run(None, {"image": images})
    taken = time_in_turn(runs, ROUNDS, BURST, tell)
    rows = {name: {"median_ms": float(np.median(ms))} for name, ms in taken.items()}
    for engine in ("ExecuTorch", "ONNX Runtime, bodies", "ONNX Runtime, our kernels"):
        rows[f"merged, {engine}"]["times_dense"] = ratio(taken[f"dense, {engine}"], taken[f"merged, {engine}"])
    return {name: ms.tolist() for name, ms in taken.items()}, {"rows": rows, "least_cosine_to_torch": fidelity}


@click.command()
@click.option("--size", default=224, show_default=True)
@click.option("--merge", default="20..0", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for executorch_cpu.json.")
def main(size: int, merge: str, output: Path | None) -> None:
    """Run a merged model in ExecuTorch and in ONNX Runtime."""
    rates = parse_merge(merge)
    with err_console.status("") as status, tempfile.TemporaryDirectory() as scratch:
        samples, statistics = measure(size, rates, Path(scratch), status.update)
    if output:
        versions = {name: metadata.version(name) for name in ("executorch", "torch")}
        method = {"size": size, "merge": merge_text(rates), "rounds": ROUNDS, "threads": available_cores(), **versions}
        subject = Subject(path=material.DINOV2, sha256="")
        write_summary(output / "executorch_cpu.json", Result("comparison", [subject], method, samples, statistics))
    rows = [[name, f"{row['median_ms']:.1f}"] for name, row in statistics["rows"].items()]
    print_table(f"{size} px, merge {merge}", ["", "ms"], rows)
    click.echo(f"least cosine to torch: {statistics['least_cosine_to_torch']}")


if __name__ == "__main__":
    main()
