"""What of a source may be shown: what is known to be harmless, and of all the rest that it is there (***).

Not the other way round: what looks like a password is no list that ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from urllib.parse import unquote

HIDDEN = "***"
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,20}://(?:.*@)?[^\s\"'<>]*")
_NAMED = re.compile(
    r"((?:pass\w{0,9}|pwd|token|secret|auth\w{0,9}|\w{0,9}key|[\w-]{0,9}-pw)\s{0,9}[=:]\s{0,9})"
    r"(?:\"(?:\\.|[^\"])*\"?|'[^']*'?|(?:\\.|[^\s&])+)",
    re.IGNORECASE,
)
"""In a text that is not ours, such as a decoder's message: beside the secrets that are known by themselves."""
_PLACE = re.compile(r"(?:\[[0-9A-Fa-f:.%\w]+\]|[\w.-]*)(?::[0-9]{0,5})?")
_PATH = re.compile(r"[\w.,~+-]{0,12}|[A-Za-z]?[a-z._-]{0,40}")
"""A part of a path that no key looks like: short, or plain words."""
_ELEMENT = re.compile(r"[a-z][a-z0-9_-]{0,40}")
_PROPERTY = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,40}(?:::[A-Za-z][A-Za-z0-9-]{0,40})*")
_MEDIA = re.compile(r"(?:application|audio|image|video)/[a-z0-9.+-]+(?:\([\w:, ]*\))?")
_LINKS = ("!", ":", "(", ")", "{", "}")
_ADDRESSES = frozenset({"location", "proxy", "uri", "url"})
_NUMBER = re.compile(r"(?:[0-9.,:/{}\[\] +-]|\((?:int|fraction|float|double|boolean)\)|true|false)*")
_WORD = re.compile(r"(?:[\w./:,{} -]|\(string\))*")
_HARMLESS = {"device": _WORD, "format": _WORD} | dict.fromkeys(
    ("bitrate", "channels", "fps", "framerate", "height", "latency", "max-buffers", "payload", "port", "sensor-id",
     "sensor-mode", "sync", "timeout", "width"),
    _NUMBER,
)  # fmt: skip
"""Properties, and fields of caps, that no secret stands in, and how their values look."""


def split_address(text: str) -> tuple[str, tuple[str, ...]]:
    """An address without user, password, query, fragment, and what in its path may be a key.

    All up to the last @ is the user and the password, whatever signs they hold.

    Returns:
        What may be shown, and what is hidden there, in the spellings that a message may have.
    """
    parts = list(_address(text))
    return _shown(parts), _spellings(parts)


def split_pipeline(words: list[str]) -> tuple[str, tuple[str, ...]]:
    """The words of a GStreamer pipeline: elements, properties, and the values of a few; and what is hidden there."""
    found = list(_pipeline(words))
    return " ".join(map(_shown, found)), _spellings(part for parts in found for part in parts)


def show_path(path: str) -> str:
    """A path that leads nowhere: it may be a mistyped address."""
    before, at, after = path.rpartition("@")
    return _shown([(before, False), (at, True)]) + re.sub(r"([?#=]).*", rf"\1{HIDDEN}", after)


def hide(text: str, secrets: Iterable[str] = ()) -> str:
    """A message of somebody else's as it may be shown.

    Args:
        text: one line.
        secrets: what it must not hold; short ones where they stand alone.
    """
    for secret in sorted(secrets, key=len, reverse=True):
        found = re.escape(secret)
        text = re.sub(found if len(secret) > 3 else rf"(?<!\w){found}(?!\w)", HIDDEN, text)
    return _NAMED.sub(rf"\1{HIDDEN}", _IN_TEXT.sub(lambda match: _shown(_address(match[0])), text))


_Part = tuple[str, bool]
"""Text, and whether it may be shown."""


def _shown(parts: Iterable[_Part]) -> str:
    return "".join(text if harmless else HIDDEN for text, harmless in parts if text)


def _spellings(parts: Iterable[_Part]) -> tuple[str, ...]:
    """Whole, in pieces, unescaped, and with a backslash where a pipeline needs one."""
    hidden = [text for text, harmless in parts if text and not harmless]
    pieces = {*hidden, *(piece for text in hidden for piece in text.split(":", 1))}
    pieces |= {piece for text in hidden for piece in re.split(r"[^\w.$%+-]+", text) if len(piece) > 3}
    pieces |= {unquote(piece) for piece in pieces} | {re.sub(r"([\\\"' ])", r"\\\1", piece) for piece in pieces}
    return tuple(sorted(pieces - {"", "true", "false"}))


def _address(text: str) -> Iterator[_Part]:
    scheme, colon, rest = text.partition("://")
    user, at, rest = rest.rpartition("@")
    place = re.split(r"[/?#;]", rest, maxsplit=1)[0]
    path = re.split(r"[?#]", rest[len(place) :], maxsplit=1)[0]
    after = rest[len(place) + len(path) :]
    yield from [(scheme + colon, True), (user, False), (at, True), (place, _PLACE.fullmatch(place) is not None)]
    for part in re.split(r"([/;&])", path):
        yield part, part in "/;&" or _PATH.fullmatch(part) is not None
    yield from [(after[:1], True), (after[1:], False)]


def _pipeline(words: list[str]) -> Iterator[list[_Part]]:
    """A word alone is shown where an element stands: at the beginning and after a link."""
    element = True
    for word in words:
        if word in _LINKS:
            yield [(word, True)]
        elif element and _MEDIA.match(word):
            yield list(_caps(word))
        elif "=" in word:
            name, _, value = word.partition("=")
            yield [(name, _PROPERTY.fullmatch(name) is not None), ("=", True), *_value(name, value)]
        else:
            yield list(_address(word)) if "://" in word else [(word, element and _ELEMENT.fullmatch(word) is not None)]
        element = word in _LINKS


def _value(name: str, value: str) -> Iterator[_Part]:
    if name == "caps":
        yield from _caps(value)
    elif name in _ADDRESSES and "://" in value:
        yield from _address(value)
    else:
        yield value, name in _HARMLESS and _HARMLESS[name].fullmatch(value) is not None


def _caps(text: str) -> Iterator[_Part]:
    """`video/x-raw(memory:NVMM), format=NV12, width=64`; of a list only its first value is shown."""
    for part in re.split(r"([,;])", text):
        if "=" in part:
            name, _, value = part.partition("=")
            yield name, _PROPERTY.fullmatch(name.strip()) is not None
            yield from [("=", True), *_value(name.strip(), value)]
        else:
            yield part, part in ",;" or _MEDIA.fullmatch(part.strip()) is not None
