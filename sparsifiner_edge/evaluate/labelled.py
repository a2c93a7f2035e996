"""Labelled images: a folder with one folder per class."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.images import class_order, evenly, list_images, load_image


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Images and their classes.

    Attributes:
        load: (index, size) -> uint8 [H,W,3]. labels: int64 [n]. classes: names. name: for results.
        files: of each image, where they are files.
    """

    load: Callable[[int, ImageSize], Pixels]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    name: str
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Labelled:
        """At most `count` of them, evenly taken."""
        return self if count is None or count >= len(self) else self.at(evenly(range(len(self)), count))

    def at(self, taken: Sequence[int]) -> Labelled:
        """Those at the places `taken`."""
        load = self.load
        return dataclasses.replace(
            self,
            load=lambda i, size: load(taken[i], size),
            labels=self.labels[list(taken)],
            files=tuple(self.files[i] for i in taken) if self.files else (),
        )


def labelled(folder: Path, classes: tuple[str, ...] | None = None, classifier: tuple[str, ...] = ()) -> Labelled:
    """Images of a folder with one folder per class.

    Args:
        classes: names in the order that labels count, if known.
        classifier: labels of the classifier that is evaluated, in its order; see `class_order`.

    Raises:
        ImageError: nothing there. ConfigError: no folder per class, or a class that is not known.
    """
    files = list_images(folder)
    parts = [path.relative_to(folder).parts if folder.is_dir() else () for path in files]
    if any(len(part) < 2 for part in parts):
        raise ConfigError(f"{folder} holds images in no folder of their class.", "Give one folder per class.")
    names = classes or class_order((part[0] for part in parts), classifier)
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted({part[0] for part in parts} - numbers.keys())
    if unknown:
        raise ConfigError(f"{folder} holds the unknown class {unknown[0]!r}.", f"Known: {', '.join(names)}.")
    labels = np.array([numbers[part[0]] for part in parts], dtype=np.int64)
    return Labelled(lambda i, size: load_image(files[i], size), labels, names, str(folder), tuple(files))
