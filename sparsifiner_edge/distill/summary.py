"""What was trained and how it went, as `distill` prints it and a student's provenance keeps it."""

from __future__ import annotations

import msgspec

from sparsifiner_edge.distill.recipe import Recipe
from sparsifiner_edge.sparse.provenance import Weights


class NamedRecipe(Recipe, frozen=True):
    """A recipe and its name."""

    name: str


class BudgetFidelity(msgspec.Struct, frozen=True):
    """Mean cosine over held-out images with one budget: of the untrained start, and of what was kept."""

    keep: float
    token_keep: tuple[tuple[int, float], ...]
    start: float
    best: float


class Fidelity(msgspec.Struct, frozen=True):
    """All budgets together, then each; of the first process alone."""

    metric: str = "cosine of patches and class token: 1 - geometric mean of 1 - cosine, held-out images and budgets"
    start: float | None = None
    best: float | None = None
    budgets: list[BudgetFidelity] | None = None


class Teacher(Weights, frozen=True):
    """Its name, and where its weights came from."""

    name: str


class TrainingImages(msgspec.Struct, frozen=True, rename=lambda name: name.replace("_", " ")):
    """How many were trained on; names of those held out; paths of those that could not be read."""

    trained_on: int
    held_out: list[str]
    unreadable: list[str]


class Start(msgspec.Struct, frozen=True):
    """The student that was trained: its folder's name, and the SHA-256 of its `config.json`."""

    student: str
    sha256: str


class TrainingSummary(msgspec.Struct, frozen=True):
    """A training.

    Attributes:
        steps: of the optimiser. kept: "the untrained start", or the step whose weights were kept.
        processes: that trained together. start: what was trained.
    """

    recipe: NamedRecipe
    steps: int
    kept: str
    fidelity: Fidelity
    teacher: Teacher
    images: TrainingImages = msgspec.field(name="pictures")
    processes: int
    start: Start = msgspec.field(name="from")
