"""Tries with hostile peers: clients of the metrics server, and a camera that answers whatever it likes."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

from sparsifiner_edge.camera.health import HealthServer
from sparsifiner_edge.camera.relay import Relay
from sparsifiner_edge.camera.status import Status
from tests.fuzz.harness import FailureError, Try
from tests.fuzz.mutate import mutated_bytes

_GET = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\nUser-Agent: x\r\n\r\n"
_SDP = b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"
_ANSWERS = {
    b"OPTIONS": b"RTSP/1.0 200 OK\r\nCSeq: %d\r\nPublic: DESCRIBE, SETUP, PLAY\r\n\r\n",
    b"DESCRIBE": b"RTSP/1.0 200 OK\r\nCSeq: %d\r\nContent-Type: application/sdp\r\nContent-Length: "
    + str(len(_SDP)).encode() + b"\r\n\r\n" + _SDP,
    b"SETUP": b"RTSP/1.0 200 OK\r\nCSeq: %d\r\nSession: 1\r\nTransport: RTP/AVP/TCP;interleaved=0-1\r\n\r\n",
    b"PLAY": b"RTSP/1.0 200 OK\r\nCSeq: %d\r\nSession: 1\r\n\r\n$\0\0\x04abcd",
}  # fmt: skip
_MOVED = b"RTSP/1.0 %d Moved\r\nCSeq: 1\r\nLocation: rtsp://127.0.0.1:%d/x\r\n\r\n"
_CHALLENGE = b'RTSP/1.0 401 No\r\nCSeq: 1\r\nWWW-Authenticate: Digest realm="r", nonce="n", qop="auth"\r\n\r\n'
_WAIT_S = 0.15
PASSWORD = "hunter2-secret"


@contextlib.contextmanager
def _no_thread_fails() -> Iterator[None]:
    """What ends a thread of ours with an error of its own ends the try."""
    lost: list[str] = []
    before = threading.excepthook
    threading.excepthook = lambda found: lost.append(f"{found.exc_type.__name__}: {found.exc_value}")
    try:
        yield
    finally:
        threading.excepthook = before
    if lost:
        raise FailureError(f"a thread ended with {lost[0]}")


def http(one: Try) -> None:
    status = Status("test", lambda _: None)
    with _no_thread_fails(), HealthServer(("127.0.0.1", 0), status, 2.0) as server:
        port = int(re.findall(r":(\d+)/", server.url)[0])
        for _ in range(8):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as client:
                client.sendall(mutated_bytes(_GET * one.rng.choice((1, 1, 3)), one.rng))
                if one.rng.random() < 0.5:
                    client.shutdown(socket.SHUT_WR)
                client.settimeout(_WAIT_S)
                client.recv(1 << 16)
        with socket.create_connection(("127.0.0.1", port), 5) as client:
            client.settimeout(2)
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = client.recv(1 << 16)
    if b" 503 " not in answer.partition(b"\r\n")[0]:
        raise FailureError(f"health answers {answer[:100]!r}")


def rtsp(one: Try) -> None:
    """A camera answers with damaged messages, redirects and challenges; its password goes nowhere else."""
    heard: list[bytes] = []
    with _no_thread_fails(), contextlib.ExitStack() as stack:
        elsewhere = stack.enter_context(_server(lambda client: heard.append(client.recv(1 << 16))))
        camera = stack.enter_context(_server(lambda client: _camera(client, one.rng, elsewhere)))
        relay = Relay(f"rtsp://user:{PASSWORD}@127.0.0.1:{camera}/stream", 1.0, allow_redirect=one.number % 2 == 0)
        stack.callback(relay.close)
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", relay.port), 5) as client:
            client.settimeout(_WAIT_S)
            for number, method in enumerate((b"OPTIONS", b"DESCRIBE", b"SETUP", b"PLAY"), 1):
                client.sendall(b"%s %s RTSP/1.0\r\nCSeq: %d\r\n\r\n" % (method, relay.url.encode(), number))
                with contextlib.suppress(TimeoutError):
                    client.recv(1 << 16)
    if one.number % 2 and heard:
        raise FailureError(f"a redirect was followed unasked: {heard[0][:200]!r}")
    if any(b"uthorization" in said or PASSWORD.encode() in said for said in heard):
        raise FailureError("another host was told who the user is")


def _camera(client: socket.socket, rng: random.Random, elsewhere: int) -> None:
    client.settimeout(1)
    for _ in range(6):
        request = client.recv(1 << 16)
        if not request:
            return
        answer = _ANSWERS.get(request.split(b" ")[0], b"RTSP/1.0 200 OK\r\nCSeq: %d\r\n\r\n")
        found = re.search(rb"CSeq: (\d{1,9})\r", request)
        whole = answer % (int(found[1]) if found else 1)
        kind = rng.randrange(6)
        if kind == 0:
            whole = _MOVED % (rng.choice((301, 302, 303, 305, 307, 399)), elsewhere)
        elif kind == 1:
            whole = _CHALLENGE
        if kind < 5:
            whole = mutated_bytes(whole, rng) if rng.random() < 0.6 else whole
        client.sendall(whole)


@contextlib.contextmanager
def _server(serve: Any) -> Iterator[int]:
    """A server on loopback for a few connections, one after the other; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            for _ in range(8):
                with contextlib.suppress(OSError, ValueError):
                    client, _address = listener.accept()
                    with client:
                        client.settimeout(1)
                        serve(client)
                if listener.fileno() < 0:
                    return

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
