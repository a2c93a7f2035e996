"""Seeded mutations of what is read from outside: objects, JSON, TOML, bytes, zip archives.

Pure functions of a good example and a `random.Random`, so that a seed tells a try again. They know nothing of commands.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from tests.fuzz.generators import HUGE, key, near, text, value

_DIGITS = "9" * 5000
_NUMBER = re.compile(rb"(?<![A-Za-z_\"-])-?\d+(\.\d+)?")
TOML_VALUES = (
    "0", "-1", "1e308", "nan", "inf", "-inf", "9223372036854775808", _DIGITS, "1_000", "0xff", "true", '""', '" "',
    '"a\\nb"', '"\\u001b[31m"', '"\\u202e"', "[]", "{}", "[[1]]", "1979-05-27", "07:32:00", "'", '"""', "[" * 2000,
    "{a=" * 500, '"\\ud800"', "٣", "²", '"' + "x" * 100_000 + '"', ".".join("a" * 3000) + " = 1",
)  # fmt: skip


class Pairs(list[tuple[str, Any]]):
    """An object whose text may have a name twice, which a dict cannot."""


def mutated_object(content: Any, rng: random.Random, changes: int | None = None) -> Any:
    """A copy of nested dicts and lists with some places changed: another value or type, missing, added, moved.

    Args:
        content: dicts, lists, tuples, and whatever else as leaves.
        changes: how many; None draws 1 to 3.
    """
    changed = copy.deepcopy(content)
    for _ in range(changes or rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            return value(rng)
        holder, name = rng.choice(places)
        _change(holder, name, places, rng)
    return changed


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index); of long lists some, so that samples do not outweigh all else."""
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
        holder[key(rng)] = value(rng)
    else:
        holder.insert(rng.randrange(len(holder) + 1), value(rng))


def mutated_json(content: Any, rng: random.Random) -> bytes:
    """JSON text of a changed copy; now and then with names that come twice, deep nesting, or damaged bytes."""
    kind = rng.randrange(20)
    if kind == 0:
        return mutated_bytes(json_text(content), rng)
    if kind == 1:
        return _spliced(json_text(content), rng)
    changed = mutated_object(content, rng)
    if kind == 2 and isinstance(changed, dict) and changed:
        twice = rng.choice(list(changed))
        return json_text(Pairs([*changed.items(), (twice, value(rng))]))
    return json_text(changed)


def _spliced(written: bytes, rng: random.Random) -> bytes:
    """Something in the place of one of the text's numbers that no object in memory could be."""
    found = list(_NUMBER.finditer(written))
    what = rng.choice(
        [b"[" * 100_000, b'{"a":' * 100_000, b"1e999", b"-1e999", b"01", b"1" * 5000, b"\xff", b"+1", b""]
    )
    if not found:
        return what
    match = rng.choice(found)
    return written[: match.start()] + what + written[match.end() :]


