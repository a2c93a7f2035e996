"""The relay between a camera and FFmpeg: redirects, passwords, and what is no RTSP; and real servers behind it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest

from benchmarks.camera_soak import Server, free_port, python_with_rtsp
from sparsifiner_edge.camera import credentials
from sparsifiner_edge.camera.credentials import Credentials
from sparsifiner_edge.camera.relay import Relay
from sparsifiner_edge.camera.rtsp import Message, Splitter, parse_address
from tests.commands import process

PYTHON = python_with_rtsp()
SDP = (
    "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"
    "a=control:track1\r\n"
)
BASIC = 'Basic realm="camera"'
DIGEST = 'Digest realm="camera", nonce="abc", qop="auth,auth-int", algorithm=SHA-256, opaque="o"'
OLD_DIGEST = 'Digest realm="camera", nonce="abc"'


class Camera:
    """Answers RTSP as a script says, and remembers what it was asked."""

    def __init__(self, answer: Callable[[Message], str | bytes], host: str = "127.0.0.1", tls: Any = None) -> None:
        self.requests: list[Message] = []
        self.connections = 0
        self._answer, self._tls = answer, tls
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self.port = self._listener.getsockname()[1]
        self.place = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), client:
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            splitter = Splitter()
            while data := client.recv(65536):
                for part in splitter.feed(data):
                    if isinstance(part, Message):
                        self.requests.append(part)
                        answer = self._answer(part)
                        client.sendall(answer.encode() if isinstance(answer, str) else answer)
            client.close()

    def __enter__(self) -> Camera:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def asked(self) -> list[tuple[str, str, bool]]:
        """Method, URI, and whether user and password were shown."""
        return [(request.method, request.uri, bool(request.get("Authorization"))) for request in self.requests]


def reply(request: Message, status: str, body: str = "", **headers: str) -> str:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"RTSP/1.0 {status}", f"CSeq: {request.get('CSeq')}", *(f"{n}: {v}" for n, v in named.items())]
    return "\r\n".join([*lines, *([f"Content-Length: {len(body)}"] if body else []), "", ""]) + body


def until(stage: str, then: Callable[[Message], str], challenge: str | None = None) -> Callable[[Message], str]:
    """A camera that works up to a request, and then does something else."""

    def answer(request: Message) -> str:
        if challenge and not request.get("Authorization"):
            return reply(request, "401 Unauthorized", WWW_Authenticate=challenge)
        if request.method == stage:
            return then(request)
        return reply(request, "200 OK", SDP if request.method == "DESCRIBE" else "", Session="1")

    return answer


def gone(request: Message) -> str:
    return reply(request, "404 Not Found")


@contextlib.contextmanager
def relay_to(location: str, **options: Any) -> Iterator[Relay]:
    relay = Relay(location, **{"patience_s": 3} | options)
    try:
        yield relay
    finally:
        relay.close()


def open_stream(url: str) -> Exception:
    """As the decoding process does; none of these servers has a video."""
    with pytest.raises((av.FFmpegError, OSError)) as caught:
        av.open(url, options={"rtsp_transport": "tcp", "protocol_whitelist": "rtsp,tcp"}, timeout=5)
    return caught.value


def reason_of(relay: Relay) -> str:
    deadline = time.monotonic() + 10
    while relay.reason is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert relay.reason is not None
    return relay.reason


# Redirects.


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "303 See Other", "307 x", "308 x", "399 x"])
@pytest.mark.parametrize("stage", ["OPTIONS", "DESCRIBE", "SETUP"])
@pytest.mark.parametrize("challenge", [None, BASIC, DIGEST])
def test_a_redirect_to_another_host_is_refused(status: str, stage: str, challenge: str | None) -> None:
    with Camera(gone) as other:
        away = until(stage, lambda r: reply(r, status, Location=f"rtsp://{other.place}/x"), challenge)
        with Camera(away) as camera, relay_to(f"rtsp://u:secret@{camera.place}/x") as relay:
            open_stream(relay.url)
            assert reason_of(relay) == (
                f"the server redirects to {other.place} (refused; allow it with --allow-redirect)"
            )
            assert camera.asked()[-1][0] == stage
        assert other.connections == 0


def test_where_it_is_allowed_it_is_followed_without_the_password() -> None:
    def there(request: Message) -> str:
        return reply(request, "401 Unauthorized", WWW_Authenticate=BASIC)

    with Camera(there) as other:
        away = until("DESCRIBE", lambda r: reply(r, "302 Found", Location=f"rtsp://{other.place}/there"), BASIC)
        with Camera(away) as camera:
            with relay_to(f"rtsp://u:secret@{camera.place}/x", allow_redirect=True) as relay:
                assert "401 Unauthorized" in str(open_stream(relay.url))
            assert camera.asked()[-1] == ("DESCRIBE", f"rtsp://{camera.place}/x", True)
        assert set(other.asked()) == {("DESCRIBE", f"rtsp://{other.place}/there", False)}


def test_nor_is_the_password_shown_where_it_leads_back() -> None:
    def first(request: Message) -> str:
        if request.uri.endswith("/back"):
            return reply(request, "401 Unauthorized", WWW_Authenticate=BASIC)
        return reply(request, "302 Found", Location=f"rtsp://{other.place}/x")

    with (
        Camera(first) as camera,
        Camera(lambda r: reply(r, "302 Found", Location=f"rtsp://{camera.place}/back")) as other,
        relay_to(f"rtsp://u:secret@{camera.place}/x", allow_redirect=True) as relay,
    ):
        open_stream(relay.url)
        assert ("OPTIONS", f"rtsp://{camera.place}/back", False) in camera.asked()
        assert not any(shown for _, _, shown in camera.asked() + other.asked())


@pytest.mark.parametrize("challenge", [BASIC, DIGEST, OLD_DIGEST])
@pytest.mark.parametrize("whole", [False, True])
def test_another_path_of_the_same_server_is_followed_with_it(challenge: str, whole: bool) -> None:
    def away(request: Message) -> str:
        if request.uri.endswith("/new"):
            return gone(request)
        return reply(request, "302 Found", Location=f"rtsp://{camera.place}/new" if whole else "/new")

    with (
        Camera(until("DESCRIBE", away, challenge)) as camera,
        relay_to(f"rtsp://u:secret@{camera.place}/x") as relay,
    ):
        assert "404 Not Found" in str(open_stream(relay.url))
        assert camera.asked()[-1] == ("DESCRIBE", f"rtsp://{camera.place}/new", True)
        assert relay.reason is None


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("rtsp://{place}/x", "the server redirects more than 5 times (refused)"),
        ("", "the server redirects to what is no address (refused)"),
        ("http://{place}/x", "the server redirects to what is no address (refused)"),
        ("file:///etc/passwd", "the server redirects to what is no address (refused)"),
        ("rtsp://h\x1b[2J/x", "the server redirects to what is no address (refused)"),
        ("rtsps://{place}/x", "the server redirects to {place} (refused; allow it with --allow-redirect)"),
        ("rtsp://u:p@h:99/x", "the server redirects to h:99 (refused; allow it with --allow-redirect)"),
        ("rtsp://localhost:1", "the server redirects to localhost:1 (refused; allow it with --allow-redirect)"),
    ],
)  # fmt: skip
def test_places_to_be_sent_to(location: str, reason: str) -> None:
    def away(request: Message) -> str:
        return reply(request, "302 Found", Location=location.format(place=camera.place, port=camera.port))

    with Camera(away) as camera, relay_to(f"rtsp://{camera.place}/x") as relay:
        open_stream(relay.url)
        assert reason_of(relay) == reason.format(place=camera.place, port=camera.port)
        assert len(camera.requests) <= 6


def test_the_service_says_so(cells: Path) -> None:
    with Camera(gone) as other:
        away = until("DESCRIBE", lambda r: reply(r, "302 Found", Location=f"rtsp://{other.place}/x"), DIGEST)
        with Camera(away) as camera:
            outcome = process("run", cells, "--source", f"rtsp://u:secret@{camera.place}/x", "--duration", 1)
        assert other.connections == 0
    assert outcome.code == 2
    assert f"the server redirects to {other.place} (refused; allow it with --allow-redirect)" in outcome.err
    assert "secret" not in outcome.err


# Passwords.


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
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()  # noqa: E731
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


# Addresses.


@pytest.mark.parametrize("rest", ["", "/", "/x", "/a/b?c=d&e", "?c=d", "/x#y", "/a%40b:c"])
def test_a_camera_sees_the_same_as_without_relay(rest: str) -> None:
    with Camera(until("SETUP", gone)) as camera:
        open_stream(f"rtsp://{camera.place}{rest}")
        direct, camera.requests = camera.asked(), []
        with relay_to(f"rtsp://{camera.place}{rest}") as relay:
            open_stream(relay.url)
        assert camera.asked() == direct
        assert len(direct) == 3


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("rtsp://h", "rtsp://h:554"),
        ("rtsps://h/x", "rtsps://h:322/x"),
        ("RTSP://u:p@H:8554/x", "rtsp://H:8554/x"),
        ("rtsp://h:/a b", "rtsp://h:554/a%20b"),
        ("rtsp://[::1]", "rtsp://[::1]:554"),
        ("rtsp://u@[fe80::1%eth0]:1/x", "rtsp://[fe80::1%eth0]:1/x"),
        ("rtsp://b\u00fccher.example/x", "rtsp://xn--bcher-kva.example:554/x"),
    ],
)
def test_addresses(text: str, uri: str) -> None:
    assert parse_address(text).uri == uri


def test_a_name_of_which_one_address_does_not_answer() -> None:
    """localhost is ::1 first, where nobody listens."""
    with Camera(until("DESCRIBE", gone)) as camera, relay_to(f"rtsp://localhost:{camera.port}/x") as relay:
        assert "404 Not Found" in str(open_stream(relay.url))
        assert camera.asked()[-1] == ("DESCRIBE", f"rtsp://localhost:{camera.port}/x", False)


def test_ipv6_and_tls(tmp_path: Path) -> None:
    with Camera(until("DESCRIBE", gone, BASIC), "::1") as camera, relay_to(f"rtsp://u:p@{camera.place}/x") as relay:
        assert "404 Not Found" in str(open_stream(relay.url))
        assert camera.asked()[-1] == ("DESCRIBE", f"rtsp://{camera.place}/x", True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*self_signed(tmp_path))
    with (
        Camera(until("DESCRIBE", gone, DIGEST), tls=context) as camera,
        relay_to(f"rtsps://u:p@{camera.place}/x") as relay,
    ):
        assert "404 Not Found" in str(open_stream(relay.url))
        assert camera.asked()[-1] == ("DESCRIBE", f"rtsps://{camera.place}/x", True)


def self_signed(folder: Path) -> tuple[Path, Path]:
    pytest.importorskip("cryptography")
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now, day = datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(days=1)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - day, now + day)
    (folder / "cert.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    return folder / "cert.pem", folder / "key.pem"


# Strangers.


@pytest.mark.parametrize("uri", ["rtsp://127.0.0.1:{port}/", "rtsp://127.0.0.1:{port}/{guess}", "*"])
def test_another_program_of_this_machine_gets_nothing(uri: str) -> None:
    with Camera(gone) as camera, relay_to(f"rtsp://u:secret@{camera.place}/x") as relay:
        with socket.create_connection(("127.0.0.1", relay.port), 5) as stranger:
            request = uri.format(port=relay.port, guess="0" * 32)
            stranger.sendall(f"OPTIONS {request} RTSP/1.0\r\nCSeq: 1\r\n\r\n".encode())
            assert stranger.recv(100) == b""
        assert camera.connections == 0
        assert relay.reason is None
        open_stream(relay.url)  # Its own decoder is served all the same.
        assert camera.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"HTTP/1.1 302 Found\r\nLocation: rtsp://127.0.0.1:1/\r\n\r\n", b"\0" * 1000, b"x" * 100_000,
        b"RTSP/1.0 200 OK\r\n" + b"A: b\r\n" * 20_000, b"RTSP/1.0 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"RTSP/1.0 200 OK\r\nContent-Length: -1\r\n\r\n", b"RTSP/1.0 9999 X\r\n\r\n", b"$", b"$\0\xff\xff" + b"x" * 10,
        b"RTSP/1.0 302 Found\nLocation: rtsp://127.0.0.1:1/\n\n", b"\r\n\r\nRTSP/1.0  307 \r\nlocation:rtsp://h/\r\n\r\n",
        b"$\0\0\4abcdRTSP/1.1 301 Found\r\nCSeq: 1\r\nLocation: rtsp://127.0.0.1:1/\r\n\r\n",
        b"RTSP/1.0 200 OK\r\nLocation: rtsp://127.0.0.1:1/\r\nContent-Length: 4\r\nContent-Length: 0\r\n\r\nabcd",
    ],
)  # fmt: skip
def test_what_is_no_rtsp(answer: bytes) -> None:
    """Nothing of it reaches another server; the relay goes on."""
    with Camera(lambda _: answer) as camera, relay_to(f"rtsp://u:secret@{camera.place}/x", patience_s=0.2) as relay:
        for _ in range(2):
            with contextlib.suppress(av.FFmpegError, OSError):
                av.open(
                    relay.url, options={"rtsp_transport": "tcp", "protocol_whitelist": "rtsp,tcp"}, timeout=5
                ).close()
            assert "secret" not in (relay.reason or "")
        assert camera.connections == 2


def test_a_stream_in_pieces_of_any_size() -> None:
    noise = random.Random(0)
    frames = [b"$" + bytes([noise.randrange(4)]) + len(d).to_bytes(2, "big") + d
              for d in (noise.randbytes(noise.randrange(2000)) for _ in range(60))]  # fmt: skip
    replies = [f"RTSP/1.0 200 OK\r\nCSeq: {n}\r\nContent-Length: {n}\r\n\r\n".encode() + b"$" * n for n in range(1, 60)]
    whole = b"".join(part for pair in zip(frames, replies, strict=False) for part in pair)
    for most in (1, 3, 100, 10_000):
        splitter, place, seen, messages = Splitter(), 0, b"", []
        while place < len(whole):
            size = noise.randint(1, most)
            for part in splitter.feed(whole[place : place + size]):
                seen += part if isinstance(part, bytes) else b""
                messages += [part] if isinstance(part, Message) else []
            place += size
        assert seen == b"".join(frames[:59])
        assert [int(message.get("CSeq")) for message in messages] == list(range(1, 60))
        assert all(message.body == b"$" * int(message.get("CSeq")) for message in messages)


def test_what_is_no_rtsp_in_mid_stream_passes_as_it_is() -> None:
    splitter = Splitter()
    splitter.patient = True
    assert b"".join(splitter.feed(b"$\0\0\1ajunk\r\n\r\n$\0\0\1b")) == b"$\0\0\1ajunk\r\n\r\n$\0\0\1b"  # type: ignore[arg-type]
    assert list(splitter.feed(b"more")) == [b"more"]


# Real servers.


@pytest.mark.skipif(PYTHON is None, reason="no Python with gi and GstRtspServer")
@pytest.mark.parametrize("way", ["basic", "digest"])
def test_a_real_server_that_asks_for_a_password(way: str, cells: Path) -> None:
    assert PYTHON is not None
    port = free_port()
    with Server(PYTHON, port, way):
        good = process("run", cells, "--source", f"rtsp://us%40er:p%20ss:%2F@127.0.0.1:{port}/camera", "--frames", 5)
        bad = process("run", cells, "--source", f"rtsp://us%40er:no@127.0.0.1:{port}/camera", "--duration", 1)
    assert good.code == 0, good.err
    assert len(good.out.splitlines()) == 5
    assert bad.code == 2
    assert "401 Unauthorized" in bad.err
