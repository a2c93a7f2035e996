"""The parent's side of a worker: starts it, asks it, and ends it whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsifiner_edge.errors import BackendError

_SOURCE = Path(__file__).resolve().parents[2]
_TAIL_BYTES = 2000


class Worker:
    """A running worker process; see `start_worker`.

    Args:
        process: the worker, with pipes for input and output.
        log: the file that takes its standard error.
    """

    def __init__(self, process: subprocess.Popen[bytes], log: Any) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self._process = process
        self._requests = process.stdin
        self._replies = process.stdout
        self._log = log
        self._buffer = b""

    def ask(self, op: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its reply.

        Raises:
            BackendError: the worker refused, died, or was silent for `timeout_s` seconds; the end of what it wrote to
                standard error is in the message.
        """
        try:
            self._requests.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self._requests.flush()
        except OSError as error:
            raise self._lost(f"died before {op!r}") from error
        reply = json.loads(self._line(op, timeout_s))
        if "error" in reply:
            raise BackendError(reply["error"]["what"], reply["error"]["fix"])
        answer: dict[str, Any] = reply["ok"]
        return answer

    def _line(self, op: str, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._replies], [], [], left)[0]:
                raise self._lost(f"gave no reply to {op!r} within {timeout_s:.0f} s")
            chunk = os.read(self._replies.fileno(), 1 << 16)
            if not chunk:
                raise self._lost(f"died during {op!r}")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _lost(self, what: str) -> BackendError:
        self._process.kill()
        code = self._process.wait()
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _TAIL_BYTES))
        tail = self._log.read().decode("utf-8", "replace").strip() or "nothing"
        return BackendError(
            f"The measuring process {what} (exit status {code}). It wrote: {tail}",
            "If it ran out of memory, close other programs or take a smaller model.",
        )

    def end(self) -> None:
        """Kill it and reap it: nothing in it is worth saving, and a hung backend hears nothing gentler."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):  # What is still unsent meets a broken pipe.
                pipe.close()


@contextlib.contextmanager
def start_worker() -> Iterator[Worker]:
    """A fresh worker, killed when the block ends, by whatever way."""
    # A session of its own: Ctrl-C reaches the parent alone, which then ends the worker. The folder of this package as
    # working directory: the worker imports the same package, and no file of the user's folder in place of a library.
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [sys.executable, "-m", "sparsifiner_edge.profiles.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=_SOURCE,
            start_new_session=True,
        ) as process,
    ):
        worker = Worker(process, log)
        try:
            yield worker
        finally:
            worker.end()
