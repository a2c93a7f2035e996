"""Files and folders, written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from sparsifiner_edge.errors import ArtifactError


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Deliver SIGINT, SIGTERM and SIGHUP after the block, so that a swap of two folders is never cut in half."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    previous = {
        s: signal.signal(s, lambda number, _frame: held.append(number))
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(s) not in (signal.SIG_IGN, None)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for arrived in held:
        signal.raise_signal(arrived)


@contextlib.contextmanager
def io_errors(path: Path) -> Iterator[None]:
    """What the disk refuses in the block becomes an `ArtifactError` about `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"{path} cannot be written: {reason}.", "Free space or choose another place.") from error


@contextlib.contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `target`; on success it takes the place of `target`, on any failure it vanishes.

    Raises:
        ArtifactError: the disk refuses.
    """
    scratch: Path | None = None
    try:
        with io_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with signals_held():
                scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            scratch.chmod(0o777 & ~_umask())
            yield scratch
            _sync(scratch)
            with signals_held():
                _swap(scratch, target)
    finally:
        with signals_held():
            if scratch is not None:
                shutil.rmtree(scratch, ignore_errors=True)


def _swap(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        target.rename(old / "old")
        try:
            scratch.rename(target)
        except OSError:
            (old / "old").rename(target)
            raise
    except OSError:
        with contextlib.suppress(OSError):  # Only when empty: were the way back refused too, it holds the earlier one.
            old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def require_file_path(path: Path) -> None:
    """Refuse an output file that is a folder, a device or a link in a circle.

    Raises:
        ArtifactError: it is.
    """
    with io_errors(path), contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise ArtifactError(f"{path} is a folder or a device.", "Give a file's name.")


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a plain file: a pipe would be waited for, a device may have no end.

    Args:
        path: the file, or a link to it.
        most: bytes that it may have.

    Raises:
        ArtifactError: missing, no plain file, larger, or the disk refuses.
    """
    try:
        with open(path, "rb", opener=_open_now) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ArtifactError(f"{path} is no plain file.", "Do not use it.")
            content = file.read(most + 1)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist.", "Check the path.") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    if len(content) > most:
        raise ArtifactError(f"{path} has more than {most} bytes.", "Do not use it.")
    return content


def _open_now(path: str, flags: int) -> int:
    """Without waiting for who would write into a pipe."""
    return os.open(path, flags | os.O_NONBLOCK)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; bytes in names that are no UTF-8 become backslash escapes.

    Raises:
        ArtifactError: `path` is a folder or a device, or the disk refuses.
    """
    require_file_path(path)
    with io_errors(path), signals_held():
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time; no file is left, and the lock ends with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_locked(folder: Path) -> bool:
    """Whether a process that locked a folder still lives."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
