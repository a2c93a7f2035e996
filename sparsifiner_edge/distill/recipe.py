"""Training recipes: all settings of a training as validated TOML, with overrides by name."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from sparsifiner_edge.artifacts import parse_toml, read_toml
from sparsifiner_edge.bounds import MOST_COUNT
from sparsifiner_edge.config import SparsityConfig, parse_keep, parse_merge, parse_token_keep
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.images import evenly
from sparsifiner_edge.pareto import SearchResult
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.records import read_record
from sparsifiner_edge.results import read_result

DEFAULT = "cpu"
"""Recipe that is used by default."""
_FOLDER = "sparsifiner_edge.recipes"
"""Package in which the built-in recipes (`export/recipes`) are installed."""
_DOCUMENT = "See docs/distillation.md for the form."
"""Fix for a recipe that cannot be read."""
Steps = Annotated[int, Meta(ge=0, le=MOST_COUNT)]
"""Number of optimiser steps."""
Every = Annotated[int, Meta(ge=1, le=MOST_COUNT)]
"""Interval in optimiser steps."""
Share = Annotated[float, Meta(ge=0, le=1)]
"""Share from 0 to 1."""
Weight = Annotated[float, Meta(ge=0, le=1e300)]
"""Weight of a loss or a penalty."""


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Phase of a training. The learning rates warm up linearly and then fall along a cosine.

    Attributes:
        steps: Optimiser steps. Either this or `epochs` is 0.
        epochs: Passes over the images. Either this or `steps` is 0.
        learning_rate: Highest learning rate of the backbone.
        predictor_learning_rate: Highest learning rate of the predictor.
        final: Share of the learning rates that is left at the end.
        warmup: Share of the steps during which the learning rates rise.
    """

    steps: Steps = 0
    epochs: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    learning_rate: Share = 2e-6
    predictor_learning_rate: Share = 1e-3
    final: Share = 0.01
    warmup: Share = 0.05

    def factor(self, share: float) -> float:
        """Return the factor of the highest learning rates after a share of the steps."""
        if share <= self.warmup:
            return share / self.warmup
        decay = 0.5 + 0.5 * math.cos(math.pi * (share - self.warmup) / (1 - self.warmup + 1e-9))
        return self.final + (1 - self.final) * decay


class Losses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights of the losses; 0 disables one.

    Attributes:
        patches: 1 - cosine between the final patch tokens of student and teacher.
        classes: 1 - cosine between the final prefix tokens of student and teacher.
        tokens: Mean squared error of the final patch tokens (Sparsifiner, equation 8, and its code).
        logits: Kullback-Leibler divergence of the class probabilities from the teacher's.
        labels: Cross-entropy with the labels, with --labels.
        outputs: Squared error of the outputs of the module around the backbone, such as a decoder's maps, relative to
            the variance of the teacher's.
        selection: Loss of the predictor. The predictor shares no parameters with the other losses, so the weight
            matters only for gradient clipping. 0 saves the time to compute it.
        relative: Scale `patches`, `classes` and `outputs` image by image by their own value, so that the logarithm of
            the error is minimised. Small shares of keys and some images cause errors ten times those of others. Without
            this setting they would be reduced at the cost of all others.
    """

    patches: Weight = 1.0
    classes: Weight = 0.5
    tokens: Weight = 0.0
    logits: Weight = 0.5
    labels: Weight = 1.0
    outputs: Weight = 0.5
    selection: Weight = 1.0
    relative: bool = False


MOST_POINTS = 6
"""Most budgets that are taken from a search for one training."""
NEAR = 3.0
"""Largest ratio, in either direction, between the error of a point and that of the search's answer."""


