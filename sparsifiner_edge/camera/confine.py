"""Takes from the decoding process all that it does not need, before it reads anything that a stranger sent.

Whatever the kernel offers of: a user of its own (where started as root), Landlock, a filter of system calls. Each alone
refuses files, programs and other processes; a kernel without one of them still has the other. `confinement` says what
there is; the limits of `limit_resources` hold everywhere.

Landlock is used by its three system calls: no library on PyPI is both kept and able to restrict ports of this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct
import sys
from pathlib import Path

import msgspec

from sparsifiner_edge.camera.syscalls import filter_calls, filter_works
from sparsifiner_edge.process import end_with_parent, limit_resource

MEMORY_BYTES = 6 << 30
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""On every architecture."""
_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All rights on files that a version of Landlock knows, by the first that does."""
_BIND_AND_CONNECT, _CONNECT, _SOCKETS_AND_SIGNALS = 3, 2, 3
_PORTS_SINCE, _SCOPES_SINCE, _RULE_PORT = 4, 6, 2
_SET_DUMPABLE, _SET_NO_NEW_PRIVS = 4, 38
_USERS = range(61184, 65520)
"""Set aside for users that no file belongs to (systemd's DynamicUser)."""
_CAPABILITIES = (5, 6, 7)
"""To end processes of another user, which whoever started this one needs then, and to become one."""


class Confinement(msgspec.Struct, frozen=True):
    """What a machine offers to confine a decoding process.

    Attributes:
        own_user, no_new_privs, system_calls: whether there are a user of its own, that bit, a filter of system calls.
        landlock: its version, or None.
        missing: a sentence for each that is not there.
    """

    own_user: bool
    no_new_privs: bool
    landlock: int | None
    system_calls: bool
    missing: list[str]


def limit_resources() -> None:
    """Limit this process: it writes no file (pipes are none) and has bounded memory; see `process` for the rest."""
    limit_resource(resource.RLIMIT_FSIZE, 0)
    limit_resource(resource.RLIMIT_AS, MEMORY_BYTES)


def confine(parent: int, port: int | None = None) -> Confinement:
    """Confine this process for good. What it needs is open and imported; it has no other thread yet.

    Args:
        parent: its parent, with which it ends.
        port: of TCP, the only one that it may connect to; None: no network at all.

    Returns:
        What is in force.

    Raises:
        OSError: the kernel offers something and then refuses it.
    """
    found = confinement()
    if found.own_user:
        _become_nobody()
    if found.no_new_privs:
        for option, value in ((_SET_DUMPABLE, 0), (_SET_NO_NEW_PRIVS, 1)):
            _checked(_libc().prctl(option, value, 0, 0, 0))
    end_with_parent(parent)  # Another user's process forgets that.
    if found.landlock is not None:
        _restrict(found.landlock, port)
    if found.system_calls:
        filter_calls(network=port is not None)
    return found


def confinement() -> Confinement:
    """What this machine offers to confine a decoding process that this user starts; nothing is changed."""
    own_user, landlock, system_calls = _may_change_user(), _landlock_version(), filter_works()
    missing = _missing(own_user, landlock, system_calls)
    return Confinement(own_user, sys.platform == "linux", landlock, system_calls, missing)


def _missing(own_user: bool, landlock: int | None, system_calls: bool) -> list[str]:
    sentences = []
    if not own_user:
        sentences.append("No user of its own: that takes root, with CAP_KILL, CAP_SETGID and CAP_SETUID.")
    if landlock is None:
        sentences.append("No Landlock: this kernel lacks it, or has it switched off (lsm=landlock,...).")
    elif landlock < _PORTS_SINCE:
        sentences.append(f"Landlock {landlock} limits no TCP ports; 4, of Linux 6.7, does.")
    if not system_calls:
        sentences.append(f"No filter of system calls: not with this kernel, or not on {platform.machine()}.")
    return sentences


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"it cannot be confined: {os.strerror(ctypes.get_errno())}")
    return result


def _may_change_user() -> bool:
    """Root, with what that takes, and where such users exist: a container may know only some."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        held = int(next(line for line in lines if line.startswith("CapEff:")).split()[1], 16)
        known = all(_are_mapped(Path(f"/proc/self/{kind}_map").read_text(encoding="utf-8")) for kind in ("uid", "gid"))
        return known and all(held >> number & 1 for number in _CAPABILITIES)
    return False


def _are_mapped(table: str) -> bool:
    rows = [[int(word) for word in line.split()] for line in table.splitlines()]
    return any(first <= _USERS.start and _USERS.stop <= first + count for first, _, count in rows)


def _become_nobody() -> None:
    user = _USERS[os.getpid() % len(_USERS)]
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _landlock_version() -> int | None:
    if sys.platform != "linux":
        return None
    version = _libc().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    return version if version > 0 else None


def _restrict(version: int, port: int | None) -> None:
    """Nothing on any file; of ports only one; no signal or abstract socket beyond this process: as far as known."""
    files = _FILES[max(first for first in _FILES if first <= version)]
    ports = _BIND_AND_CONNECT if version >= _PORTS_SINCE else 0
    scopes = _SOCKETS_AND_SIGNALS if version >= _SCOPES_SINCE else 0
    rights = struct.pack("=QQQ", files, ports, scopes)
    rules = _checked(_libc().syscall(_CREATE_RULESET, rights, ctypes.c_size_t(len(rights)), 0))
    try:
        if port is not None and ports:
            _checked(_libc().syscall(_ADD_RULE, rules, _RULE_PORT, struct.pack("=QQ", _CONNECT, port), 0))
        _checked(_libc().syscall(_RESTRICT_SELF, rules, 0))
    finally:
        os.close(rules)
