"""What the score `novelty` tells, and what it costs.

    python benchmarks/novelty.py score [-o FOLDER]                  # AUROC on publication images
    python benchmarks/novelty.py score --development                # layers and statistics, on development images
    python benchmarks/novelty.py cost [-o FOLDER]                   # beside the same bundle without it

DINOv2 ViT-S/14, keep .25, merging 29..0 at 224 px, fitted to the photographs that are trained on, in crops
(`accuracy_images`). Usual are the publication photographs. Far: clothes (Fashion-MNIST), close-ups of brick, grass and
gravel, white noise, a covered lens. Near: stamps on white, night (`low_light` at severities 3 and 5). Beside them, for
what the score does not see: upside-down, fog, snow, blur. Of textures there is one source, so development images have
crops of it too.

Needs the packages that `accuracy.py` and `stamps.py` name.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import stamps
from accuracy_images import write_photographs
from fashion import fashion_mnist
from fidelity_subject import weights_file
from msgspec.structs import replace
from PIL import Image
from summary import brief, write_summary

import sparsifiner_edge as se
from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.cli.common import print_table, progress_bar
from sparsifiner_edge.corruptions import corrupt
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.images import evenly, load_image
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.metrics import auroc
from sparsifiner_edge.novelty import NOVELTY, fit_density, novelty
from sparsifiner_edge.ops import native
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.sparse.novelty import statistics

SIZE, COUNT = 224, 50
FAR, NEAR = ("clothes", "textures", "noise", "covered lens"), ("stamps", "night 3", "night 5")
REQUIRED = {"far": 0.95, "near": 0.80, "cost": 0.01}
RESAMPLES = 500
PROFILED = 60
"""Runs under the profiler."""
_work = click.option("--work", type=click.Path(path_type=Path), default=Path("build/novelty"), show_default=True)
_output = click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the JSON.")


def student(work: Path) -> Path:
    """Calibrated on the photographs to train on."""
    made, images = work / "student", photographs(work) / "train"
    if not made.exists():
        merge = tuple(round(29 * (1 - layer / 11)) for layer in range(12))
        with progress_bar("student") as progress:
            se.sparsify(
                material.DINOV2, made, weights=weights_file(), img_size=SIZE, keep=0.25, merge=merge, calibrate=images,
                progress=progress,
            )  # fmt: skip
    return made


def photographs(work: Path) -> Path:
    """Folders `train` and `held-out`."""
    folder = work / "photographs"
    if not folder.exists():
        scratch = folder.with_suffix(".part")
        shutil.rmtree(scratch, ignore_errors=True)
        write_photographs(scratch, SIZE)
        scratch.rename(folder)
    return folder


def bundle(work: Path, named: str = "bundle", **options: Any) -> Path:
    """The student, exported."""
    made = work / named
    return made if made.exists() else se.export_bundle(student(work), made, **options)


def sets(usual: Sequence[Path], part: str, seed: int) -> Iterator[tuple[str, list[Pixels]]]:
    """By name images [224,224,3]: the usual ones first."""
    rng = np.random.default_rng(seed)
    images = [load_image(path, SIZE) for path in usual]
    clothes = fashion_mnist(part).first(COUNT)
    yield "usual", images
    yield "clothes", [clothes.load(number, SIZE) for number in range(COUNT)]
    yield "textures", list(_textures(rng))
    yield "noise", [_noise(rng) for _ in range(COUNT)]
    yield "covered lens", [_covered(rng) for _ in range(COUNT)]
    yield "stamps", [_on_white(path) for path in random.Random(seed).sample(stamps.usable(), COUNT)]
    for name, corruption, severity in (
        ("night 3", "low_light", 3), ("night 5", "low_light", 5), ("fog 3", "fog", 3), ("snow 3", "snow", 3),
        ("defocus 3", "defocus_blur", 3), ("noise 3", "gaussian_noise", 3),
    ):  # fmt: skip
        yield name, [corrupt(image, corruption, severity, seed=number) for number, image in enumerate(images)]
    yield "upside-down", [np.ascontiguousarray(image[::-1, ::-1]) for image in images]


def _noise(rng: np.random.Generator) -> Pixels:
    return rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def _covered(rng: np.random.Generator) -> Pixels:
    return np.clip(rng.normal(3, 2, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


def _textures(rng: Any) -> Iterator[Pixels]:
    from skimage import data

    sources = [data.brick(), data.grass(), data.gravel()]
    for number in range(COUNT):
        texture, side = sources[number % 3], int(rng.integers(200, 400))
        top, left = (int(rng.integers(0, length - side)) for length in texture.shape)
        crop = Image.fromarray(texture[top : top + side, left : left + side]).convert("RGB")
        yield np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _on_white(path: Path) -> Pixels:
    with Image.open(path) as opened:
        stamp = opened.convert("RGBA")
    stamp.thumbnail((160, 160))
    scene = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 255))
    scene.alpha_composite(stamp, ((SIZE - stamp.width) // 2, (SIZE - stamp.height) // 2))
    return np.asarray(scene.convert("RGB"))


def area(usual: Array, others: Array) -> float:
    """Area under the ROC curve: how often one of the others scores higher."""
    found = auroc(np.concatenate([usual, others]), np.repeat([0, 1], [len(usual), len(others)]))
    assert found is not None
    return found


def interval(usual: Array, others: Array) -> tuple[float, float]:
    """Of the area, 95 %, bootstrapped over images."""
    rng = np.random.default_rng(0)
    drawn = [area(rng.choice(usual, len(usual)), rng.choice(others, len(others))) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


@click.group()
def main() -> None:
    """See the module's documentation."""


