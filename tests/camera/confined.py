"""Attempts of a compromised decoding process; test_confined.py runs this program in a separate process.

Standard input: JSON with `folder` (writable by everybody), `other` and `port` (of TCP servers on 127.0.0.1), `user` (an
ordinary user to switch to first), `landlock` (a version, null for all, 0 for none: the same attempts, unconfined).
Standard output: JSON with the outcome of each attempt, "done" or the name of the error. The last attempt is to execute
another program.
"""

from __future__ import annotations

import contextlib
import ctypes
import encodings.idna  # noqa: F401 (for host names: once confined, nothing is imported)
import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsifiner_edge.camera import confine

LIBC = ctypes.CDLL(None, use_errno=True)
MARK = ctypes.create_string_buffer(b"untouched")
"""Has the same address in the parent."""


def write_through_proc(pid: int) -> None:
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:  # noqa: PTH123
        memory.seek(ctypes.addressof(MARK))
        memory.write(b"TAKEN")


def trace(pid: int) -> None:
    if LIBC.ptrace(0x4206, pid, None, None) < 0:
        raise OSError(ctypes.get_errno(), "")


def tries(folder: Path, parent: int, other: int, port: int) -> dict[str, Callable[[], Any]]:
    return {
        "create": lambda: (folder / "new").write_text(""),
        "truncate": lambda: os.truncate(folder / "open", 0),
        "delete": (folder / "deleted").unlink,
        "rename": lambda: (folder / "renamed").rename(folder / "elsewhere"),
        "make a folder": (folder / "made").mkdir,
        "list a folder": lambda: os.listdir(folder),  # noqa: PTH208
        "read a file": (folder / "open").read_bytes,
        "read what is root's": lambda: Path("/etc/shadow").read_bytes(),
        "read the user's own": (folder / "own").read_bytes,
        "spawn": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
        "signal": lambda: os.kill(parent, signal.SIGURG),
        "write its memory": lambda: write_through_proc(parent),
        "trace": lambda: trace(parent),
        "bind": lambda: socket.create_server(("127.0.0.1", 0)),
        "connect": lambda: socket.create_connection(("127.0.0.1", other), 5),
        "become root": lambda: os.setuid(0),
        "its one port": lambda: socket.create_connection(("127.0.0.1", port), 5),
        "look up a host": lambda: Path("/etc/hosts").read_bytes(),
    }


def outcome(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "done"


def become(user: int) -> None:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    LIBC.prctl(4, 1, 0, 0, 0)  # Readable by its own user again, as if that user had started it.


def main() -> None:
    request = json.loads(sys.stdin.read())
    folder, landlock = Path(request["folder"]), request["landlock"]
    signal.signal(signal.SIGURG, lambda *_: None)
    if request["user"] is not None:
        become(request["user"])
    for name in ("own", "deleted", "renamed"):
        (folder / name).write_text("")
    (folder / "own").chmod(0o600)
    parent = os.getpid()
    if os.fork():
        os.wait()
        print(json.dumps({"mark": MARK.value.decode()}), flush=True)
        return
    if landlock:
        confine._landlock_version = lambda: landlock
    if landlock != 0:
        confine.confine(parent, request["port"])
    results = {name: outcome(a) for name, a in tries(folder, parent, request["other"], request["port"]).items()}
    print(json.dumps({"user": os.getuid(), "tries": results}), flush=True)
    with contextlib.suppress(OSError):
        os.execv("/bin/echo", ["echo", '"another program"'])
    os._exit(0)


if __name__ == "__main__":
    main()
