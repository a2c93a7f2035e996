"""The student that a search begins with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsifiner_edge.artifacts import kind_of
from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.files import scratch_folder
from sparsifiner_edge.images import Normalise, evenly
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.search.finalists import linked
from sparsifiner_edge.sparse.novelty import with_novelty
from sparsifiner_edge.sparse.student import Student, load_student, refuse_normalisation, save_student, sparsify

START = "start"
START_SHARE = 0.25
"""Of keys, of the student that plans are made from: each gives its own."""
PREDICTED, FITTED = 8, 100
"""Images at most that predictors are calibrated with, and that the score `novelty` is fitted to: a minute or two at
518 px each.
"""


def start_of(
    source: str | Path, folder: Path, weights: str | Path | None, img_size: ImageSize | None, teacher: str | None,
    images: Sequence[Path], trust: Sequence[str], normalise: Normalise, progress: Progress | None,
) -> Path:  # fmt: skip
    """The user's student, or one with a predictor in every layer, which is made once, in `folder`; see `search_model`.

    Raises:
        ConfigError: a size or a teacher that the source does not take.
    """
    given = Path(source)
    if given.is_dir() and kind_of(given) == "student":
        if img_size is not None:
            raise ConfigError("A student has a size of its own.", "Leave --img-size out.")
        refuse_normalisation(normalise)
        return given
    if teacher is not None:
        raise ConfigError("--teacher is for a student.", "Leave it out: a model is its own teacher.")
    start = folder / START
    if not start.exists():
        with scratch_folder() as scratch:
            pictures = linked(scratch / "images", evenly(images, PREDICTED))
            made = sparsify(
                str(source), scratch / START, weights=weights, img_size=img_size, keep=START_SHARE, calibrate=pictures,
                normalise=normalise, progress=progress,
            )  # fmt: skip
            save_student(with_novelty(load_student(made, trust=trust), evenly(images, FITTED), progress), start)
    return start


def require_searchable(student: Student, start: Path) -> None:
    """Refuse a student that plans cannot be made of.

    Raises:
        ConfigError: it is dense, prunes tokens, or is of another preset.
    """
    sparsity = student.sparsity
    if sparsity.is_dense or sparsity.token_keep or sparsity.preset != "edge":
        raise ConfigError(
            f"{start} is dense, prunes tokens, or is of another preset than edge.",
            "Give the model itself, or a student made by `sparsify MODEL --keep 0.25`.",
        )
