"""Safe display of untrusted text: file names, labels, keys and messages, in terminals, JSON and configurations.

A name may hold escape sequences that rewrite a terminal, characters that reverse the text direction, line breaks that
fake a line, or bytes that are not text. `printable` makes all of these visible and harmless.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

_SHORT = 300
"""Default maximum number of characters of `printable`."""
_FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | {
    chr(code)
    for first, last in ((0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF))
    for code in range(first, last + 1)
}
"""Characters that count as printable and are invisible: fillers and variation selectors."""


def _is_hidden(character: str) -> bool:
    """Return True for control and format characters, unusual separators, surrogates and private use."""
    return character in _FILLERS or not (character.isprintable() or character == "\u3000")


def _map_hidden(text: str, escape: Callable[[str], str]) -> str:
    """Replace each hidden character by an escape."""
    hidden = {ord(character): escape(character) for character in set(text) if _is_hidden(character)}
    return text.translate(hidden) if hidden else text


def printable(text: object, most: int = _SHORT) -> str:
    r"""Return text in one line that is safe to display: hidden characters become escapes such as \x1b.

    Args:
        text: Anything; its `str` is shown.
        most: Maximum number of characters; longer text is cut in the middle.
    """
    plain = _map_hidden(str(text), _escape)
    if len(plain) <= most:
        return plain
    half = (most - 5) // 2
    return f"{plain[:half]} ... {plain[-half:]}"


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def one_line(error: object, most: int = 500) -> str:
    """Return a library's error message in one line, or its class if it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "Did you mean ..?" with the most similar known names; empty if there is none."""
    import difflib  # Takes milliseconds, needed only for errors.

    close = difflib.get_close_matches(name, list(known))
    return f"Did you mean {', '.join(close)}?" if close else ""


def file_name(text: str) -> str:
    """Return a safe name for a file or folder.

    It has only letters, digits, dots, underscores and hyphens, and starts with a letter or digit.
    """
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip("._-")[:100] or "model"


def dump_json(content: Any, indent: int | None = 2) -> str:
    r"""Return content as JSON text with a line break at its end; every file and line is written this way.

    Letters of all languages stay as they are. Hidden characters are escaped, such as \u009b.

    Raises:
        ValueError: The content has NaN or infinity, which JSON lacks; see `finite`.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    # Outside of strings, JSON text has no hidden characters except its own line breaks.
    return "\n".join(_map_hidden(line, lambda x: json.dumps(x)[1:-1]) for line in text.split("\n")) + "\n"


def finite(content: Any) -> tuple[Any, int]:
    """Return the content with None for every NaN and infinity, and their number."""
    if isinstance(content, float):
        return (content, 0) if math.isfinite(content) else (None, 1)
    if isinstance(content, dict):
        pairs = {name: finite(value) for name, value in content.items()}
        return {name: value for name, (value, _) in pairs.items()}, sum(count for _, count in pairs.values())
    if isinstance(content, (list, tuple)):
        values = [finite(value) for value in content]
        return [value for value, _ in values], sum(count for _, count in values)
    return content, 0
