"""JSON lines to where a reader may be slow, a disk full, or a pipe closed."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.files import io_errors, is_locked, lock, replaced_file, require_file_path, signals_held, umask
from sparsifiner_edge.records import write_record
from sparsifiner_edge.text import dump_json, finite

_WAITING = 64
_DRAIN_S = 2.0
_STUCK_S = 1.0


def line_of(content: object) -> tuple[bytes, int]:
    """A record, or what is ready for JSON, as a JSON line with its line break; how many numbers were not finite.

    Those are null, and counted in the line as `not_finite`, which a record may have done itself. Hidden characters are
    escaped.
    """
    known, count = finite(write_record(content))
    if count:
        known.setdefault("not_finite", count)
    return dump_json(known, indent=None).encode(), count


class LineWriter:
    """Writes lines from a thread of its own.

    A pipe, socket or terminal gets no more at a time than it has room for, so that a reader who does not read holds
    nothing up; whether the descriptor blocks, which all its holders have in common, makes no difference.

    Args:
        handle: a file descriptor, closed at the end; None discards every line.
        patient: wait for the reader, and raise what the disk says; else drop and count lines that find no room, and
            keep trying: a service goes on.
        hurry: once set, patience ends: somebody asked to stop.

    Attributes:
        dropped: lines that were not written, for want of room; of the last one a part may have been.
        errors: lines that the disk refused.
    """

    def __init__(self, handle: int | None, patient: bool, hurry: threading.Event | None = None) -> None:
        self.dropped, self.errors = 0, 0
        self.error: OSError | None = None
        self._handle, self._patient = handle, patient
        self._hurry, self._over = hurry or threading.Event(), threading.Event()
        self._queue: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._run, name="lines", daemon=True)
        self._thread.start()

    def write(self, content: object) -> None:
        """Hand one line over.

        Raises:
            BrokenPipeError: the reader has gone.
            OSError: a patient writer's disk refused.
        """
        line, _ = line_of(content)
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
        """Write what waits, for at most 2 s where patience ends, and close. What is left then is dropped and counted.

        Raises:
            OSError: as `write`.
        """
        asked, ends = False, float("inf")
        # A thread that does not end soon after it was told to is held up by the system: a disk that hangs.
        while self._thread.is_alive() and time.monotonic() < ends + _STUCK_S:
            if not asked:
                with contextlib.suppress(queue.Full):
                    self._queue.put(None, timeout=0.1)
                    asked = True
            self._thread.join(0.1)
            if not self._waits():
                ends = min(ends, time.monotonic() + _DRAIN_S)
            if time.monotonic() >= ends:
                self._over.set()
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
        done, is_file = 0, stat.S_ISREG(os.fstat(handle).st_mode)
        most = len(line) if is_file else select.PIPE_BUF
        try:
            while done < len(line) and self._has_room(handle):
                with contextlib.suppress(BlockingIOError):  # Another process was faster to take the room.
                    done += os.write(handle, line[done : done + most])
        except OSError as error:
            self.errors += 1
            if self._patient or isinstance(error, BrokenPipeError):
                self.error = error
        else:
            self.dropped += done < len(line)
        if is_file and 0 < done < len(line):
            _take_back(handle, done)

    def _has_room(self, handle: int) -> bool:
        """Wait for the reader; False if patience ended before there was room."""
        room = select.poll()
        room.register(handle, select.POLLOUT)
        while not self._over.is_set():
            if room.poll(100):
                return True
        return False


def _take_back(handle: int, done: int) -> None:
    """No half lines: the begun one is removed."""
    with contextlib.suppress(OSError):
        end = os.lseek(handle, -done, os.SEEK_CUR)
        os.ftruncate(handle, min(end, os.fstat(handle).st_size))  # Logs are rotated by being emptied.


def open_output(path: Path, append: bool) -> int:
    """File descriptor of a file for lines, which no other run can write to before it is closed.

    Args:
        path: the file; folders above it are made.
        append: keep the lines that are there, and begin a new one; else the file is emptied.

    Raises:
        ArtifactError: another run writes it, a folder, a device, or the disk refuses.
    """
    require_file_path(path)
    with io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Always at the end, wherever that is after the file was emptied: logs are rotated so.
        handle = os.open(path, os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | (os.O_RDWR if append else os.O_WRONLY), 0o666)
        try:
            _require_free(lock(handle), path)
            if append:
                _end_line(handle)
            else:
                os.ftruncate(handle, 0)
        except BaseException:
            os.close(handle)
            raise
        return handle


def _require_free(free: bool, path: Path) -> None:
    if not free:
        raise ArtifactError(f"{path} is written by another run.", "Give another file, or end that run.")


def _end_line(handle: int) -> None:
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":  # The power was cut.
        with contextlib.suppress(OSError):
            os.write(handle, b"\n")


@contextlib.contextmanager
def new_lines(path: Path) -> Iterator[Callable[[object], None]]:
    """Takes lines for a file that appears when all are there.

    While it grows it has a hidden name beside `path`. Cut short, by an error or a signal, its whole lines stay as
    `path` with ".part" at the end, and what `path` held stays as it was. What a killed run left is removed.

    Raises:
        ArtifactError: another run writes it, a folder, a device, or the disk refuses.
    """
    require_file_path(path)
    place = Path(os.path.realpath(path))
    with io_errors(path):
        _require_free(not os.access(place, os.R_OK) or not is_locked(place), path)
    with replaced_file(path) as scratch:
        try:
            writer = LineWriter(os.open(scratch, os.O_WRONLY | os.O_CLOEXEC), patient=True)
            try:
                yield writer.write
            finally:
                writer.close()
            with scratch.open("rb") as file:  # Here, so that a disk that refuses costs no lines either.
                os.fsync(file.fileno())
        except BaseException:
            _keep_part(scratch, place)
            raise


def _keep_part(scratch: Path, place: Path) -> None:
    with signals_held(), contextlib.suppress(OSError):
        if scratch.stat().st_size:
            scratch.chmod(0o666 & ~umask())
            scratch.replace(place.with_name(f"{place.name}.part"))
