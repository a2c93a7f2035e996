"""JSON lines for outputs whose reader may be slow, whose disk may be full, or whose pipe may be closed."""

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
"""Longest time in seconds that `LineWriter.close` waits for a reader."""
_TURN_MS = 100
"""Milliseconds of one wait for the reader, after which `stop` is checked again."""


def line_of(content: object) -> bytes:
    """Return content as a JSON line with its line break.

    Hidden characters are escaped. Values that are NaN or infinite become null; their number is added as `not_finite`,
    unless a record has counted them itself.

    Args:
        content: A record, or content that is ready for JSON.
    """
    known, count = finite(write_record(content))
    if count:
        known.setdefault("not_finite", count)
    return dump_json(known, indent=None).encode()


class LineWriter:
    """Context manager that writes whole lines from any thread.

    It never writes more to a pipe, socket or terminal than fits, so that a reader that does not read blocks nothing.
    This does not depend on whether the descriptor is non-blocking, a setting that all its holders share.

    Args:
        output: A file, whose folders are created; or a standard stream, None if it was closed from the start.
        live: For a service. True: drop and count lines that do not fit or cannot be written, keep trying,
            and append to the lines of an earlier run. False: wait for the reader, and raise errors of the disk.
        stop: Once this event is set, writes no longer wait: undelivered lines are dropped and counted.
        count: Called with "lines_dropped" for a line that did not fit (part of the last one may have been written), and
            with "output_errors" for a line that the disk refused.

    Raises:
        ArtifactError: Another run writes the file, it is a folder or a device, or the file cannot be written.
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
        self._line, self._written = b"", 0  # The latest line, and how many of its bytes are written.
        self._is_file = stat.S_ISREG(os.fstat(self._handle).st_mode)
        self._room = select.poll()
        self._room.register(self._handle, select.POLLOUT)

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(OSError, ArtifactError) if kind else contextlib.nullcontext():
            self.close()

    def write(self, content: object) -> None:
        """Write one line.

        If it does not fit, wait; for a live source, keep it pending instead and drop later lines meanwhile.

        Raises:
            BrokenPipeError: The reader is gone.
            ArtifactError: The disk refused a line of a source that is not live.
            OSError: Writing to a standard stream failed, for a source that is not live.
        """
        line = line_of(content)
        with self._lock, self._errors():
            if self._flush():
                self._line, self._written = line, 0
                self._flush()
            else:
                self._count("lines_dropped")

    def close(self) -> None:
        """Write the pending line, waiting at most 2 s for the reader, and close the output.

        For a live source it is no error if the reader is gone.

        Raises:
            BrokenPipeError: The reader is gone, for a source that is not live.
            ArtifactError: The disk refused a line of a source that is not live.
            OSError: Writing to a standard stream failed, for a source that is not live.
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
        """Write as much as fits; return True if nothing is left."""
        most = len(self._line) if self._is_file else select.PIPE_BUF
        while self._written < len(self._line):
            waits = not (self._live or self._stop.is_set())
            if self._room.poll(_TURN_MS if waits else 0):
                try:
                    self._written += os.write(self._handle, self._line[self._written : self._written + most])
                except BlockingIOError:  # Another process filled the pipe in the meantime.
                    continue
                except OSError as error:
                    self._give_up(error)
            elif not waits:
                return False
        return True

    def _give_up(self, error: OSError) -> None:
        """Drop the current line after an error, and remove the part of it that was written to a file."""
        if self._is_file and self._written:
            with contextlib.suppress(OSError):
                end = os.lseek(self._handle, -self._written, os.SEEK_CUR)
                # The file may have been emptied in the meantime, and must not grow.
                os.ftruncate(self._handle, min(end, os.fstat(self._handle).st_size))
        self._line, self._written = b"", 0
        self._count("output_errors")
        if not self._live or isinstance(error, BrokenPipeError):
            raise error


def _open(path: Path, append: bool) -> int:
    """Return the descriptor of a file that is locked against other runs.

    Args:
        path: File to open.
        append: Keep existing lines and begin a new one; otherwise empty the file.

    Raises:
        ArtifactError: Another run writes the file, or it cannot be opened.
    """
    require_file_path(path)
    with io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # O_APPEND writes at the end even after log rotation has emptied the file.
        handle = os.open(path, os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | (os.O_RDWR if append else os.O_WRONLY), 0o666)
        if not lock(handle):
            os.close(handle)
            raise ArtifactError(f"{path} is being written by another run.", "Give another file, or end that run.")
        size = os.fstat(handle).st_size
        if not append:
            os.ftruncate(handle, 0)
        elif size and os.pread(handle, 1, size - 1) != b"\n":  # The last line is incomplete, as after a power cut.
            with contextlib.suppress(OSError):
                os.write(handle, b"\n")
    return handle
