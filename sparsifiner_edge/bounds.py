"""Limits of numbers from command lines, configurations and manifests, and the type of an image size."""

from __future__ import annotations

import math
import operator
import re
from typing import Any, TypeAlias

from sparsifiner_edge.errors import ConfigError

MOST_THREADS = 1024
"""Maximum number of threads: more than the cores of any board, and few enough to be started."""
MOST_SIDE = 8192
"""Maximum side of a model's image in pixels: some 340,000 patches of 14 px."""
MOST_SECONDS = 10 * 366 * 86400.0
"""Maximum time limit, duration or pause in seconds: ten years."""
MOST_COUNT = 2**31 - 1
"""Maximum of anything that is counted: steps, frames, classes."""
MOST_BATCH = 99_999
"""Maximum batch size."""
MOST_WORKERS = 256
"""Maximum number of processes that read images."""
MOST_CLASSES = 1 << 17
"""Maximum number of classes: six times those of the largest image data sets."""
MOST_DEPTH = 64
"""Maximum nesting of lists and objects in a file. Our files have ten levels."""
ImageSize: TypeAlias = int | tuple[int, int]
"""Image size in pixels: the side of a square, or (height, width)."""
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


def whole_number(text: str, name: str, least: int = 0, most: int = MOST_COUNT) -> int:
    """Parse a whole number in decimal digits.

    Args:
        text: Text to parse.
        name: What the number is, for the error message.
        least: Minimum.
        most: Maximum.

    Raises:
        ConfigError: The text is not a whole number, or the number is out of range.
    """
    number = int(text) if _WHOLE.fullmatch(text.strip()) else None
    if number is None or not least <= number <= most:
        raise ConfigError(f"{name} is {text:.40}.", f"Give a whole number from {least} to {most}.")
    return number


def height_width(size: int | tuple[int, ...]) -> tuple[int, int]:
    """Return height and width of an image size in pixels.

    Raises:
        ConfigError: The size is neither one whole number nor two.
    """
    try:
        height, width = map(operator.index, size if isinstance(size, (tuple, list)) else (size, size))
    except (TypeError, ValueError) as error:
        fix = "Give one whole number for a square, or two: height and width."
        raise ConfigError(f"The image size is {size!r:.80}.", fix) from error
    return height, width


def size_of(height: int, width: int) -> ImageSize:
    """Return an image size as files store it: one number for a square."""
    return height if height == width else (height, width)


def size_text(size: ImageSize) -> str:
    """Format an image size as `--img-size` takes it: "224", or "294x518" with the height first."""
    height, width = height_width(size)
    return f"{height}" if height == width else f"{height}x{width}"


def flaw(content: Any, finite: bool = True, nulls: bool = True) -> str | None:
    """Return what is wrong with parsed content: deep nesting, NaN, infinity or null.

    Args:
        content: Result of `json.loads` or `tomllib.loads`, neither of which refuses these.
        finite: Refuse NaN and infinity.
        nulls: Allow null.

    Returns:
        Place and flaw, such as "samples.latency_ms[3] is nan"; None if there is none.
    """
    pending: list[tuple[Any, str, int]] = [(content, "", 0)]
    while pending:
        value, path, depth = pending.pop()
        if depth > MOST_DEPTH:
            return f"{path:.60} is nested deeper than {MOST_DEPTH} levels"
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for name, child in children:
            if isinstance(child, (dict, list)):
                pending.append((child, _place(path, name), depth + 1))
            elif finite and isinstance(child, float) and not math.isfinite(child):
                return f"{_place(path, name)} is {child}"
            elif child is None and not nulls:
                return f"{_place(path, name)} is null; a value, or the reason why there is none, is required"
    return None


def _place(path: str, name: str | int) -> str:
    """Return the path of a child, cut short: keys may be long and are repeated for each child."""
    place = f"{path:.200}[{name}]" if isinstance(name, int) else f"{path:.200}.{name:.200}"
    return place.lstrip(".")
