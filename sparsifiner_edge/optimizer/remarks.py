"""Remarks on the images of a search."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.images import open_image
from sparsifiner_edge.optimizer.search import Attempt, Search

FEW = 20
"""Number of images below which the result may not carry over to others."""
ODD = 6.0
"""An image is odd if its error is this many times the median."""
SHOWN = 3
"""Maximum number of image names in a remark."""
SMALL = 0.5
"""An image below this share of the model's side is mostly interpolated."""


def remarks_on(search: Search, answer: Attempt) -> list[str]:
    """Return remarks on too few, equal and small images, and on images with an unusually large error."""
    paths, remarks = search.subject.paths, list[str]()
    if len(paths) < FEW:
        remarks.append(
            f"{len(paths)} images give only a rough estimate for other images. Give a few dozen from the same camera."
        )
    if search.bound.by_fidelity and fmean(answer.reserved) > search.limit:
        remarks.append(
            "On the held-out images the fidelity is below the bound, because your images vary a lot. Give more images."
        )
    size = search.subject.student.img_size
    duplicates = len(paths) - len({hashlib.sha256(path.read_bytes()).digest() for path in paths})
    if duplicates:
        remarks.append(f"{duplicates} images are duplicates and add no information.")
    small = [path for path in paths if min(open_image(path).size) < SMALL * min(height_width(size))]
    if small:
        remarks.append(f"{_names(small)}: smaller than half of the model's image size. Use larger images.")
    errors = dict(zip(paths, [*answer.errors, *answer.reserved], strict=True))
    median_error = median(errors.values())
    outliers = [path for path in sorted(paths, key=lambda path: -errors[path]) if errors[path] > ODD * median_error]
    if outliers and median_error > search.subject.least:
        excess = f"{errors[outliers[0]] / median_error:.0f} times that of the median image"
        remarks.append(
            f"{_names(outliers)}: the error is up to {excess}. Remove them if the camera takes no such images."
        )
    return remarks


def _names(paths: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in paths[:SHOWN])
    return f"{names} and {len(paths) - SHOWN} more" if len(paths) > SHOWN else names
