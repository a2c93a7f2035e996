"""Images a second of `evaluate --metric top1`, from JPEGs on, beside the bare batched rate of the same two models.

    python benchmarks/evaluate_scale.py [--images 5000] [--rounds 5] [--model deit_small_patch16_224] [-o result.json]

JPEGs as ImageNet has them, 500 x 375 or upright, in ten folders: parts of the photographs that are installed. A sparse
student with random weights (time does not depend on them) and its dense twin. Each round evaluates a share of the
images, and calls the models for as many, on a float tensor that lies ready on their device, with the same batch; which
comes first is drawn anew. Every evaluation starts workers of its own, which counts. Required is a ratio of .9.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from summary import write_summary

from sparsifiner_edge.artifacts import STUDENT_FILE, sha256
from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.cli.common import output_option, print_table, progress_bar
from sparsifiner_edge.config import parse_merge
from sparsifiner_edge.demo import split
from sparsifiner_edge.errors import ImageError
from sparsifiner_edge.evaluate.classes import ClassResult
from sparsifiner_edge.evaluate.evaluate import evaluate_student
from sparsifiner_edge.images import open_image
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.sparse.hosts.timm import create
from sparsifiner_edge.sparse.student import dense_twin, load_student, sparsify

CLASSES, LONG, SHORT = 10, 500, 375
REQUIRED = 0.9
Tell = Callable[[str, float, float], None]


@click.command()
@click.option("--images", default=5000, show_default=True, type=click.IntRange(2 * CLASSES))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(2))
@click.option("--model", default="deit_small_patch16_224", show_default=True, help="Of timm.")
@click.option("--keep", default=0.25, show_default=True)
@click.option("--merge", default="0", show_default=True, help="As of sparsify.")
@click.option("--batch", type=int, help="As of evaluate.")
@click.option("--workers", type=int, help="As of evaluate.")
@output_option("Result JSON to write.", required=False)
def main(
    images: int, rounds: int, model: str, keep: float, merge: str, batch: int | None, workers: int | None,
    output: Path | None,
) -> None:  # fmt: skip
    """See the module's documentation."""
    if images < rounds * CLASSES:
        raise click.UsageError(
            f"--images {images}: give {rounds * CLASSES} or more, one of each class for every round."
        )
    with tempfile.TemporaryDirectory() as name, progress_bar("images") as tell:
        folder = Path(name)
        save_file(create(model, None, CLASSES).state_dict(), folder / "weights.safetensors")
        given = {"weights": folder / "weights.safetensors", "keep": keep, "merge": parse_merge(merge)}
        student = sparsify(model, folder / "student", **given)
        parts = [folder / f"part{number}" for number in range(rounds)]
        write_jpegs(parts, images, tell)
        samples, method = measure(student, parts, batch, workers, tell)
        subject = Subject(role="subject", kind="student", path=model, sha256=sha256(student / STUDENT_FILE))
    ratios = np.divide(samples["evaluated_per_s"], samples["bare_per_s"])
    found = stats.small_sample_mean(ratios)
    statistics = {
        "evaluated_per_s": float(np.median(samples["evaluated_per_s"])),
        "bare_per_s": float(np.median(samples["bare_per_s"])),
        "ratio": write_record(found), "required": REQUIRED,
    }  # fmt: skip
    rows = [[str(number), *(f"{x[number]:.2f}" for x in samples.values())] for number in range(rounds)]
    print_table(f"{images} JPEGs through {model}, sparse and dense: images a second", ["round", *samples], rows)
    click.echo(f"ratio {found.value:.3f} ({ratios.min():.3f} to {ratios.max():.3f} of rounds), required {REQUIRED}")
    if output:
        write_summary(output, Result("evaluation", [subject], method | {"images": images}, samples, statistics))
    raise SystemExit(0 if found.value >= REQUIRED else 1)


def write_jpegs(parts: list[Path], count: int, tell: Tell) -> None:
    """So many JPEGs in all, evenly over the folders, each of which gets every class."""
    sources = [*split.development(), *split.calibration()]
    with contextlib.suppress(ImageError):  # those that Python packages carry are enough
        sources += split.training()
    rng, number = np.random.default_rng(0), 0
    each = -(-count // len(sources))
    for path in sources:
        whole = open_image(path)
        for _ in range(min(each, count - number)):
            width, height = (LONG, SHORT) if rng.random() < 0.75 else (SHORT, LONG)
            scale = min(whole.width / width, whole.height / height) * rng.uniform(0.4, 1)
            across, down = int(width * scale), int(height * scale)
            left, top = int(rng.integers(whole.width - across + 1)), int(rng.integers(whole.height - down + 1))
            part = whole.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + across, top + down))
            folder = parts[number % len(parts)] / f"class{number // len(parts) % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            part.save(folder / f"{number:05d}.jpg", quality=90)
            number += 1
            tell("writing JPEGs", number, count)


def measure(
    student: Path, parts: list[Path], batch: int | None, workers: int | None, tell: Tell
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Images a second of either kind, by round; and how they were found."""
    draw, samples = random.Random(0), {"evaluated_per_s": list[float](), "bare_per_s": list[float]()}

    def evaluated(part: Path) -> ClassResult:
        result = evaluate_student(student, part, metric="top1", batch=batch, workers=workers, progress=tell)
        assert isinstance(result, ClassResult)
        return result

    method = evaluated(parts[0]).method  # what is done once is not timed
    at_once = (method.batch or {})["subject"]
    own = load_student(student)
    models = [own.model, dense_twin(own).model]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for model in models:
        model.eval().to(device)
    bare_per_s(models, own.img_size, at_once, 2 * at_once, device, tell)
    for number, part in enumerate(parts):
        count = sum(1 for _ in part.rglob("*.jpg"))
        for kind in draw.sample(sorted(samples), 2):
            if kind == "bare_per_s":
                samples[kind].append(bare_per_s(models, own.img_size, at_once, count, device, tell))
            else:
                samples[kind].append(evaluated(part).statistics.images_per_second or 0.0)
        click.echo(f"round {number + 1} of {len(parts)}: {samples}", err=True)
    kept = {name: getattr(method, name) for name in ("preprocessing", "batch", "workers", "processes")}
    return samples, kept | {"threads": torch.get_num_threads(), "device": device}


@torch.no_grad()
def bare_per_s(models: list[Any], size: Any, batch: int, count: int, device: str, tell: Tell) -> float:
    """Images a second through all models, on tensors that lie ready."""
    images = torch.randn(batch, 3, *height_width(size), device=device)
    begun, left = time.perf_counter(), count
    while left > 0:
        for model in models:
            model(images[:left])
        left -= batch
        tell("models alone", min(count, count - left), count)
    if device == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
