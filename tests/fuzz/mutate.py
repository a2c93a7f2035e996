"""Seeded mutations of external input: objects, JSON, TOML, bytes, zip archives, and values to insert.

Pure functions of a valid example and a `random.Random`, so that a seed reproduces a try. They are independent of
commands.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

HUGE = 10**5000
"""A whole number of more digits than Python reads or writes by default."""
NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    1023,
    65_536,
    2**31 - 1,
    2**31,
    -(2**31) - 1,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**64),
    10**30,
    10**400,
    HUGE,
    -HUGE,
    0.0,
    -0.0,
    0.5,
    1e-9,
    5e-324,
    1e-300,
    -1e-300,
    1e15,
    1e16,
    1e100,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    -math.inf,
)
TEXTS = (
    "",
    " ",
    "0",
    "-1",
    "1e9",
    "nan",
    "true",
    "null",
    "٣",
    "²",
    "x" * 100_000,
    "a\nb",
    "a\r\nb",
    "a\tb",
    "a\0b",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b31m",
    "\u202egnp.exe",
    "\u2066\u2069",
    "\u200b",
    "\ufeff",
    "\ud800",
    "\udfff\ud800",
    "\udc80",
    "é",
    "日本語",
    "😀",
    "a" + "\u0301" * 500,
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "]]>",
    "{{ 7 * 7 }}",
    "{0.__class__}",
    "%s%n",
    "$(id)",
    "`id`",
    "[/red]",
    "[bold]",
    "| a | b |",
    "../../etc/passwd",
    "/dev/zero",
    "/etc/passwd",
    "C:\\x",
    "a/b",
    ".",
    "..",
    "\\",
    "'",
    '"',
    "x" * 256,
)
"""Unusual texts: empty, 100 kB, escapes, markup, lone surrogates."""
KEYS = (*TEXTS[:12], "__class__", "unavailable", "value", "schema_version", "kind", "name", "path", "\ud800", "a.b")
"""Names of entries."""
_DIGITS = "9" * 5000
_NUMBER = re.compile(rb"(?<![A-Za-z_\"-])-?\d+(\.\d+)?")
_TOML_VALUE = re.compile(r'"[^"\n]*"|-?\d+(\.\d+)?')
TOML_VALUES = (
    "0",
    "-1",
    "1e308",
    "nan",
    "inf",
    "-inf",
    "9223372036854775808",
    _DIGITS,
    "1_000",
    "0xff",
    "true",
    '""',
    '" "',
    '"a\\nb"',
    '"\\u001b[31m"',
    '"\\u202e"',
    "[]",
    "{}",
    "[[1]]",
    "1979-05-27",
    "07:32:00",
    "'",
    '"""',
    "[" * 2000,
    "{a=" * 500,
    '"\\ud800"',
    "٣",
    "²",
    '"' + "x" * 100_000 + '"',
    ".".join("a" * 3000) + " = 1",
)


NESTED = json.loads('{"a":[' * 100 + "1" + "]}" * 100)
"""Alternately nested lists and objects: deeper than any file of ours, not too deep for any writer."""


def value(rng: random.Random) -> Any:
    """Return any JSON value, or NaN or infinity, which Python's reader accepts too."""
    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 7:
        return rng.choice(TEXTS)
    if kind == 7:
        return rng.choice([None, True, False])
    if kind == 8:
        return rng.choice([[], {}, [[]], [{}], [None], [0] * 1000, {"unavailable": "x"}, {"value": 1e308}, NESTED])
    return [value(rng) for _ in range(rng.randrange(4))] if rng.random() < 0.5 else {rng.choice(KEYS): value(rng)}


def near(content: Any, rng: random.Random) -> Any:
    """Return a value of nearly the type of `content`: what a damaged or older file would hold."""
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


