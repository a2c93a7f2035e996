"""Child processes for native code that may abort or hang.

The parent always ends its children. Both sides exchange JSON messages over a separate socket, so that anything a
library prints in the child cannot mix with them; standard output and standard error of the child go to a log that error
messages quote. A request names one of the child's operations and its arguments. The reply holds the result, or the
error of this package that the operation raised.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, TypeVar

import msgspec

from sparsifiner_edge.errors import BackendError, SparsifinerError, rebuilt
from sparsifiner_edge.process import StalledError, read_message, start_python, write_message
from sparsifiner_edge.records import read_record, write_record

_TAIL_BYTES = 2000
"""Number of bytes at the end of the child's log that an error message quotes."""
_MOST_BYTES = 1 << 30
"""Maximum size of a message in bytes (1 GiB); it bounds the memory that a broken child can make the parent use."""
_PIPE = "SPARSIFINER_PIPE"
"""Environment variable that gives the child the file descriptor of its end of the socket."""
_ENDING_S = 5.0
"""Seconds that a child which closed its socket has to exit before it is killed."""
_REPORT = "Report this as a bug."
"""Advice for a malformed reply."""
_KINDS = {kind.__name__: kind for kind in SparsifinerError.__subclasses__()}
"""Error classes of this package by name, to raise in the parent the error that was raised in the child."""
_Result = TypeVar("_Result")


class _Reply(msgspec.Struct, frozen=True):
    """Reply of the child to a request.

    Attributes:
        error: Class name, message and advice of the error that the operation raised; None if it succeeded.
        result: JSON-serializable result of the operation.
    """

    error: tuple[str, str, str] | None = None
    result: Any = None


class Child:
    """Handle of a child process in the parent; `start_child` creates it.

    Args:
        name: Name of the child, with which messages begin.
        fix: Advice for the case that the child dies or hangs.
        process: The child's process.
        pipe: File descriptor of the parent's end of the socket.
        log: File that receives the child's output.

    Attributes:
        pid: Process ID of the child.
    """

    def __init__(self, name: str, fix: str, process: subprocess.Popen[bytes], pipe: int, log: IO[bytes]) -> None:
        self.pid = process.pid
        self._name, self._fix, self._process, self._pipe, self._log = name, fix, process, pipe, log

    def ask(self, operation: str, timeout_s: float, form: type[_Result], **arguments: object) -> _Result:
        """Run an operation in the child and wait for its result.

        Args:
            operation: Name of the operation.
            timeout_s: Seconds to wait for the reply.
            form: Type of the result.
            arguments: JSON-serializable arguments of the operation.

        Returns:
            The result of the operation.

        Raises:
            SparsifinerError: The operation raised this error.
            BackendError: The child died or exceeded the timeout; the message quotes the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(OSError):  # The read below detects a child that is gone.
            write_message(self._pipe, json.dumps({"operation": operation, **arguments}).encode())
        try:
            message = read_message(self._pipe, deadline, _MOST_BYTES)
            content = None if message is None else json.loads(message)
        except StalledError as error:
            raise self._failure(f"gave no reply to {operation!r} within {timeout_s:g} s and was ended") from error
        except (OSError, ValueError):  # The reply was cut off or corrupted.
            content = None
        if content is None:
            raise self._failure(f"{self._reap()} during {operation!r}")
        reply = read_record(content, _Reply, self._name, _REPORT, BackendError)
        if reply.error is not None:
            kind, what, fix = reply.error
            raise rebuilt(_KINDS.get(kind, BackendError), what, fix)
        return read_record(reply.result, form, self._name, _REPORT, BackendError)

    def end(self) -> None:
        """Kill and reap the child. It has no state to save, and a hung process ignores gentler signals."""
        self._process.kill()
        self._process.wait()

    def _reap(self) -> str:
        """Wait for the child to end and return how it did. Kill it if it closed its socket but does not exit."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_S)
        self.end()
        status = self._process.returncode
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"

    def _failure(self, what: str) -> BackendError:
        """End the child and return an error that quotes the end of its log."""
        self.end()
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _TAIL_BYTES))
        written = " ".join(self._log.read().decode("utf-8", "replace").split()) or "nothing"
        return BackendError(f"{self._name} {what}. It wrote: {written}", self._fix)


@contextlib.contextmanager
def start_child(module: str, name: str, fix: str) -> Iterator[Child]:
    """Run `python -m module`, which calls `serve`, and kill it when the block ends.

    Args:
        module: Module to run.
        name: Name of the child, with which messages begin.
        fix: Advice for the case that the child dies or hangs.

    Yields:
        The handle of the child.
    """
    near, far = socket.socketpair()
    with tempfile.TemporaryFile() as log, near:
        with far:
            process = start_python(
                module,
                {_PIPE: str(far.fileno())},
                pass_fds=[far.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        child = Child(name, fix, process, near.fileno(), log)
        try:
            yield child
        finally:
            child.end()


def serve(operations: Mapping[str, Callable[..., Any]]) -> None:
    """Process the parent's requests in the child until the parent closes the socket.

    Args:
        operations: Operations by name. Each is called with the arguments of a request and returns a record.
    """
    pipe = int(os.environ.pop(_PIPE))
    os.set_inheritable(pipe, False)  # Programs that a library starts must not hold the socket open.
    with contextlib.suppress(ConnectionError):
        while (message := read_message(pipe, None, _MOST_BYTES)) is not None:
            request = json.loads(message)
            operation = operations[request.pop("operation")]
            try:
                reply = _Reply(result=write_record(operation(**request)))
            except SparsifinerError as error:
                reply = _Reply(error=(type(error).__name__, error.what, error.fix))
            write_message(pipe, json.dumps(write_record(reply)).encode())
