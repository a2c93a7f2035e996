"""Stands between a camera and FFmpeg, which follows redirects with the password in hand, and cannot be told not to.

The relay listens on 127.0.0.1 and connects to the camera. It alone knows the address and proves the password. FFmpeg,
in a process that reads what strangers send, gets an address of this machine that holds neither; in requests the relay
puts the camera's in its place, so that the hash of Digest is over what the camera sees. A redirect to another host is
refused, or followed without user and password where that is allowed. Frames pass as they come.

It runs in the process that was given the password, not in the decoding one: that needs no names of hosts, no TLS and no
connection but this one, and holds no secret.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import select
import socket
import ssl
import threading
import time

from sparsifiner_edge.camera.credentials import Credentials
from sparsifiner_edge.camera.rtsp import Address, Message, Splitter, parse_address

_CHUNK = 1 << 16
_BUFFER = 1 << 17
"""Of frames on their way to a decoder that is busy: more would only make them older."""
_MOST_CLIENTS, _MOST_HOPS, _MOST_TRIES, _MOST_PENDING = 8, 5, 2, 32
_FIRST_S = 2.0
"""For whoever connects to say who it is."""
_FOLLOWED = ("OPTIONS", "DESCRIBE")
"""Requests before there is a session; no other was ever followed."""


class RefusedError(Exception):
    """The camera asks for what it does not get; the message may be shown."""


class _LeftError(Exception):
    """The decoder has gone, or it is not the decoder who connected."""


class Relay:
    """Takes connections until it is closed; each makes one to the camera.

    Args:
        location: the camera's address.
        patience_s: a camera that says nothing for so long is given up.
        allow_redirect: follow redirects to other hosts, without user and password.

    Attributes:
        port: on 127.0.0.1.
        url: what the decoder opens. It holds a secret of its own: no other user of this machine gets at the camera so.
        reason: why the last connection ended where the camera was the cause; None else.

    Raises:
        OSError: no port can be had.
    """

    def __init__(self, location: str, patience_s: float, allow_redirect: bool = False) -> None:
        self.address = parse_address(location)
        self.patience_s, self.allow_redirect = patience_s, allow_redirect
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=_MOST_CLIENTS)
        self.port = int(self._listener.getsockname()[1])
        self.url = f"rtsp://127.0.0.1:{self.port}/{secrets.token_hex(16)}"
        self.reason: str | None = None
        self._clients = threading.Semaphore(_MOST_CLIENTS)
        threading.Thread(target=self._listen, name="relay", daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those that there are end with the decoder."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # Wakes the thread; closing alone would not.
        self._listener.close()

    def _listen(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                if self._listener.fileno() < 0:
                    return
                time.sleep(0.1)  # No descriptor is left, for now.
                continue
            if self._clients.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(client,), name="relay", daemon=True).start()
            else:
                client.close()

    def _serve(self, client: socket.socket) -> None:
        session = _Session(self, client)
        reason = None
        try:
            session.run()
        except _LeftError:
            pass
        except RefusedError as error:
            reason = str(error)
        except TimeoutError:
            reason = f"nothing came from the camera for {self.patience_s:g} s"
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        finally:
            if session.known and reason is not None:
                self.reason = reason  # Also late, of a name that was looked up in vain.
            session.close()
            self._clients.release()


class _Session:
    """One connection of the decoder's, and its own to the camera."""

    def __init__(self, relay: Relay, client: socket.socket) -> None:
        self._relay, self._client, self._target = relay, client, relay.address
        self._server: socket.socket | None = None
        self._credentials: Credentials | None = None
        if self._target.user is not None:
            self._credentials = Credentials(self._target.user, self._target.password)
        self._asked, self._answered = Splitter(), Splitter()
        self._pending: dict[int, tuple[Message, int]] = {}
        """Requests by the number that the camera knows, and how often each was sent."""
        self._count, self._hops = 0, 0
        self.known = False
        """That it is the decoder who connected."""

    def run(self) -> None:
        """Until one side leaves.

        Raises:
            RefusedError: the camera redirects.
            OSError, ValueError: its connection fails, or what it sends is no RTSP.
        """
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._client.settimeout(_FIRST_S)
        while self._server is None:
            if not self._from_client():
                return
        self._client.settimeout(None)  # It ends with its process.
        while True:
            ready = self._ready()
            if self._client.fileno() in ready and not self._from_client():
                return
            if self._server.fileno() in ready and not self._from_server(self._server):
                return

    def close(self) -> None:
        """Both connections."""
        self._client.close()
        if self._server is not None:
            self._server.close()

    def _ready(self) -> list[int]:
        assert self._server is not None
        poll = select.poll()
        for side in (self._client, self._server):
            poll.register(side, select.POLLIN)
        ready = [handle for handle, _ in poll.poll(self._relay.patience_s * 1000)]
        if not ready:
            raise TimeoutError
        return ready

    def _from_client(self) -> bool:
        """Pass on what the decoder says; False when it has left."""
        try:
            data = self._client.recv(_CHUNK)
        except OSError as error:
            raise _LeftError from error
        for part in self._asked.feed(data):
            if isinstance(part, Message) and part.method:
                self._request(part)
            elif self._server is not None:  # Of a stranger nothing passes.
                self._server.sendall(part.encode() if isinstance(part, Message) else part)
        return bool(data)

    def _request(self, request: Message) -> None:
        if self._server is None:
            if not hmac.compare_digest(request.uri.encode("latin-1"), self._relay.url.encode()):
                raise _LeftError
            self.known = True
            self._connect()
        self._send(request, 1)

    def _send(self, request: Message, tries: int) -> None:
        """A request as the camera takes it, for the first or another time."""
        assert self._server is not None
        url, uri = self._relay.url, request.uri
        if uri.startswith(url):
            rest, base = uri[len(url) :], self._target.uri
            uri = base + (rest[1:] if base.endswith("/") else rest)  # FFmpeg adds a / where none is.
        self._count += 1
        self._pending[self._count] = request, tries
        while len(self._pending) > _MOST_PENDING:
            del self._pending[next(iter(self._pending))]
        proof = None if self._credentials is None else self._credentials.answer(request.method, uri)
        first = f"{request.method} {uri} RTSP/1.0"
        self._server.sendall(request.changed({"CSeq": str(self._count), "Authorization": proof}, first).encode())

    def _from_server(self, server: socket.socket) -> bool:
        """Pass on what the camera says; False when it has left."""
        while True:
            data = server.recv(_CHUNK)
            for part in self._answered.feed(data):
                if isinstance(part, Message) and part.status:
                    self._reply(part)
                else:
                    self._to_client(part.encode() if isinstance(part, Message) else part)
                if self._server is not server:
                    return True
            if not data or not isinstance(server, ssl.SSLSocket) or not server.pending():
                return bool(data)

    def _to_client(self, data: bytes) -> None:
        try:
            self._client.sendall(data)
        except OSError as error:
            raise _LeftError from error

    def _reply(self, reply: Message) -> None:
        number = reply.get("CSeq")
        known = int(number) if number.isdecimal() and int(number) in self._pending else next(iter(self._pending), 0)
        request, tries = self._pending.pop(known, (None, 0))
        if 300 <= reply.status < 400:
            self._redirected(reply, request)
            return
        if reply.status == 401 and request is not None and tries < _MOST_TRIES and self._may_prove(reply):
            self._send(request, tries + 1)
            return
        if request is not None and request.method == "PLAY" and reply.status < 300:
            self._answered.patient = True
        headers: dict[str, str | None] = {"Location": None, "WWW-Authenticate": None}
        if request is not None:
            headers["CSeq"] = request.get("CSeq")
        self._to_client(reply.changed(headers).encode())

    def _may_prove(self, reply: Message) -> bool:
        return self._credentials is not None and self._credentials.challenged(reply)

    def _redirected(self, reply: Message, request: Message | None) -> None:
        """Follow to another path of the same server, or as far as it is allowed.

        Raises:
            RefusedError: it is not.
        """
        old, to = self._target, reply.get("Location")
        try:
            new = old._replace(rest=to) if to.startswith("/") else parse_address(to)
        except ValueError as error:
            raise RefusedError("the server redirects to what is no address (refused)") from error
        same = (new.secure, new.host.lower(), new.port) == (old.secure, old.host.lower(), old.port)
        if not same and not self._relay.allow_redirect:
            raise RefusedError(f"the server redirects to {new.place} (refused; allow it with --allow-redirect)")
        if request is None or request.method not in _FOLLOWED:
            raise RefusedError(f"the server redirects to {new.place} in the middle of a session (refused)")
        self._hops += 1
        if self._hops > _MOST_HOPS:
            raise RefusedError(f"the server redirects more than {_MOST_HOPS} times (refused)")
        if not same:
            self._credentials = None  # Once away they are not shown again, also not where it leads back.
        self._target = new
        self._connect()
        self._send(request, 1)

    def _connect(self) -> None:
        """To where the camera is now; a connection from before ends."""
        if self._server is not None:
            self._server.close()
        self._answered, self._pending = Splitter(), {}
        self._server = _connected(self._target, self._relay.patience_s)
        self._relay.reason = None


def _connected(camera: Address, patience_s: float) -> socket.socket:
    """A connection to a camera, over TLS where its address says so; reads and writes have `patience_s`, too."""
    plain = socket.create_connection((camera.host, camera.port), patience_s)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not camera.secure:
        return plain
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # No certificate that anybody signed: cameras have none.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        return context.wrap_socket(plain, server_hostname=camera.host)
    except BaseException:
        plain.close()
        raise
