"""PNGs of drawings, by matplotlib."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

from sparsifiner_edge.errors import MissingExtraError
from sparsifiner_edge.report.draw import PALETTE, RADIUS, Area, Box, Dot, Drawing, Line, Shape, Words

_CJK = (
    "Noto Sans CJK JP",
    "Noto Sans JP",
    "IPAexGothic",
    "IPAGothic",
    "TakaoGothic",
    "VL Gothic",
    "Source Han Sans JP",
)
_SCALE, _TITLE = 2, 36.0
_POINTS = 0.72
"""Points per pixel, where an inch is 100 pixels."""


def fonts(language: str) -> list[str] | None:
    """Font families for a language, or None where no installed font has its characters.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.font_manager import fontManager
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report") from error
    eastern = _present(fontManager)
    if not eastern:
        _add_new_fonts(fontManager)
        eastern = _present(fontManager)
    if language == "ja":
        return [*eastern[:1], "DejaVu Sans"] if eastern else None
    return ["DejaVu Sans", *eastern[:1]]


def _present(manager: Any) -> list[str]:
    names = {entry.name for entry in manager.ttflist}
    return [name for name in _CJK if name in names]


def _add_new_fonts(manager: Any) -> None:
    """Fonts that were installed after matplotlib made its list, which it keeps in the user's cache."""
    from matplotlib.font_manager import findSystemFonts

    known = {entry.fname for entry in manager.ttflist}
    for path in sorted(set(findSystemFonts()) - known):
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # A font that it cannot read it does not need.
            manager.addfont(path)


def png(drawing: Drawing, title: str, families: list[str]) -> bytes:
    """The drawing on white below its title, at twice its size in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(drawing.width / 100, (drawing.height + _TITLE) / 100), dpi=100 * _SCALE, facecolor=_paint("card")
    )
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, -_TITLE)
    axes.set_axis_off()
    for shape in (Words(8, -_TITLE / 2 + 5, title, size=15, bold=True), *drawing.shapes):
        _draw(axes, shape, families)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A name may hold characters that no font has; they become boxes.
        canvas.print_png(buffer)
    return buffer.getvalue()


def _paint(colour: str) -> str:
    return PALETTE[colour][0]


def _draw(axes: Any, shape: Shape, families: list[str]) -> None:
    from matplotlib import patches

    paint = _paint(shape.colour)
    if isinstance(shape, Line):
        x, y = zip(*shape.points, strict=True)
        style = (0, (4, 3)) if shape.dashed else "-"
        axes.plot(x, y, color=paint, linewidth=shape.width * _POINTS, linestyle=style, solid_capstyle="butt")
    elif isinstance(shape, Area):
        axes.add_patch(patches.Polygon(list(shape.points), facecolor=paint, alpha=shape.opacity, linewidth=0))
    elif isinstance(shape, (Box, Dot)):
        look: dict[str, Any] = {"facecolor": _paint("card") if shape.hollow else paint, "edgecolor": paint}
        look["linewidth"] = 1.1 if shape.hollow else 0
        if isinstance(shape, Dot):
            axes.add_patch(patches.Circle((shape.x, shape.y), RADIUS, zorder=3, **look))
        else:
            style = "--" if shape.hollow else "-"
            box = ((shape.x, shape.y), max(0.0, shape.width), shape.height)
            axes.add_patch(patches.Rectangle(*box, linestyle=style, **look))
    else:
        place = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
        font: dict[str, Any] = {
            "fontfamily": families,
            "fontsize": shape.size * _POINTS,
            "fontweight": "bold" if shape.bold else "normal",
        }
        # Names are no formulas, whatever dollars they hold.
        axes.text(shape.x, shape.y, shape.text, color=paint, ha=place, va="baseline", parse_math=False, **font)
