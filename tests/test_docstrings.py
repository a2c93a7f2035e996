"""Tests that docstrings of the package begin with a verb or a noun, not with "What", "Of" or "How"."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.repository import ROOT, code

OPENING = re.compile(r"\W*(What|Of|How|Those|See|Whether|Where|Which|Who|Whose|Such)\b")


def strings(text: str) -> Iterator[tuple[int, str]]:
    """Return every docstring of a source file with its line, including those of attributes and constants."""
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for child in body if isinstance(body, list) else ():
            match child:
                case ast.Expr(value=ast.Constant(value=str(docstring))):
                    yield child.lineno, docstring


def test_docstrings_begin_plainly() -> None:
    files = [name for name in code() if name.startswith("sparsifiner_edge/") and name.endswith(".py")]
    found = [
        f"{name}:{line}: {docstring.strip().splitlines()[0]}"
        for name in files
        for line, docstring in strings((ROOT / name).read_text(encoding="utf-8"))
        if OPENING.match(docstring)
    ]
    assert not found, "\n".join(found)


def test_nothing_keeps_the_formatter_away() -> None:
    skipping = [name for name in code() if re.search(r"fmt: (off|skip)", (ROOT / name).read_text(encoding="utf-8"))]
    assert skipping == []


def test_an_opening_is_recognised() -> None:
    source = "'What it is.'\nX = 1\n'Number of tokens.'\n"
    assert [docstring for _, docstring in strings(source)] == ["What it is.", "Number of tokens."]
    assert OPENING.match("What it is.")
    assert not OPENING.match("Number of tokens.")
