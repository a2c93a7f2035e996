"""Recipes: every number of a training, as validated TOML; each can be overridden by name."""

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
from sparsifiner_edge.front import SearchResult
from sparsifiner_edge.images import evenly
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.records import read_record
from sparsifiner_edge.results import read_result

DEFAULT = "cpu"
_FOLDER = "sparsifiner_edge.recipes"
"""Where `export/recipes` is installed."""
_DOCUMENT = "See docs/distillation.md for the form."
Steps = Annotated[int, Meta(ge=0, le=MOST_COUNT)]
Every = Annotated[int, Meta(ge=1, le=MOST_COUNT)]
Share = Annotated[float, Meta(ge=0, le=1)]
Weight = Annotated[float, Meta(ge=0, le=1e300)]


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stretch of training; learning rates warm up linearly, then fall along a cosine.

    Attributes:
        steps, epochs: optimiser steps, or passes over the images; one of them is 0.
        learning_rate, predictor_learning_rate: highest, of the backbone and of the predictor.
        final: share of the learning rates that is left at the end.
        warmup: share of the steps that the learning rates rise.
    """

    steps: Steps = 0
    epochs: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    learning_rate: Share = 2e-6
    predictor_learning_rate: Share = 1e-3
    final: Share = 0.01
    warmup: Share = 0.05

    def factor(self, share: float) -> float:
        """Of the highest learning rates, what they are after a share of the steps."""
        if share <= self.warmup:
            return share / self.warmup
        decay = 0.5 + 0.5 * math.cos(math.pi * (share - self.warmup) / (1 - self.warmup + 1e-9))
        return self.final + (1 - self.final) * decay


class Losses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights of the losses; 0 leaves one out.

    Attributes:
        patches, classes: 1 - cosine of final patch tokens, and of the tokens before them, to the teacher's.
        tokens: mean squared error of the final patch tokens (Sparsifiner, equation 8, and its code).
        logits: Kullback-Leibler divergence of the classes from the teacher's. labels: cross-entropy, with --labels.
        outputs: squared error of what is around the backbone, a decoder's maps, relative to the teacher's variance.
        selection: of the predictor, which has parameters of its own: the weight matters for clipping alone; 0 spares
            the time.
        relative: whether `patches`, `classes` and `outputs` count, image by image, by the share of themselves that goes
            away (their logarithm). Few keys, and some images, make errors ten times those of others, which would else
            be learnt at the cost of all others.
    """

    patches: Weight = 1.0
    classes: Weight = 0.5
    tokens: Weight = 0.0
    logits: Weight = 0.5
    labels: Weight = 1.0
    outputs: Weight = 0.5
    selection: Weight = 1.0
    relative: bool = False


MOST_POINTS, NEAR = 6, 3.0
"""Budgets of one training at most; how many times what the answer loses they may lose, or how little of it."""


