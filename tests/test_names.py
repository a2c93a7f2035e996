"""Names say what a thing is: words that say how it was come by are few, and functions are verbs; counts only fall."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

from tests.rooms import ROOT, code

WORDS = frozenset(["found", "told", "asked", "own", "made", "given", "left", "seen", "kept"])
MOST = 40
PARTICIPLES = 10
"""Functions whose name is a past participle, or ends in one."""
IRREGULAR = frozenset([
    "held", "told", "found", "made", "left", "kept", "seen", "given", "known", "said", "taken", "drawn",
    "written", "shown", "bound", "lost",
])  # fmt: skip


def names(path: str, text: str) -> Iterator[str]:
    """Identifiers of a file of Python, C or C++, each time that they stand there; comments and texts left out."""
    if path.endswith(".py"):
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        return (token.string for token in tokens if token.type == tokenize.NAME)
    bare = re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', "", text, flags=re.DOTALL)
    return iter(re.findall(r"[A-Za-z_]\w*", bare))


def words(name: str) -> list[str]:
    """ "own_Width" -> ["own", "width"]."""
    return [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]


def files() -> dict[str, str]:
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in code()}


def test_names_say_what_a_thing_is() -> None:
    worst = {path: sum(bool(WORDS & {*words(name)}) for name in names(path, text)) for path, text in files().items()}
    assert sum(worst.values()) <= MOST, sorted(worst.items(), key=lambda entry: -entry[1])[:10]


def test_functions_are_verbs() -> None:
    participles = []
    for path, text in files().items():
        for node in ast.walk(ast.parse(text)) if path.endswith(".py") else ():
            if isinstance(node, ast.FunctionDef) and not node.decorator_list and not node.name.startswith("__"):
                *before, last = words(node.name)
                is_one = (last.endswith("ed") and last not in ("embed", "need", "feed")) or last in IRREGULAR
                if is_one and before[:1] not in (["is"], ["has"]):
                    participles.append(f"{path}: {node.name}")
    assert len(participles) <= PARTICIPLES, participles


def test_what_is_counted() -> None:
    assert list(names("a.py", "found = left_out(x)  # made")) == ["found", "left_out", "x"]
    assert list(names("a.cc", 'int kept = 1;  // told\nsay("seen");')) == ["int", "kept", "say"]
    assert words("own_Width") == ["own", "width"]
