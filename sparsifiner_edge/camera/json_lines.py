"""JSON lines to where a reader may be slow, a disk full, or a pipe closed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import select
import stat
import struct
import termios
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
_MOST_PIPE = 1 << 20
"""Bytes that a pipe may be widened to by anyone, unless the system is set up otherwise."""


def line_of(content: object) -> tuple[bytes, int]:
    """A record, or what is ready for JSON, as a JSON line with its line break; how many numbers were not finite.

    Those are null, and counted in the line as `not_finite`. Hidden characters are escaped.
    """
    known, count = finite(write_record(content))
    if count:
        known["not_finite"] = count
    return dump_json(known, indent=None).encode(), count


class LineWriter:
    """Writes lines from a thread of its own, whole or not at all.

    No line is begun before there is room for all of it, wherever the system can tell (files, and pipes up to 1 MiB a
    line). Whether the descriptor blocks, which all its holders have in common, makes no difference.

    Args:
        handle: a file descriptor, closed at the end; None discards every line.
        patient: wait for the reader, and raise what the disk says; else drop and count lines that find no room, and
            keep trying: a service goes on.
        hurry: once set, patience ends: somebody asked to stop.

    Attributes:
        dropped: lines that were not written, for want of room.
        errors: lines that the disk refused.
        cut: the last line has no end: it was too long for its pipe, or went to a socket or terminal, and the reader
            took no more before patience ended.
    """

    def __init__(self, handle: int | None, patient: bool, hurry: threading.Event | None = None) -> None:
        self.dropped, self.errors, self.cut = 0, 0, False
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
        done = 0
        try:
            while done < len(line) and (room := self._room(handle, len(line) - done)):
                done += _write_now(handle, line[done : done + room])
        except OSError as error:
            self.errors += 1
            if self._patient or isinstance(error, BrokenPipeError):
                self.error = error
        else:
            self.dropped += done < len(line)
        if 0 < done < len(line):
            self._take_back(handle, done)

    def _room(self, handle: int, wanted: int) -> int:
        """Wait for the reader; bytes that can be written at once, 0 if patience ended before there was room."""
        pause = 0.0005
        while not self._over.is_set():
            room = _room_now(handle, wanted)
            if room:
                return room
            self._over.wait(pause)
            pause = min(2 * pause, 0.05)
        return 0

    def _take_back(self, handle: int, done: int) -> None:
        """No half lines, where that can be: the begun one is removed."""
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            self.cut = True
            return
        with contextlib.suppress(OSError):
            end = os.lseek(handle, -done, os.SEEK_CUR)
            os.ftruncate(handle, min(end, os.fstat(handle).st_size))  # Logs are rotated by being emptied.


def _write_now(handle: int, data: bytes) -> int:
    """Bytes written; 0 where another process was faster to take the room."""
    try:
        return os.write(handle, data)
    except BlockingIOError:
        time.sleep(0.001)
        return 0


def _room_now(handle: int, wanted: int) -> int:
    """How many of so many bytes can be written without being held up, after a look of at most 0.1 s."""
    kind = os.fstat(handle).st_mode
    if stat.S_ISREG(kind):
        return wanted
    ready = select.poll()
    ready.register(handle, select.POLLOUT)
    events = ready.poll(100)
    if not events:
        return 0
    if events[0][1] != select.POLLOUT or wanted <= select.PIPE_BUF:  # Else: who read has left; writing tells.
        return wanted
    if not stat.S_ISFIFO(kind):
        return select.PIPE_BUF
    # A pipe with something in it may hold little more, since parts of its pages lie idle; empty, it holds its size.
    return 0 if _unread(handle) else min(wanted, _widened(handle, wanted))


def _unread(handle: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(handle, termios.FIONREAD, bytes(4)))[0])


def _widened(handle: int, wanted: int) -> int:
    """Bytes that a pipe holds, after it was widened for so many where that is allowed."""
    size = fcntl.fcntl(handle, fcntl.F_GETPIPE_SZ)
    if size < wanted:
        with contextlib.suppress(OSError):
            size = fcntl.fcntl(handle, fcntl.F_SETPIPE_SZ, min(wanted, _MOST_PIPE))
    return size


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
            _claim(handle, path)
            if append:
                _end_line(handle)
            else:
                os.ftruncate(handle, 0)
        except BaseException:
            os.close(handle)
            raise
        return handle


def _claim(handle: int, path: Path) -> None:
    if not lock(handle):
        raise _busy(path)


def _busy(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} is written by another run.", "Give another file, or end that run.")


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
        if os.access(place, os.R_OK) and is_locked(place):
            raise _busy(path)
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
