"""Recipes: every number of a training, as validated TOML; each can be overridden by name."""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from sparsifiner_edge.bounds import MOST_COUNT, is_number
from sparsifiner_edge.config import parse_token_keep
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.toml import parse_toml, read_toml

DEFAULT = "cpu"
_DOCUMENT = "See docs/distillation.md for the form."
PRECISIONS = ("no", "bf16", "fp16")
LEARNS = ("all", "attention")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training; learning rates warm up linearly, then fall along a cosine.

    Attributes:
        steps, epochs: optimiser steps, or passes over the pictures; one of them is 0.
        learning_rate, predictor_learning_rate: highest, of the backbone and of the predictor.
        final: share of the learning rates that is left at the end.
        warmup: share of the steps that the learning rates rise.
    """

    steps: int = 0
    epochs: float = 0.0
    learning_rate: float = 2e-6
    predictor_learning_rate: float = 1e-3
    final: float = 0.01
    warmup: float = 0.05


@dataclasses.dataclass(frozen=True)
class Losses:
    """Weights of the losses; 0 leaves one out.

    Attributes:
        patches, classes: 1 - cosine of final patch tokens, and of the tokens before them, to the teacher's.
        tokens: mean squared error of all final tokens (Sparsifiner, equation 8).
        logits: Kullback-Leibler divergence of the classes from the teacher's. labels: cross-entropy, with --labels.
        selection: of the predictor, which has parameters of its own: the weight matters for clipping alone.
        relative: whether `patches` and `classes` count, picture by picture, by the share of themselves that goes away
            (their logarithm). Few keys, and some pictures, make errors ten times those of others, which would else be
            learnt at the cost of all others.
    """

    patches: float = 1.0
    classes: float = 0.5
    tokens: float = 0.0
    logits: float = 0.5
    labels: float = 1.0
    selection: float = 1.0
    relative: bool = False


@dataclasses.dataclass(frozen=True)
class Budgets:
    """What the student learns to do with.

    Attributes:
        keep: shares of keys; each step takes one. Empty: the student's own alone.
        token_keep: places and shares of token pruning, as "3:.7,6:.7,9:.7"; "": the student's own alone.
        pruned: share of the steps that prune tokens, where there is a token_keep; 1 where the student itself prunes.
    """

    keep: tuple[float, ...] = ()
    token_keep: str = ""
    pruned: float = 0.5


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What is done to pictures.

    Attributes:
        smallest_crop: share of a picture's area that a random crop has at least; 1: the centre square.
        flip: whether half of them are mirrored.
        cut_mix: share of the batches whose pictures get a rectangle of their neighbour's (CutMix, Yun et al. 2019), so
            that a few pictures make many scenes; such a batch teaches no label.
        held_out: pictures taken out of the folder, that are never trained on and decide which checkpoint is best.
        workers: processes that read pictures; 0: the training's own.
    """

    smallest_crop: float = 0.35
    flip: bool = True
    cut_mix: float = 0.0
    held_out: int = 32
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training.

    Attributes:
        seed: of everything that is drawn.
        batch: pictures per process and pass. accumulate: passes per step.
        learns: "all", or "attention": layers of attention, norms and the head alone, which is faster and less noisy.
        epsilon: of Adam, for the backbone: what is added to the root of its mean squared gradients. Large against
            gradients that are mostly noise, it keeps them from moving their weights as far as all others.
        weight_decay: of matrices. clip: norm that gradients are cut to, backbone and predictor apart; 0: never.
        ema: decay of the averaged weights, which are those that are judged and kept; 0: the weights themselves.
        precision: "no" (float32), "bf16" or "fp16" autocast.
        check_every: steps between judgements on the held-out pictures. save_every: steps between checkpoints.
        explosion: times the recent losses' median at which the training stops.
        reconstruct: first, the predictor alone, while all attention is dense. distil: then everything.
    """

    seed: int = 0
    batch: int = 8
    accumulate: int = 1
    learns: str = "all"
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.0
    precision: str = "no"
    check_every: int = 100
    save_every: int = 50
    explosion: float = 20.0
    reconstruct: Phase = Phase(learning_rate=0.0)
    distil: Phase = Phase(steps=1000)
    losses: Losses = Losses()
    budgets: Budgets = Budgets()
    pictures: Pictures = Pictures()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self) | {
            "budgets": dataclasses.asdict(self.budgets) | {"keep": list(self.budgets.keep)}
        }


_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31), "batch": (1, 65536), "accumulate": (1, 65536), "ema": (0, 0.999999),
    "steps": (0, MOST_COUNT), "epochs": (0, 1e6), "check_every": (1, MOST_COUNT), "save_every": (1, MOST_COUNT),
    "explosion": (1, math.inf), "warmup": (0, 1),
    "epsilon": (1e-12, 1), "final": (0, 1), "pruned": (0, 1), "cut_mix": (0, 1),
    "smallest_crop": (0.01, 1), "held_out": (1, 4096), "workers": (0, 256), "learning_rate": (0, 1),
    "predictor_learning_rate": (0, 1),
}  # fmt: skip
"""Least and greatest value by name; others are at least 0."""


def names() -> list[str]:
    """Recipes that come with the package."""
    folder = importlib.resources.files("sparsifiner_edge.distill").joinpath("recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_recipe(source: str = DEFAULT, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or from a TOML file, with `overrides` such as "distil.steps=500" or "budgets.keep=[0.1]".

    Raises:
        ConfigError: no such recipe, no TOML, a name is unknown, or a value is of the wrong type or out of range.
    """
    content = _content(source)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override!r} has no value.", "Give NAME=VALUE, such as distil.steps=500.")
        section: Any = content
        *path, last = name.strip().split(".")
        for part in path:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--set {override!r}: {part} is no section.", "See the recipe's names.")
        section[last] = _value(text.strip())
    recipe: Recipe = _build(Recipe, content, "")
    _check(recipe)
    return recipe


