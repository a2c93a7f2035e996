"""Images as uint8 arrays of a model's input size, and the pixel normalisation that a model expects."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from sparsifiner_edge.arrays import Pixels
from sparsifiner_edge.bounds import MOST_SIDE, ImageSize, height_width, size_text
from sparsifiner_edge.errors import ArtifactError, ConfigError, ImageError, MissingExtraError
from sparsifiner_edge.files import open_regular
from sparsifiner_edge.fitting import BARS, Fitting, Framing

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""File formats whose decoders may run. Another decoder of Pillow, for EPS, starts Ghostscript."""
_FIX = "Replace or remove it."
"""Fix for an image that cannot be read."""
Item = TypeVar("Item")
Normalise: TypeAlias = tuple[Sequence[float], Sequence[float]] | Literal[False] | None
"""Pixel normalisation as callers give it.

(mean, standard deviation): see `Normalisation`. False: the module normalises itself and takes pixels from 0 to 1. None:
not given, so that the model must declare it.
"""
_Deviation = Annotated[float, msgspec.Meta(gt=0)]
"""Standard deviation: above 0."""


class Normalisation(msgspec.Struct, frozen=True):
    """Normalisation that a model expects: x = (pixel * scale - mean) / std per RGB channel."""

    mean: tuple[float, float, float]
    std: tuple[_Deviation, _Deviation, _Deviation]
    scale: Literal["1/255"] = "1/255"

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}, scale {self.scale}"

    @classmethod
    def of(cls, mean: Any, std: Any) -> Normalisation:
        """Build a normalisation from three finite means and three standard deviations above 0.

        Raises:
            ConfigError: The values are something else.
        """
        return cls(_channels("mean", mean), _channels("std", std, 0.0))

    @classmethod
    def parse(cls, normalise: Normalise) -> Normalisation | None:
        """Parse a caller's `Normalise`; None if it was not given.

        Raises:
            ConfigError: It is not a valid `Normalise`.
        """
        if normalise is None or normalise is False:
            return None if normalise is None else AS_IS
        if isinstance(normalise, tuple) and len(normalise) == 2:
            return cls.of(*normalise)
        raise ConfigError(
            f"normalise is {normalise!r:.80}.", "Give (mean, std), or False where the module normalises inside."
        )


