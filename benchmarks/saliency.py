"""Measures a trained dense task at 518 px: maps of the sparse and dense saliency model on unseen photographs.

    python benchmarks/saliency.py --train FOLDER                  # 420 steps, some 8 s each on two cores
    python benchmarks/saliency.py [--student FOLDER/student] [--stamps FOLDER] [--time] [-o FOLDER]

The model is `sparsifiner_edge.demo.saliency`. Each budget gives mean absolute error, IoU at .5 and AUROC of the map
against the dense model's over the publication photographs. With --stamps (see `stamps.py`), at 24 G multiply-
accumulates at most, it also gives IoU and AUROC of both against the true masks, and the drop, image by image. Rivals:
ToMe and MAT (`tome.py`) in the backbone, and the dense model for fewer pixels, whose map is resized; neither that nor
resizing its images is in its time. --train: distil a sparse model on the training photographs; the decoder's own maps
are the teacher's. --student: use that model; otherwise an untrained one. --time: time the complete model with its
decoder in fp32, ours and rivals in ONNX Runtime and OpenVINO, the dense one in torch too, interleaved in one run; the
ratio is that of the fastest.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import tome
import torch
import torch.nn.functional as F
from accuracy_images import distilled, linked, photographs_at
from cpu_engines import by_kernels, openvino_run, ort_session, ratio, time_in_turn
from frontier_points import sum_of_layers
from summary import said, write_summary
from torch import Tensor, nn

import sparsifiner_edge as se
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.config import Keep, keep_text, merge_text
from sparsifiner_edge.demo import split
from sparsifiner_edge.demo.saliency import OUTPUT, saliency
from sparsifiner_edge.evaluate.evaluators import answers, evaluator_of
from sparsifiner_edge.evaluate.extract import Extractor
from sparsifiner_edge.evaluate.reading import feed_of
from sparsifiner_edge.evaluate.scores import clean_scores, score_statistics
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.deployed_model import DeployedModel
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.images import Normalisation, list_images
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.scoring import MAPS
from sparsifiner_edge.sparse.source import load_source
from sparsifiner_edge.sparse.weights import normalise

MODULE, SIZE = "sparsifiner_edge.demo.saliency", 518
READ: Keep = (0.2, 0.2, 0.5, 1.0)
"""Shares of keys, chosen on the development photographs, one for all budgets."""
BUDGETS: tuple[tuple[tuple[int, ...], Keep], ...] = (
    ((54, 0), 1.0),
    ((80, 0), READ),
    ((122, 0), READ),
    ((167, 0), READ),
    ((182, 0), READ),
)
STAMPED = 24e9
"""Maximum multiply-accumulates of the layers for the comparison with true masks."""
FIGURES = ("teacher_iou", "drop_iou", "drop_auroc")
"""Printed figures of that comparison."""
FALLING, SIDES = (150, 180), (392, 336)
"""Rivals: merging rates in the first layer, and pixels per side."""
ROUNDS = 11
TRAINING = (
    "batch=2",
    "distil.steps=420",
    "distil.learning_rate=3e-6",
    "clip=0.25",
    'budgets=[{merge="122..0"},{merge="167..0"}]',
    "losses.classes=0",
    "images.mixed=0",
    "check_every=40",
)
"""Changes to the recipe: images are larger, batches small (clip), shares of keys the model's own."""


def name_of(merge: tuple[int, ...], keep: Keep) -> str:
    return f"merge {merge_text(merge)}, keep {keep_text(keep)}"


def untrained(folder: Path) -> Path:
    if not (folder / "untrained").exists():
        calibration = linked(folder / "calibration", split.images("calibration"))
        se.sparsify(f"{MODULE}:saliency", folder / "untrained", keep=READ, background_tokens=49, calibrate=calibration)
    return folder / "untrained"


def train(work: Path) -> None:
    """Distil towards the dense model's tokens and maps, evaluated on the development photographs."""
    pictures = photographs_at(work / "pictures", SIZE) / "train"
    judges = linked(work / "development", split.images("development"))
    distilled(untrained(work), pictures, work / "student", judges, overrides=TRAINING, trust=[MODULE])


class Exported(NamedTuple):
    """One budget's file. macs: multiply-accumulates of the backbone's layers."""

    bundle: Path
    macs: float


def exported(student: Path, folder: Path, tell: Any) -> tuple[Path, dict[str, Exported]]:
    """Return the dense bundle, and one per budget."""
    tell("export dense")
    dense, found = se.export_bundle(f"{MODULE}:saliency", folder / "dense"), {}
    for merge, keep in BUDGETS:
        name = name_of(merge, keep)
        tell(f"export {name}")
        bundle = se.export_bundle(
            student, folder / name, model=se.ModelOptions(trust=[MODULE]), budget=se.Budget(merge=merge, keep=keep)
        )
        macs = sum_of_layers(se.load_student(student, budget=se.Budget(merge=merge, keep=keep), trust=[MODULE]))
        found[name] = Exported(bundle, macs)
    return dense, found