@main.command()
@_work
@_output
@click.option("--development", is_flag=True, help="Compare layers on development images instead.")
def score(work: Path, output: Path | None, development: bool) -> None:
    """AUROC of each set against photographs."""
    if development:
        layers(work)
        return
    scores: dict[str, list[float]] = {}
    with open_session(bundle(work)) as session:
        for name, images in sets(split.publication(), "test", 1):
            scores[name] = [float(session.infer({"image": image[None]})[NOVELTY][0, 0]) for image in images]
    usual = np.array(scores["usual"])
    statistics = {}
    for name, values in scores.items():
        others = np.array(values)
        low, high = interval(usual, others)
        statistics[name] = {
            "auroc": area(usual, others),
            "low": low,
            "high": high,
            "above_1": float((others > 1).mean()),
        }
    table = [
        [name, str(len(scores[name])), f"{x['auroc']:.3f}", f"{x['low']:.3f} to {x['high']:.3f}", f"{x['above_1']:.0%}"]
        for name, x in statistics.items()
    ]  # fmt: skip
    print_table(f"against {len(usual)} photographs", ["", "images", "AUROC", "95 %", "above 1"], table)
    for kind, names in (("far", FAR), ("near", NEAR)):
        pooled = area(usual, np.concatenate([scores[name] for name in names]))
        statistics[kind] = {"auroc": pooled}
        click.echo(f"{kind} sets together: {pooled:.3f}, required {REQUIRED[kind]}")
    _write(work, output, "novelty", {"size": SIZE, "far": list(FAR), "near": list(NEAR)}, scores, statistics)


def layers(work: Path) -> None:
    """What layer and statistics were chosen by: usual are crops of every third photograph to train on, and the
    eight of development; the Gaussian is of the others.
    """
    found, crops = se.load_student(student(work)), sorted((photographs(work) / "train").iterdir())
    numbers = sorted({path.name.partition("-")[0] for path in crops})
    held = [path for path in crops if path.name.partition("-")[0] in numbers[::3]]
    fitted = [path for path in crops if path not in held]
    table = []
    with tempfile.TemporaryDirectory() as folder:
        files = {"fitted": fitted}
        for name, images in sets([*evenly(held, 60), *split.development()], "train", 0):
            files[name] = [Path(folder) / f"{name}{number}.png" for number in range(len(images))]
            for path, image in zip(files[name], images, strict=True):
                Image.fromarray(image).save(path)
        for layer in range(6):
            rows = {name: statistics(found, paths, layer) for name, paths in files.items()}
            for how in ("deviation", "logarithm"):
                seen = {name: _as(x, how) for name, x in rows.items()}
                density = fit_density(seen.pop("fitted"))
                scores = {name: novelty(density, x) for name, x in seen.items()}
                usual = scores.pop("usual")
                table.append([f"{layer}, {how}", *(f"{area(usual, x):.3f}" for x in scores.values())])
    print_table("AUROC on development images", ["after layer", *scores], table)


def _as(rows: Array, how: str) -> Array:
    """Statistics with the deviations themselves, or with their logarithms."""
    half = rows.shape[1] // 2
    return rows if how == "logarithm" else np.concatenate([rows[:, :half], np.exp(rows[:, half:])], 1)


@main.command()
@_work
@_output
@click.option("--seconds", default=60.0, show_default=True, help="Least time measured per bundle.")
def cost(work: Path, output: Path | None, seconds: float) -> None:
    """Time of a bundle beside the same without the score, in turns."""
    both = bundle(work), bundle(work, "without", novelty=False)
    with progress_bar("cost") as progress:
        result = se.profile_bundle(both[0], against=both[1], seconds=seconds, layers=False, progress=progress)
    click.echo(write_record(result.statistics)["comparison"]["sentence"])
    share = nodes_share(both[0])
    click.echo(
        f"its nodes take {share:.2%} of a run by ONNX Runtime's profiler; required: {REQUIRED['cost']:.0%} at most"
    )
    if output:
        statistics = write_record(result.statistics) | {"nodes_share": share}
        subjects = [replace(subject, path=Path(str(subject.path)).name) for subject in result.subjects]
        found = Result("comparison", subjects, result.method, result.samples, statistics)
        write_summary(output / "novelty_cost.json", found, method=brief(write_record(result.method)))


def nodes_share(folder: Path) -> float:
    """Of the time of all nodes, what those of the score take."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = available_cores(), True
    options.register_custom_ops_library(str(native.library_path()))
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = f"{scratch}/profile"
        session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        for _ in range(PROFILED):
            session.run(None, {"image": smooth_images(SIZE)})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    own = sum(event["dur"] for event in nodes if event["name"].startswith(f"{NOVELTY}."))
    return float(own / sum(event["dur"] for event in nodes))


def _write(work: Path, output: Path | None, name: str, method: Any, samples: Any, statistics: Any) -> None:
    if output:
        subjects = [replace(open_bundle(bundle(work)).subject(), path="bundle")]
        write_summary(output / f"{name}.json", Result("comparison", subjects, method, samples, statistics))


if __name__ == "__main__":
    main()
