"""Commands in a separate network namespace, and every packet that they try to send out of it.

    python -m tests.security.isolated SECONDS < commands.json     a list of {"name", "arguments", "environment"}

The namespace has a loopback and one interface for all other traffic, a name server's address included: a look-up or a
connection is a packet there, before anyone answers. Prints one JSON object: `codes` per name (None if it still ran at
the end and was ended), `packets` (what was sent), `errors` per name (standard error).
"""

from __future__ import annotations

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
from typing import Any

CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_SERVER = "10.77.0.2"
CI = (
    "CI",
    "APPVEYOR",
    "BITBUCKET_BUILD_NUMBER",
    "BUILDKITE",
    "CIRCLECI",
    "CODEBUILD_BUILD_ID",
    "GITHUB_ACTIONS",
    "GITLAB_CI",
    "JENKINS_URL",
    "TEAMCITY_VERSION",
    "TF_BUILD",
    "TRAVIS",
)
"""Variables that disable telemetry of ONNX Runtime; they are removed, as on a user's machine."""


def enter() -> int:
    """Leave the machine's network and its name servers; return the other end of the outgoing interface.

    Raises:
        OSError: Not permitted here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS | CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    handle = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", b"out0", _IFF_TUN | _IFF_NO_PI))
    for line in ("link set lo up", "addr add 10.77.0.1/24 dev out0", "link set out0 up", "route add default dev out0"):
        subprocess.run(["ip", *line.split()], check=True, capture_output=True)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    with tempfile.NamedTemporaryFile("w") as file:  # It stays mounted without its name.
        file.write(f"nameserver {_SERVER}\noptions timeout:1 attempts:1\n")
        file.flush()
        subprocess.run(["mount", "--bind", file.name, os.path.realpath("/etc/resolv.conf")], check=True)
    return handle


def listen(handle: int, packets: list[str]) -> None:
    """Collect outgoing packets forever, except IPv6 neighbour and router discovery."""
    while True:
        packet = os.read(handle, 65535)
        if packet[0] >> 4 == 6 and packet[6] in (0, 58):  # Hop-by-hop options (MLD) and ICMPv6.
            continue
        packets.append(f"{packet[:40].hex()} {packet[28:90]!r}")


def run_all(handle: int, commands: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Run all commands at once, for `seconds` at most."""
    packets: list[str] = []
    threading.Thread(target=listen, args=(handle, packets), daemon=True).start()
    users = {name: value for name, value in os.environ.items() if name not in CI}
    with tempfile.TemporaryDirectory() as logs:
        started = {}
        for command in commands:
            with (Path(logs) / command["name"]).open("wb") as log:
                started[command["name"]] = subprocess.Popen(
                    command["arguments"],
                    env=users | command.get("environment", {}),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(process.poll() is None for process in started.values()):
            time.sleep(0.1)
        codes = {name: process.poll() for name, process in started.items()}
        for name, process in started.items():
            if codes[name] is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(0.2)
        errors = {name: (Path(logs) / name).read_text(errors="replace")[-2000:] for name in started}
    return {"codes": codes, "packets": packets, "errors": errors}


if __name__ == "__main__":
    json.dump(run_all(enter(), json.load(sys.stdin), float(sys.argv[1])), sys.stdout)
