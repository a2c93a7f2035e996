"""Takes from the decoding process all that it does not need, before it reads anything that a stranger sent.

Limits, and whatever the system offers of: a user of its own (where started as root) and Landlock, which refuses files,
programs and connections by TCP. Which system calls there are is for the unit of systemd to say (`runtime/systemd/`): a
table of them by hand ages.

Landlock is used by its three system calls: no library on PyPI is both kept and able to restrict ports of this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import struct
import sys
from pathlib import Path

import msgspec

from sparsifiner_edge.process import end_with_parent, limit_resource

MEMORY_BYTES = 6 << 30
_LIBC = ctypes.CDLL(None, use_errno=True)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""On every architecture."""
_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All rights on files that a version of Landlock knows, by the first that does."""
_READ, _BIND_AND_CONNECT, _CONNECT, _SOCKETS_AND_SIGNALS = 4, 3, 2, 3
_PORTS_SINCE, _SCOPES_SINCE, _RULE_PATH, _RULE_PORT = 4, 6, 1, 2
_SET_DUMPABLE, _SET_NO_NEW_PRIVS = 4, 38
_NAMES = ("hosts", "resolv.conf", "nsswitch.conf", "host.conf", "gai.conf")
"""Of /etc: what is read to find a host's address."""
_USERS = range(61184, 65520)
"""Set aside for users that no file belongs to (systemd's DynamicUser)."""
_CAPABILITIES = 1 << 5 | 1 << 6 | 1 << 7
"""To end processes of another user, which whoever started this one needs then, and to become one."""


class Confinement(msgspec.Struct, frozen=True):
    """What a machine offers to confine a decoding process: a user of its own, Landlock's version or None; and a
    sentence for each that is missing.
    """

    separate_user: bool
    landlock: int | None
    missing: list[str]


def confine(parent: int, port: int | None = None) -> None:
    """Confine this process for good. What it needs is open and imported; it has no other thread yet.

    Args:
        parent: its parent, with which it ends.
        port: of TCP, the only one that it may connect to, also by the name of a host; None: to none.

    Raises:
        OSError: the kernel offers something and then refuses it.
    """
    limit_resource(resource.RLIMIT_FSIZE, 0)  # It writes no file; pipes are none.
    limit_resource(resource.RLIMIT_AS, MEMORY_BYTES)
    offered = confinement()
    if offered.separate_user:
        user = _USERS[os.getpid() % len(_USERS)]
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if sys.platform == "linux":
        for option, value in ((_SET_DUMPABLE, 0), (_SET_NO_NEW_PRIVS, 1)):
            _check(_LIBC.prctl(option, value, 0, 0, 0))
    end_with_parent(parent)  # Another user's process forgets that.
    if offered.landlock is not None:
        _restrict(offered.landlock, port)


def confinement() -> Confinement:
    """What this machine offers to confine a decoding process that this user starts; nothing is changed."""
    separate_user, landlock, missing = _may_change_user(), _landlock_version(), []
    if not separate_user:
        missing.append("No user of its own: that takes root, with CAP_KILL, CAP_SETGID and CAP_SETUID.")
    if landlock is None:
        missing.append("No Landlock: this kernel lacks it, or has it switched off (lsm=landlock,...).")
    elif landlock < _PORTS_SINCE:
        missing.append(f"Landlock {landlock} limits no TCP ports; 4, of Linux 6.7, does.")
    return Confinement(separate_user, landlock, missing)


def _check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"it cannot be confined: {os.strerror(ctypes.get_errno())}")
    return result


def _may_change_user() -> bool:
    """Root, with what that takes, and where such users exist: a container may know only some."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    held = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    with contextlib.suppress(FileNotFoundError):  # A kernel without namespaces of users has all of them.
        for table in ("uid_map", "gid_map"):
            rows = (map(int, row.split()) for row in Path("/proc/self", table).read_text(encoding="utf-8").splitlines())
            if not any(first <= _USERS.start < _USERS.stop <= first + count for first, _, count in rows):
                return False
    return held is not None and int(held[1], 16) & _CAPABILITIES == _CAPABILITIES


def _landlock_version() -> int | None:
    if sys.platform != "linux":
        return None
    version = _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    return version if version > 0 else None


def _restrict(version: int, port: int | None) -> None:
    """Nothing on any file; of ports only one, with the files that hosts are looked up in; no signal or abstract socket
    beyond this process: as far as the version knows.
    """
    files = _FILES[max(first for first in _FILES if first <= version)]
    ports = _BIND_AND_CONNECT if version >= _PORTS_SINCE else 0
    scopes = _SOCKETS_AND_SIGNALS if version >= _SCOPES_SINCE else 0
    rights = struct.pack("=QQQ", files, ports, scopes)
    rules = _check(_LIBC.syscall(_CREATE_RULESET, rights, ctypes.c_size_t(len(rights)), 0))
    try:
        if port is not None:
            _allow_names(rules)
        if port is not None and ports:
            _check(_LIBC.syscall(_ADD_RULE, rules, _RULE_PORT, struct.pack("=QQ", _CONNECT, port), 0))
        _check(_LIBC.syscall(_RESTRICT_SELF, rules, 0))
    finally:
        os.close(rules)


def _allow_names(rules: int) -> None:
    for name in _NAMES:
        with contextlib.suppress(FileNotFoundError):
            file = os.open(f"/etc/{name}", os.O_PATH | os.O_CLOEXEC)
            try:
                _check(_LIBC.syscall(_ADD_RULE, rules, _RULE_PATH, struct.pack("=Qi", _READ, file), 0))
            finally:
                os.close(file)
