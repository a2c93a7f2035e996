"""A drawing as a list of shapes, in pixels from the upper left, and its SVG; `png.py` renders the same shapes."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

PALETTE = {
    "ink": ("#15191e", "#eef1f4"),
    "muted": ("#566070", "#a3afbd"),
    "grid": ("#dfe3e8", "#303843"),
    "card": ("#ffffff", "#181d24"),
    "s1": ("#0a66c2", "#5ab0ff"),
    "s2": ("#c85a00", "#ff9d4d"),
    "s3": ("#16784c", "#4fca8d"),
    "s4": ("#7d3fb8", "#c39bf5"),
    "s5": ("#b02379", "#f57fc0"),
    "s6": ("#5a6b7b", "#9db0c2"),
}
"""Colour name -> (light, dark), as the page and the PNGs use them."""
SERIES = ("s1", "s2", "s3", "s4", "s5", "s6")
SMALL, NORMAL = 12.0, 13.0


class Line(NamedTuple):
    """An open line through `points`."""

    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 1.0
    dashed: bool = False


class Area(NamedTuple):
    """A filled polygon."""

    points: Sequence[tuple[float, float]]
    colour: str
    opacity: float = 1.0


class Box(NamedTuple):
    """A rectangle; `hollow`: outline alone, dashed, as estimates have it. `note` is shown on hovering."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    hollow: bool = False
    note: str = ""


class Dot(NamedTuple):
    """A disc, or a ring where `hollow`."""

    x: float
    y: float
    colour: str
    hollow: bool = False
    note: str = ""


class Words(NamedTuple):
    """Text on a base line; `anchor` is start, middle or end."""

    x: float
    y: float
    text: str
    colour: str = "ink"
    anchor: str = "start"
    size: float = SMALL
    bold: bool = False


Shape = Line | Area | Box | Dot | Words
RADIUS = 5.5


class Drawing(NamedTuple):
    """Shapes in a frame of `width` x `height` pixels; `label` tells what is to be seen to those who cannot."""

    width: float
    height: float
    shapes: list[Shape]
    label: str


def width_of(text: str, size: float = SMALL, bold: bool = False) -> float:
    """About how many pixels wide a text is: characters of East Asia are square."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return size * (wide + (len(text) - wide) * (0.6 if bold else 0.56))


def fitted(text: str, space: float, size: float = SMALL, bold: bool = False) -> str:
    """The text, shortened to fit into `space` pixels."""
    if width_of(text, size, bold) <= space:
        return text
    while text and width_of(text + "…", size, bold) > space:
        text = text[:-1]
    return text + "…"


def svg(drawing: Drawing, name: str) -> str:
    """An `<svg>` element whose colours follow the page's custom properties; `name` is its class."""
    shapes = "".join(_element(shape) for shape in drawing.shapes)
    size = f"{drawing.width:g} {drawing.height:g}"
    label = html.escape(drawing.label)
    style = f'style="max-width:{drawing.width:g}px"'
    return f'<svg class="{name}" viewBox="0 0 {size}" {style} role="img" aria-label="{label}">{shapes}</svg>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _element(shape: Shape) -> str:
    paint = f"var(--{shape.colour})"
    if isinstance(shape, Line):
        dashes = ' stroke-dasharray="4 3"' if shape.dashed else ""
        stroke = f'stroke="{paint}" stroke-width="{shape.width:g}"{dashes} fill="none"'
        return f'<polyline points="{_path(shape.points)}" {stroke}/>'
    if isinstance(shape, Area):
        return f'<polygon points="{_path(shape.points)}" fill="{paint}" fill-opacity="{shape.opacity:g}"/>'
    if isinstance(shape, Words):
        weight = ' font-weight="600"' if shape.bold else ""
        place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.anchor}" font-size="{shape.size:g}"'
        return f'<text {place}{weight} fill="{paint}">{html.escape(shape.text)}</text>'
    fill = f'fill="var(--card)" stroke="{paint}" stroke-width="1.5"' if shape.hollow else f'fill="{paint}"'
    note = f"<title>{html.escape(shape.note)}</title>" if shape.note else ""
    if isinstance(shape, Dot):
        return f'<circle cx="{shape.x:.1f}" cy="{shape.y:.1f}" r="{RADIUS:g}" {fill}>{note}</circle>'
    dashes = ' stroke-dasharray="4 3"' if shape.hollow else ""
    size = f'x="{shape.x:.1f}" y="{shape.y:.1f}" width="{max(0.0, shape.width):.1f}" height="{shape.height:.1f}"'
    return f'<rect {size} rx="2" {fill}{dashes}>{note}</rect>'