def _content(source: str) -> dict[str, Any]:
    if source in names():
        file = importlib.resources.files("sparsifiner_edge.distill").joinpath(f"recipes/{source}.toml")
        return parse_toml(file.read_text("utf-8"), source, _DOCUMENT)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"There is no recipe {source!r}.", f"Name a TOML file, or one of: {', '.join(names())}.")
    return read_toml(path, f"Give a TOML file in UTF-8. {_DOCUMENT}")


def _value(text: str) -> Any:
    try:
        return parse_toml(f"x = {text}", text, _DOCUMENT)["x"]
    except ConfigError:
        return text  # strings need no quotes on a command line


def _build(kind: Any, content: Mapping[str, Any], origin: str) -> Any:
    hints = get_type_hints(kind)
    unknown = sorted(content.keys() - hints.keys())
    if unknown:
        raise ConfigError(
            f"The recipe has no {origin}{unknown[0]}.", f"Known: {', '.join(origin + name for name in sorted(hints))}."
        )
    values = {name: _typed(hints[name], name, value, origin) for name, value in content.items()}
    return kind(**values)


def _typed(kind: Any, name: str, value: Any, origin: str) -> Any:
    label = f"{origin}{name}"
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{label} is {value!r}.", f"Make it a section [{label}].")
        return _build(kind, value, f"{label}.")
    if kind == tuple[float, ...]:
        if not isinstance(value, list) or not all(is_number(x) and 0 < x < 1 for x in value):
            raise ConfigError(f"{label} is {value!r}.", "Give a list of shares between 0 and 1, such as [0.1, 0.25].")
        return tuple(float(x) for x in value)
    fits = is_number(value) if kind is float else type(value) is kind
    if not fits:
        raise ConfigError(f"{label} is {value!r}.", f"It must be of type {kind.__name__}.")
    low, high = _RANGES.get(name, (0, math.inf))
    if kind in (int, float) and not low <= value <= high:
        raise ConfigError(f"{label} is {value!r}.", f"It must lie between {low:g} and {high:g}.")
    return float(value) if kind is float else value


def _check(recipe: Recipe) -> None:
    if recipe.precision not in PRECISIONS:
        raise ConfigError(f"precision is {recipe.precision!r}.", f"Choose one of: {', '.join(PRECISIONS)}.")
    if recipe.learns not in LEARNS:
        raise ConfigError(f"learns is {recipe.learns!r}.", f"Choose one of: {', '.join(LEARNS)}.")
    for name in ("reconstruct", "distil"):
        phase: Phase = getattr(recipe, name)
        if phase.steps and phase.epochs:
            raise ConfigError(f"{name} has both steps and epochs.", "Set one of them to 0.")
    if not any((p.steps or p.epochs) for p in (recipe.reconstruct, recipe.distil)):
        raise ConfigError("The recipe trains for no step.", "Give distil.steps or distil.epochs.")
    parse_token_keep(recipe.budgets.token_keep)
