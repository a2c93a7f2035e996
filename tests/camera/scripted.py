"""Cameras that answer RTSP by a script, and a relay before them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import av
import pytest

from sparsifiner_edge.camera.relay import Relay
from sparsifiner_edge.camera.rtsp import Message, Splitter

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
