"""Good examples that tries are made from, each made once, with the project itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from tests.made import draw_classes, draw_pictures, make_keys, save_weights

SHORT = (
    "distil.steps=6", "batch=2", "check_every=3", "save_every=2", "images.held_out=2", "ema=0.9",
    'budgets=[{keep="0.1"},{keep="0.2"}]',
)  # fmt: skip
"""Overrides of a training of a second."""
SHORT_OPTIONS = " ".join(f"--set {override}" for override in SHORT)


def images(good: Path) -> None:
    draw_pictures(good / "images")


def plain(good: Path) -> None:
    """A bundle of a few products: quick to open."""
    from sparsifiner_edge.costs import ModelShape
    from tests.package.reseal import reseal
    from tests.tiny import make_bundle

    more = {"preprocessing": {"size": 8}, "shape": dataclasses.asdict(ModelShape(1, 1, 8, 8, 0, 64, 1))}
    make_bundle(good / "plain", size=8, function=True, **more)
    (good / "plain" / "labels.txt").write_text("cat\ndog\n")
    reseal(good / "plain")


def keys(good: Path) -> None:
    make_keys(good / "keys")


def student(good: Path) -> None:
    from sparsifiner_edge.sparse.student import sparsify
    from tests.models import TINY

    save_weights(good / "weights.safetensors", 10)
    sparsify(TINY, good / "student", weights=good / "weights.safetensors", cells=4)


def bundle(good: Path) -> None:
    """A bundle as `export` makes it."""
    from sparsifiner_edge.export.export import export_bundle

    export_bundle(good / "student", good / "bundle")


def results(good: Path) -> None:
    """One result of each kind."""
    from sparsifiner_edge.evaluate.evaluate import evaluate_student
    from sparsifiner_edge.profiles.estimate import estimate_bundle
    from sparsifiner_edge.profiles.profile import profile_bundle
    from sparsifiner_edge.results import write_result

    made = {
        "comparison": profile_bundle(good / "bundle", against=good / "plain", seconds=0.3, threads=1),
        "profile": profile_bundle(good / "plain", seconds=0.2, threads=1),
        "evaluation": evaluate_student(good / "bundle", good / "images", against=good / "bundle"),
        "estimate": estimate_bundle(good / "bundle", "jetson-orin-nano-8gb"),
    }
    for name, result in made.items():
        write_result(good / "results" / f"{name}.json", result)


def training(good: Path) -> None:
    """A training that was cut short, with its checkpoint and history."""
    from sparsifiner_edge.distill.distill import distill_student
    from sparsifiner_edge.sparse.student import save_student
    from tests.models import student as make

    draw_classes(good / "data")
    save_student(make(num_classes=2), good / "start")

    class StopError(Exception):
        pass

    def stop(_stage: str, done: float, _total: float) -> None:
        if done == 5:
            raise StopError

    try:
        distill_student(good / "start", good / "data", good / "out", overrides=SHORT, progress=stop)
    except StopError:
        return
    raise AssertionError("the training was not cut short")


MAKERS: dict[str, Callable[[Path], None]] = {
    "images": images, "plain": plain, "keys": keys, "student": student, "bundle": bundle, "results": results,
    "training": training,
}  # fmt: skip
_NEEDS = {"bundle": ("student",), "results": ("bundle", "plain", "images")}


def make(good: Path, names: tuple[str, ...]) -> None:
    """Make what is named and what that needs, unless it is there."""
    good.mkdir(parents=True, exist_ok=True)
    for name in names:
        make(good, _NEEDS.get(name, ()))
        done = good / f".{name}"
        if not done.exists():
            MAKERS[name](good)
            done.touch()
