"""Passwords that the relay gives a camera: digests, schemes, and who is told."""

from __future__ import annotations

import base64
import hashlib
import random
import re
import socket

import pytest

from sparsifiner_edge.camera import credentials
from sparsifiner_edge.camera.credentials import Credentials
from sparsifiner_edge.camera.rtsp import Message
from tests.camera.scripted import (
    BASIC,
    DIGEST,
    OLD_DIGEST,
    Camera,
    gone,
    open_stream,
    relay_to,
    reply,
    until,
)


def test_known_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of RFC 7616 and RFC 2617 (without qop, as RFC 2069)."""
    monkeypatch.setattr(credentials.secrets, "token_hex", lambda _: "f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ")
    nonce = "7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v"
    begin = f'Digest realm="http-auth@example.org", qop="auth, auth-int", nonce="{nonce}"'
    for algorithm, response in (
        ("MD5", "8ca523f5e9506fed4657c9700eebdbec"),
        ("SHA-256", "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"),
    ):
        known = Credentials(b"Mufasa", b"Circle of Life")
        assert known.challenged(Message("", (("WWW-Authenticate", f"{begin}, algorithm={algorithm}"),)))
        assert f'response="{response}"' in (known.answer("GET", "/dir/index.html") or "")
    known = Credentials(b"Mufasa", b"Circle Of Life")
    old = 'Digest realm="testrealm@host.com", nonce="dcd98b7102dd2f0e8b11d0f600bfb0c093"'
    assert known.challenged(Message("", (("WWW-Authenticate", old),)))
    assert 'response="670fd8c2df070c60b045671b8b24ff02"' in (known.answer("GET", "/dir/index.html") or "")


@pytest.mark.parametrize(
    ("offered", "answered"),
    [
        ([BASIC, OLD_DIGEST, DIGEST], "SHA-256"),
        ([BASIC, OLD_DIGEST], "Digest"),
        ([f"{BASIC}, {OLD_DIGEST}"], "Digest"),
        ([BASIC, 'Digest realm="r", nonce="n", algorithm=SHA-512-256'], "Basic"),
        ([BASIC, 'Digest realm="r", nonce="n", qop="auth-int"'], "Basic"),
        ([BASIC, 'Digest realm="r", nonce="n", algorithm="MD5-sess", qop="auth"'], "Basic"),
        (["Bearer x", "Digest realm", "", "x" * 9999], None),
    ],
)
def test_the_best_that_is_offered(offered: list[str], answered: str | None) -> None:
    known = Credentials(b'us"er', b"secret")
    challenged = known.challenged(Message("", tuple(("WWW-Authenticate", header) for header in offered)))
    said = known.answer("OPTIONS", "rtsp://h/x")
    assert challenged is (answered is not None)
    assert said is None if answered is None else answered in str(said)
    assert answered in (None, "Basic") or 'username="us\\"er"' in str(said)


@pytest.mark.parametrize(
    ("userinfo", "user", "password"),
    [
        ("us er:p@ss", b"us er", b"p@ss"),
        ("us%40er:p%20a%3ass%2f", b"us@er", b"p a:ss/"),
        ("token", b"token", b""),
        (":x", b"", b"x"),
        ("\u00fc:\u00e4", "\u00fc".encode(), "\u00e4".encode()),
    ],
)
def test_what_the_camera_is_told(userinfo: str, user: bytes, password: bytes) -> None:
    with Camera(until("OPTIONS", gone, BASIC)) as camera, relay_to(f"rtsp://{userinfo}@{camera.place}/x") as relay:
        open_stream(relay.url)
        said = camera.requests[-1].get("Authorization")
        assert base64.b64decode(said.removeprefix("Basic ")) == user + b":" + password


def test_a_wrong_password_is_tried_once() -> None:
    with (
        Camera(lambda r: reply(r, "401 Unauthorized", WWW_Authenticate=DIGEST)) as camera,
        relay_to(f"rtsp://u:wrong@{camera.place}/x") as relay,
    ):
        assert "401 Unauthorized" in str(open_stream(relay.url))
        assert camera.asked() == [("OPTIONS", f"rtsp://{camera.place}/x", shown) for shown in (False, True)]


def test_a_challenge_that_always_changes_is_given_up() -> None:
    def answer(request: Message) -> str:
        return reply(request, "401 Unauthorized", WWW_Authenticate=f'Digest realm="r", nonce="{random.random()}"')

    with Camera(answer) as camera, relay_to(f"rtsp://u:secret@{camera.place}/x") as relay:
        assert "401 Unauthorized" in str(open_stream(relay.url))
        assert len(camera.requests) == 2


def digest_is_right(request: Message, password: str) -> bool:
    said = dict(re.findall(r'(\w+)="?([^",]*)', request.get("Authorization")))

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    secret, asked = digest(f"u:camera:{password}"), digest(f"{request.method}:{request.uri}")
    expected = digest(f"{secret}:{said['nonce']}:{said['nc']}:{said['cnonce']}:auth:{asked}")
    return said["uri"] == request.uri and said["response"] == expected


def test_every_request_is_proven_over_what_the_camera_sees() -> None:
    """Also those of a session that goes on, after the camera has changed its nonce: by a client that asks by hand."""
    nonces = ["abc"]

    def answer(request: Message) -> str:
        if f'nonce="{nonces[-1]}"' not in request.get("Authorization"):
            return reply(request, "401 No", WWW_Authenticate=DIGEST.replace("abc", nonces[-1]))
        assert digest_is_right(request, "secret")
        return reply(request, "200 OK", WWW_Authenticate="x", Location="rtsp://elsewhere/")

    with Camera(answer) as camera, relay_to(f"rtsp://u:secret@{camera.place}/x?y=1") as relay:
        with socket.create_connection(("127.0.0.1", relay.port), 5) as client, client.makefile("rb") as lines:
            for number, (method, uri) in enumerate(
                [("OPTIONS", ""), ("DESCRIBE", ""), ("SETUP", "/track1"), ("PLAY", ""), ("GET_PARAMETER", "")]
            ):
                if method == "GET_PARAMETER":
                    nonces.append("def")
                request = f"{method} {relay.url}{uri} RTSP/1.0\r\nCSeq: {7 * number}\r\nAuthorization: fake\r\n\r\n"
                client.sendall(request.encode())
                said = b"".join(iter(lines.readline, b"\r\n")).decode()
                assert said == f"RTSP/1.0 200 OK\r\nCSeq: {7 * number}\r\n"
                assert camera.requests[-1].uri == f"rtsp://{camera.place}/x?y=1{uri}"
        assert [request.get("CSeq") for request in camera.requests] == [str(n + 1) for n in range(7)]
        assert [shown for _, _, shown in camera.asked()] == [False, *[True] * 6]
