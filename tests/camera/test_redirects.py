"""The relay between a camera and FFmpeg: redirects, addresses, and what is no RTSP; and real servers behind it."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
from pathlib import Path

import av
import pytest

from sparsifiner_edge.camera.rtsp import Message, Splitter, parse_address
from tests.camera.scripted import (
    BASIC,
    DIGEST,
    OLD_DIGEST,
    Camera,
    gone,
    open_stream,
    reason_of,
    relay_to,
    reply,
    until,
)
from tests.camera.soak import Server, free_port, python_with_rtsp
from tests.commands import process

PYTHON = python_with_rtsp()


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


@pytest.mark.everything
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
