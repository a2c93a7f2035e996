"""What is to be said of the images that a search was given."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.images import open_image
from sparsifiner_edge.optimizer.explore import Search
from sparsifiner_edge.optimizer.whole import Attempt

FEW, ODD, SHOWN = 20, 6.0, 3
"""Images that say little of others; an image that loses so many times the median is odd; names that are said."""
SMALL = 0.5
"""Of the model's side: an image that is smaller was mostly made up."""


def remarks_on(search: Search, answer: Attempt) -> list[str]:
    """Of too few images, the same ones, small ones, and those on which the answer loses far more than on others."""
    paths, remarks = search.trial.paths, list[str]()
    if len(paths) < FEW:
        remarks.append(
            f"{len(paths)} images say roughly what others will lose: give some dozens, as the camera makes them."
        )
    if search.bound.by_fidelity and fmean(answer.reserved) > search.limit:
        remarks.append(
            "On the images kept back it is less than was asked for: images differ that much. Give more of them."
        )
    size = search.models.student_of(answer.plan).img_size
    same = len(paths) - len({hashlib.sha256(path.read_bytes()).digest() for path in paths})
    if same:
        remarks.append(f"{same} images are the same as others: they say nothing new.")
    small = [path for path in paths if min(open_image(path).size) < SMALL * min(height_width(size))]
    if small:
        remarks.append(f"{_named(small)}: less than half as large as the model's images.")
    lost = dict(zip(paths, [*answer.distances, *answer.reserved], strict=True))
    usual = median(lost.values())
    odd = [path for path in sorted(paths, key=lambda path: -lost[path]) if lost[path] > ODD * usual]
    if odd and usual > search.trial.least:
        much = f"{lost[odd[0]] / usual:.0f} times as much as the median image"
        remarks.append(f"{_named(odd)}: up to {much} is lost there. Take them out if the camera makes none such.")
    return remarks


def _named(paths: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in paths[:SHOWN])
    return f"{names} and {len(paths) - SHOWN} more" if len(paths) > SHOWN else names
