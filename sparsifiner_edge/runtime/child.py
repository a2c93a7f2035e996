"""Child processes that work for this one, since native code may abort or hang; they are always ended.

Both sides speak JSON, one message at a time, on a pipe of their own: what a library prints in the child, on either
output, is kept for messages and mixes with nothing. A request is one of the child's operations with its arguments; its
result comes back, or the error of this package that it raised.
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
_MOST_BYTES = 1 << 30
_PIPE = "SPARSIFINER_PIPE"
"""Variable of the child's environment: the number of its end of the pipe."""
_ENDING_S = 5.0
_REPORT = "Report this as a bug."
_KINDS = {kind.__name__: kind for kind in SparsifinerError.__subclasses__()}
_Result = TypeVar("_Result")


class _Reply(msgspec.Struct, frozen=True):
    """The error of an operation (class, what, fix), or else its result, JSON-ready."""

    error: tuple[str, str, str] | None = None
    result: Any = None


class Child:
    """The parent's side; see `start_child`."""

    def __init__(self, name: str, fix: str, process: subprocess.Popen[bytes], pipe: int, log: IO[bytes]) -> None:
        self.pid = process.pid
        self._name, self._fix, self._process, self._pipe, self._log = name, fix, process, pipe, log

    def ask(self, operation: str, timeout_s: float, form: type[_Result], **arguments: object) -> _Result:
        """Have an operation carried out.

        Args:
            form: its result's type. arguments: JSON-ready.

        Raises:
            SparsifinerError: as the operation raised it.
            BackendError: the child died (with the end of what it wrote), or took longer than `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(OSError):  # That it is gone is seen when it is read from.
            write_message(self._pipe, json.dumps({"operation": operation, **arguments}).encode())
        try:
            message = read_message(self._pipe, deadline, _MOST_BYTES)
            content = None if message is None else json.loads(message)
        except StalledError as error:
            raise self._failure(f"gave no reply to {operation!r} within {timeout_s:g} s and was ended") from error
        except (OSError, ValueError):  # Cut off, or overwritten by what goes wrong there.
            content = None
        if content is None:
            raise self._failure(f"{self._reap()} during {operation!r}")
        reply = read_record(content, _Reply, self._name, _REPORT, BackendError)
        if reply.error is not None:
            kind, what, fix = reply.error
            raise rebuilt(_KINDS.get(kind, BackendError), what, fix)
        return read_record(reply.result, form, self._name, _REPORT, BackendError)

    def end(self) -> None:
        """Kill it and reap it: it holds nothing worth saving, and a hung process heeds nothing gentler."""
        self._process.kill()
        self._process.wait()

    def _reap(self) -> str:
        """How it ended; one that closed its pipe and hangs is killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_ENDING_S)
        self.end()
        status = self._process.returncode
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"left with exit status {status}"

    def _failure(self, what: str) -> BackendError:
        self.end()
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _TAIL_BYTES))
        written = " ".join(self._log.read().decode("utf-8", "replace").split()) or "nothing"
        return BackendError(f"{self._name} {what}. It wrote: {written}", self._fix)


@contextlib.contextmanager
def start_child(module: str, name: str, fix: str) -> Iterator[Child]:
    """`python -m module`, which calls `serve`; killed when the block ends, in whatever way.

    Args:
        name: how messages begin. fix: what to do where it died or hung.
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
    """The child's side: carry out what the parent asks for, until it closes the pipe.

    Args:
        operations: by name; each is called with a request's arguments, and returns a record.
    """
    pipe = int(os.environ.pop(_PIPE))
    os.set_inheritable(pipe, False)  # Programs that a library starts must not hold the pipe open.
    with contextlib.suppress(ConnectionError):
        while (message := read_message(pipe, None, _MOST_BYTES)) is not None:
            request = json.loads(message)
            operation = operations[request.pop("operation")]
            try:
                reply = _Reply(result=write_record(operation(**request)))
            except SparsifinerError as error:
                reply = _Reply(error=(type(error).__name__, error.what, error.fix))
            write_message(pipe, json.dumps(write_record(reply)).encode())
