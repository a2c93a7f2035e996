"""Geometry from frames to a model's input, shared by images, videos, cameras and overlays."""

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
"""Left, top, width and height in pixels."""
Affine: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Map of points (x, y): each row has the factors of x and y, and the offset."""
BARS = (124, 116, 104)
"""RGB of the bars of "letterbox": ImageNet's mean, which is close to zero after any of the usual normalisations.

One colour serves all models, so that clients need no setting for it.
"""
_ROUNDED = 5
"""Percentage of a frame that may be cut without a hint to use another fit: the input consists of whole patches."""


class Fitting(msgspec.Struct, frozen=True):
    """The part of a frame that a model reads.

    Attributes:
        frame: Width and height of the frame in pixels.
        box: Part of the frame that is read.
        size: Width and height of the model's input.
        inner: Where the box lies in the input; bars surround it.
        affine: Where the input's points were before a moving view was aligned, in pixels of the input; None if it was
            not. See `camera.align`.

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
    affine: Affine | None = None

    def to_frame(self, x: float, y: float) -> tuple[float, float]:
        """Map a point of the input, in pixels from its corner, to the frame."""
        if self.affine is not None:
            x, y = (across * x + down * y + offset for across, down, offset in self.affine)
        (x0, y0, across, down), (column, row, columns, rows) = self.box, self.inner
        return x0 + (x - column) * across / columns, y0 + (y - row) * down / rows

    @property
    def corners(self) -> list[tuple[float, float]]:
        """Corners of the part of the frame that was read, clockwise from the upper left one of the input."""
        x, y, width, height = self.inner
        points = (x, y), (x + width, y), (x + width, y + height), (x, y + height)
        return [self.to_frame(*point) for point in points]

    @property
    def read(self) -> tuple[float, float, float, float]:
        """Part of the frame that was read, as the smallest box around it."""
        if self.affine is None:
            return self.box
        across, down = zip(*self.corners, strict=True)
        x, y, right, bottom = min(across), min(down), max(across), max(down)
        return round(x, 2), round(y, 2), round(right - x, 2), round(bottom - y, 2)

    @property
    def is_turned(self) -> bool:
        """True if `read` is not exact, because the view was turned."""
        return self.affine is not None and self.affine[0][1] != 0

    def cut(self, values: Array) -> Array:
        """Return the part of a map [...,h,w] of the input that belongs to the box, without bars."""
        (x, y, width, height), (across, down), (rows, columns) = self.inner, self.size, values.shape[-2:]
        return values[..., _span(y, height, down, rows), _span(x, width, across, columns)]


class Framing(msgspec.Struct, frozen=True):
    """Geometry from frames to a model's input.

    Attributes:
        size: Input size in pixels.
        fit: "crop": the largest centred box with the input's aspect ratio. "letterbox": the whole frame between bars of
            the colour `BARS`. "stretch": the whole frame, distorted.
        region: Part of the frame that counts as the whole frame, as `parse_region` takes it; None for all of it.

    Raises:
        ConfigError: The fit or the region is invalid.
    """

    size: ImageSize
    fit: Fit = "crop"
    region: Box | None = None

    def __post_init__(self) -> None:
        require_fit(self.fit)
        if self.region is not None:
            msgspec.structs.force_setattr(self, "region", parse_region(self.region))

    def of(self, width: int, height: int) -> Fitting:
        """Return the fitting for a frame of this width and height; refuses a frame that does not contain the region."""
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
        """True if this is "crop" of a whole frame."""
        return self.fit == "crop" and self.region is None

    def describe(self, fitting: Fitting) -> str:
        """Describe which part of a frame is read, which is not, and what to do about it."""
        (width, height), (_, _, across, down), (columns, rows) = fitting.frame, fitting.box, fitting.size
        dropped = round(100 * (1 - across * down / (width * height)))
        bars = round(100 * (1 - fitting.inner[2] * fitting.inner[3] / (columns * rows)))
        text = f"{self}: {across}x{down} of {width}x{height} pixels are read"
        if dropped and self.region is None:
            like = ", or export with --like VIDEO" if dropped > _ROUNDED else ""
            text += f", {dropped} % is dropped; to read all, run with --fit letterbox{like}"
        like = "; to avoid bars, export with --like VIDEO" if bars > _ROUNDED and self.region is None else ""
        return text + (f", {bars} % of the input is bars{like}" if bars else "")

    def __str__(self) -> str:
        """Describe the framing as results do: "centre square, bicubic to 224 px"."""
        rows, columns = height_width(self.size)
        ways = "centre square" if rows == columns else "centre rectangle", "whole between bars", "whole, stretched"
        region = f" of the region {','.join(map(str, self.region))}" if self.region else ""
        return f"{ways[FITS.index(self.fit)]}{region}, bicubic to {size_text(self.size)} px"


def require_fit(fit: str) -> None:
    """Refuse a fit that is not in `FITS`."""
    if fit not in FITS:
        raise ConfigError(f"fit is {fit!r:.40}.", f"Choose one of: {', '.join(FITS)}.")


def parse_region(region: object) -> Box:
    """Parse a region: "640,0,640,480" or [640, 0, 640, 480] -> (640, 0, 640, 480); refuses an empty one."""
    parts = region.split(",") if isinstance(region, str) else region
    if not isinstance(parts, list | tuple) or len(parts) != 4:
        raise ConfigError(f"The region is {region!r:.60}.", "Give X,Y,WIDTH,HEIGHT, in pixels of the frame.")
    x, y = (whole_number(str(part), "X or Y of the region") for part in parts[:2])
    width, height = (whole_number(str(part), "A side of the region", 1, MOST_COUNT) for part in parts[2:])
    return x, y, width, height


def _largest(within: Box, across: int, down: int) -> Box:
    """Return the largest box with the aspect ratio across : down, centred in another box."""
    x, y, width, height = within
    wide, high = min(width, max(1, round(height * across / down))), min(height, max(1, round(width * down / across)))
    return x + (width - wide) // 2, y + (height - high) // 2, wide, high


def _span(first: int, length: int, whole: int, cells: int) -> slice:
    """Return the cells of a grid that cover a span of pixels; at least one."""
    start = min(round(first * cells / whole), cells - 1)
    return slice(start, max(start + 1, round((first + length) * cells / whole)))
