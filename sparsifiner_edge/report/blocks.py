"""What a section of the page is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from sparsifiner_edge.report.read import Source


class Figure(NamedTuple):
    """A chart; `label` says in words what it shows.

    Attributes:
        name: that of its PNG. draw: width in pixels -> a matplotlib figure.
    """

    name: str
    title: str
    label: str
    draw: Callable[[float], Any]
    kind: str = "figure"


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
    """What is below a heading, and the commands that reproduce its figures; `name` leads to its title and intro."""

    name: str
    blocks: Sequence[Block]
    commands: Sequence[str] = ()


def commands_of(sources: Iterable[Source]) -> list[str]:
    """Their commands, each once."""
    return list(dict.fromkeys(source.command for source in sources))
