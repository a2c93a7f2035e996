"""The dense model that a student learns from and is held against."""

from __future__ import annotations

from pathlib import Path

from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.sparse.source import is_factory
from sparsifiner_edge.sparse.student import Student, dense_twin, load_dense


def teacher_of(student: Student, name: str | None, weights: Path | None) -> Student:
    """What a student is held against: a dense model by name, or its own weights where it was never trained.

    Raises:
        ConfigError: a trained student's teacher is not named, or weights of none are; another architecture.
        SparsifinerError: see `load_dense`.
    """
    if name is None:
        if weights is not None:
            raise ConfigError("--weights are the teacher's, and none is named.", "Name it: --teacher MODEL.")
        if student.provenance.training is not None:
            raise ConfigError(
                "This student was trained: its weights are no longer its teacher's.",
                "Name the teacher: --teacher MODEL --weights FILE.",
            )
        return dense_twin(student)
    # A function's own module may leave to its student what both expect.
    pixels = student.normalisation if is_factory(name) else None
    teacher = load_dense(name, weights, student.img_size, pixels)
    for (what, value), (_, own) in zip(_compared(teacher), _compared(student), strict=True):
        if value != own and not (what == "classes" and 0 in (value, own)):
            raise ConfigError(
                f"The teacher {name} has {value} {what}, the student {own}.",
                "Give a teacher of the student's architecture.",
            )
    return teacher


def _compared(student: Student) -> list[tuple[str, object]]:
    """What must agree for tokens to be compared; both see the same normalised images."""
    backbone = student.backbone
    return [
        ("mean and standard deviation of pixels", student.normalisation),
        ("channels", backbone.width),
        ("patches", backbone.patches),
        ("tokens before them", backbone.prefix),
        ("classes", backbone.classes),
    ]
