"""Images from files and folders, as uint8 arrays of the size a model takes, and what it expects of their pixels."""

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
"""What these endings stand for, and no other decoder: one of Pillow's starts another program."""
_FIX = "Replace or remove it."
Item = TypeVar("Item")
Normalise: TypeAlias = tuple[Sequence[float], Sequence[float]] | Literal[False] | None
"""What a caller says of pixels: mean and standard deviation (see `Normalisation`); False: the module normalises inside,
pixels from 0 to 1; None: nothing, so that the model itself must.
"""
_Deviation = Annotated[float, msgspec.Meta(gt=0)]


class Normalisation(msgspec.Struct, frozen=True):
    """What a model expects of an image: x = (pixel * scale - mean) / std per channel of RGB."""

    mean: tuple[float, float, float]
    std: tuple[_Deviation, _Deviation, _Deviation]
    scale: Literal["1/255"] = "1/255"

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean}, std {std}, scale {self.scale}"

    @classmethod
    def of(cls, mean: Any, std: Any) -> Normalisation:
        """Of three finite numbers each, standard deviations above 0.

        Raises:
            ConfigError: something else.
        """
        return cls(_channels("mean", mean), _channels("std", std, 0.0))

    @classmethod
    def parse(cls, normalise: Normalise) -> Normalisation | None:
        """What a caller said; None: nothing.

        Raises:
            ConfigError: it is neither of what `Normalise` is.
        """
        if normalise is None or normalise is False:
            return None if normalise is None else AS_IS
        if isinstance(normalise, tuple) and len(normalise) == 2:
            return cls.of(*normalise)
        raise ConfigError(
            f"normalise is {normalise!r:.80}.", "Give (mean, std), or False where the module normalises inside."
        )


AS_IS = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Pixels from 0 to 1, whatever the module does with them."""


def _channels(name: str, values: Any, above: float = -math.inf) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError, RuntimeError):  # The last of a tensor with other axes than one.
        red = green = blue = math.nan
    if not all(above < value < math.inf for value in (red, green, blue)):
        raise ConfigError(f"{name} is {values!r:.80}.", "Give one number for each of red, green and blue.")
    return red, green, blue


def list_images(source: Path) -> list[Path]:
    """The image `source` itself, or every image below the folder `source`, sorted by path.

    Raises:
        ImageError: it does not exist or holds no image.
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
    """At most `most` of the items, evenly taken."""
    if len(items) <= most:
        return list(items)
    return [items[number * len(items) // most] for number in range(most)]


def class_order(folders: Iterable[str], labels: Sequence[str]) -> tuple[str, ...]:
    """Names of the folders that hold one class each, in the order of the classifier's outputs.

    Args:
        folders: their names. labels: the classifier's own, in that order; empty where it has none.

    Returns:
        The labels, where every folder is named after one; the sorted folders, where none is, as in data sets whose
        folders are numbers or codes.

    Raises:
        ConfigError: some folders are named after a label and others are not.
    """
    names = sorted(set(folders))
    unknown = [name for name in names if name not in labels]
    if not labels or len(unknown) == len(names):
        return tuple(names)
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is not a class of the classifier.", f"Its classes: {', '.join(labels)}.")
    return tuple(labels)


def load_image(path: Path, size: ImageSize | Framing) -> Pixels:
    """An image as a model takes it: uint8 RGB [height, width, 3]; see `read_image`."""
    return read_image(path, size)[0]


def read_image(path: Path, size: ImageSize | Framing) -> tuple[Pixels, Fitting]:
    """An image as a model takes it, uint8 RGB [height, width, 3], and which part of the image that is; of a size alone
    its centre. Resized bicubically.

    Raises:
        ImageError: the file is missing, not a regular file, truncated, no image, or absurdly large; or a region is not
            within it.
        ConfigError: the size is beyond `MOST_SIDE`, or none.
    """
    framing = size if isinstance(size, Framing) else Framing(size)
    height, width = height_width(framing.size)
    if max(height, width) > MOST_SIDE:
        fix = f"Use at most {MOST_SIDE} pixels along a side."
        raise ConfigError(f"Images of {size_text(framing.size)} px were requested.", fix)

    def read(image: Any) -> tuple[Pixels, Fitting]:
        fitting = framing.of(*image.size)
        if framing.region is None and framing.fit != "letterbox":  # Region and bars are of the whole image's pixels.
            image.draft("RGB", (width, height))
        return np.array(fit_image(image, framing)), fitting

    fitted: tuple[Pixels, Fitting] = _use(path, read)
    return fitted


def load_mask(path: Path, size: ImageSize | Framing) -> npt.NDArray[np.bool_]:
    """The same part of a mask as `load_image` takes of its image: bool [height, width], where it is brighter than half.

    Raises:
        ImageError: see `load_image`.
    """
    mask = _use(path, lambda image: np.array(fit_image(image, size, "L", "BILINEAR")))
    return np.asarray(mask > 127, dtype=np.bool_)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image, in pixels; raises as `read_image`."""
    width, height = _use(path, lambda image: image.size)
    return width, height


def fit_image(image: Any, size: ImageSize | Framing, mode: str = "RGB", resampling: str = "BICUBIC") -> Any:
    """A Pillow image, as `size` says how, as Pillow's image of that size and mode."""
    fitting = (size if isinstance(size, Framing) else Framing(size)).of(*image.size)
    x, y, width, height = fitting.box
    part = image.crop((x, y, x + width, y + height)).convert(mode)
    part = part.resize(fitting.inner[2:], _pillow().Resampling[resampling])
    if fitting.inner[2:] == fitting.size:
        return part
    whole = _pillow().new(mode, fitting.size, BARS if mode == "RGB" else 0)
    whole.paste(part, fitting.inner[:2])
    return whole


def open_image(path: Path) -> Any:
    """An image as Pillow's RGB image, read whole.

    Raises:
        ImageError: as of `load_image`.
    """
    return _use(path, lambda image: image.convert("RGB"))


def _use(path: Path, use: Callable[[Any], Any]) -> Any:
    try:
        with open_regular(path) as file:
            return _decode(file, path, use)
    except ArtifactError as error:  # Missing, a pipe, a device.
        raise ImageError(f"{path} cannot be read as an image: {error.what}", _FIX) from error


def _decode(file: BinaryIO, path: Path, use: Callable[[Any], Any]) -> Any:
    """Caught here: what Pillow raises for a file of an unknown format is an OSError too."""
    image_module = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about palettes with transparency, which is dropped
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            with image_module.open(file, formats=_FORMATS) as image:
                return use(image)
    except ConfigError as error:  # A region.
        raise ImageError(f"{path}: {error.what}", error.fix) from error
    # Pillow's decoders raise many kinds of error on damaged files; none of them is worth a traceback.
    except Exception as error:
        unknown = isinstance(error, image_module.UnidentifiedImageError)  # It would say in which object of Python's.
        why = f"it is none of {', '.join(_FORMATS)}" if unknown else error
        raise ImageError(f"{path} cannot be read as an image: {why}.", _FIX) from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "cpu") from error
    return Image
