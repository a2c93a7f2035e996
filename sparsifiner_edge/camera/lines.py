"""JSON lines to where a reader may be slow, a disk full, or a pipe closed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsifiner_edge.files import io_errors, require_file_path, signals_held

_WAITING = 64
_DRAIN_S = 2.0


class LineWriter:
    """Writes lines from a thread of its own, whole or not at all.

    Args:
        handle: a file descriptor, closed at the end; None discards every line.
        patient: wait for the reader, and raise what the disk says; else drop and count lines that find no room, and
            keep trying: a service goes on.
        hurry: once set, patience ends: somebody asked to stop.
    """

    def __init__(self, handle: int | None, patient: bool, hurry: threading.Event | None = None) -> None:
        self.dropped, self.errors = 0, 0
        self.error: OSError | None = None
        self._handle, self._patient = handle, patient
        self._hurry = hurry or threading.Event()
        self._queue: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)
        self._thread.start()

    def write(self, content: dict[str, Any]) -> None:
        """Hand one line over.

        Raises:
            BrokenPipeError: the reader has gone.
            OSError: a patient writer's disk refused.
        """
        text = json.dumps(content, ensure_ascii=False) + "\n"
        line = text.encode("utf-8", "backslashreplace")
        while True:
            self._raise()
            try:
                self._queue.put(line, timeout=0.2 if self._patient else 0)
            except queue.Full:
                if self._waits():
                    continue
                self.dropped += 1
            return

    def close(self) -> None:
        """Write what waits, for at most 2 s where patience ends, and close.

        Raises:
            OSError: as `write`.
        """
        asked, late = False, None
        while self._thread.is_alive() and (late is None or time.monotonic() < late):
            with contextlib.suppress(queue.Full):
                if not asked:
                    self._queue.put(None, timeout=0.1)
                    asked = True
            self._thread.join(0.1)
            if late is None and not self._waits():
                late = time.monotonic() + _DRAIN_S
        self.dropped += max(0, self._queue.qsize() - asked)
        self._raise()

    def _waits(self) -> bool:
        return self._patient and not self._hurry.is_set()

    def _raise(self) -> None:
        if self.error is not None and (self._patient or isinstance(self.error, BrokenPipeError)):
            raise self.error

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            if self._handle is not None and self.error is None:
                self._write(self._handle, line)
        if self._handle is not None:
            os.close(self._handle)

    def _write(self, handle: int, line: bytes) -> None:
        done = 0
        try:
            while done < len(line):
                done += os.write(handle, line[done:])
        except OSError as error:
            self.errors += 1
            if self._patient or isinstance(error, BrokenPipeError):
                self.error = error
            if done and stat.S_ISREG(os.fstat(handle).st_mode):  # No half lines.
                with contextlib.suppress(OSError):
                    end = os.lseek(handle, -done, os.SEEK_CUR)
                    os.ftruncate(handle, min(end, os.fstat(handle).st_size))  # Logs are rotated by being emptied.


def open_output(path: Path, append: bool) -> int:
    """File descriptor of a file for lines.

    Args:
        path: the file; folders above it are made.
        append: keep the lines that are there, and begin a new one; else the file is emptied.

    Raises:
        ArtifactError: a folder, a device, or the disk refuses.
    """
    require_file_path(path)
    with io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not append:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":  # The power was cut.
            with contextlib.suppress(OSError):
                os.write(handle, b"\n")
        return handle


@contextlib.contextmanager
def new_lines(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Takes lines for a file that appears when all are there.

    While it grows it has a hidden name beside `path`. Cut short, by an error or a signal, its whole lines stay as
    `path` with ".part" at the end, and what `path` held stays as it was.

    Raises:
        ArtifactError: a folder, a device, or the disk refuses.
    """
    require_file_path(path)
    place = Path(os.path.realpath(path))
    scratch = place.with_name(f".{place.name}.{os.urandom(4).hex()}")
    try:
        with io_errors(path):
            place.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            writer = LineWriter(handle, patient=True)
            try:
                yield writer.write
            finally:
                writer.close()
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
            scratch.replace(place)
    finally:
        with signals_held(), contextlib.suppress(OSError):
            if scratch.stat().st_size:
                scratch.replace(place.with_name(f"{place.name}.part"))
            else:
                scratch.unlink()
