"""Hostile values, drawn from a `random.Random`: what a stranger's file may hold in the place of a name or a figure."""

from __future__ import annotations

import math
import random
from typing import Any

HUGE = 10**5000
"""A whole number of more digits than Python reads or writes by itself."""
NESTED = 200
"""Levels of `nested`: more than any file of ours has, few enough for every writer."""
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 255, 1023, 65_536, 2**31 - 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**64),
    10**30, 10**400, HUGE, -HUGE,
    0.0, -0.0, 0.5, 1e-9, 5e-324, 1e-300, -1e-300, 1e15, 1e16, 1e100, 1e308, -1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip
TEXTS = (
    "", " ", "0", "-1", "1e9", "nan", "true", "null", "٣", "²", "x" * 100_000, "a\nb", "a\r\nb", "a\tb", "a\0b",
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b31m", "\u202egnp.exe", "\u2066\u2069", "\u200b", "\ufeff",
    "\ud800", "\udfff\ud800", "\udc80", "é", "日本語", "😀", "a" + "\u0301" * 500,
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "' onload='alert(1)", "]]>", "{{ 7 * 7 }}",
    "{0.__class__}", "%s%n", "$(id)", "`id`", "[/red]", "[bold]", "| a | b |", "../../etc/passwd", "/dev/zero",
    "/etc/passwd", "C:\\x", "a/b", ".", "..", "\\", "'", '"', "x" * 256,
)  # fmt: skip
KEYS = (*TEXTS[:12], "__class__", "unavailable", "value", "schema_version", "kind", "name", "path", "\ud800", "a.b")


def number(rng: random.Random) -> Any:
    """A number that is seldom one: zero, negative, huge, tiny, NaN, infinite, of 5,000 digits."""
    return rng.choice(NUMBERS)


def text(rng: random.Random) -> str:
    """A text that is seldom one: empty, 100 kB, escapes, markup, halves of characters."""
    return rng.choice(TEXTS)


def key(rng: random.Random) -> str:
    """The name of an entry."""
    return rng.choice(KEYS)


def nested(levels: int = NESTED) -> Any:
    """Lists and objects in turn, one in the other."""
    found: Any = 1
    for level in range(levels):
        found = [found] if level % 2 else {"a": found}
    return found


def value(rng: random.Random) -> Any:
    """Anything that JSON can say, and NaN and infinity, which Python's reader takes too."""
    kind = rng.randrange(10)
    if kind < 4:
        return number(rng)
    if kind < 7:
        return text(rng)
    if kind == 7:
        return rng.choice([None, True, False])
    if kind == 8:
        return rng.choice([[], {}, [[]], [{}], [None], [0] * 1000, {"unavailable": "x"}, {"value": 1e308}, nested()])
    return [value(rng) for _ in range(rng.randrange(4))] if rng.random() < 0.5 else {key(rng): value(rng)}


def near(content: Any, rng: random.Random) -> Any:
    """Something of the same type as `content`, or nearly: what a damaged or older file would hold."""
    if isinstance(content, bool):
        return rng.choice([not content, int(content), str(content)])
    if isinstance(content, (int, float)):
        small = content if abs(content) < 1e100 else 1
        return rng.choice([-small, 0, small + 1, small * 1000, small / 3, str(small), [small], True, -1, 1 << 40])
    if isinstance(content, str):
        return rng.choice([content[: len(content) // 2], content * 2, content.upper(), [content], {content[:9]: 1}, 0])
    if isinstance(content, (list, tuple)):
        items = list(content)
        return rng.choice([items[:-1], items * 2, items[::-1], [items], [], dict(zip("abc", items, strict=False))])
    return value(rng)
