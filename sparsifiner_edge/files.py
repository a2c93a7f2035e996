"""Files and folders that are written completely or not at all."""

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

# Constants of renameat2(2) on Linux.
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
    """Turn disk errors in the block into an `ArtifactError` about `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, shutil.Error):  # From `copytree`: a list of (source, target, reason).
            reason = str(error.args[0][0][2]).rpartition("] ")[2].partition(": ")[0]
        raise ArtifactError(f"{path} cannot be written: {reason}.", "Free space or choose another place.") from error


@contextlib.contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Fill a temporary folder that replaces `target` on success and is removed on failure.

    Leftovers of a killed process are removed.

    Raises:
        ArtifactError: Writing fails.
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
    """Fill a temporary file that replaces `target` on success and is removed on failure.

    Args:
        target: Name of the file; if it is a link, the file that it names is replaced.

    Raises:
        ArtifactError: `target` is a folder or a device, or writing fails.
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
    """Make a temporary folder that is removed afterwards, together with leftovers of killed processes."""
    place = Path(tempfile.gettempdir()) / f"sparsifiner-edge-{os.getuid()}"
    with contextlib.ExitStack() as stack:
        with io_errors(place):
            scratch = stack.enter_context(scratch_beside(place, folder=True))
        yield scratch


@contextlib.contextmanager
def scratch_beside(target: Path, folder: bool) -> Iterator[Path]:
    """Make a locked temporary file or folder next to `target`; it is removed after the block.

    Raises:
        OSError: Writing fails.
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
    """Make a file or folder `.NAME.{8 hex digits}.tmp` next to `target`, and remove those of dead processes.

    Returns:
        A file descriptor that holds a lock until it is closed, and the path.
    """
    _remove_dead(target)
    while True:
        path = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
        if folder:
            path.mkdir(mode=0o700)
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        else:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if lock(handle) and path.exists():  # Otherwise another process removed it as a leftover.
            return handle, path
        os.close(handle)


def lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed, however this process ends.

    Args:
        handle: File descriptor.
        wait: Wait until the present holder releases it.

    Returns:
        True if this process holds the lock. A file system without locks always gives True.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _remove_dead(target: Path) -> None:
    """Remove temporary files of `target` whose process, and with it the lock, has ended."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):
        for path in target.parent.iterdir():
            with contextlib.suppress(OSError):  # Another user's, in a folder that everyone may write to.
                if name.fullmatch(path.name) and path.lstat().st_uid == os.getuid() and not is_locked(path):
                    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _swap(scratch: Path, target: Path) -> None:
    """Put the new file or folder in the place of the old, atomically if the system can.

    `scratch` then holds the old one.
    """
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


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths atomically and return True; False on file systems without renameat2 (Linux 3.15)."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def umask() -> int:
    """Return this process's permission mask for new files."""
    current = os.umask(0)
    os.umask(current)
    return current


def sync(path: Path) -> None:
    """Flush a file's content to disk before its name points to it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def require_file_path(path: Path) -> None:
    """Refuse an output file that is a folder, a device or a circular link.

    Raises:
        ArtifactError: It is one of these.
    """
    with io_errors(path), contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise ArtifactError(f"{path} is a folder or a device.", "Give a file's name.")


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading. Opening a pipe would block, and a device may have no end.

    Args:
        path: The file, or a link to it.

    Raises:
        ArtifactError: The file is missing or not a regular file, or reading fails, also during the block.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ArtifactError(f"{path} is not a regular file.", "Do not use it.")
            yield file
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist.", "Check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte.
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path} cannot be read: {reason}.", "Check the path.") from error


def read_bytes(path: Path, most: int) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The file, or a link to it.
        most: Maximum size in bytes.

    Raises:
        ArtifactError: The file cannot be opened (see `open_regular`) or is larger.
    """
    with open_regular(path) as file:
        # Python allocates the requested size at once, so never request the limit itself.
        content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
        while len(content) <= most and (more := file.read(1 << 20)):
            content += more
    if len(content) > most:
        raise ArtifactError(f"{path} has more than {most} bytes.", "Do not use it.")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all. Bytes that are not UTF-8 become backslash escapes.

    Raises:
        ArtifactError: `path` is a folder or a device, or the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file completely or not at all.

    Raises:
        ArtifactError: `path` is a folder or a device, or the file cannot be written.
    """
    with replace_file(path) as scratch:
        scratch.write_bytes(content)


@contextlib.contextmanager
def hold_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock on a file or folder during the block; yields False if another process holds it."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield lock(handle, wait)
    finally:
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Return True if a live process holds a lock on a file or folder."""
    if path.is_symlink():  # Possibly another user's: only files and folders are locked.
        return False
    with contextlib.suppress(FileNotFoundError), hold_lock(path, wait=False) as ours:
        return not ours
    return False
