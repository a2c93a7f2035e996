"""Commands in a network namespace of their own, and every packet that they try to send out of it.

    python -m tests.security.isolated SECONDS < commands.json     a list of {"name", "arguments", "environment", "cwd"}

The namespace has a loopback, and one interface through which all else would go, a name server's address included: a
look-up or a connection is a packet there, before anyone answers. Prints one JSON object: `codes` per name (None where
it still ran at the end and was ended), `packets` (what was sent), `errors` per name (what it wrote).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_SERVER = "10.77.0.2"
CI = ("CI", "APPVEYOR", "BITBUCKET_BUILD_NUMBER", "BUILDKITE", "CIRCLECI", "CODEBUILD_BUILD_ID", "GITHUB_ACTIONS",
      "GITLAB_CI", "JENKINS_URL", "TEAMCITY_VERSION", "TF_BUILD", "TRAVIS")  # fmt: skip
"""Where one of these is set ONNX Runtime reports nothing anyway; what is run here runs as on a user's machine."""
Started = tuple[subprocess.Popen[bytes], IO[bytes]]


def enter() -> int:
    """Leave the machine's network and its name servers; returns the other end of the interface that leads out.

    Raises:
        OSError: not permitted here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    handle = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", b"out0", _IFF_TUN | _IFF_NO_PI))
    for line in ("link set lo up", "addr add 10.77.0.1/24 dev out0", "link set out0 up", "route add default dev out0"):
        subprocess.run(["ip", *line.split()], check=True, capture_output=True)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    with tempfile.NamedTemporaryFile("w") as file:  # Mounted it stays, also without its name.
        file.write(f"nameserver {_SERVER}\noptions timeout:1 attempts:1\n")
        file.flush()
        subprocess.run(["mount", "--bind", file.name, os.path.realpath("/etc/resolv.conf")], check=True)
    return handle


class Listener:
    """Collects what is sent out; IPv6's own chatter about neighbours and routers aside."""

    def __init__(self, handle: int) -> None:
        self.packets: list[str] = []
        self._handle = handle
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            packet = os.read(self._handle, 65535)
            if packet[0] >> 4 == 6 and packet[6] in (0, 58):  # Hop-by-hop options (MLD) and ICMPv6.
                continue
            self.packets.append(f"{packet[:40].hex()} {packet[28:90]!r}")


def run_all(handle: int, commands: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Run all commands at once, for `seconds` at most."""
    listener = Listener(handle)
    with contextlib.ExitStack() as stack:
        started = {command["name"]: _started(command, stack.enter_context(_log())) for command in commands}
        return _watch(listener, started, seconds)


def _watch(listener: Listener, started: dict[str, Started], seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    codes: dict[str, int | None] = {}
    while time.monotonic() < deadline and any(process.poll() is None for process, _ in started.values()):
        time.sleep(0.1)
    for name, (process, _) in started.items():
        codes[name] = process.poll()
        if codes[name] is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(0.2)
    errors = {name: Path(log.name).read_text(errors="replace")[-2000:] for name, (_, log) in started.items()}
    return {"codes": codes, "packets": listener.packets, "errors": errors}


def _log() -> IO[bytes]:
    return tempfile.NamedTemporaryFile()


def _started(command: dict[str, Any], log: IO[bytes]) -> Started:
    users = {name: value for name, value in os.environ.items() if name not in CI}
    process = subprocess.Popen(
        command["arguments"], env=users | command.get("environment", {}), cwd=command.get("cwd"),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
    )  # fmt: skip
    return process, log


if __name__ == "__main__":
    json.dump(run_all(enter(), json.load(sys.stdin), float(sys.argv[1])), sys.stdout)
