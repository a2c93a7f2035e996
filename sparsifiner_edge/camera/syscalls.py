"""A filter of system calls (seccomp) for a process that computes, reads what is open, and reaches for nothing else.

Refused is what names a file, another process or the machine. Calls younger than Linux 5.1 do not exist for it: all
architectures number them alike, from `_YOUNG` on, and libraries know how to do without. So the table below is whole and
stays so: what it does not refuse touches the memory, descriptors and threads of the process itself.

By one system call of our own: the libraries on PyPI need the system's libseccomp, or filter only what they start.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from typing import Any

_REFUSED = """
open 2 -, creat 85 -, openat 257 56, name_to_handle_at 303 264, open_by_handle_at 304 265, memfd_create 319 279,
truncate 76 45, rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -,
symlinkat 266 36, unlink 87 -, unlinkat 263 35, mkdir 83 -, mkdirat 258 34, rmdir 84 -, mknod 133 -, mknodat 259 33,
chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54, utime 132 -,
utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14,
lremovexattr 198 15, fremovexattr 199 16, chdir 80 49, fchdir 81 50, chroot 161 51, pivot_root 155 41, mount 165 40,
umount2 166 39, uselib 134 -, inotify_add_watch 254 27, fanotify_init 300 262, fanotify_mark 301 263, quotactl 179 60,
fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, ptrace 101 117, process_vm_readv 310 270,
process_vm_writev 311 271, kcmp 312 272, kill 62 129, tkill 200 130, rt_sigqueueinfo 129 138,
rt_tgsigqueueinfo 297 240, get_robust_list 274 100, setpriority 141 140, ioprio_set 251 30, sched_setparam 142 118,
sched_setscheduler 144 119, sched_setattr 314 274, sched_setaffinity 203 122, migrate_pages 256 238,
move_pages 279 239, unshare 272 97, setns 308 268, socketpair 53 199, bind 49 200, listen 50 201, accept 43 202,
accept4 288 242, shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, semctl 66 191, msgget 68 186,
msgctl 71 187, mq_open 240 180, mq_unlink 241 181, add_key 248 217, request_key 249 218, keyctl 250 219, bpf 321 280,
perf_event_open 298 241, userfaultfd 323 282, io_setup 206 0, personality 135 92, modify_ldt 154 -, iopl 172 -,
ioperm 173 -, init_module 175 105, finit_module 313 273, delete_module 176 106, kexec_load 246 104,
kexec_file_load 320 294, reboot 169 142, acct 163 89, swapon 167 224, swapoff 168 225, syslog 103 116, vhangup 153 58,
settimeofday 164 170, clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266, sethostname 170 161,
setdomainname 171 162, setuid 105 146, setgid 106 144, setreuid 113 145, setregid 114 143, setresuid 117 147,
setresgid 119 149, setgroups 116 159, setfsuid 122 151, setfsgid 123 152, capset 126 91
"""
"""Name, number on x86-64, number on AArch64 (- where it has none)."""
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""The kernel's number of the architecture, and the column of its calls."""
_YOUNG = 424
_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_THREAD, _FAST_OPEN, _ALL = 0x10000, 0x20000000, 0xFFFFFFFF
_IPV4, _STREAM, _TCP = 2, 1, 6
_Row = tuple[int, int, int, int]
"""Code, rows to skip if true, rows to skip if not, operand."""
_PASS: _Row = (_RETURN, 0, 0, 0x7FFF0000)
_REFUSE: _Row = (_RETURN, 0, 0, 0x00050000 | errno.EACCES)
_UNKNOWN: _Row = (_RETURN, 0, 0, 0x00050000 | errno.ENOSYS)
_KILL: _Row = (_RETURN, 0, 0, 0x80000000)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("rows", ctypes.c_void_p))


def filter_works() -> bool:
    """Whether this kernel has such filters, and this architecture's calls are known; nothing is changed."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES or struct.calcsize("P") != 8:
        return False
    return _set_filter(None) == errno.EFAULT  # There is none at address 0.


def filter_calls(network: bool) -> None:
    """Refuse them to this process, which has one thread, and to every one that it starts, from now on.

    It must not be able to gain privileges any more.

    Args:
        network: TCP over IPv4 may be spoken; else no socket can be made.

    Raises:
        OSError: the kernel refuses.
    """
    rows = _rows(network, os.getpid(), *_MACHINES[platform.machine()])
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *row) for row in rows))
    wrong = _set_filter(ctypes.byref(_Program(len(rows), ctypes.addressof(code))))
    if wrong:
        raise OSError(wrong, f"system calls cannot be filtered: {os.strerror(wrong)}")


def _set_filter(program: Any) -> int:
    """0, or the number of the error. By prctl, which every manager of services lets pass."""
    return ctypes.get_errno() if ctypes.CDLL(None, use_errno=True).prctl(22, 2, program, 0, 0) else 0


def _rows(network: bool, pid: int, architecture: int, column: int) -> list[_Row]:
    rows = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), _KILL, (_LOAD, 0, 0, _NUMBER)]
    rows += [(_AT_LEAST, 0, 1, _YOUNG), _UNKNOWN]
    for entry, body in _bodies(network, pid).items():
        number = _number(entry, column)
        if number is not None:
            rows += [(_EQUAL, 0, len(body), number), *body]
    return [*rows, _PASS]


def _number(entry: str, column: int) -> int | None:
    text = entry.split()[1 + column]
    return None if text == "-" else int(text)


def _bodies(network: bool, pid: int) -> dict[str, list[_Row]]:
    """What becomes of a call: every body ends by passing or refusing it."""
    tcp = [*_only(0, _IPV4), *_only(1, _STREAM, mask=0xF), *_only(2, 0, _TCP), _PASS]
    return {
        **{entry: [_REFUSE] for entry in _REFUSED.replace("\n", " ").split(",")},
        "socket 41 198": tcp if network else [_REFUSE],
        "sendto 44 206": [*_never(3, _FAST_OPEN, mask=_FAST_OPEN), _PASS],  # It would connect, unseen by Landlock.
        "sendmsg 46 211": [*_never(2, _FAST_OPEN, mask=_FAST_OPEN), _PASS],
        "sendmmsg 307 269": [*_never(3, _FAST_OPEN, mask=_FAST_OPEN), _PASS],
        "clone 56 220": [*_only(0, _THREAD, mask=_THREAD), _PASS],  # A thread, no process.
        "tgkill 234 131": [*_only(0, pid), _PASS],
        "prlimit64 302 261": [*_only(0, 0, pid), _PASS],
        "prctl 157 167": [*_never(0, 1, 4), _PASS],  # To end with its parent and to be unreadable stays as it is.
        "fcntl 72 25": [*_never(1, 8, 10, 15), _PASS],  # F_SETOWN, F_SETSIG, F_SETOWN_EX send signals to others,
        "ioctl 16 29": [*_never(1, 0x8901, 0x8902, 0x5412), _PASS],  # so do FIOSETOWN, SIOCSPGRP; TIOCSTI types.
    }


def _only(argument: int, *values: int, mask: int = _ALL) -> list[_Row]:
    """Refuses the call unless the argument, where the mask has ones, is one of the values."""
    tests = [(_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [*_load(argument, mask), *tests, _REFUSE]


def _never(argument: int, *values: int, mask: int = _ALL) -> list[_Row]:
    """Refuses the call if it is one of the values."""
    return [*_load(argument, mask), *(row for value in values for row in ((_EQUAL, 0, 1, value), _REFUSE))]


def _load(argument: int, mask: int) -> list[_Row]:
    return [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument), (_AND, 0, 0, mask)]  # Its lower half.
