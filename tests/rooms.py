"""The rooms of the house, by path, and how many lines each has: `python -m tests.rooms [FOLDER]` prints the table.

A line counts as documentation where it belongs to a docstring, or holds nothing but a comment.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CODE = (".py", ".cc", ".cpp", ".c", ".h")
HOUSES = ("sparsifiner_edge/", "runtime/", "export/")
"""Where the package's code lies."""
ROOMS: dict[str, tuple[str, ...]] = {
    "base": ("sparsifiner_edge/*.py",),
    "ops": ("sparsifiner_edge/ops/",),
    "native": ("runtime/native/",),
    "triton": ("sparsifiner_edge/ops/triton/",),
    "sparse": ("sparsifiner_edge/sparse/",),
    "distill": ("sparsifiner_edge/distill/",),
    "export": ("sparsifiner_edge/export/",),
    "bundle": ("sparsifiner_edge/bundle/",),
    "runtime": ("sparsifiner_edge/runtime/",),
    "profiles": ("sparsifiner_edge/profiles/",),
    "evaluate": ("sparsifiner_edge/evaluate/", "sparsifiner_edge/corruptions.py", "sparsifiner_edge/outcomes.py"),
    "optimizer": ("sparsifiner_edge/optimizer/", "sparsifiner_edge/front.py"),
    "report": ("sparsifiner_edge/report/",),
    "camera": ("sparsifiner_edge/camera/",),
    "package": ("sparsifiner_edge/package/", "export/"),
    "cli": ("sparsifiner_edge/cli/", "sparsifiner_edge/__main__.py"),
    "demo, doctor": ("sparsifiner_edge/demo/", "sparsifiner_edge/doctor.py"),
}
"""Room to its folders, files and patterns; a file is of the room that names it the most closely."""


class Lines(NamedTuple):
    """Of a file or of a room. Attributes: documentation: of docstrings, and of comments alone."""

    all: int = 0
    documentation: int = 0

    def __add__(self, other: object) -> Lines:
        """Of both."""
        assert isinstance(other, Lines)
        return Lines(self.all + other.all, self.documentation + other.documentation)


def tracked(folder: Path = ROOT) -> list[str]:
    """Every file of the repository, as git has it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=folder, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (folder / name).is_file()]


def code(folder: Path = ROOT) -> list[str]:
    """The package's files of code."""
    return [name for name in tracked(folder) if name.startswith(HOUSES) and name.endswith(CODE)]


def room_of(name: str) -> str | None:
    """The room of a file; None where none names it, or two do as closely."""
    named = [(len(place), room) for room, places in ROOMS.items() for place in places if _holds(place, name)]
    closest = max((length for length, _ in named), default=0)
    rooms = {room for length, room in named if length == closest}
    return rooms.pop() if len(rooms) == 1 else None


def _holds(place: str, name: str) -> bool:
    if place.endswith("/"):
        return name.startswith(place)
    return PurePosixPath(name).parent == PurePosixPath(place).parent and PurePosixPath(name).match(place)


def lines_of(path: Path) -> Lines:
    """Counted in a file of code."""
    text = path.read_text(encoding="utf-8")
    documented = _python_documentation(text) if path.suffix == ".py" else _c_comments(text)
    return Lines(len(text.splitlines()), len(documented))


def _python_documentation(text: str) -> set[int]:
    found: set[int] = set()
    strings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.update(range(node.lineno + 1, (node.end_lineno or node.lineno) + 1))
    comments = {number for number, line in enumerate(text.splitlines(), 1) if line.lstrip().startswith("#")}
    return found | comments - strings


def _c_comments(text: str) -> set[int]:
    found: set[int] = set()
    for match in re.finditer(r"^[ \t]*(//[^\n]*|/\*.*?\*/)", text, re.MULTILINE | re.DOTALL):
        first = text.count("\n", 0, match.start(1)) + 1
        found.update(range(first, first + match[1].count("\n") + 1))
    return found


@functools.cache
def counted(folder: Path = ROOT) -> dict[str, Lines]:
    """Room to its lines."""
    found = dict.fromkeys(ROOMS, Lines())
    for name in code(folder):
        room = room_of(name)
        if room is not None:
            found[room] += lines_of(folder / name)
    return found


def main() -> None:
    """Print the table."""
    found = counted(Path(sys.argv[1]) if sys.argv[1:] else ROOT)
    rows = [*found.items(), ("all", sum(found.values(), Lines()))]
    print("| room | lines | docstrings and comments |\n| --- | --- | --- |")
    for room, lines in rows:
        print(f"| {room} | {lines.all:,} | {lines.documentation / max(lines.all, 1):.1%} |")


if __name__ == "__main__":
    main()
