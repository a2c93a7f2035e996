"""What a section of the page is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sparsifiner_edge.report.result_files import ResultFile


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


class Picture(NamedTuple):
    """A picture that was given; `source`: a data URI of it."""

    title: str
    source: str
    kind: str = "picture"


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


Block = Figure | Picture | Table | Note


class Section(NamedTuple):
    """What is below a heading, and the files that its figures are from; `name` leads to its title and intro."""

    name: str
    blocks: Sequence[Block]
    files: Sequence[ResultFile] = ()

    @property
    def commands(self) -> list[str]:
        """The commands that reproduce its figures, each once."""
        return list(dict.fromkeys(file.command for file in self.files))
