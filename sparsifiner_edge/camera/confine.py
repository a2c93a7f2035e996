"""Confinement of the decoding process, which takes effect before the process reads untrusted input.

It sets resource limits, changes to a separate user (if started as root), and uses Landlock, as far as the system offers
them. Landlock denies access to files, programs and TCP connections. System calls are filtered by the systemd unit
(`runtime/systemd/`), because a table maintained here would become outdated.

Landlock is used through its three system calls: no library on PyPI is both maintained and able to restrict the ports of
the calling process.
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
"""Limit of the address space of the decoding process. Decoders map far more memory than they use."""
_LIBC = ctypes.CDLL(None, use_errno=True)

# System calls of Landlock: the same numbers on every architecture.
_CREATE_RULESET = 444
_ADD_RULE = 445
_RESTRICT_SELF = 446

# Constants of <linux/landlock.h>.
_READ = 4
"""LANDLOCK_ACCESS_FS_READ_FILE."""
_CONNECT = 2
"""LANDLOCK_ACCESS_NET_CONNECT_TCP."""
_BIND_AND_CONNECT = 3
"""LANDLOCK_ACCESS_NET_BIND_TCP and LANDLOCK_ACCESS_NET_CONNECT_TCP."""
_SOCKETS_AND_SIGNALS = 3
"""LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and LANDLOCK_SCOPE_SIGNAL."""
_RULE_PATH = 1
"""LANDLOCK_RULE_PATH_BENEATH."""
_RULE_PORT = 2
"""LANDLOCK_RULE_NET_PORT."""
_PORTS_SINCE = 4
"""First version of Landlock that restricts TCP ports."""
_SCOPES_SINCE = 6
"""First version of Landlock that restricts signals and abstract sockets."""
_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All access rights to files, by the version of Landlock that introduced the set."""

_SET_DUMPABLE = 4
"""PR_SET_DUMPABLE of prctl."""
_SET_NO_NEW_PRIVS = 38
"""PR_SET_NO_NEW_PRIVS of prctl."""
_NAMES = ("hosts", "resolv.conf", "nsswitch.conf", "host.conf", "gai.conf")
"""Files in /etc that name resolution reads."""
_USERS = range(61184, 65520)
"""User IDs that own no files: the range that systemd reserves for DynamicUser."""
_CAPABILITIES = 1 << 5 | 1 << 6 | 1 << 7
"""CAP_KILL, CAP_SETGID and CAP_SETUID: to become another user, and to end the processes of that user."""


class Confinement(msgspec.Struct, frozen=True):
    """Means that a machine offers to confine a decoding process.

    Attributes:
        separate_user: True if the process can run as a user of its own.
        landlock: Version of Landlock, or None.
        missing: One sentence for each missing means.
    """

    separate_user: bool
    landlock: int | None
    missing: list[str]


def confine(parent: int, port: int | None = None) -> None:
    """Confine this process for good.

    It must have a single thread, and must have imported and opened everything that it needs.

    Args:
        parent: Process ID of the parent; this process ends with it.
        port: The only TCP port that the process may connect to, including by host name; None for no connections.

    Raises:
        OSError: The kernel offers a restriction but refuses to apply it.
    """
    limit_resource(resource.RLIMIT_FSIZE, 0)  # It writes no files. The limit does not apply to pipes.
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
    end_with_parent(parent)  # Again, because the kernel clears this setting when the user changes.
    if offered.landlock is not None:
        _restrict(offered.landlock, port)


def confinement() -> Confinement:
    """Return the means that this machine offers to confine a decoding process of the current user. Changes nothing."""
    separate_user, landlock, missing = _may_change_user(), _landlock_version(), []
    if not separate_user:
        missing.append("No separate user: this requires root with CAP_KILL, CAP_SETGID and CAP_SETUID.")
    if landlock is None:
        missing.append("No Landlock: this kernel lacks it, or it is disabled (enable it with lsm=landlock,...).")
    elif landlock < _PORTS_SINCE:
        missing.append(f"Landlock {landlock} cannot restrict TCP ports; version 4 (Linux 6.7) can.")
    return Confinement(separate_user, landlock, missing)


def _check(result: int) -> int:
    """Return the result of a system call; raise OSError if it failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"the decoder cannot be confined: {os.strerror(ctypes.get_errno())}")
    return result


def _may_change_user() -> bool:
    """Return True if this is root with the needed capabilities, and the user IDs exist (containers map only some)."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    held = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    with contextlib.suppress(FileNotFoundError):  # Without user namespaces in the kernel all users exist.
        for table in ("uid_map", "gid_map"):
            rows = (map(int, row.split()) for row in Path("/proc/self", table).read_text(encoding="utf-8").splitlines())
            if not any(first <= _USERS.start < _USERS.stop <= first + count for first, _, count in rows):
                return False
    return held is not None and int(held[1], 16) & _CAPABILITIES == _CAPABILITIES


def _landlock_version() -> int | None:
    """Return the version of Landlock that the kernel offers, or None."""
    if sys.platform != "linux":
        return None
    version = _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    return version if version > 0 else None


def _restrict(version: int, port: int | None) -> None:
    """Deny access to files, to all TCP ports but one, and to signals and abstract sockets outside this process.

    The version of Landlock decides which of these apply. With a port, the files of name resolution stay readable.
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
    """Allow reading the files of name resolution."""
    for name in _NAMES:
        with contextlib.suppress(FileNotFoundError):
            file = os.open(f"/etc/{name}", os.O_PATH | os.O_CLOEXEC)
            try:
                _check(_LIBC.syscall(_ADD_RULE, rules, _RULE_PATH, struct.pack("=Qi", _READ, file), 0))
            finally:
                os.close(file)