def mutated_object(content: Any, rng: random.Random) -> Any:
    """Copy nested dicts and lists with 1 to 3 changes: another value or type, missing, added, moved."""
    changed = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            return value(rng)
        holder, name = rng.choice(places)
        _change(holder, name, places, rng)
    return changed


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Return every (container, key or index), but only some of long lists, so that samples do not dominate."""
    names: list[Any] = []
    if isinstance(content, dict):
        names = list(content)
    elif isinstance(content, list):
        names = list(range(len(content))) if len(content) <= 8 else [0, 1, len(content) // 2, len(content) - 1]
    for name in names:
        yield content, name
        yield from _places(content[name])


def _change(holder: Any, name: Any, places: list[tuple[Any, Any]], rng: random.Random) -> None:
    kind = rng.randrange(8)
    if kind < 3:
        holder[name] = value(rng)
    elif kind < 5:
        holder[name] = near(holder[name], rng)
    elif kind == 5:
        del holder[name]
    elif kind == 6:
        other, place = rng.choice(places)
        if place in other if isinstance(other, dict) else place < len(other):
            holder[name] = copy.deepcopy(other[place])
    elif isinstance(holder, dict):
        holder[rng.choice(KEYS)] = value(rng)
    else:
        holder.insert(rng.randrange(len(holder) + 1), value(rng))


def mutated_json(content: Any, rng: random.Random) -> bytes:
    """Return JSON of a changed copy, sometimes with duplicate names, deep nesting or damaged bytes."""
    kind = rng.randrange(20)
    if kind == 0:
        return mutated_bytes(json_text(content), rng)
    if kind == 1:  # Replaces a number by what no object in memory could be.
        odd = (b"[" * 100_000, b'{"a":' * 100_000, b"1e999", b"-1e999", b"01", b"1" * 5000, b"\xff", b"+1", b"")
        return _replaced(json_text(content), _NUMBER, rng.choice(odd), rng)
    changed = mutated_object(content, rng)
    if kind == 2 and isinstance(changed, dict) and changed:
        return json_text(changed)[:-1] + b"," + json_text({rng.choice(list(changed)): value(rng)})[1:]
    return json_text(changed)


def _replaced(written: Any, pattern: re.Pattern[Any], new: Any, rng: random.Random) -> Any:
    """Replace one match, or everything if there is no match."""
    found = [match.span() for match in pattern.finditer(written)] or [(0, len(written))]
    start, end = rng.choice(found)
    return written[:start] + new + written[end:]


def json_text(content: Any) -> bytes:
    """Return JSON of everything that `value` returns, including huge numbers and lone surrogates."""
    if isinstance(content, dict):
        pairs = (json_text(str(name)) + b":" + json_text(child) for name, child in content.items())
        return b"{" + b",".join(pairs) + b"}"
    if isinstance(content, (list, tuple)):
        return b"[" + b",".join(map(json_text, content)) + b"]"
    if isinstance(content, int) and abs(content) >= HUGE:
        return (b"-" if content < 0 else b"") + _DIGITS.encode()
    if isinstance(content, float) and not math.isfinite(content):
        return repr(content).replace("inf", "Infinity").replace("nan", "NaN").encode()
    return json.dumps(content).encode()


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return bytes that are cut, flipped, zeroed, doubled, appended, swapped or entirely different."""
    if not content:
        return rng.randbytes(8)
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((1, 4, 16, 256, 4096)))
    before, some, after = content[:start], content[start:end], content[end:]
    flipped = bytes([content[start] ^ (1 << rng.randrange(8))])
    operations: list[Callable[[], bytes]] = [
        lambda: before,
        lambda: some + after,
        lambda: before + after,
        lambda: before + flipped + content[start + 1 :],
        lambda: before + bytes(len(some)) + after,
        lambda: before + b"\xff" * len(some) + after,
        lambda: before + some * 4 + after,
        lambda: content + rng.randbytes(64),
        lambda: before + rng.randbytes(len(some)) + after,
        lambda: rng.choice([b"", b"\0", b"\n", b"{}", b"[]", b"null", b"PK\x03\x04", rng.randbytes(100)]),
    ]
    return rng.choice(operations)()


def mutated_toml(content: str, rng: random.Random) -> bytes:
    """Return TOML with another value or name, a line removed, repeated or moved, or damaged bytes."""
    lines = content.splitlines()
    if rng.random() < 0.15 or "=" not in content:
        return mutated_bytes(content.encode("utf-8"), rng)
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.choice([n for n, line in enumerate(lines) if "=" in line] or [0])
        name, _, old = lines[place].partition("=")
        text = json.dumps(rng.choice(TEXTS), ensure_ascii=rng.random() < 0.5)
        new = rng.choice(TOML_VALUES) if rng.random() < 0.7 else text
        changes: list[list[str]] = [
            *[[f"{name}= {new}"]] * 3,
            *[[f"{name}= {_replaced(old, _TOML_VALUE, rng.choice(TOML_VALUES), rng)}"]] * 2,
            [],
            [lines[place]] * 2,
            [f"{json.dumps(rng.choice(KEYS))} = {new}", lines[place]],
            [f"x.{name}= {new}"],
            [rng.choice(["[", "[[x]]", "[a.b]", "[sources]", "[[power_modes]]"]), lines[place]],
        ]
        lines[place : place + 1] = rng.choice(changes)
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def mutated_zip(content: bytes, rng: random.Random) -> bytes:
    """Return a zip archive with changed bytes, or with one member changed, missing, renamed or duplicated."""
    if rng.random() < 0.5:
        return mutated_bytes(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    place = rng.randrange(len(members))
    name, data = members[place]
    names = (f"../{name}", f"/{name}", name.upper(), "x", f"{name}/", name + "\u202e")
    more = (f"more{rng.randrange(9)}.npy", rng.choice([b"", b"\0" * 4_000_000, rng.randbytes(50)]))
    kinds = (
        *[[(name, mutated_bytes(data, rng))]] * 3,
        [],
        [(rng.choice(names), data)],
        [(name, data), more],
        [(name, rng.choice(members)[1])] * 2,
    )
    members[place : place + 1] = rng.choice(kinds)
    packed = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(packed, "w", rng.choice((0, zipfile.ZIP_DEFLATED))) as archive:
        warnings.simplefilter("ignore")  # of duplicate names
        for name, data in members:
            archive.writestr(name, data)
    return packed.getvalue()
