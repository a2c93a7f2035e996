"""Tells systemd that the service is ready and alive (sd_notify: a datagram to the socket that it names)."""

from __future__ import annotations

import contextlib
import os
import socket
import time

_EVERY_S = 1.0


class Notifier:
    """Silent where no socket is named."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._next = 0.0

    def say(self, text: str) -> None:
        """Such as READY=1 or STOPPING=1."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
            service.setblocking(False)
            service.sendto(text.encode(), address)

    def alive(self) -> None:
        """The loop turns; told at most once a second."""
        if self._address and time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY_S
            self.say("WATCHDOG=1")
