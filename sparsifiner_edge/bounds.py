"""Limits of numbers that come from outside: command lines, configurations, manifests. One place for all of them. And
the size of an image, which all of those say."""

from __future__ import annotations

import math
import operator
import re
from typing import Any, TypeAlias

from sparsifiner_edge.errors import ConfigError

MOST_THREADS = 1024
"""More than the cores of any board, and few enough to be started."""
MOST_SIDE = 8192
"""Pixels along a side of a model's image: some 340,000 patches of 14 px."""
MOST_SECONDS = 10 * 366 * 86400.0
"""Ten years: a time limit, a duration, a pause."""
MOST_COUNT = 2**31 - 1
"""Whatever is counted: steps, frames, classes."""
MOST_BATCH = 99_999
"""Images at once."""
MOST_WORKERS = 256
"""Processes that read images."""
MOST_CLASSES = 1 << 17
"""Classes of a classifier: six times those of the largest image data sets."""
MOST_DEPTH = 64
"""Nesting of lists and objects in what is read; our files have ten levels."""
ImageSize: TypeAlias = int | tuple[int, int]
"""Pixels of an image: along each side of a square, or height and width."""
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


def whole_number(text: str, name: str, least: int = 0, most: int = MOST_COUNT) -> int:
    """A whole number in decimal digits.

    Args:
        text: as given. name: what it is, for the message.
        least, most: where it must lie.

    Raises:
        ConfigError: it is not one, or lies outside.
    """
    number = int(text) if _WHOLE.fullmatch(text.strip()) else None
    if number is None or not least <= number <= most:
        raise ConfigError(f"{name} is {text:.40}.", f"Give a whole number from {least} to {most}.")
    return number


def height_width(size: int | tuple[int, ...]) -> tuple[int, int]:
    """Height and width in pixels, of a square too.

    Raises:
        ConfigError: the size is neither one whole number nor two.
    """
    try:
        height, width = map(operator.index, size if isinstance(size, (tuple, list)) else (size, size))
    except (TypeError, ValueError) as error:
        fix = "Give one whole number for a square, or two: height and width."
        raise ConfigError(f"The image size is {size!r:.80}.", fix) from error
    return height, width


def size_of(height: int, width: int) -> ImageSize:
    """A size as files hold it: one number for a square."""
    return height if height == width else (height, width)


def size_text(size: ImageSize) -> str:
    """Such as "224", or "294x518", height first: as `--img-size` takes it."""
    height, width = height_width(size)
    return f"{height}" if height == width else f"{height}x{width}"


def flaw(content: Any, finite: bool = True, nulls: bool = True) -> str | None:
    """What is wrong with lists and objects that were read, whatever they mean: deep nesting, NaN, infinity, null.

    Args:
        content: as of `json.loads` or `tomllib.loads`, neither of which refuses these.
        finite: refuse NaN and infinity. nulls: allow null.

    Returns:
        Where and what, such as "samples.latency_ms[3] is nan"; None: nothing.
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
                return f"{_place(path, name)} is null, where a value or the reason for its absence must stand"
    return None


def _place(path: str, name: str | int) -> str:
    """Where a child is; cut, for keys may be long and are repeated for each child."""
    place = f"{path:.200}[{name}]" if isinstance(name, int) else f"{path:.200}.{name:.200}"
    return place.lstrip(".")
