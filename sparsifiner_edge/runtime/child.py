"""Processes of ours that work for this one, since native code may abort or hang: started, heard, and always ended.

Both sides speak JSON, one message per line. What the child writes to standard error is kept for messages.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Any

from sparsifiner_edge.process import start_python

_TAIL_BYTES = 2000


class Child:
    """The parent's side; see `start_child`."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self._process = process
        self._requests, self._replies = process.stdin, process.stdout
        self._log = log
        self._buffer = b""

    def send(self, message: object) -> None:
        """Send one message, JSON-ready.

        Raises:
            OSError: it is gone.
        """
        self._requests.write(json.dumps(message).encode() + b"\n")
        self._requests.flush()

    def receive(self, deadline: float) -> Any:
        """The next message, or None where it has closed its output.

        Args:
            deadline: by `time.monotonic`.

        Raises:
            TimeoutError: there is none by then.
        """
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._replies], [], [], left)[0]:
                raise TimeoutError
            chunk = os.read(self._replies.fileno(), 1 << 16)
            if not chunk:
                return None
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def wait(self) -> int:
        """Its exit status, once it has ended; negative where a signal ended it."""
        return self._process.wait()

    def written(self) -> str:
        """The end of what it wrote to standard error, in one line."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _TAIL_BYTES))
        return " ".join(self._log.read().decode("utf-8", "replace").split()) or "nothing"

    def end(self) -> None:
        """Kill it and reap it: nothing in it is worth saving, and what hangs hears nothing gentler."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):  # What is still unsent meets a broken pipe.
                pipe.close()


@contextlib.contextmanager
def start_child(module: str) -> Iterator[Child]:
    """`python -m module`, killed when the block ends, by whatever way."""
    with (
        tempfile.TemporaryFile() as log,
        start_python(module, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        child = Child(process, log)
        try:
            yield child
        finally:
            child.end()


class Parent:
    """The child's side. From here on whatever a library prints goes to standard error, and none can read requests."""

    def __init__(self) -> None:
        self._requests = os.fdopen(os.dup(0), encoding="utf-8")
        self._replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)

    def messages(self) -> Iterator[Any]:
        """What it sends, until it closes the pipe."""
        for line in iter(self._requests.readline, ""):
            yield json.loads(line)

    def send(self, message: object) -> None:
        """Send one message, JSON-ready.

        Raises:
            OSError: it is gone.
        """
        self._replies.write(json.dumps(message) + "\n")
        self._replies.flush()
