"""Labelled images: a folder with one folder per class, or Fashion-MNIST as Debian packages it."""

from __future__ import annotations

import dataclasses
import gzip
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.images import class_order, evenly, list_images, load_image, resized

FASHION = "fashion-mnist"
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
"""In the order of the labels (Xiao, Rasul, Vollgraf 2017, table 2)."""


_MOST_BYTES = 1 << 26
"""Unpacked; the largest file has 47 MB."""


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Images and their classes.

    Attributes:
        load: (index, size) -> uint8 [size,size,3]. labels: int64 [n]. classes: names. name: for results.
    """

    load: Callable[[int, int], Pixels]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Labelled:
        """At most `count` of them, evenly taken."""
        return self if count is None or count >= len(self) else self.at(evenly(range(len(self)), count))

    def at(self, taken: Sequence[int]) -> Labelled:
        """Those at the places `taken`."""
        load = self.load
        return dataclasses.replace(self, load=lambda i, size: load(taken[i], size), labels=self.labels[list(taken)])


def labelled(
    source: str | Path, split: str, classes: tuple[str, ...] | None = None, classifier: tuple[str, ...] = ()
) -> Labelled:
    """Images of a folder, or of "fashion-mnist".

    Args:
        split: "train" or "test", for Fashion-MNIST. classes: names in the order that labels count, if known.
        classifier: labels of the classifier that is asked, in its order; see `class_order`.

    Raises:
        ImageError: nothing there. ConfigError: no folder per class, or a class that is not known.
    """
    if str(source) == FASHION:
        # Labels none of which is a class here are no names, as for folders.
        named = bool(set(classifier) & set(FASHION_CLASSES))
        if classes not in (None, FASHION_CLASSES) or (named and classifier != FASHION_CLASSES):
            raise ConfigError(f"{FASHION} has classes of its own.", "Give images with the classes that are known.")
        return _fashion(split)
    folder = Path(source)
    files = list_images(folder)
    parts = [path.relative_to(folder).parts if folder.is_dir() else () for path in files]
    if any(len(part) < 2 for part in parts):
        raise ConfigError(f"{folder} holds images in no folder of their class.", "Give one folder per class.")
    names = classes or class_order((part[0] for part in parts), classifier)
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted({part[0] for part in parts} - numbers.keys())
    if unknown:
        raise ConfigError(
            f"{folder} holds the class {unknown[0]!r}, which is not known.", f"Known: {', '.join(names)}."
        )
    labels = np.array([numbers[part[0]] for part in parts], dtype=np.int64)
    return Labelled(lambda i, size: load_image(files[i], size), labels, names, str(folder))


def _fashion(split: str) -> Labelled:
    prefix = "train" if split == "train" else "t10k"
    images = _idx(FASHION_FOLDER / f"{prefix}-images-idx3-ubyte.gz", 16, (-1, 28, 28))
    labels = _idx(FASHION_FOLDER / f"{prefix}-labels-idx1-ubyte.gz", 8, (len(images),)).astype(np.int64)
    return Labelled(lambda i, size: resized(images[i], size), labels, FASHION_CLASSES, f"{FASHION} {split}")


def _idx(path: Path, header: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    try:
        with gzip.open(path) as file:
            return np.frombuffer(file.read(_MOST_BYTES), np.uint8, offset=header).reshape(shape)
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist.", "Debian, Ubuntu: apt-get install dataset-fashion-mnist") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ImageError(f"{path} cannot be read: {error}.", "Install the package again.") from error