class RecipeBudget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Budget that the student is trained for. Each value has the form that `export` takes; "" keeps the student's own.

    Attributes:
        keep: One share of keys for the sparse layers of the student, or shares by layer.
        merge: Numbers of token pairs that merge.
        token_keep: Layers and shares of token pruning.
    """

    keep: str = ""
    merge: str = ""
    token_keep: str = ""

    def config(self, student: SparsityConfig, plan: LayerPlan) -> SparsityConfig:
        """Return the settings of a student with this budget.

        Args:
            student: The student's own settings.
            plan: The student's own plan by layer.

        Raises:
            ConfigError: If keep, merge or token_keep is invalid, or if token_keep differs from that of a student which
                prunes tokens.
        """
        keep = parse_keep(self.keep) if self.keep else student.keep
        if student.keep == 1:  # Dense layers have no predictor and stay dense.
            keep = student.keep
        elif isinstance(keep, float) and 1 in plan.keep:
            keep = tuple(1.0 if share == 1 else keep for share in plan.keep)
        merge = parse_merge(self.merge) if self.merge else student.merge
        pruned = parse_token_keep(self.token_keep) or student.token_keep
        if student.token_keep not in ((), pruned):
            raise ConfigError(
                f"A budget has token_keep {self.token_keep}, but the student already prunes other tokens.",
                "Leave token_keep out, or start from a student that keeps all tokens.",
            )
        return dataclasses.replace(student, keep=keep, merge=merge, token_keep=pruned)


class Images(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Image augmentation and loading.

    Attributes:
        smallest_crop: Smallest share of an image's area in a random crop. 1 takes the complete centre of the image.
        flip: Mirror half of the images.
        auto_augment: timm's policy, such as "rand-m9-mstd0.5-inc1" (RandAugment, Cubuk et al. 2020), or "" for none.
        erasing: Share of the images in which a rectangle is replaced by noise (Zhong et al. 2020).
        mixup: Parameter of the Beta distribution of mixup (Zhang et al. 2018), which mixes images and labels. 0
            disables it. With `mixup_cut` as well, the two alternate at random.
        mixup_cut: Parameter of the Beta distribution of CutMix (Yun et al. 2019). 0 disables it.
        mixed: Share of the batches that are mixed. Mixing makes many scenes of a few images; the teacher sees the same
            mixture.
        smoothing: Share of each label that is distributed over all classes.
        held_out: Number of images of the folder that are not trained on and that select the best checkpoint.
        workers: Number of processes that read images. 0 reads them in the training process.
    """

    smallest_crop: Annotated[float, Meta(ge=0.01, le=1)] = 0.35
    flip: bool = True
    auto_augment: Annotated[str, Meta(max_length=100)] = ""
    erasing: Share = 0.0
    mixup: Weight = 0.0
    mixup_cut: Weight = 0.0
    mixed: Share = 1.0
    smoothing: Share = 0.0
    held_out: Annotated[int, Meta(ge=1, le=4096)] = 32
    workers: Annotated[int, Meta(ge=0, le=256)] = 0


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of a training.

    Attributes:
        seed: Seed of all random numbers.
        batch: Images per process and step.
        epsilon: Epsilon of Adam for the backbone, which is added to the root of the mean squared gradients. A value
            above the noise of the gradients keeps weights with noisy gradients from moving as far as all others.
        weight_decay: Weight decay of the backbone's matrices.
        predictor_weight_decay: Weight decay of the predictor.
        clip: Largest gradient norm, for backbone and predictor separately. 0 disables clipping.
        ema: Decay of the averaged weights, which are evaluated and kept. 0 uses the weights themselves.
        freeze_decoder: Leave everything around the backbone unchanged.
        precision: "no" (float32), or "bf16" (autocast).
        best: Metric that selects the weights to keep: "cosine" to the teacher's tokens, or "top1" accuracy on the
            held-out images. Without labels, "top1" uses the cosine, too.
        check_every: Steps between evaluations on the held-out images.
        save_every: Steps between checkpoints.
        reconstruct: First phase, which trains the predictor only, with dense attention.
        distil: Second phase, which trains everything.
        losses: Weights of the losses.
        budgets: Budgets to train for; each step takes one of them. Empty takes the student's own.
        images: Image augmentation and loading.
    """

    seed: Annotated[int, Meta(ge=0, le=2**31)] = 0
    batch: Annotated[int, Meta(ge=1, le=65536)] = 8
    epsilon: Annotated[float, Meta(ge=1e-12, le=1)] = 1e-8
    weight_decay: Weight = 0.0
    predictor_weight_decay: Weight = 0.0
    clip: Weight = 1.0
    ema: Annotated[float, Meta(ge=0, le=0.999999)] = 0.0
    freeze_decoder: bool = False
    precision: Annotated[str, Meta(pattern="^(no|bf16)$")] = "no"
    best: Annotated[str, Meta(pattern="^(cosine|top1)$")] = "cosine"
    check_every: Every = 100
    save_every: Every = 50
    reconstruct: Phase = Phase(learning_rate=0.0)
    distil: Phase = Phase(steps=1000)
    losses: Losses = Losses()
    budgets: tuple[RecipeBudget, ...] = ()
    images: Images = Images()


def names() -> list[str]:
    """Return the names of the built-in recipes."""
    folder = importlib.resources.files(_FOLDER)
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_recipe(source: str = DEFAULT, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        source: Name of a built-in recipe, or path of a TOML file.
        overrides: Settings such as "distil.steps=500" or "clip=0.5".

    Raises:
        ConfigError: If there is no such recipe, the file is not TOML, a name is unknown, or a value has the wrong type
            or is out of range.
    """
    content = _content(source)
    for override in overrides:
        _set(content, override)
    recipe = read_record(content, Recipe, "The recipe", _DOCUMENT, ConfigError)
    for name, phase in (("reconstruct", recipe.reconstruct), ("distil", recipe.distil)):
        if phase.steps and phase.epochs:
            raise ConfigError(f"{name} has both steps and epochs.", "Set one of them to 0.")
    if not any(phase.steps or phase.epochs for phase in (recipe.reconstruct, recipe.distil)):
        raise ConfigError("The recipe has no training steps.", "Give distil.steps or distil.epochs.")
    return recipe