def json_text(content: Any) -> bytes:
    """JSON of everything that `generators.value` gives: huge numbers and halves of characters included."""
    if isinstance(content, Pairs):
        return b"{" + b",".join(json_text(name) + b":" + json_text(child) for name, child in content) + b"}"
    if isinstance(content, dict):
        return json_text(Pairs((str(name), child) for name, child in content.items()))
    if isinstance(content, (list, tuple)):
        return b"[" + b",".join(map(json_text, content)) + b"]"
    if isinstance(content, int) and abs(content) >= HUGE:
        return (b"-" if content < 0 else b"") + _DIGITS.encode()
    if isinstance(content, float) and not math.isfinite(content):
        return repr(content).replace("inf", "Infinity").replace("nan", "NaN").encode()
    return json.dumps(content).encode()


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, zeroed, doubled, appended, swapped, or other bytes altogether."""
    changed = bytearray(content)
    size = max(1, len(changed))
    start = rng.randrange(size)
    end = min(len(changed), start + rng.choice((1, 4, 16, 256, 4096)))
    operations: list[Callable[[], bytes]] = [
        lambda: bytes(changed[:start]),
        lambda: bytes(changed[start:]),
        lambda: bytes(changed[:start] + changed[end:]),
        lambda: bytes(changed[:start] + bytes([changed[start] ^ (1 << rng.randrange(8))]) + changed[start + 1 :]),
        lambda: bytes(changed[:start] + bytes(end - start) + changed[end:]),
        lambda: bytes(changed[:start] + b"\xff" * (end - start) + changed[end:]),
        lambda: bytes(changed[:end] + changed[start:end] * 3 + changed[end:]),
        lambda: bytes(changed + rng.randbytes(64)),
        lambda: bytes(changed[:start] + rng.randbytes(end - start) + changed[end:]),
        lambda: rng.choice([b"", b"\0", b"\n", b"{}", b"[]", b"null", b"PK\x03\x04", rng.randbytes(100)]),
    ]
    return rng.choice(operations)() if content else rng.randbytes(8)


def mutated_toml(content: str, rng: random.Random) -> bytes:
    """TOML text with another value or name, a line less, twice, elsewhere, or damaged bytes."""
    lines = content.splitlines()
    numbers = [number for number, line in enumerate(lines) if "=" in line]
    if rng.random() < 0.15 or not numbers:
        return mutated_bytes(content.encode("utf-8"), rng)
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.choice([n for n in numbers if n < len(lines)] or [0])
        name, _, old = lines[place].partition("=")
        new = rng.choice(TOML_VALUES) if rng.random() < 0.7 else json.dumps(text(rng), ensure_ascii=rng.random() < 0.5)
        changes: list[list[str]] = [
            [f"{name}= {new}"], [f"{name}= {new}"], [f"{name}= {new}"],
            [f"{name}= {_near_toml(old, rng)}"], [f"{name}= {_near_toml(old, rng)}"],
            [],
            [lines[place]] * 2,
            [f"{json.dumps(key(rng), ensure_ascii=True)} = {new}", lines[place]],
            [f"x.{name}= {new}"],
            [rng.choice(["[", "[[x]]", "[a.b]", "[sources]", "[[power_modes]]"]), lines[place]],
        ]  # fmt: skip
        lines[place : place + 1] = rng.choice(changes)
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _near_toml(old: str, rng: random.Random) -> str:
    """One of the numbers or texts in a value changed, the rest as it was."""
    found = list(re.finditer(r'"[^"]*"|-?\d+(\.\d+)?', old))
    if not found:
        return rng.choice(TOML_VALUES)
    match = rng.choice(found)
    return old[: match.start()] + rng.choice(TOML_VALUES) + old[match.end() :]


def mutated_zip(content: bytes, rng: random.Random) -> bytes:
    """A zip archive, such as .npz or .pt, whose members are changed, missing, renamed, twice, or wrongly described."""
    if rng.random() < 0.3:
        return mutated_bytes(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = rng.choice(list(members) or [""])
    if rng.random() < 0.4:
        return _misdescribed(content, rng)
    kind = rng.randrange(7)
    if kind < 3:
        members[name] = mutated_bytes(members.get(name, b""), rng)
    elif kind == 3:
        members.pop(name, None)
    elif kind == 4:
        members[rng.choice([f"../{name}", f"/{name}", name.upper(), "x", f"{name}/", name + "\u202e"])] = members.pop(
            name, b""
        )
    elif kind == 5:
        members[f"more{rng.randrange(9)}.npy"] = rng.choice([b"", b"\0" * 4_000_000, rng.randbytes(50)])
    else:
        members[name] = members[rng.choice(list(members))] if members else b""
    return _zipped(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)), twice=kind == 6)


def _zipped(members: dict[str, bytes], compression: int, twice: bool) -> bytes:
    """Written by hand: `zipfile` would warn of names that come twice."""
    body, directory = bytearray(), bytearray()
    entries = list(members.items()) * (2 if twice else 1)
    for name, data in entries:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = data if compression == zipfile.ZIP_STORED else packer.compress(data) + packer.flush()
        written = name.encode("utf-8")
        common = struct.pack("<HHHHIIIHH", 0x800, compression, 0, 0x21, zlib.crc32(data), len(packed), len(data),
                             len(written), 0)  # fmt: skip
        directory += b"PK\x01\x02" + struct.pack("<HH", 20, 20) + common
        directory += struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + written
        body += b"PK\x03\x04" + struct.pack("<H", 20) + common + written + packed
    end = struct.pack("<HHHHIIH", 0, 0, len(entries), len(entries), len(directory), len(body), 0)
    return bytes(body + directory + b"PK\x05\x06" + end)


def _misdescribed(content: bytes, rng: random.Random) -> bytes:
    """One field of a member's entry in the directory, or of the end of the archive, is another."""
    changed = bytearray(content)
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
    end = content.rfind(b"PK\x05\x06")
    # Flags (encrypted), method, CRC, packed and real size, lengths of name and extra, place of the member.
    fields = [(8, "<H"), (10, "<H"), (16, "<I"), (20, "<I"), (24, "<I"), (28, "<H"), (30, "<H"), (42, "<I")]
    if entries and rng.random() < 0.8:
        start = rng.choice(entries)
    else:
        start, fields = end, [(8, "<H"), (10, "<H"), (12, "<I"), (16, "<I"), (20, "<H")]
    if start < 0:
        return mutated_bytes(content, rng)
    place, kind = rng.choice(fields)
    most = (1 << (8 * struct.calcsize(kind))) - 1
    wrong = rng.choice([0, 1, 9, 12, 14, 93, 99, most, most // 2, rng.randrange(most)]) & most
    struct.pack_into(kind, changed, start + place, wrong)
    return bytes(changed)
