"""What the relay knows of RTSP: addresses, and the requests and replies among the frames."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote, unquote_to_bytes

_ADDRESS = re.compile(r"(?P<scheme>rtsps?)://(?:(?P<user>[^/?#]*)@)?(?P<place>[^/?#@]*)(?P<rest>.*)", re.IGNORECASE)
_PLACE = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<name>[^\s:\[\]%\\\"'<>]{1,253}))(?::(?P<port>[0-9]{0,5}))?"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_REPLY = re.compile(r"RTSP/1\.[01] +(?P<status>[1-5][0-9]{2})(?: .*)?")
_REQUEST = re.compile(r"(?P<method>[A-Z_]{1,20}) (?P<uri>[^ ].*) RTSP/1\.[01]")
_FRAME = ord("$")
"""Before a channel and a length of two bytes."""
_ENDS = (b"\n\r\n", b"\n\n")
"""Of a head."""
_MAX_HEAD, _MAX_BODY = 1 << 14, 1 << 20


class Address(NamedTuple):
    """Where a camera is.

    Attributes:
        secure: over TLS.
        host: without brackets.
        port: also where none was given.
        rest: path, query and fragment.
        user: as the camera knows it, unescaped; None where none was given.
        password: as `user`.
    """

    secure: bool
    host: str
    port: int
    rest: str
    user: bytes | None
    password: bytes

    @property
    def place(self) -> str:
        """Host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def uri(self) -> str:
        """As requests name it: without user and password."""
        return f"rtsp{'s' * self.secure}://{self.place}{self.rest}"


def parse_address(text: str) -> Address:
    """Read `rtsp://user:password@host:port/path`; signs in user and password may be escaped (%40).

    Raises:
        ValueError: it is no such address. The message holds nothing of it.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None or _CONTROL.search(unquote(text)):
        raise ValueError("it is no address")
    if found["user"] is None and "@" in found["rest"].partition("?")[0]:  # Of a password with a / in it, most likely.
        raise ValueError("its path holds an @")
    place = _PLACE.fullmatch(found["place"])
    secure = found["scheme"].lower() == "rtsps"
    port = int((place and place["port"]) or (322 if secure else 554))
    if place is None or not 0 < port < 1 << 16:
        raise ValueError("its host or port cannot be")
    try:
        host = place["v6"] or place["name"].encode("idna").decode()
    except UnicodeError:
        raise ValueError("its host cannot be") from None
    # Bytes as latin-1 characters, which is how messages hold them.
    rest = found["rest"].replace(" ", "%20").encode("utf-8", "surrogateescape").decode("latin-1")
    user, _, password = (found["user"] or "").partition(":")
    known = None if found["user"] is None else unquote_to_bytes(user)
    return Address(secure, host, port, rest, known, unquote_to_bytes(password))


class Message(NamedTuple):
    """A request or a reply; text holds bytes as latin-1 characters.

    Attributes:
        first: its first line.
        headers: names and values, in their order.
        body: for a request that has none, empty.
    """

    first: str
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""

    @property
    def status(self) -> int:
        """Of a reply; 0 of a request."""
        found = _REPLY.fullmatch(self.first)
        return int(found["status"]) if found else 0

    @property
    def method(self) -> str:
        """Of a request; "" of a reply."""
        found = _REQUEST.fullmatch(self.first)
        return found["method"] if found else ""

    @property
    def uri(self) -> str:
        """Of a request; "" of a reply."""
        found = _REQUEST.fullmatch(self.first)
        return found["uri"] if found else ""

    def all(self, name: str) -> list[str]:
        """Every value of a header."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def get(self, name: str) -> str:
        """The first value of a header; "" where there is none."""
        return next(iter(self.all(name)), "")

    def changed(self, headers: dict[str, str | None], first: str | None = None) -> Message:
        """A copy with other values of headers, None for out, and another first line."""
        names = {name.lower() for name in headers}
        kept = [pair for pair in self.headers if pair[0].lower() not in names]
        new = [(name, value) for name, value in headers.items() if value is not None]
        return Message(self.first if first is None else first, (*new, *kept), self.body)

    def encode(self) -> bytes:
        """As it is sent."""
        lines = [self.first, *(f"{name}: {value}" for name, value in self.headers), "", ""]
        return "\r\n".join(lines).encode("latin-1") + self.body


class Splitter:
    """Takes apart what one side sends: messages, and interleaved frames, which pass as the bytes that they are.

    Attributes:
        patient: what is no RTSP does not raise, but passes without a look, it and all that follows.
    """

    def __init__(self) -> None:
        self.patient = False
        self._blind = False
        self._kept = bytearray()
        self._wanted = 0
        """So many bytes make a next look worth while: a long body may come byte by byte."""

    def feed(self, data: bytes) -> Iterator[bytes | Message]:
        """All that is whole.

        Raises:
            ValueError: it is no RTSP.
        """
        self._kept += data
        while self._kept and len(self._kept) >= self._wanted:
            part, length = self._next()
            if not length:
                return
            del self._kept[:length]
            self._wanted = 0
            if part:
                yield part

    def _next(self) -> tuple[bytes | Message, int]:
        """What comes first, and its length; 0 while it is not whole."""
        kept = self._kept
        if kept[0] in b"\r\n":  # Some send empty lines between messages.
            return b"", 1
        if kept[0] == _FRAME:
            end = self._frames_end()
            return bytes(kept[:end]), end
        try:
            return (bytes(kept), len(kept)) if self._blind else self._message()
        except ValueError:
            if not self.patient:
                raise
            self._blind = True
            return bytes(kept), len(kept)

    def _frames_end(self) -> int:
        """Where the last whole frame ends."""
        kept, end = self._kept, 0
        while len(kept) >= end + 4 and kept[end] == _FRAME:
            following = end + 4 + int.from_bytes(kept[end + 2 : end + 4], "big")
            if following > len(kept):
                break
            end = following
        return end

    def _message(self) -> tuple[bytes | Message, int]:
        kept = self._kept
        ends = [place + len(end) for end in _ENDS if (place := kept.find(end, 0, _MAX_HEAD)) >= 0]
        if not ends:
            if len(kept) >= _MAX_HEAD:
                raise ValueError("a head without end")
            return b"", 0
        head = _head(bytes(kept[: min(ends)]))
        whole = min(ends) + int(head.get("Content-Length") or 0)
        if len(kept) < whole:
            self._wanted = whole
            return b"", 0
        return head._replace(body=bytes(kept[min(ends) : whole])), whole


def _head(data: bytes) -> Message:
    """A message before its body, with what can be read of its headers."""
    first, *lines = data.decode("latin-1").replace("\r\n", "\n").split("\n")
    if not _REPLY.fullmatch(first) and not _REQUEST.fullmatch(first):
        raise ValueError("a line that is no RTSP")
    pairs = [line.partition(":") for line in lines]
    headers = [(name, _CONTROL.sub(" ", value).strip()) for name, _, value in pairs if re.fullmatch(r"[\w-]+", name)]
    head = Message(first, tuple(headers))
    length = head.get("Content-Length") or "0"
    if not re.fullmatch(r"[0-9]{1,7}", length) or int(length) > _MAX_BODY:
        raise ValueError("a body whose length cannot be")
    # One length alone: who reads on must find the same end.
    return head.changed({"Content-Length": length if int(length) else None})
