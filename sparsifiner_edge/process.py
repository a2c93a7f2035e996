"""Child processes: Python modules of this package, and other programs.

A child ends when the process that started it ends, for whatever reason. The kernel enforces this, so a child that hangs
in native code ends as well. Python children never import files of the working directory, send no telemetry and write no
core files.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import runpy
import select
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsifiner_edge.quiet import NO_TELEMETRY

_SOURCE = str(Path(__file__).resolve().parents[1])
_MOST_FILES = 4096
"""Maximum number of open files of a Python child."""
_LENGTH = struct.Struct("<I")
"""Prefix of a message: its length in bytes."""
_PR_SET_PDEATHSIG = 1
# Removes the working directory from the import path before anything that is not built in is imported: `-c` puts it
# first, and an empty entry of PYTHONPATH means it too. The source folder of this package comes last.
_BOOT = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; "
    "sys.path.append(sys.argv[3]) if sys.argv[3] not in sys.path else None; "
    "from sparsifiner_edge.process import _serve; _serve(sys.argv[1], int(sys.argv[2]))"
)
# Sets the parent-death signal (prctl 1, signal 9) and ends if the parent has already ended. Python ignores SIGPIPE and
# SIGXFSZ; without the reset, the program would ignore them too.
_BECOME = (
    "import ctypes, os, sys, _signal; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); "
    "[_signal.signal(n, _signal.SIG_DFL) for n in (_signal.SIGPIPE, _signal.SIGXFSZ)]; "
    "os.execv(sys.argv[2], sys.argv[2:])"
)


def start_python(module: str, environment: Mapping[str, str] | None = None, **pipes: Any) -> subprocess.Popen[bytes]:
    """Start `python -m module` in its own session: Ctrl-C reaches only the parent, which then ends it.

    Args:
        module: Module of this package.
        environment: Variables on top of this process's own.
        pipes: `stdin`, `stdout`, `stderr`, `cwd` of `subprocess.Popen`.

    Raises:
        OSError: The system refuses.
    """
    command = [sys.executable, "-c", _BOOT, module, str(os.getpid()), _SOURCE]
    return subprocess.Popen(command, env=_environment(environment), start_new_session=True, **pipes)


def start_program(command: Sequence[str], **pipes: Any) -> subprocess.Popen[bytes]:
    """Start a program that is not Python, in the session and folder of this process.

    Python starts first, without site packages, and execs the program, which inherits the parent-death signal. (Code
    between fork and exec, which `subprocess` offers, is not safe with threads.)

    Args:
        command: Program and arguments; no shell reads them.
        pipes: As for `start_python`, and `pass_fds`.

    Raises:
        OSError: The system refuses, or there is no such program.
    """
    program = shutil.which(command[0])
    if program is None:
        reason = errno.EACCES if Path(command[0]).exists() else errno.ENOENT
        raise OSError(reason, os.strerror(reason), command[0])  # Python picks the class by the reason.
    line = [sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), program, *command[1:]]
    return subprocess.Popen(line, env=_environment(None), **pipes)


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    variables = {**NO_TELEMETRY, **os.environ, **(more or {})}
    if "PYTHONPATH" in variables:  # Empty and relative entries would mean the working directory.
        variables["PYTHONPATH"] = os.pathsep.join(filter(os.path.isabs, variables["PYTHONPATH"].split(os.pathsep)))
    return variables


def _serve(module: str, parent: int) -> None:
    """Run the module in the new process."""
    end_with_parent(parent)
    limit_resource(resource.RLIMIT_CORE, 0)
    limit_resource(resource.RLIMIT_NOFILE, _MOST_FILES)
    sys.argv[:] = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def end_with_parent(parent: int) -> None:
    """Make the kernel end this process as soon as the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # The parent has already ended.
        os.kill(os.getpid(), signal.SIGKILL)


def limit_resource(kind: int, most: int) -> None:
    """Limit a resource (`resource.RLIMIT_...`) for this process and its children."""
    hard = resource.getrlimit(kind)[1]
    value = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (value, value))


class StalledError(Exception):
    """Nothing arrived within the time allowed."""


def write_message(handle: int, content: bytes) -> None:
    """Write one message to a pipe or socket; waits while the reader is busy.

    Raises:
        OSError: The other side is gone.
    """
    data = memoryview(_LENGTH.pack(len(content)) + content)
    while data:
        data = data[os.write(handle, data) :]


def read_message(handle: int, deadline: float | None, most: int) -> bytearray | None:
    """Read one message; None at the end of the stream.

    Args:
        handle: File descriptor.
        deadline: Time by `time.monotonic`; None waits without limit.
        most: Maximum size in bytes.

    Raises:
        StalledError: The message was not complete in time.
        ValueError: It is too long.
        OSError: The other side is gone.
    """
    prefix = _receive(handle, _LENGTH.size, deadline)
    if prefix is None:
        return None
    (length,) = _LENGTH.unpack(prefix)
    if length > most:
        raise ValueError(f"a message of {length} bytes")
    return _receive(handle, length, deadline)


def _receive(handle: int, count: int, deadline: float | None) -> bytearray | None:
    """Read `count` bytes; None at the end of the stream. See `read_message`."""
    data = bytearray(count)
    view, poll = memoryview(data), select.poll()
    poll.register(handle, select.POLLIN)
    while view:
        timeout_ms = None if deadline is None else 1000 * (deadline - time.monotonic())
        if (timeout_ms is not None and timeout_ms <= 0) or not poll.poll(timeout_ms):
            raise StalledError
        got = os.readv(handle, [view])
        if got == 0:
            return None
        view = view[got:]
    return data


@contextlib.contextmanager
def stopping() -> Iterator[threading.Event]:
    """Yield an event that the first SIGTERM or SIGINT sets; later signals act as before.

    Only the main thread receives signals: in another thread the event is never set.
    """
    requested = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}

    def stop(_number: int, _frame: object) -> None:
        requested.set()
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield requested
    finally:
        restore()
