"""What a decoding process that was taken over would try; run by test_confined.py in a process of its own.

Standard input: JSON with `folder` (where everybody may write), `other` and `port` (of TCP servers on 127.0.0.1),
`user` (an ordinary one, to become before), `layers` (of the confinement: `landlock`, which is "all", a version or none,
and `filter`; without: the same tries, unconfined). Standard output: JSON, what each try came to, "done" or the error's
name. The last try is to become another program.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from sparsifiner_edge.camera import confine, syscalls

LIBC = ctypes.CDLL(None, use_errno=True)
MARK = ctypes.create_string_buffer(b"untouched")
"""At this address in the parent, too."""
FAST_OPEN, ANOTHERS_FILE = 0x20000000, "/etc/shadow"


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


class Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def write_into(pid: int) -> None:
    text = ctypes.create_string_buffer(b"TAKEN")
    ours, theirs = (Vector(ctypes.addressof(place), 5) for place in (text, MARK))
    checked(LIBC.process_vm_writev(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0))


def write_through_proc(pid: int) -> None:
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:  # noqa: PTH123
        memory.seek(ctypes.addressof(MARK))
        memory.write(b"TAKEN")


def fork() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def signal_through_descriptor(pid: int) -> None:
    import fcntl

    ours, _theirs = os.pipe()
    fcntl.fcntl(ours, fcntl.F_SETOWN, pid)


def send_unasked(port: int) -> None:
    with socket.socket() as one:
        one.sendto(b"x", FAST_OPEN, ("127.0.0.1", port))


def connect(port: int, protocol: int = 0) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol) as one:
        one.settimeout(5)
        one.connect(("127.0.0.1", port))


def bind() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))


def close_new(family: int, kind: int) -> None:
    socket.socket(family, kind).close()


def tries(folder: Path, parent: int, other: int, port: int) -> dict[str, Callable[[], Any]]:
    def call(number: int, *arguments: Any) -> Callable[[], int]:
        return lambda: checked(LIBC.syscall(number, *arguments))

    return {
        "create": lambda: (folder / "new").write_text(""),
        "append": lambda: open(folder / "open", "a").close(),  # noqa: PTH123
        "truncate": lambda: os.truncate(folder / "open", 0),
        "change mode": lambda: (folder / "own").chmod(0o777),
        "delete": (folder / "deleted").unlink,
        "rename": lambda: (folder / "renamed").rename(folder / "elsewhere"),
        "link": lambda: os.link(folder / "open", folder / "link"),
        "symbolic link": lambda: (folder / "symbolic").symlink_to("open"),
        "make a folder": (folder / "made").mkdir,
        "make a pipe": lambda: os.mkfifo(folder / "fifo"),
        "list a folder": lambda: os.listdir(folder),  # noqa: PTH208
        "read a file": (folder / "open").read_bytes,
        "read what is root's": lambda: Path(ANOTHERS_FILE).read_bytes(),
        "read the user's own": (folder / "own").read_bytes,
        "change the folder": lambda: os.chdir(folder),
        "fork": fork,
        "spawn": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
        "signal": lambda: os.kill(parent, signal.SIGURG),
        "signal a thread": call(syscalls._number("tgkill 234 131", COLUMN) or 0, parent, parent, int(signal.SIGURG)),
        "signal by descriptor": lambda: signal_through_descriptor(parent),
        "write its memory": lambda: write_into(parent),
        "write its memory by file": lambda: write_through_proc(parent),
        "trace": lambda: checked(LIBC.ptrace(0x4206, parent, None, None)),
        "limit it": lambda: resource.prlimit(parent, resource.RLIMIT_CPU, (1000, 1000)),
        "slow it": lambda: os.setpriority(os.PRIO_PROCESS, parent, 19),
        "move it": lambda: os.sched_setaffinity(parent, os.sched_getaffinity(0)),
        "outlive it": lambda: checked(LIBC.prctl(1, 0, 0, 0, 0)),
        "be read": lambda: checked(LIBC.prctl(4, 1, 0, 0, 0)),
        "bind": bind,
        "connect": lambda: connect(other),
        "connect by data": lambda: send_unasked(other),
        "connect by another protocol": lambda: connect(other, 262),  # MPTCP
        "datagrams": lambda: close_new(socket.AF_INET, socket.SOCK_DGRAM),
        "local sockets": lambda: close_new(socket.AF_UNIX, socket.SOCK_STREAM),
        "kernel sockets": lambda: close_new(socket.AF_NETLINK, socket.SOCK_RAW),
        "shared memory": call(syscalls._number("shmget 29 194", COLUMN) or 0, 0, 4096, 0o1600),
        "keys": call(syscalls._number("keyctl 250 219", COLUMN) or 0, 0, -3, 0),
        "io_uring": call(425, 1, ctypes.create_string_buffer(120)),
        "become root": lambda: os.setuid(0),
        "its one port": lambda: connect(port),
        "new namespaces": call(syscalls._number("unshare 272 97", COLUMN) or 0, 0x10000000),
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
    LIBC.prctl(4, 1, 0, 0, 0)  # Readable by its own user again, as a process that was started by one.


def main() -> None:
    asked = json.loads(sys.stdin.read())
    folder, layers = Path(asked["folder"]), asked["layers"]
    signal.signal(signal.SIGURG, lambda *_: None)
    if asked["user"] is not None:
        become(asked["user"])
    for name in ("own", "deleted", "renamed"):
        (folder / name).write_text("")
    (folder / "own").chmod(0o600)
    parent = os.getpid()
    if os.fork():
        os.wait()
        print(json.dumps({"mark": MARK.value.decode()}), flush=True)
        return
    found: dict[str, Any] = {}
    if layers:
        if layers["landlock"] != "all":
            confine._landlock_version = lambda: layers["landlock"]
        if not layers["filter"]:
            confine.filter_works = lambda: False
        found["confinement"] = to_builtins(confine.confine(parent, asked["port"]))
    found["user"] = os.getuid()
    found["tries"] = {
        name: outcome(attempt) for name, attempt in tries(folder, parent, asked["other"], asked["port"]).items()
    }
    print(json.dumps(found), flush=True)
    with contextlib.suppress(OSError):
        os.execv("/bin/echo", ["echo", '"another program"'])
    os._exit(0)


COLUMN = syscalls._MACHINES[os.uname().machine][1]
if __name__ == "__main__":
    main()
