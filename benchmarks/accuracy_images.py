"""Images for benchmarks (crops of photographs, and Fashion-MNIST), and trainings on them.

Every sixth photograph is held out with all its crops, and some of them select the checkpoint to keep. (One wallpaper
comes in two sizes, one on each side.)
"""

from __future__ import annotations

import dataclasses
import gzip
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from sparsifiner_edge import ModelOptions, TrainingOptions
from sparsifiner_edge.cli.common import group, progress_bar
from sparsifiner_edge.demo import split
from sparsifiner_edge.distill.checkpoint import CHECKPOINT
from sparsifiner_edge.distill.distill import distill_student
from sparsifiner_edge.errors import ImageError
from sparsifiner_edge.images import evenly, open_image

SIZE = 224
DETAIL = 5.0
"""Minimum mean difference of neighbouring pixels (of 255) in a crop: flatter ones are skies and abstract art."""
CROPS, FASHION_IMAGES, GALLERY = 30, 300, 5000
MORE_FASHION = 10100
"""Number of Fashion-MNIST images for the training `tokens`, none of them in the gallery; every 101st is held out."""
HELD_OUT = 6
"""One of this many photographs is held out."""
FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017) as Debian packages it: apt-get install dataset-fashion-mnist."""


@dataclasses.dataclass(frozen=True)
class Clothes:
    """Images uint8 [n,28,28] and their class numbers."""

    images: Any
    labels: Any
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Clothes:
        """Return at most `count` of them, evenly spaced."""
        taken = evenly(range(len(self.labels)), count)
        return dataclasses.replace(self, images=self.images[taken], labels=self.labels[taken])

    def load(self, number: int, size: int) -> Any:
        """Load an image as uint8 [size,size,3]."""
        image = Image.fromarray(self.images[number]).convert("RGB")
        return np.array(image.resize((size, size), Image.Resampling.BICUBIC))


def fashion_mnist(split: str) -> Clothes:
    """Read Fashion-MNIST; split: "train" or "test"."""
    prefix = "train" if split == "train" else "t10k"
    images = _read(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = _read(f"{prefix}-labels-idx1-ubyte.gz", 8).astype(np.int64)
    return Clothes(images, labels, f"fashion-mnist {split}")


def _read(name: str, header: int) -> Any:
    path = FASHION / name
    if not path.is_file():
        raise ImageError(f"{path} does not exist.", "Debian, Ubuntu: apt-get install dataset-fashion-mnist")
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def collect(folder: Path) -> Path:
    """Write the training images to `train` and those that select the checkpoint to `held-out`."""
    if folder.exists():
        return folder
    made = folder.with_suffix(".part")
    shutil.rmtree(made, ignore_errors=True)  # of an interrupted run
    scratch = made / "train"
    write_photographs(made, SIZE)
    for path in split.images("calibration"):
        (scratch / path.name).symlink_to(path)
    fashion = fashion_mnist("train").first(FASHION_IMAGES)
    for number in range(len(fashion)):
        Image.fromarray(fashion.load(number, 28)).save(scratch / f"fashion{number:04d}.png")
    made.rename(folder)
    return folder


def write_photographs(folder: Path, size: int) -> None:
    """Write crops of each photograph for training at `size` to `train`, and some of held-out ones to `held-out`."""
    names = ("whole", "crop1", "crop2", "crop3")
    for part in ("train", "held-out"):
        (folder / part).mkdir(parents=True)
    for number, path in enumerate(split.training()):
        decides = number % HELD_OUT == 0
        for name, picture in _crops(path, number, size):
            if not decides or name in names:
                file = f"photograph{number:03d}-{name}.jpg"
                picture.save(folder / ("held-out" if decides else "train") / file, quality=95)


def photographs_at(folder: Path, size: int) -> Path:
    """Return the folder of `write_photographs`, made once."""
    if not folder.exists():
        made = folder.with_suffix(".part")
        shutil.rmtree(made, ignore_errors=True)
        write_photographs(made, size)
        made.rename(folder)
    return folder


def distilled(start: Path, pictures: Path, output: Path, held_out: Path, **options: Any) -> None:
    """Train a sparse model into `output` unless it exists; resume an interrupted training."""
    if output.exists():
        return
    began, checkpoint = time.monotonic(), output.with_name(f"{output.name}.training") / CHECKPOINT
    options |= {"held_out": held_out, "resume": checkpoint.exists()}
    groups = group(options, model=ModelOptions, options=TrainingOptions)
    with progress_bar(output.name) as progress:
        summary = distill_student(start, pictures, output, progress=progress, **groups)
    minutes = (time.monotonic() - began) / 60
    click.echo(f"{output.name}: {minutes:.1f} minutes, {summary.start} to {summary.best}, kept {summary.kept}")


def collect_fashion(folder: Path, others: Path) -> Path:
    """Write the images of `collect` with many more of Fashion-MNIST."""
    if folder.exists():
        return folder
    made = folder.with_suffix(".part")
    shutil.rmtree(made, ignore_errors=True)
    for part in ("train", "held-out"):
        (made / part).mkdir(parents=True)
        for path in (others / part).iterdir():
            if not path.name.startswith("fashion"):
                (made / part / path.name).symlink_to(path.resolve())
    fashion = fashion_mnist("train")
    gallery = set(evenly(range(len(fashion)), GALLERY))
    for place, number in enumerate(evenly([n for n in range(len(fashion)) if n not in gallery], MORE_FASHION)):
        part = "train" if place % 101 else "held-out"
        Image.fromarray(fashion.load(number, 28)).save(made / part / f"fashion{place:04d}.png")
    made.rename(folder)
    return folder


def _crops(path: Path, seed: int, size: int) -> Iterator[tuple[str, Any]]:
    """Return the centre square and random squares, at up to twice the training size."""
    rng = np.random.default_rng(seed)
    picture = open_image(path)
    short = min(picture.size)
    for number in range(CROPS + 1):
        side = short if number == 0 else int(short * rng.uniform(0.2, 0.7))
        left, top = (int((length - side) * (0.5 if number == 0 else rng.random())) for length in picture.size)
        crop = picture.crop((left, top, left + side, top + side)).resize((min(side, 2 * size),) * 2)
        grey = np.asarray(crop.resize((SIZE, SIZE)).convert("L"), dtype=float)
        if np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean() >= 2 * DETAIL:
            yield ("whole" if number == 0 else f"crop{number}"), crop


def linked(folder: Path, paths: Sequence[Path]) -> Path:
    """Return a folder with links to the images."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    return folder
