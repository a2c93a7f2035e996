"""Files and folders, written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sparsifiner_edge.errors import ArtifactError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
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
    """Errors of the disk in the block become an `ArtifactError` about `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"{path} cannot be written: {reason}.", "Free space or choose another place.") from error


@contextlib.contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `target`; on success it takes the place of `target`, on any failure it is removed.

    What a killed process left of an earlier try is removed.

    Raises:
        ArtifactError: the disk refuses.
    """
    with io_errors(target), scratch_beside(target, folder=True) as scratch:
        scratch.chmod(0o777 & ~umask())
        yield scratch
        for path in scratch.rglob("*"):
            if path.is_file():
                sync(path)
        with hold_signals():
            _swap(scratch, target)


@contextlib.contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """Fill a temporary file beside `target`; on success it takes the place of `target`, on any failure it is removed.

    Args:
        target: a file's name; of a link, the file that it names is replaced.

    Raises:
        ArtifactError: `target` is a folder or a device, or the disk refuses.
    """
    require_file_path(target)
    place = Path(os.path.realpath(target))
    with io_errors(target), scratch_beside(place, folder=False) as scratch:
        yield scratch
        sync(scratch)
        scratch.chmod(0o666 & ~umask())
        with hold_signals():
            scratch.replace(place)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in the system's place for temporary files; it is removed, as is what killed processes left."""
    place = Path(tempfile.gettempdir()) / f"sparsifiner-edge-{os.getuid()}"
    with contextlib.ExitStack() as stack:
        with io_errors(place):
            scratch = stack.enter_context(scratch_beside(place, folder=True))
        yield scratch


@contextlib.contextmanager
def scratch_beside(target: Path, folder: bool) -> Iterator[Path]:
    """A new file or folder beside `target`, locked as long as this process works on it, gone afterwards.

    Raises:
        OSError: the disk refuses.
    """
    with contextlib.ExitStack() as stack:
        target.parent.mkdir(parents=True, exist_ok=True)
        with hold_signals():
            handle, scratch = _new_scratch(target, folder)
            stack.callback(_remove_scratch, handle, scratch)
        yield scratch


def _remove_scratch(handle: int, scratch: Path) -> None:
    with hold_signals():
        _remove(scratch)
        os.close(handle)


def _new_scratch(target: Path, folder: bool) -> tuple[int, Path]:
    """A new file or folder `.NAME.{8 hex digits}.tmp` beside `target`; those that dead processes left are removed.

    Returns:
        A file descriptor, which holds a lock until it is closed; and the path.
    """
    _remove_dead(target)
    while True:
        path = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
        if folder:
            path.mkdir(mode=0o700)
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        else:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if lock(handle) and path.exists():  # Else another process took it for a leftover, in between.
            return handle, path
        os.close(handle)


def lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed, by whatever way this process ends.

    Args:
        handle: its descriptor. wait: until its present holder releases it.

    Returns:
        Whether it is ours now. A disk without locks gives every one.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _remove_dead(target: Path) -> None:
    """Remove scratch files of `target` whose process has ended: its lock has ended with it."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):
        for path in target.parent.iterdir():
            with contextlib.suppress(OSError):  # Somebody else's, in a folder that all may write.
                if name.fullmatch(path.name) and path.lstat().st_uid == os.getuid() and not is_locked(path):
                    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _swap(scratch: Path, target: Path) -> None:
    """The new takes the place of the old, at one moment where the system can; `scratch` then holds the old."""
    if not target.exists():
        scratch.rename(target)
    elif not _exchange(scratch, target):
        old = scratch.with_name(f"{scratch.name[:-4]}.old")
        target.rename(old)
        try:
            scratch.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Whether the two have changed places; not every file system can (renameat2, Linux 3.15)."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def umask() -> int:
    """This process's mask of permissions for new files."""
    current = os.umask(0)
    os.umask(current)
    return current


def sync(path: Path) -> None:
    """Have the disk hold a file's content before its name says so."""
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


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading: opening a pipe would block, and a device may have no end.

    Args:
        path: the file, or a link to it.

    Raises:
        ArtifactError: missing, not a regular file, or the disk refuses, then or in the block.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ArtifactError(f"{path} is not a regular file.", "Do not use it.")
            yield file
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist.", "Check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a zero in it.
        said = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path} cannot be read: {said}.", "Check the path.") from error


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file.

    Args:
        path: the file, or a link to it.
        most: bytes that it may have.

    Raises:
        ArtifactError: see `open_regular`; or it is larger.
    """
    with open_regular(path) as file:
        # Python allocates as much as it is asked to read, so the limit itself is never asked for.
        content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
        while len(content) <= most and (more := file.read(1 << 20)):
            content += more
    if len(content) > most:
        raise ArtifactError(f"{path} has more than {most} bytes.", "Do not use it.")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; bytes in names that are no UTF-8 become backslash escapes.

    Raises:
        ArtifactError: `path` is a folder or a device, or the disk refuses.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        ArtifactError: `path` is a folder or a device, or the disk refuses.
    """
    with replace_file(path) as scratch:
        scratch.write_bytes(content)


@contextlib.contextmanager
def hold_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """One process at a time: whether the file or folder is ours. The lock ends with the process."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield lock(handle, wait)
    finally:
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether a process that locked a file or folder still lives."""
    if path.is_symlink():  # Somebody else's: what we lock is a file or a folder.
        return False
    with contextlib.suppress(FileNotFoundError), hold_lock(path, wait=False) as ours:
        return not ours
    return False
