"""Processes of ours that work for this one, since native code may abort or hang: started, heard, and always ended.

Both sides speak JSON, one message at a time, on a pipe of their own: what a library prints in the child, on either
output, is kept for messages and mixes with nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

from sparsifiner_edge.process import start_python

_TAIL_BYTES = 2000
_PIPE = "SPARSIFINER_PIPE"
"""Variable of the child's environment: the number of its end of the pipe."""


class Child:
    """The parent's side; see `start_child`."""

    def __init__(self, process: subprocess.Popen[bytes], pipe: Connection, log: IO[bytes]) -> None:
        self.pid = process.pid
        self._process, self._pipe, self._log = process, pipe, log

    def send(self, message: object) -> None:
        """Send one message, JSON-ready.

        Raises:
            OSError: it is gone.
        """
        self._pipe.send_bytes(json.dumps(message).encode())

    def receive(self, deadline: float) -> Any:
        """The next message, or None where it has ended.

        Args:
            deadline: by `time.monotonic`.

        Raises:
            TimeoutError: there is none by then.
        """
        if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        try:
            return json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):  # Between two messages, or within one.
            return None

    def wait(self) -> int:
        """Its exit status, once it has ended; negative where a signal ended it."""
        return self._process.wait()

    def written(self) -> str:
        """The end of what it wrote to standard output and error, in one line."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _TAIL_BYTES))
        return " ".join(self._log.read().decode("utf-8", "replace").split()) or "nothing"

    def end(self) -> None:
        """Kill it and reap it: nothing in it is worth saving, and what hangs hears nothing gentler."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def start_child(module: str) -> Iterator[Child]:
    """`python -m module`, killed when the block ends, by whatever way."""
    near, far = Pipe()
    with tempfile.TemporaryFile() as log, near:
        with far:
            process = start_python(
                module, {_PIPE: str(far.fileno())}, pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        child = Child(process, near, log)
        try:
            yield child
        finally:
            child.end()


class Parent:
    """The child's side."""

    def __init__(self) -> None:
        handle = int(os.environ.pop(_PIPE))
        os.set_inheritable(handle, False)  # Programs that a library starts must not hold the pipe open.
        self._pipe = Connection(handle)

    def messages(self) -> Iterator[Any]:
        """What it sends, until it closes the pipe."""
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                yield json.loads(self._pipe.recv_bytes())

    def send(self, message: object) -> None:
        """Send one message, JSON-ready.

        Raises:
            OSError: it is gone.
        """
        self._pipe.send_bytes(json.dumps(message).encode())
