"""The parent's side of a worker: starts it, asks it, and ends it whatever happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TypeVar

from sparsifiner_edge.errors import BackendError
from sparsifiner_edge.records import read_record
from sparsifiner_edge.runtime.child import Child, start_child

Record = TypeVar("Record")


class Worker:
    """A running worker process; see `start_worker`."""

    def __init__(self, child: Child) -> None:
        self.pid = child.pid
        self._child = child

    def ask(self, op: str, timeout_s: float, form: type[Record], **arguments: object) -> Record:
        """Send one request, of `worker.OPERATIONS`, and wait for its reply, a record of the class `form`.

        Raises:
            BackendError: the worker refused, died, or was silent for `timeout_s` seconds; the end of what it wrote to
                standard error is in the message.
        """
        try:
            self._child.send({"op": op, **arguments})
        except OSError as error:
            raise self._lost(f"died before {op!r}") from error
        try:
            reply = self._child.receive(time.monotonic() + timeout_s)
        except TimeoutError as error:
            raise self._lost(f"gave no reply to {op!r} within {timeout_s:.0f} s") from error
        if reply is None:
            raise self._lost(f"died during {op!r}")
        if "error" in reply:
            raise BackendError(reply["error"]["what"], reply["error"]["fix"])
        return read_record(reply["ok"], form, "The measuring process", "Report this as a bug.", BackendError)

    def _lost(self, what: str) -> BackendError:
        self._child.end()
        return BackendError(
            f"The measuring process {what} (exit status {self._child.wait()}). It wrote: {self._child.written()}",
            "If it ran out of memory, close other programs or take a smaller model.",
        )


@contextlib.contextmanager
def start_worker() -> Iterator[Worker]:
    """A fresh worker, killed when the block ends, however it ends."""
    with start_child("sparsifiner_edge.profiles.measure.worker") as child:
        yield Worker(child)
