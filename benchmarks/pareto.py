"""Fidelity against its costs, in MACs and in measured time: ours, the published preset, a local window, pruning alone.

    python benchmarks/pareto.py [--work FOLDER] [-o FOLDER]

DINOv2 ViT-S/14, 224 px, the eight photographs. Trained students are those of `accuracy.py`, where it was run. Every
point is an exported file, run by the kernels that a session uses here; the published preset's predictor has no native
kernel. Fidelity is the cosine of the class token to the dense model's: where tokens are pruned, others are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from accuracy import SIZE, TOKENS, untrained
from accuracy_images import linked
from cpu_engines import ort_session, time_in_turn
from fidelity_subject import local_window, weights_file

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.config import parse_token_keep
from sparsifiner_edge.costs import summary
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.export.export import export_bundle, model_shape
from sparsifiner_edge.images import load_image
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.results import Result, Subject, write_result
from sparsifiner_edge.sparse.calibrate import sparse_layers
from sparsifiner_edge.sparse.student import load_student, sparsify

KEEPS = (0.05, 0.1, 0.25, 0.5)
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Of tokens that go on after layers 3, 6 and 9, where pruning is alone."""
DENSE = "dense"
Point = tuple[str, str, onnx.ModelProto, int]
"""Family, label, file, MACs."""


def points(work: Path, tell: Any) -> Iterator[Point]:
    """Every point of the image, the dense model first."""
    bundle = export_bundle(material.DINOV2, work / "pareto-dense", weights=weights_file(), img_size=SIZE)
    yield DENSE, "1", *_file(bundle)
    edge = untrained(work, "edge")
    for family, folder in (("ours, untrained", edge), ("ours, trained", work / "edge")):
        if not folder.exists():
            continue
        for keep in KEEPS:
            tell(f"{family}, keep {keep:g}")
            yield family, f"{keep:g}", *_exported(work, folder, keep=keep)
        for keep in (0.1, 0.25):
            yield (
                f"{family}, tokens .7",
                f"{keep:g}",
                *_exported(work, folder, keep=keep, token_keep=parse_token_keep(TOKENS)),
            )
    if (work / "tokens").exists():
        for keep in (0.05, 0.1, 0.25):
            tell(f"ours, trained with pruning, keep {keep:g}")
            yield "ours, trained with tokens .7, fused", f"{keep:g}", *_exported(work, work / "tokens", keep=keep)
    for family, folder in (("paper, untrained", untrained(work, "paper")), ("paper, trained", work / "paper")):
        for keep in (0.1, 0.25, 0.5) if folder.exists() else ():
            tell(f"{family}, keep {keep:g}")
            yield family, f"{keep:g}", *_exported(work, folder, keep=keep)
    for keep in KEEPS:
        tell(f"local window, keep {keep:g}")
        model, _ = _exported(work, edge, keep=keep)
        yield "local window", f"{keep:g}", *_windowed(model, load_student(edge, keep=keep))
    calibration = linked(work / "calibration", split.calibration())
    whole = sparsify(material.DINOV2, work / "pareto-whole", weights=weights_file(), img_size=SIZE, keep=1,
                     token_keep=parse_token_keep(TOKENS), calibrate=calibration)  # fmt: skip
    for share in SHARES:
        tell(f"pruning alone, {share:g}")
        pruned = tuple((layer, share) for layer, _ in parse_token_keep(TOKENS))
        yield "pruning alone", f"{share:g}", *_exported(work, whole, token_keep=pruned)


def _exported(work: Path, student: Path, **budget: Any) -> tuple[onnx.ModelProto, int]:
    return _file(export_bundle(student, work / "pareto-bundle", **budget))


def _file(bundle: Path) -> tuple[onnx.ModelProto, int]:
    return onnx.load(bundle / "model.onnx"), open_bundle(bundle).manifest.costs["total_macs"]


def _windowed(model: onnx.ModelProto, student: Any) -> tuple[onnx.ModelProto, int]:
    """The file with fixed lists in place of its selections."""
    choose, layers = local_window(student.model), iter(sparse_layers(student.model))
    for node in [n for n in model.graph.node if n.op_type == "KeySelect"]:
        lists = choose(next(layers), torch.empty(0)).contiguous().numpy()
        model.graph.initializer.append(onnx.numpy_helper.from_array(lists, node.output[0]))
        model.graph.node.remove(node)
    costs = summary(model_shape(student.model), student.sparsity)
    return model, costs["total_macs"] - costs["predictor_macs"]


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Two panels: against MACs, and against time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    dense = next(row for row in rows if row["family"] == DENSE)
    for axis, name in zip(axes, ("gmacs", "median_ms"), strict=True):
        axis.axvline(dense[name], color="0.6", linestyle=":", label=DENSE)
    for family in dict.fromkeys(row["family"] for row in rows if row is not dense):
        mine = [row for row in rows if row["family"] == family]
        for axis, name in zip(axes, ("gmacs", "median_ms"), strict=True):
            axis.plot([r[name] for r in mine], [1 - r["class_cosine"] for r in mine], "o-", label=family)
            for row in mine:
                axis.annotate(row["label"], (row[name], 1 - row["class_cosine"]), fontsize=7)
    axes[0].set(xlabel="GMACs, whole model", ylabel="1 - cosine of the class token to the dense model's", yscale="log")
    axes[1].set(xlabel="ms")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/accuracy"), show_default=True)
@click.option("--threads", type=int, default=available_cores())
@click.option("--rounds", type=int, default=9, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for pareto.json and .png.")
def main(work: Path, threads: int, rounds: int, output: Path | None) -> None:
    work.mkdir(parents=True, exist_ok=True)
    images = [{"image": load_image(path, SIZE)[None]} for path in split.development()]
    rows, runs, dense = [], {}, []
    with err_console.status("") as status:
        for family, label, model, macs in points(work, status.update):
            session = ort_session(model.SerializeToString(), threads)
            features = [session.run(["features"], image)[0] for image in images]
            dense = dense or features
            similar = [float(cosine(ours, theirs).mean()) for ours, theirs in zip(features, dense, strict=True)]
            rows.append(
                {"family": family, "label": label, "gmacs": macs / 1e9, "class_cosine": float(np.mean(similar))}
            )
            runs[f"{family}, {label}"] = lambda session=session: session.run(None, images[0])
        times = time_in_turn(runs, rounds, 3, status.update)
    for row, taken in zip(rows, times.values(), strict=True):
        row["median_ms"] = float(np.median(taken))
    cells = [
        [f"{r['family']}, {r['label']}", f"{r['gmacs']:.2f}", f"{r['median_ms']:.1f}", f"{r['class_cosine']:.4f}"]
        for r in rows
    ]
    print_table(f"DINOv2 ViT-S/14, {SIZE} px", ["", "GMACs", "ms", "class cosine"], cells)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        subjects = [Subject(path=name, sha256="exported in this run") for name in runs]
        method = {"threads": threads, "rounds": rounds, "pictures": [p.name for p in split.development()]}
        samples = {label: taken.tolist() for label, taken in times.items()}
        write_result(output / "pareto.json", Result("comparison", subjects, method, samples, {"points": rows}))
        picture(rows, output / "pareto.png")


if __name__ == "__main__":
    main()
