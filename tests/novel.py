"""A student with the score novelty, what it was calibrated on, and bundles of it; made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

import sparsifiner_edge as se
from tests.commands import process
from tests.models import TINY
from tests.once import Once


def draw(path: Path, number: int, cells: int = 6, low: int = 40, high: int = 200) -> None:
    """A smooth image of its own."""
    Image.fromarray(drawn(number, cells, low, high)).save(path)


def drawn(number: int, cells: int = 6, low: int = 40, high: int = 200) -> np.ndarray:
    coarse = np.random.default_rng(number).integers(low, high, (cells, cells, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((160, 160), Image.Resampling.BICUBIC))


def smooth_images(once: Once) -> Path:
    """Forty smooth images."""
    return once("smooth", lambda folder: [draw(folder / f"{n:02}.png", n) for n in range(40)])


def calibrated_student(once: Once, weights: Path) -> Path:
    """A student that merges, made by the command, and beside it what that said."""

    def make(folder: Path) -> None:
        arguments = ("--weights", weights, "--keep", ".3", "--merge", "10", "--calibrate", smooth_images(once))
        done = process("sparsify", TINY, *arguments, "-o", folder / "student")
        assert done.code == 0, done.err
        (folder / "said").write_text(done.out)

    return once("calibrated", make) / "student"


def novel_bundle(once: Once, weights: Path) -> Path:
    """That student's."""

    def make(folder: Path) -> None:
        se.export_bundle(calibrated_student(once, weights), folder / "bundle", batch="dynamic")

    return once("novel", make) / "bundle"
