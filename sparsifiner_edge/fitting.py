"""How a frame is brought to the size that a model takes: one geometry for images, videos, cameras and what is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import msgspec

from sparsifiner_edge.bounds import MOST_COUNT, ImageSize, height_width, size_text, whole_number
from sparsifiner_edge.errors import ConfigError

if TYPE_CHECKING:
    from sparsifiner_edge.arrays import Array

Fit: TypeAlias = Literal["crop", "letterbox", "stretch"]
FITS: tuple[Fit, ...] = get_args(Fit)
Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, width, height, in pixels."""
BARS = (124, 116, 104)
"""RGB of what "letterbox" leaves free: ImageNet's mean, within a fifth of a standard deviation of zero whichever of the
usual means a model takes off. One colour for all, so that no program needs to ask a model.
"""
_ROUNDED = 5
"""Percent of a frame that may be lost to a size of its own shape, which is of whole patches: no reason for another."""


class Fitting(msgspec.Struct, frozen=True):
    """Where in a frame a model reads.

    Attributes:
        frame: its width and height, in pixels. box: what is read of it.
        size: width and height of the model's input. inner: where in that the box is; around it are bars.

    Example:
        >>> fitted = Framing(224, "letterbox").of(1920, 1080)
        >>> fitted.box, fitted.inner
        ((0, 0, 1920, 1080), (0, 49, 224, 126))
        >>> fitted.to_frame(112, 49)
        (960.0, 0.0)
    """

    frame: tuple[int, int]
    box: Box
    size: tuple[int, int]
    inner: Box

    def to_frame(self, x: float, y: float) -> tuple[float, float]:
        """A point of the input, in pixels from its corner, in those of the frame."""
        (x0, y0, across, down), (column, row, columns, rows) = self.box, self.inner
        return x0 + (x - column) * across / columns, y0 + (y - row) * down / rows

    def cut(self, values: Array) -> Array:
        """What a map [...,h,w] of the input says of the box: without bars."""
        (x, y, width, height), (across, down), (rows, columns) = self.inner, self.size, values.shape[-2:]
        return values[..., _span(y, height, down, rows), _span(x, width, across, columns)]


class Framing(msgspec.Struct, frozen=True):
    """How frames become a model's input.

    Attributes:
        size: of the input, in pixels.
        fit: "crop": the largest box of that shape about the frame's centre; "letterbox": the whole frame, with bars of
            the colour `BARS`; "stretch": the whole frame, distorted.
        region: what counts as the whole frame, whatever `parse_region` takes; None: all of it.

    Raises:
        ConfigError: there is no such fit, or the region is none.
    """

    size: ImageSize
    fit: Fit = "crop"
    region: Box | None = None

    def __post_init__(self) -> None:
        require_fit(self.fit)
        if self.region is not None:
            msgspec.structs.force_setattr(self, "region", parse_region(self.region))

    def of(self, width: int, height: int) -> Fitting:
        """Of a frame of so many pixels; refuses one that the region is not within."""
        rows, columns = height_width(self.size)
        box, inner = self.region or (0, 0, width, height), (0, 0, columns, rows)
        if box[0] + box[2] > width or box[1] + box[3] > height:
            what = f"The region {','.join(map(str, box))} is not within a frame of {width}x{height} pixels."
            raise ConfigError(what, "Give X,Y,WIDTH,HEIGHT of a part of it, X and Y from the upper left corner.")
        if self.fit == "crop":
            box = _largest(box, columns, rows)
        elif self.fit == "letterbox":
            inner = _largest(inner, *box[2:])
        return Fitting((width, height), box, (columns, rows), inner)

    @property
    def is_centre(self) -> bool:
        """That it is what `crop` takes of a whole frame."""
        return self.fit == "crop" and self.region is None

    def describe(self, fitting: Fitting) -> str:
        """For people: what of a frame is read, what is not, and what to do about it."""
        (width, height), (_, _, across, down), (columns, rows) = fitting.frame, fitting.box, fitting.size
        dropped = round(100 * (1 - across * down / (width * height)))
        bars = round(100 * (1 - fitting.inner[2] * fitting.inner[3] / (columns * rows)))
        text = f"{self}: {across}x{down} of {width}x{height} pixels are read"
        if dropped and self.region is None:
            like = ", or export with --like VIDEO" if dropped > _ROUNDED else ""
            text += f", {dropped} % is dropped; to read all, run with --fit letterbox{like}"
        like = "; export with --like VIDEO to have none" if bars > _ROUNDED and self.region is None else ""
        return text + (f", {bars} % of the input is bars{like}" if bars else "")

    def __str__(self) -> str:
        """As results and people are told: "centre square, bicubic to 224 px"."""
        rows, columns = height_width(self.size)
        ways = "centre square" if rows == columns else "centre rectangle", "whole between bars", "whole, stretched"
        region = f" of the region {','.join(map(str, self.region))}" if self.region else ""
        return f"{ways[FITS.index(self.fit)]}{region}, bicubic to {size_text(self.size)} px"


def require_fit(fit: str) -> None:
    """Refuse what is none of `FITS`."""
    if fit not in FITS:
        raise ConfigError(f"fit is {fit!r:.40}.", f"Choose one of: {', '.join(FITS)}.")


def parse_region(region: object) -> Box:
    """ "640,0,640,480" or [640, 0, 640, 480] -> (640, 0, 640, 480); refuses other than four numbers, and no pixel."""
    parts = region.split(",") if isinstance(region, str) else region
    if not isinstance(parts, list | tuple) or len(parts) != 4:
        raise ConfigError(f"The region is {region!r:.60}.", "Give X,Y,WIDTH,HEIGHT, in pixels of the frame.")
    x, y = (whole_number(str(part), "X or Y of the region") for part in parts[:2])
    width, height = (whole_number(str(part), "A side of the region", 1, MOST_COUNT) for part in parts[2:])
    return x, y, width, height


def _largest(within: Box, across: int, down: int) -> Box:
    """The largest box of the shape across : down about the centre of another."""
    x, y, width, height = within
    wide, high = min(width, max(1, round(height * across / down))), min(height, max(1, round(width * down / across)))
    return x + (width - wide) // 2, y + (height - high) // 2, wide, high


def _span(first: int, length: int, whole: int, cells: int) -> slice:
    """The cells of `cells` that stand for so many of `whole` pixels; at least one."""
    start = min(round(first * cells / whole), cells - 1)
    return slice(start, max(start + 1, round((first + length) * cells / whole)))