def fidelity(dense: Path, files: dict[str, Exported], stamps: Path | None, tell: Any) -> dict[str, dict[str, Any]]:
    """Return multiply-accumulates and the figures of the task per budget."""
    rows: dict[str, dict[str, Any]] = {}
    for name, file in files.items():
        tell(f"maps, {name}")
        found = se.evaluate_student(
            file.bundle, split.images("publication"), options=se.EvaluationOptions(metric="task"), against=dense
        )
        row: dict[str, Any] = {"macs": file.macs, "photographs": write_record(found.statistics)}
        samples = {"photographs": found.samples}
        if stamps and file.macs <= STAMPED:
            tell(f"stamps, {name}")
            images, masks = stamps / "images", stamps / "masks"
            found = se.evaluate_student(
                file.bundle, images, options=se.EvaluationOptions(masks=masks, metric="task"), against=dense
            )
            row["stamps"], samples["stamps"] = write_record(found.statistics), found.samples
        rows[name] = row | {"samples": samples}
    return rows


class Merged(nn.Module):
    """The model with a rival's backbone: uint8 images [B,H,W,3] -> maps [B,H,W], as the only output."""

    def __init__(self, rates: list[int], chained: bool) -> None:
        super().__init__()
        self.whole = saliency()
        self.backbone = tome.ToMe(self.whole.backbone, rates, chained)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        tokens = self.backbone(image)[1]
        grid = self.whole.backbone.patch_embed.grid_size
        found = self.whole.last(self.whole.decoder(tokens[:, 1:].transpose(1, 2).unflatten(-1, grid)))
        return (F.interpolate(found, image.shape[1:3], mode="bilinear", align_corners=False).sigmoid()[:, 0],)


