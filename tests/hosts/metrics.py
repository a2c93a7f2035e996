"""A user's metrics, valid and invalid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class Covered:
    """Share of the image that a mask covers: a score from 0 to 1 per image, their mean over all images."""

    higher_is_better = True

    def __init__(self) -> None:
        self.seen: list[float] = []

    def update(self, outputs: Mapping[str, Any], path: Path) -> float | None:
        self.seen.append(float((outputs["mask"] > 0.5).mean()))
        return self.seen[-1]

    def result(self) -> float:
        return sum(self.seen) / max(len(self.seen), 1)


class Brightness(Covered):
    """The mean of a map, over the whole set only."""

    def update(self, outputs: Mapping[str, Any], path: Path) -> float | None:
        self.seen.append(float(outputs["heat"].mean()))
        return None if path.stem == "picture1" else self.seen[-1]


class Sure(Covered):
    """For a classifier: the probability of its class; smaller is better."""

    higher_is_better = False

    def update(self, outputs: Mapping[str, Any], path: Path) -> float | None:
        assert set(outputs) == {"logits", "features", "tokens"}
        shares = np.exp(outputs["logits"] - outputs["logits"].max())
        return float(shares.max() / shares.sum())


class Silent(Covered):
    def update(self, outputs: Mapping[str, Any], path: Path) -> float | None:
        return None


class Broken(Covered):
    def update(self, outputs: Mapping[str, Any], path: Path) -> float | None:
        raise KeyError("mask")


class Unmade(Covered):
    def __init__(self) -> None:
        raise OSError("no labels here")


class Partial:
    def update(self) -> None:
        pass