def pareto_budgets(path: Path) -> str:
    """Return an override that trains a student for points of a search's Pareto front, evenly taken near its answer.

    Args:
        path: Result file of the search.

    Raises:
        ArtifactError: If the file is not the result of a search.
        ConfigError: If the front has no point to train for.
    """
    search = read_result(path, SearchResult).statistics
    points = sorted((point for point in search.points if point.pareto_optimal), key=lambda point: point.fidelity)
    if search.finalists:
        error = 1 - search.finalists[0].fidelity
        points = [point for point in points if error / NEAR <= 1 - point.fidelity <= error * NEAR]
    if not points:
        raise ConfigError(f"{path} has no point to train for.", "Search again with another bound.")
    chosen = evenly(points, MOST_POINTS)
    rows = (f"{{merge = {json.dumps(point.merge)}, keep = {json.dumps(point.keep)}}}" for point in chosen)
    return f"budgets=[{', '.join(rows)}]"


def _set(content: dict[str, Any], override: str) -> None:
    """Apply an override such as "distil.steps=500" to the content of a recipe."""
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override!r} has no value.", "Give NAME=VALUE, such as distil.steps=500.")
    *path, last = name.strip().split(".")
    section: Any = content
    for part in path:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override!r}: {part} is not a section of the recipe.", _DOCUMENT)
    try:
        section[last] = parse_toml(f"x = {text.strip()}", text, _DOCUMENT)["x"]
    except ConfigError:
        section[last] = text.strip()  # Strings need no quotes on a command line.


def _content(source: str) -> Any:
    """Return the content of a built-in recipe or a TOML file."""
    if source in names():
        file = importlib.resources.files(_FOLDER).joinpath(f"{source}.toml")
        return parse_toml(file.read_text("utf-8"), source, _DOCUMENT)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"There is no recipe {source!r}.", f"Give a TOML file, or one of: {', '.join(names())}.")
    return read_toml(path, f"Give a TOML file in UTF-8. {_DOCUMENT}")
