"""What a section of the page is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from sparsifiner_edge.report.draw import Drawing, svg
from sparsifiner_edge.report.read import Source

WIDE, NARROW = 720.0, 340.0
"""Widths of a chart on a desk and on a telephone: the same text size on either."""


class Figure(NamedTuple):
    """A chart in both widths; `name` is that of its PNG."""

    name: str
    title: str
    wide: Drawing
    narrow: Drawing
    kind: str = "figure"

    @property
    def svg_wide(self) -> str:
        """SVG for wide windows and paper."""
        return svg(self.wide, "wide")

    @property
    def svg_narrow(self) -> str:
        """SVG for telephones."""
        return svg(self.narrow, "narrow")


class Table(NamedTuple):
    """Rows of text under `head`; the first column is on the left, the others right unless `words`."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False
    kind: str = "table"


class Note(NamedTuple):
    """A remark; `missing`: about something that was not measured. `command`: what would measure it."""

    text: str
    missing: bool = False
    command: str = ""
    kind: str = "note"


Block = Figure | Table | Note


class Section(NamedTuple):
    """A heading, what is below it, and the commands that reproduce its figures."""

    name: str
    title: str
    intro: str
    blocks: Sequence[Block]
    commands: Sequence[str] = ()
    estimate: bool = False


def figure(name: str, title: str, draw: Callable[[float], Drawing]) -> Figure:
    """A chart drawn at both widths."""
    return Figure(name, title, draw(WIDE), draw(NARROW))


def commands_of(sources: Iterable[Source]) -> list[str]:
    """Their commands, each once."""
    return list(dict.fromkeys(source.command for source in sources))
