"""Proves a password to a camera: Digest (RFC 7616: SHA-256 and MD5, with and without qop=auth), or Basic."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from typing import NamedTuple
from urllib.request import parse_http_list, parse_keqv_list

from sparsifiner_edge.camera.rtsp import Message

_NEXT = re.compile(r",\s*(?=(?:Basic|Digest)\s)", re.IGNORECASE)
_WAYS = ("BASIC", "MD5", "SHA-256")
"""The better last."""


class _Challenge(NamedTuple):
    """What a server asks for: `way` is one of `_WAYS`, `fields` are its own words."""

    way: str
    fields: dict[str, str]
    qop: bool = False


class Credentials:
    """A user and a password, as the camera knows them."""

    def __init__(self, user: bytes, password: bytes) -> None:
        self._user, self._password = user, password
        self._asked: _Challenge | None = None
        self._count = 0

    def challenged(self, reply: Message) -> bool:
        """Remember what a reply 401 asks for; True if an answer is worth a try: not where one was refused."""
        headers = [part for value in reply.all("WWW-Authenticate") for part in _NEXT.split(value)]
        offered = [found for header in headers if (found := _challenge(header)) is not None]
        if not offered:
            return False
        best = max(offered, key=lambda found: _WAYS.index(found.way))
        same = self._asked is not None and self._asked.fields.get("nonce") == best.fields.get("nonce")
        if same and best.fields.get("stale", "").lower() != "true":
            return False
        self._asked, self._count = best, 0
        return True

    def answer(self, method: str, uri: str) -> str | None:
        """The value of Authorization for a request; None where nobody asked."""
        if self._asked is None:
            return None
        if self._asked.way == "BASIC":
            return "Basic " + base64.b64encode(self._user + b":" + self._password).decode()
        return self._digest(self._asked, method, uri)

    def _digest(self, asked: _Challenge, method: str, uri: str) -> str:
        self._count += 1
        fields, nonce, realm = asked.fields, _bytes(asked.fields["nonce"]), _bytes(asked.fields.get("realm", ""))
        count, own = f"{self._count:08x}", secrets.token_hex(8)
        user = _hash(asked.way, self._user, realm, self._password)
        between = [count, own, "auth"] if asked.qop else []
        request = _hash(asked.way, method.encode(), _bytes(uri))
        response = _hash(asked.way, _bytes(user), nonce, *map(_bytes, between), _bytes(request))
        said = {"username": self._user.decode("latin-1"), "realm": fields.get("realm", ""), "nonce": fields["nonce"]}
        said |= {"uri": uri, "response": response} | ({"cnonce": own} if asked.qop else {})
        said |= {"opaque": fields["opaque"]} if "opaque" in fields else {}
        plain = {"algorithm": fields["algorithm"]} if "algorithm" in fields else {}
        plain |= {"qop": "auth", "nc": count} if asked.qop else {}
        return "Digest " + ", ".join([_quoted(*pair) for pair in said.items()] + ["=".join(p) for p in plain.items()])


def _challenge(header: str) -> _Challenge | None:
    """None for what cannot be answered: other schemes and hashes, qop=auth-int alone."""
    scheme, _, rest = header.strip().partition(" ")
    if scheme.lower() == "basic":
        return _Challenge("BASIC", {})
    try:
        fields = {name.lower(): value for name, value in parse_keqv_list(parse_http_list(rest)).items()}
    except (ValueError, IndexError):
        return None
    way = fields.get("algorithm", "MD5").upper()
    qops = {word.strip().lower() for word in fields.get("qop", "").split(",")} - {""}
    if scheme.lower() != "digest" or way not in _WAYS[1:] or "nonce" not in fields or (qops and "auth" not in qops):
        return None
    return _Challenge(way, fields, bool(qops))


def _hash(way: str, *parts: bytes) -> str:
    return hashlib.new(way.replace("SHA-", "sha").lower(), b":".join(parts), usedforsecurity=False).hexdigest()


def _bytes(text: str) -> bytes:
    return text.encode("latin-1")


def _quoted(name: str, value: str) -> str:
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'{name}="{escaped}"'
