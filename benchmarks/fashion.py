"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017) as Debian packages it: apt-get install dataset-fashion-mnist."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparsifiner_edge.errors import ImageError
from sparsifiner_edge.images import evenly

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
"""In the order of the labels (table 2)."""


@dataclasses.dataclass(frozen=True)
class Clothes:
    """Images uint8 [n,28,28] and their classes."""

    images: Any
    labels: Any
    name: str
    classes: tuple[str, ...] = CLASSES

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Clothes:
        """At most `count` of them, evenly taken."""
        taken = evenly(range(len(self.labels)), count)
        return dataclasses.replace(self, images=self.images[taken], labels=self.labels[taken])

    def load(self, number: int, size: int) -> Any:
        """uint8 [size,size,3]."""
        image = Image.fromarray(self.images[number]).convert("RGB")
        return np.array(image.resize((size, size), Image.Resampling.BICUBIC))


def fashion_mnist(split: str) -> Clothes:
    """Its images; split: "train" or "test"."""
    prefix = "train" if split == "train" else "t10k"
    images = _read(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = _read(f"{prefix}-labels-idx1-ubyte.gz", 8).astype(np.int64)
    return Clothes(images, labels, f"fashion-mnist {split}")


def _read(name: str, header: int) -> Any:
    path = FOLDER / name
    if not path.is_file():
        raise ImageError(f"{path} does not exist.", "Debian, Ubuntu: apt-get install dataset-fashion-mnist")
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)
