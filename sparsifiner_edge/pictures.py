"""Pictures from files and folders, as uint8 arrays of the size a model takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsifiner_edge.errors import MissingExtraError, PictureError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
Picture = npt.NDArray[np.uint8]


def list_pictures(source: Path) -> list[Path]:
    """The picture `source` itself, or every picture below the folder `source`, sorted by path.

    Raises:
        PictureError: it does not exist or holds no picture.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise PictureError(f"{source} does not exist.", "Give a picture or a folder of pictures.")
    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise PictureError(f"{source} holds no picture.", f"Known endings: {', '.join(sorted(SUFFIXES))}.")
    return found


def evenly(paths: list[Path], most: int) -> list[Path]:
    """At most `most` of the paths, evenly taken."""
    return paths[:: max(1, len(paths) // most)][:most]


def load_picture(path: Path, size: int) -> Picture:
    """Centre square of a picture, resized bicubically: uint8 RGB [size, size, 3].

    Raises:
        PictureError: the file is missing, truncated, no picture, or absurdly large.
    """

    def square(image: Any) -> Picture:
        image.draft("RGB", (size, size))
        return np.array(_centre_square(image).convert("RGB").resize((size, size), _pillow().Resampling.BICUBIC))

    picture: Picture = _read(path, square)
    return picture


def resized(pixels: npt.NDArray[np.uint8], size: int) -> Picture:
    """A square of pixels, grey [s,s] or RGB [s,s,3], resized bicubically: uint8 RGB [size, size, 3]."""
    image_module = _pillow()
    image = image_module.fromarray(pixels).convert("RGB")
    return np.array(image.resize((size, size), image_module.Resampling.BICUBIC))


def open_picture(path: Path) -> Any:
    """A picture as Pillow's RGB image, read whole.

    Raises:
        PictureError: as of `load_picture`.
    """
    return _read(path, lambda image: image.convert("RGB"))


def _read(path: Path, use: Callable[[Any], Any]) -> Any:
    image_module = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of palettes with transparency, which is dropped
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            with image_module.open(path) as image:
                return use(image)
    # Pillow's decoders raise many kinds of error on damaged files; none of them is worth a traceback.
    except Exception as error:
        raise PictureError(f"{path} cannot be read as a picture: {error}.", "Replace or remove it.") from error


def load_batch(paths: list[Path], size: int) -> Picture:
    """Pictures stacked: uint8 [len(paths), size, size, 3]."""
    return np.stack([load_picture(path, size) for path in paths])


def _centre_square(image: Any) -> Any:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("pillow", "cpu") from error
    return Image
