"""Connections to cameras."""

from __future__ import annotations

import socket
import ssl

from sparsifiner_edge.camera.rtsp import Address


def connect(target: Address, patience_s: float) -> socket.socket:
    """A connection to a camera, over TLS where its address says so; reads and writes have `patience_s`, too.

    Raises:
        OSError: there is none.
    """
    plain = _connected(target, patience_s)
    if not target.secure:
        return plain
    try:
        return _tls().wrap_socket(plain, server_hostname=target.host)
    except BaseException:
        plain.close()
        raise


def _connected(target: Address, patience_s: float) -> socket.socket:
    """To one of a host's addresses; the time is shared among them.

    Raises:
        OSError: there is none, or the last one's error.
    """
    found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    for place, (family, _, _, _, address) in enumerate(found):
        one = socket.socket(family, socket.SOCK_STREAM)
        try:
            one.settimeout(patience_s / len(found))
            one.connect(address)
        except OSError:
            one.close()
            if place == len(found) - 1:
                raise
            continue
        one.settimeout(patience_s)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return one
    raise OSError(f"{target.host} has no address")


def _tls() -> ssl.SSLContext:
    """Encrypts, and asks for no certificate that anybody signed: cameras have none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
