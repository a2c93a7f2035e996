"""Test data, each made once: used as fixtures in `conftest.py` and as valid inputs by `tests.fuzz`.

Heavy packages are imported where they are used: some tests run without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

SHORT = (
    "distil.steps=6",
    "batch=2",
    "check_every=3",
    "save_every=2",
    "images.held_out=2",
    "ema=0.9",
    'budgets=[{keep="0.1"},{keep="0.2"}]',
)
"""Configuration overrides for a training of about one second."""
SHORT_OPTIONS = " ".join(f"--set {override}" for override in SHORT)


def draw_pictures(folder: Path) -> None:
    """Write three small images: picture0.png and so on."""
    import numpy as np
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (60 + number, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"picture{number}.png")


def draw_classes(folder: Path) -> None:
    """Write twelve smooth images in two classes."""
    import numpy as np
    from PIL import Image

    for number in range(12):
        coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        path = folder / ("cats" if number % 2 else "dogs") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((180, 170), Image.Resampling.BICUBIC).save(path)


def save_weights(path: Path, classes: int) -> None:
    """Save the weights of timm's smallest model; 0 classes: without classifier."""
    import safetensors.torch

    from tests.models import vit

    safetensors.torch.save_file(vit(num_classes=classes).state_dict(), path)


def make_keys(folder: Path) -> None:
    """Write key.pem, key.pub, other.pem and other.pub."""
    from sparsifiner_edge.bundle.sign import generate_key

    for name in ("key", "other"):
        generate_key(folder / f"{name}.pem")


def plain(folder: Path) -> None:
    """Write a bundle of a few MatMuls, which opens quickly."""
    from sparsifiner_edge.costs import ModelShape
    from tests.seal import reseal
    from tests.tiny import make_bundle

    more = {"preprocessing": {"size": 8}, "shape": dataclasses.asdict(ModelShape(1, 1, 8, 8, 0, 64, 1))}
    make_bundle(folder, size=8, function=True, **more)
    (folder / "labels.txt").write_text("cat\ndog\n")
    reseal(folder)


def student(folder: Path) -> None:
    from sparsifiner_edge.sparse.student import sparsify
    from tests.models import TINY

    save_weights(folder.parent / "weights.safetensors", 10)
    sparsify(TINY, folder, weights=folder.parent / "weights.safetensors", background_tokens=4)


def bundle(folder: Path) -> None:
    """Write a bundle with `export`."""
    from tests.flat import export_bundle

    export_bundle(folder.parent / "student", folder)


def results(folder: Path) -> None:
    """Write results that `report` accepts."""
    from sparsifiner_edge.results import write_result
    from tests.flat import evaluate_student, profile_bundle

    whole, small, images = (folder.parent / name for name in ("bundle", "plain", "images"))
    made = {
        "comparison": profile_bundle(whole, against=small, seconds=0.3, threads=1),
        "profile": profile_bundle(small, seconds=0.2, threads=1),
        "evaluation": evaluate_student(whole, images, against=whole),
    }
    for name, result in made.items():
        write_result(folder / f"{name}.json", result)


def training(folder: Path) -> None:
    """Write an interrupted training with its checkpoint and history."""
    from sparsifiner_edge.sparse.student import save_student
    from tests.flat import distill_student
    from tests.models import student as make_student

    good = folder.parent
    draw_classes(good / "data")
    save_student(make_student(num_classes=2), good / "start")

    class StopError(Exception):
        pass

    def stop(_stage: str, done: float, _total: float) -> None:
        if done == 5:
            raise StopError

    with contextlib.suppress(StopError):
        distill_student(good / "start", good / "data", good / "out", overrides=SHORT, progress=stop)
    assert (good / "out.training").is_dir(), "the training was not cut short"


MAKERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "images": (draw_pictures, ()),
    "plain": (plain, ()),
    "keys": (make_keys, ()),
    "student": (student, ()),
    "bundle": (bundle, ("student",)),
    "results": (results, ("bundle", "plain", "images")),
    "training": (training, ()),
}
"""Maps a folder name to the function that makes it and the folders it needs."""


def make(good: Path, names: tuple[str, ...]) -> None:
    """Make a folder and those it needs, unless they exist."""
    good.mkdir(parents=True, exist_ok=True)
    for name in names:
        maker, needs = MAKERS[name]
        make(good, needs)
        done = good / f".{name}"
        if not done.exists():
            maker(good / name)
            done.touch()


def install_plugin(site: Path, monkeypatch: pytest.MonkeyPatch, group: str, **points: str) -> None:
    """Write a package to `site` as if installed, with entry points of `sparsifiner_edge.<group>` (name to object)."""
    info = site / "foreign-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1\n")
    lines = "".join(f"{name} = {point}\n" for name, point in points.items())
    (info / "entry_points.txt").write_text(f"[sparsifiner_edge.{group}]\n{lines}")
    monkeypatch.syspath_prepend(site)
