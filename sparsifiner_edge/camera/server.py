"""A small HTTP server that no client can hold up: few connections, a time limit, and a share of one core for all."""

from __future__ import annotations

import contextlib
import http
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from sparsifiner_edge.errors import ConfigError

MOST_CONNECTIONS = 128
"""Open at a time; one more closes the oldest."""
DEADLINE_S = 5.0
"""From a connection's beginning to its end, however busy its client is."""
_MOST_REQUEST = 8192
_WAITING = 4096
"""Connections that the kernel keeps until it is their turn; fewer where it allows fewer."""
_TURN_S = 0.02
_LOOK_S = 0.1
"""Between two looks at those that are open; a new one is looked at as it is taken."""
_SHARE = 0.08
"""Of one core: what all clients together may cost."""
_BURST_S = 0.02


class Page(NamedTuple):
    """What an address answers: status, media type, content."""

    code: int
    kind: str
    content: bytes


def listen(address: tuple[str, int]) -> socket.socket:
    """A socket that waits for clients.

    Raises:
        ConfigError: the host has no address here, the port is taken, or the system refuses.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it: closed without an answer they are reset, which leaves nothing behind in the kernel.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _linger(on=True))
        listener.bind(address)
        listener.listen(_WAITING)
        listener.setblocking(False)
    except (OSError, UnicodeError, TypeError) as error:  # The latter two: no name can be written so.
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"Metrics cannot be served on {address[0]}:{address[1]}: {reason}.", "Choose another port or host."
        ) from error
    return listener


def _linger(on: bool) -> bytes:
    return struct.pack("ii", int(on), 0)


class PageServer:
    """A small HTTP server that nobody can keep busy: one thread, few connections, and a share of one core.

    Its thread sleeps between turns. In a turn it takes new connections from the kernel's queue, oldest first, as long
    as the processor time lasts that has come together since; ten times a second it does for each what goes without
    waiting. So clients without end, slow or fast, cost no more than that share, and one among thousands is answered in
    its turn.

    Args:
        listener: see `listen`.
        pages: by path; each is made at most once in a turn.
    """

    def __init__(self, listener: socket.socket, pages: Mapping[str, Callable[[], Page]]) -> None:
        self.port = int(listener.getsockname()[1])
        self._listener, self._pages = listener, pages
        self._made: dict[str, Page] = {}
        self._open: list[_Connection] = []
        self._look = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pages", daemon=True)

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and every connection."""
        self._stop.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # Which wakes the thread.
        if self._thread.is_alive():
            self._thread.join()
        for one in self._open:
            one.close()
        self._listener.close()

    def _run(self) -> None:
        knocks = select.poll()
        knocks.register(self._listener, select.POLLIN)
        left_s, turned = _BURST_S, time.monotonic()
        while not self._stop.wait(_TURN_S):
            if not self._open:
                knocks.poll(1000)
            now, used = time.monotonic(), time.thread_time()
            left_s, turned = min(_BURST_S, left_s + (now - turned) * _SHARE), now
            if left_s > 0:
                self._turn(now, used + left_s)
            left_s -= time.thread_time() - used

    def _turn(self, now: float, until_s: float) -> None:
        self._made.clear()
        if now >= self._look:
            self._open, self._look = [one for one in self._open if one.goes_on(now)], now + _LOOK_S
        while time.thread_time() < until_s:
            try:
                client, _ = self._listener.accept()
            except OSError:  # None waits; or one has left already, or this process has no descriptor to spare.
                return
            one = _Connection(client, now + DEADLINE_S, self._page)
            if one.goes_on(now):
                if len(self._open) >= MOST_CONNECTIONS:
                    self._open.pop(0).close()
                self._open.append(one)

    def _page(self, path: str) -> Page:
        if path not in self._pages:
            return Page(404, "text/plain", b"/metrics or /healthz\n")
        if path not in self._made:
            try:
                self._made[path] = self._pages[path]()
            except Exception:  # The thread must live on, whatever a page's maker meets.
                self._made[path] = Page(500, "text/plain", b"no answer could be made\n")
        return self._made[path]


class _Connection:
    """One client: its request as it comes, then the answer, then whatever it says until it closes.

    Args:
        client: accepted. until: when it is closed, on the monotonic clock.
        page_of: what a path answers.
    """

    def __init__(self, client: socket.socket, until: float, page_of: Callable[[str], Page]) -> None:
        self._client, self._until, self._page_of = client, until, page_of
        self._request = b""
        self._answer: bytes | None = None

    def goes_on(self, now: float) -> bool:
        """Do what goes without waiting; False once it is over, and closed."""
        try:
            if now < self._until and self._step():
                return True
        except BlockingIOError:
            return True
        except OSError:  # A client that leaves in the middle is none of the service's troubles.
            pass
        self.close()
        return False

    def _step(self) -> bool:
        """Whether there may be more to do; BlockingIOError where the client must do something first."""
        if self._answer is None:
            more = self._client.recv(_MOST_REQUEST, socket.MSG_DONTWAIT)
            self._request += more
            self._answer = answer(self._request, self._page_of)
            if self._answer is None:
                return bool(more)
        if self._answer:
            self._answer = self._answer[self._client.send(self._answer, socket.MSG_DONTWAIT) :]
            if self._answer:
                return True
            self._client.shutdown(socket.SHUT_WR)
        # Closed while the client still sends, the connection would be reset, and the answer with it.
        return bool(self._client.recv(_MOST_REQUEST, socket.MSG_DONTWAIT))

    def close(self) -> None:
        """At once; a client that has no answer yet is told by a reset."""
        with contextlib.suppress(OSError):
            if self._answer == b"":
                self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _linger(on=False))
        self._client.close()


def answer(request: bytes, page_of: Callable[[str], Page]) -> bytes | None:
    """What an HTTP request gets; None while it is not complete.

    Args:
        request: as far as it has come. Only its first line is looked at; what follows its head is dropped.
        page_of: what a path answers.
    """
    method, path, code = read_request(request)
    if code is None:
        return None
    page = page_of(path) if code == 200 else Page(code, "text/plain", f"{_phrase(code)}\n".encode())
    head = (
        f"HTTP/1.1 {page.code} {_phrase(page.code)}\r\nServer: sparsifiner-edge\r\nAllow: GET, HEAD\r\n"
        f"Content-Type: {page.kind}\r\nContent-Length: {len(page.content)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if method == "HEAD" else page.content)


def _phrase(code: int) -> str:
    return http.HTTPStatus(code).phrase


def read_request(request: bytes) -> tuple[str, str, int | None]:
    """Method, path without what follows a question mark, and status: 200, what is wrong, or None for not complete."""
    line, ended, _ = request.partition(b"\n")
    full = len(request) >= _MOST_REQUEST
    if not ended:
        return "", "", 414 if full else None
    words = line.decode("latin-1").split()
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return "", "", 400
    code: int | None = 200 if words[0] in ("GET", "HEAD") else 405
    if not re.search(rb"\n\r?\n", request):
        code = 431 if full else None
    return words[0], words[1].partition("?")[0], code