class RecipeBudget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the student learns to work with, each as `export` takes it; "": the student's own.

    Attributes:
        keep: a share of keys, for the layers that are sparse in the student, or shares by layer.
        merge: what merges. token_keep: places and shares of token pruning.
    """

    keep: str = ""
    merge: str = ""
    token_keep: str = ""

    def config(self, student: SparsityConfig, plan: LayerPlan) -> SparsityConfig:
        """Of a student with this budget; plan: the student's own.

        Raises:
            ConfigError: no such keep, merge or token_keep; or other pruning than the student's own is to be learnt.
        """
        keep = parse_keep(self.keep) if self.keep else student.keep
        if student.keep == 1:  # Layers that are dense have no predictor, and stay dense.
            keep = student.keep
        elif isinstance(keep, float) and 1 in plan.keep:
            keep = tuple(1.0 if share == 1 else keep for share in plan.keep)
        merge = parse_merge(self.merge) if self.merge else student.merge
        pruned = parse_token_keep(self.token_keep) or student.token_keep
        if student.token_keep not in ((), pruned):
            raise ConfigError(
                f"A budget's token_keep is {self.token_keep}, but this student prunes tokens by itself.",
                "Leave it out, or begin with a student that keeps all tokens.",
            )
        return dataclasses.replace(student, keep=keep, merge=merge, token_keep=pruned)


class Images(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is done to images.

    Attributes:
        smallest_crop: share of an image's area that a random crop has at least; 1: its centre, whole.
        flip: whether half of them are mirrored.
        auto_augment: timm's policy, such as "rand-m9-mstd0.5-inc1" (RandAugment, Cubuk et al. 2020); "": none.
        erasing: share of the images a rectangle of which becomes noise (Zhong et al. 2020).
        mixup, mixup_cut: parameters of the Beta distributions that batches are mixed by, with their labels: of mixup
            (Zhang et al. 2018) and of CutMix (Yun et al. 2019), by turns where both are; 0: never. mixed: share of the
            batches. A few images make many scenes so; the teacher answers for the mixture.
        smoothing: share of a label that all classes have in common.
        held_out: images taken out of the folder, that are never trained on and decide which checkpoint is best.
        workers: processes that read images; 0: the training's own.
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
    """A training.

    Attributes:
        seed: of everything that is drawn.
        batch: images per process and step.
        epsilon: of Adam, for the backbone: what is added to the root of its mean squared gradients. Large against
            gradients that are mostly noise, it keeps them from moving their weights as far as all others.
        weight_decay, predictor_weight_decay: of matrices.
        clip: norm that gradients are cut to, backbone and predictor apart; 0: never.
        ema: decay of the averaged weights, which are those that are judged and kept; 0: the weights themselves.
        freeze_decoder: whether what is around the backbone stays as it is.
        precision: "no" (float32), or "bf16" autocast.
        best: what decides which weights are kept: "cosine" to the teacher's tokens, or "top1" of the held-out images;
            without labels that is the cosine, too.
        check_every: steps between judgements on the held-out images. save_every: steps between checkpoints.
        reconstruct: first, the predictor alone, while all attention is dense. distil: then everything.
        budgets: each step takes one of them; none: the student's own.
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
    """Recipes that come with the package."""
    folder = importlib.resources.files(_FOLDER)
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_recipe(source: str = DEFAULT, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or from a TOML file, with `overrides` such as "distil.steps=500" or "clip=0.5".

    Raises:
        ConfigError: no such recipe, no TOML, a name is unknown, or a value is of the wrong type or out of range.
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


def front_budgets(path: Path) -> str:
    """An override that trains a student for the points of a search's front: those near its answer, some of them.

    Raises:
        ArtifactError: not the result of a search.
        ConfigError: the search found nothing to train for.
    """
    search = read_result(path, SearchResult).statistics
    points = sorted((point for point in search.points if point.on_front), key=lambda point: point.fidelity)
    if search.finalists:
        lost = 1 - search.finalists[0].fidelity
        points = [point for point in points if lost / NEAR <= 1 - point.fidelity <= lost * NEAR]
    if not points:
        raise ConfigError(f"{path} has no point to train for.", "Search again, with another bound.")
    chosen = evenly(points, MOST_POINTS)
    rows = (f"{{merge = {json.dumps(point.merge)}, keep = {json.dumps(point.keep)}}}" for point in chosen)
    return f"budgets=[{', '.join(rows)}]"


def _set(content: dict[str, Any], override: str) -> None:
    """Put the value of an override such as "distil.steps=500" in its place."""
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override!r} has no value.", "Give NAME=VALUE, such as distil.steps=500.")
    *path, last = name.strip().split(".")
    section: Any = content
    for part in path:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override!r}: {part} is not a section.", "See the recipe's names.")
    try:
        section[last] = parse_toml(f"x = {text.strip()}", text, _DOCUMENT)["x"]
    except ConfigError:
        section[last] = text.strip()  # strings need no quotes on a command line


def _content(source: str) -> Any:
    if source in names():
        file = importlib.resources.files(_FOLDER).joinpath(f"{source}.toml")
        return parse_toml(file.read_text("utf-8"), source, _DOCUMENT)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"There is no recipe {source!r}.", f"Name a TOML file, or one of: {', '.join(names())}.")
    return read_toml(path, f"Give a TOML file in UTF-8. {_DOCUMENT}")
