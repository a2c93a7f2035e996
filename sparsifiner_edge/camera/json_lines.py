"""JSON lines to where a reader may be slow, a disk full, or a pipe closed."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.files import io_errors, lock, require_file_path
from sparsifiner_edge.records import write_record
from sparsifiner_edge.text import dump_json, finite

_DRAIN_S = 2.0
_TURN_MS = 100


def line_of(content: object) -> bytes:
    """A record, or what is ready for JSON, as a JSON line with its line break.

    Numbers that are not finite are null, and counted in the line as `not_finite`, which a record may have done itself.
    Hidden characters are escaped.
    """
    known, count = finite(write_record(content))
    if count:
        known.setdefault("not_finite", count)
    return dump_json(known, indent=None).encode()


class LineWriter:
    """Writes whole lines, from any thread. A context manager, which closes it.

    A pipe, socket or terminal gets no more at a time than it has room for, so that a reader who does not read holds
    nothing up; whether the descriptor blocks, which all its holders have in common, makes no difference.

    Args:
        output: a file, folders above it are made; or a standard stream, None where it was closed from the start.
        live: drop and count lines that find no room, or that the disk refuses, and keep trying: a service goes on, and
            one that is started again goes on in its file. Else wait for the reader, and raise what the disk says.
        stop: once set, writes no longer wait: undelivered lines are dropped and counted.
        count: told "lines_dropped" of a line that was not written for want of room (of the last one a part may have
            been), and "output_errors" of one that the disk refused.

    Raises:
        ArtifactError: another run writes the file, it is a folder or a device, or the disk refuses.
    """

    def __init__(
        self,
        output: Path | TextIO | None,
        live: bool,
        stop: threading.Event | None = None,
        count: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._errors: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        if isinstance(output, Path):
            self._handle, self._errors = _open(output, append=live), functools.partial(io_errors, output)
        elif output is None:
            self._handle = os.open(os.devnull, os.O_WRONLY)
        else:
            output.flush()
            self._handle = os.dup(output.fileno())
        self._live, self._stop, self._count, self._lock = live, stop or threading.Event(), count, threading.Lock()
        self._line, self._written = b"", 0
        """The last one, and how much of it is written."""
        self._is_file = stat.S_ISREG(os.fstat(self._handle).st_mode)
        self._room = select.poll()
        self._room.register(self._handle, select.POLLOUT)

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(OSError, ArtifactError) if kind else contextlib.nullcontext():
            self.close()

    def write(self, content: object) -> None:
        """Write one line. Where there is no room that waits; a live source's stays pending, and later ones are dropped
        meanwhile.

        Raises:
            BrokenPipeError: the reader has gone.
            ArtifactError, OSError: the disk refused, of a source that is not live.
        """
        line = line_of(content)
        with self._lock, self._errors():
            if self._flush():
                self._line, self._written = line, 0
                self._flush()
            else:
                self._count("lines_dropped")

    def close(self) -> None:
        """Write what waits, for at most 2 s where nothing is waited for, and close.

        Raises:
            ArtifactError, OSError: as of `write`, of a source that is not live: else that the reader has gone is no
                failure of what is over.
        """
        gone = contextlib.suppress(BrokenPipeError) if self._live else contextlib.nullcontext()
        with self._lock, self._errors(), gone:
            ends = time.monotonic() + _DRAIN_S
            try:
                while not (flushed := self._flush()) and time.monotonic() < ends:
                    self._room.poll(_TURN_MS)
                if not flushed:
                    self._count("lines_dropped")
            finally:
                os.close(self._handle)

    def _flush(self) -> bool:
        """Write as much as there is room for; whether that was all."""
        most = len(self._line) if self._is_file else select.PIPE_BUF
        while self._written < len(self._line):
            waits = not (self._live or self._stop.is_set())
            if self._room.poll(_TURN_MS if waits else 0):
                try:
                    self._written += os.write(self._handle, self._line[self._written : self._written + most])
                except BlockingIOError:  # Another process was faster to take the room.
                    continue
                except OSError as error:
                    self._give_up(error)
            elif not waits:
                return False
        return True

    def _give_up(self, error: OSError) -> None:
        """No half lines: the begun one is removed."""
        if self._is_file and self._written:
            with contextlib.suppress(OSError):
                end = os.lseek(self._handle, -self._written, os.SEEK_CUR)
                os.ftruncate(self._handle, min(end, os.fstat(self._handle).st_size))  # It may have been emptied.
        self._line, self._written = b"", 0
        self._count("output_errors")
        if not self._live or isinstance(error, BrokenPipeError):
            raise error


def _open(path: Path, append: bool) -> int:
    """File descriptor of a file, which no other run can write to before it is closed; either its lines are kept, and a
    new one is begun, or it is emptied.
    """
    require_file_path(path)
    with io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Always at the end, wherever that is after the file was emptied: logs are rotated so.
        handle = os.open(path, os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | (os.O_RDWR if append else os.O_WRONLY), 0o666)
        if not lock(handle):
            os.close(handle)
            raise ArtifactError(f"{path} is written by another run.", "Give another file, or end that run.")
        size = os.fstat(handle).st_size
        if not append:
            os.ftruncate(handle, 0)
        elif size and os.pread(handle, 1, size - 1) != b"\n":  # The power was cut.
            with contextlib.suppress(OSError):
                os.write(handle, b"\n")
    return handle