class Rival(NamedTuple):
    """A rival for stock engines.

    Attributes:
        side: Pixels per side of its images.
        macs: Multiply-accumulates of the backbone's layers.
    """

    module: nn.Module
    side: int
    macs: float

    @torch.inference_mode()
    def map(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return the maps of uint8 images [B,SIZE,SIZE,3]."""
        if self.side == SIZE:
            return {OUTPUT: self.module(torch.from_numpy(images))[0].numpy()}
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        small = F.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True).round().clamp(0, 255)
        found = self.module(small.permute(0, 2, 3, 1).to(torch.uint8))[0]
        return {OUTPUT: F.interpolate(found[:, None], (SIZE, SIZE), mode="bilinear")[:, 0].numpy()}


def rivals() -> dict[str, Rival]:
    """Return rivals by name."""
    dense = saliency()
    depth, width = len(dense.backbone.blocks), dense.backbone.embed_dim

    def macs(rates: list[int], side: int) -> float:
        return float(tome.macs(rates, (side // dense.backbone.patch_embed.patch_size[0]) ** 2 + 1, width, 4 * width))

    found = {}
    for kind in ("ToMe", "MAT"):
        for first in FALLING:
            rates = list(tome.schedule((first, 1), depth)[0])
            found[f"{kind} {first}..0"] = Rival(Merged(rates, kind == "MAT").eval(), SIZE, macs(rates, SIZE))
    for side in SIDES:
        model = saliency(side)
        whole = DeployedModel(model, Normalisation.of(model.image_mean, model.image_std))
        found[f"{side} px"] = Rival(whole, side, macs([0] * depth, side))
    return found


def rivals_fidelity(dense: Path, found: dict[str, Rival], stamps: Path | None, tell: Any) -> dict[str, dict[str, Any]]:
    """Return the figures of `fidelity` for rivals in torch."""
    rows: dict[str, dict[str, Any]] = {}
    session = open_session(dense)
    framing = Framing(SIZE, "crop", None)

    def extractor(name: str, extract: Any) -> Extractor:
        return Extractor(extract, SIZE, 1, Subject(path=name, sha256=""), session.description)

    known: dict[bytes, dict[str, np.ndarray]] = {}

    def dense_maps(image: np.ndarray) -> dict[str, np.ndarray]:
        key = hashlib.sha256(image.tobytes()).digest()
        if key not in known:
            known[key] = session.infer({"image": image})
        return known[key]

    teacher = extractor("dense", dense_maps)
    sets = {"photographs": (split.images("publication"), None)}
    sets |= {"stamps": (list_images(stamps / "images"), stamps / "masks")} if stamps else {}
    for name, rival in found.items():
        rows[name] = {"macs": rival.macs, "samples": {}}
        for of, (files, masks) in sets.items():
            tell(f"{of}, {name}")
            evaluator = evaluator_of(MAPS, files, framing, None, masks, clean=True)
            pairs = answers(evaluator, extractor(name, rival.map), teacher, feed_of(None, framing), None)
            rows[name]["samples"][of] = clean_scores(evaluator, pairs)
            rows[name][of] = write_record(score_statistics(rows[name]["samples"][of]))
    return rows


def times(
    dense: Path, files: dict[str, Exported], others: dict[str, Rival], folder: Path, tell: Any
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return milliseconds [rounds, 1] of every engine; medians, and the ratio of the fastest dense to our fastest."""
    threads = available_cores()
    image = smooth_images(SIZE)
    loaded = load_source(f"{MODULE}:saliency")
    pixels = normalise(torch.from_numpy(image), loaded.normalisation)
    torch.set_num_threads(threads)

    def in_torch() -> Any:
        with torch.inference_mode():
            return loaded.model(pixels)

    plain = ort_session(str(dense / "model.onnx"), threads, False)
    runs = {
        "dense, ONNX Runtime": lambda: plain.run(None, {"image": image}),
        "dense, OpenVINO": openvino_run(str(dense / "model.onnx"), {"image": image}, threads, "f32"),
        "dense, torch": in_torch,
    }
    for name, file in files.items():
        for engine, backend in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino")):
            session = open_session(file.bundle, by_kernels(backend, "auto", threads))
            runs[f"{name}, {engine}"] = lambda session=session: session.infer({"image": image})
    for name, rival in others.items():
        tell(f"export {name}")
        path = str(tome.export(rival.module, rival.side, folder / f"{name}.onnx", outputs=[OUTPUT]))
        feed = {"image": smooth_images(rival.side)}
        stock = ort_session(path, threads, False)
        runs[f"{name}, ONNX Runtime"] = lambda stock=stock, feed=feed: stock.run(None, feed)
        runs[f"{name}, OpenVINO"] = openvino_run(path, feed, threads, "f32")
    taken = time_in_turn(runs, ROUNDS, 1, tell)
    medians = {key: float(np.median(value)) for key, value in taken.items()}
    best = min((key for key in medians if key.startswith("dense")), key=medians.__getitem__)
    ratios = {}
    for name in (*files, *others):
        fastest = min((key for key in medians if key.startswith(f"{name}, ")), key=medians.__getitem__)
        ratios[name] = {"dense": best, "fastest": fastest, **ratio(taken[best], taken[fastest])}
    return taken, {"median_ms": medians, "ratios": ratios}


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """Drop the separate figures of each model against true masks, which their difference covers."""
    if "stamps" not in row:
        return row
    return row | {"stamps": {name: row["stamps"][name] for name in ("iou", "auroc", *FIGURES)}}


def show(rows: dict[str, dict[str, Any]], timed: dict[str, Any]) -> None:
    table = []
    for name, row in rows.items():
        maps, stamps = row["photographs"], row.get("stamps", {})
        cells = [
            name,
            f"{row['macs'] / 1e9:.1f}",
            f"{maps['error']['mean']['value']:.4f}",
            f"{maps['iou']['mean']['value']:.3f}",
            f"{maps['auroc']['mean']['value']:.4f}",
        ]
        for figure in FIGURES:
            cells.append(f"{stamps[figure]['mean']['value']:.4f}" if figure in stamps else "-")
        if timed:
            cells.append(said(timed["ratios"][name]))
        table.append(cells)
    head = ["", "G MACs", "error", "IoU", "AUROC", "stamps: dense IoU", "lost IoU", "lost AUROC"]
    print_table("Saliency at 518 px, against the dense model's maps", head + (["times dense"] if timed else []), table)


@click.command()
@click.option("--train", "work", type=click.Path(path_type=Path), help="Train here, measure nothing.")
@click.option("--student", type=click.Path(path_type=Path, exists=True), help="One that was trained.")
@click.option("--stamps", type=click.Path(path_type=Path, exists=True), help="What stamps.py wrote.")
@click.option("--time", "timed", is_flag=True, help="Measure time too.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for saliency.json.")
def main(work: Path | None, student: Path | None, stamps: Path | None, timed: bool, output: Path | None) -> None:
    """Measure a trained dense task at 518 px."""
    if work:
        train(work)
        return
    with tempfile.TemporaryDirectory() as scratch, err_console.status("") as status:
        made = student or untrained(Path(scratch))
        dense, files = exported(made, Path(scratch), status.update)
        others = rivals()
        rows = fidelity(dense, files, stamps, status.update) | rivals_fidelity(dense, others, stamps, status.update)
        taken, found = times(dense, files, others, Path(scratch), status.update) if timed else ({}, {})
    samples = {name: row.pop("samples") for name, row in rows.items()}
    show(rows, found)
    samples["ms"] = {name: x.tolist() for name, x in taken.items()}
    if output:
        method = {
            "photographs": len(split.images("publication")),
            "size": SIZE,
            "student": "trained" if student else "untrained",
            "rounds": ROUNDS if timed else 0,
        }
        subject = Subject(path=MODULE, sha256="")
        result = Result("comparison", [subject], method, samples, {"budgets": rows, "times": found})
        short = {"budgets": {name: brief(row) for name, row in rows.items()}, "times": found}
        write_summary(output / f"saliency{'_trained' if student else ''}.json", result, statistics=short)


if __name__ == "__main__":
    main()
