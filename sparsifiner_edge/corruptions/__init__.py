"""Images as a camera may see them: noise, blur, weather, compression, and what goes wrong in the camera itself.

The fifteen of `COMMON` are those of ImageNet-C with its parameters (Hendrycks, Dietterich: Benchmarking neural network
robustness to common corruptions and perturbations, ICLR 2019), which are for images of 224 px: lengths grow with the
shorter side, so that the same scene suffers alike at any size. Frost is drawn, where the published one is pasted from
photographs. `CAMERA` is what those leave out of a camera's life.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.corruptions.camera import OF_CAMERAS
from sparsifiner_edge.corruptions.imagenet_c import IMAGENET_C
from sparsifiner_edge.corruptions.shared import PUBLISHED_SIDE, Generator
from sparsifiner_edge.errors import ConfigError

SEVERITIES = (1, 2, 3, 4, 5)
COMMON, CAMERA = tuple(IMAGENET_C), tuple(OF_CAMERAS)
_EVERY = IMAGENET_C | OF_CAMERAS
_MOVING = {name: _EVERY[name] for name in ("elastic_transform", "rotation")}


class Condition(NamedTuple):
    """A corruption and how severe it is."""

    corruption: str
    severity: int

    @property
    def label(self) -> str:
        """As in results: "fog 3"."""
        return f"{self.corruption} {self.severity}"


def corrupt(image: Pixels, name: str, severity: int, seed: int) -> Pixels:
    """An image as it looks under a corruption.

    Args:
        image: uint8 RGB [H,W,3]. name: of `COMMON` or `CAMERA`. severity: of `SEVERITIES`. seed: of what is drawn.

    Returns:
        uint8 RGB [H,W,3]; the same for the same arguments.

    Raises:
        ConfigError: an unknown name or severity. MissingExtraError: Pillow or SciPy is missing.
    """
    check(name, severity)
    rng, scale = _drawn(name, severity, seed), min(image.shape[:2]) / PUBLISHED_SIDE
    found = _EVERY[name](image.astype(np.float32) / 255, severity - 1, rng, scale)
    changed: Pixels = np.rint(255 * np.clip(found, 0, 1)).astype(np.uint8)
    return changed


def moved(mask: npt.NDArray[np.bool_], name: str, severity: int, seed: int) -> npt.NDArray[np.bool_]:
    """Where a mask [H,W] of an image lies once `corrupt` has moved its pixels; most corruptions move none."""
    check(name, severity)
    if name not in _MOVING:
        return mask
    rng, scale = _drawn(name, severity, seed), min(mask.shape) / PUBLISHED_SIDE
    return np.asarray(_MOVING[name](mask[..., None].astype(np.float32), severity - 1, rng, scale)[..., 0] > 0.5)


def check(name: str, severity: int) -> None:
    """Refuse what `corrupt` does not know.

    Raises:
        ConfigError: an unknown name or severity.
    """
    if name not in _EVERY:
        raise ConfigError(f"The corruption {name!r} is unknown.", f"Choose of: {', '.join(_EVERY)}.")
    if severity not in SEVERITIES:
        raise ConfigError(f"severity is {severity}.", f"Choose {SEVERITIES[0]} to {SEVERITIES[-1]}.")


def parse_corruptions(text: str) -> tuple[str, ...]:
    """Names from "all", "common", "camera", or names with commas between; in the order of `COMMON` and `CAMERA`.

    Raises:
        ConfigError: one is unknown, or none is given.
    """
    groups = {"all": (*COMMON, *CAMERA), "common": COMMON, "camera": CAMERA}
    named = [part.strip() for part in text.split(",")]
    asked = {name for part in named for name in groups.get(part, (part,))}
    for name in sorted(asked):
        check(name, SEVERITIES[0])
    return tuple(name for name in _EVERY if name in asked)


def parse_severities(text: str) -> tuple[int, ...]:
    """Severities from "3", "1,3,5" or "1..5".

    Raises:
        ConfigError: none of these, or beyond `SEVERITIES`.
    """
    found = re.fullmatch(r"([1-5])\.\.([1-5])|[1-5](,[1-5])*", text.replace(" ", ""))
    if found is None or (found[1] and found[1] > found[2]):
        raise ConfigError(f"severity is {text!r}.", "Give one of 1 to 5, some as 1,3,5, or a range as 1..5.")
    if found[1]:
        return tuple(range(int(found[1]), int(found[2]) + 1))
    return tuple(sorted({int(digit) for digit in found[0].split(",")}))


def every_condition(corruptions: str, severity: str | None) -> list[Condition]:
    """Every corruption that is named at every severity (None: all of them); see `parse_corruptions`."""
    severities = SEVERITIES if severity is None else parse_severities(severity)
    return [Condition(*pair) for pair in itertools.product(parse_corruptions(corruptions), severities)]


def _drawn(name: str, severity: int, seed: int) -> Generator:
    return np.random.default_rng([seed, list(_EVERY).index(name), severity])