AS_IS = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Pixels from 0 to 1 without normalisation."""


def _channels(name: str, values: Any, above: float = -math.inf) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor with more than one axis.
        red = green = blue = math.nan
    if not all(above < value < math.inf for value in (red, green, blue)):
        raise ConfigError(f"{name} is {values!r:.80}.", "Give one number for each of red, green and blue.")
    return red, green, blue


def list_images(source: Path) -> list[Path]:
    """Return the image `source`, or every image below the folder `source`, sorted by path.

    Raises:
        ImageError: It does not exist or holds no image.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ImageError(f"{source} does not exist.", "Give an image or a folder of images.")
    paths = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ImageError(f"{source} holds no image.", f"Known endings: {', '.join(sorted(SUFFIXES))}.")
    return paths


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` of the items, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[number * len(items) // most] for number in range(most)]


def class_order(folders: Iterable[str], labels: Sequence[str]) -> tuple[str, ...]:
    """Return the names of class folders in the order of the classifier's outputs.

    Args:
        folders: Names of the folders.
        labels: Names of the classifier's classes in order; empty if it has none.

    Returns:
        The labels if every folder is named after one; the sorted folders if none is (folders named by numbers or
        codes).

    Raises:
        ConfigError: Only some folders are named after a label.
    """
    names = sorted(set(folders))
    unknown = [name for name in names if name not in labels]
    if not labels or len(unknown) == len(names):
        return tuple(names)
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is not a class of the classifier.", f"Its classes: {', '.join(labels)}.")
    return tuple(labels)


def load_image(path: Path, size: ImageSize | Framing) -> Pixels:
    """Load an image as a model's input, uint8 RGB [height, width, 3]; see `read_image`."""
    return read_image(path, size)[0]


def read_image(path: Path, size: ImageSize | Framing) -> tuple[Pixels, Fitting]:
    """Load an image as a model's input, and return which part of the image that is.

    Images are resized bicubically. A size alone takes the centre.

    Returns:
        uint8 RGB [height, width, 3], and the fitting.

    Raises:
        ImageError: The file is missing, not a regular file, truncated, no image, or absurdly large, or it does not
            contain the region.
        ConfigError: The size is invalid or beyond `MOST_SIDE`.
    """
    framing = size if isinstance(size, Framing) else Framing(size)
    height, width = height_width(framing.size)
    if max(height, width) > MOST_SIDE:
        fix = f"Use at most {MOST_SIDE} pixels along a side."
        raise ConfigError(f"Images of {size_text(framing.size)} px were requested.", fix)

    def read(image: Any) -> tuple[Pixels, Fitting]:
        fitting = framing.of(*image.size)
        if framing.region is None and framing.fit != "letterbox":  # Regions and bars refer to the whole image's pixels.
            image.draft("RGB", (width, height))
        return np.array(fit_image(image, framing)), fitting

    fitted: tuple[Pixels, Fitting] = _use(path, read)
    return fitted


def load_mask(path: Path, size: ImageSize | Framing) -> npt.NDArray[np.bool_]:
    """Load a mask like its image: bool [height, width], True where it is brighter than half.

    It covers the same part as `load_image` takes of the image.

    Raises:
        ImageError: See `load_image`.
    """
    mask = _use(path, lambda image: np.array(fit_image(image, size, "L", "BILINEAR")))
    return np.asarray(mask > 127, dtype=np.bool_)


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height of an image in pixels; raises as `read_image`."""
    width, height = _use(path, lambda image: image.size)
    return width, height


def fit_image(image: Any, size: ImageSize | Framing, mode: str = "RGB", resampling: str = "BICUBIC") -> Any:
    """Fit a Pillow image to a size, and return it as a Pillow image of that size and mode."""
    fitting = (size if isinstance(size, Framing) else Framing(size)).of(*image.size)
    x, y, width, height = fitting.box
    part = image.crop((x, y, x + width, y + height)).convert(mode)
    part = part.resize(fitting.inner[2:], _pillow().Resampling[resampling])
    if fitting.inner[2:] == fitting.size:
        return part
    canvas = _pillow().new(mode, fitting.size, BARS if mode == "RGB" else 0)
    canvas.paste(part, fitting.inner[:2])
    return canvas


def open_image(path: Path) -> Any:
    """Open an image and read it completely, as an RGB Pillow image.

    Raises:
        ImageError: See `load_image`.
    """
    return _use(path, lambda image: image.convert("RGB"))


def _use(path: Path, use: Callable[[Any], Any]) -> Any:
    try:
        with open_regular(path) as file:
            return _decode(file, path, use)
    except ArtifactError as error:  # Missing, a pipe or a device.
        raise ImageError(f"{path} cannot be read as an image: {error.what}", _FIX) from error


def _decode(file: BinaryIO, path: Path, use: Callable[[Any], Any]) -> Any:
    """Decode an image. Pillow raises an OSError for an unknown format, so errors are distinguished here."""
    image_module = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # palettes with transparency, which is dropped
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            with image_module.open(file, formats=_FORMATS) as image:
                return use(image)
    except ConfigError as error:  # The region does not fit.
        raise ImageError(f"{path}: {error.what}", error.fix) from error
    # Pillow's decoders raise many kinds of errors on damaged files; none deserves a traceback.
    except Exception as error:
        unknown = isinstance(error, image_module.UnidentifiedImageError)  # Its message would name a Python object.
        why = f"its format is none of {', '.join(_FORMATS)}" if unknown else error
        raise ImageError(f"{path} cannot be read as an image: {why}.", _FIX) from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "cpu") from error
    return Image
