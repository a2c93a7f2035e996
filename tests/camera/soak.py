"""A camera service beside an RTSP server that is killed again and again.

A real server (gst-rtsp-server, run by a Python that has gi) on 127.0.0.1 gives 25 frames a second, each with the time
of its drawing in the image; `sparsifiner-edge run` reads it with a bundle whose features are those cells, so that
each record tells the true age of its frame: from drawing to answer, encoder, network and decoder included. The server
is killed (SIGKILL) and started again a few seconds later.

Judged: seconds from the server's being back to the first answer; age of every frame answered, from the first one on;
resident memory of the service and its decoder against the most that they took in the first minute (in a shorter run:
its first third).

    python -m tests.camera.soak [--minutes 10] [-o RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from sparsifiner_edge.bundle.store import bundle_hash
from sparsifiner_edge.camera.pattern import BITS
from sparsifiner_edge.results import Result, Subject, write_result
from tests.camera.cells import make_cells_bundle, number_of

SERVER = Path(__file__).resolve().parent / "rtsp_server.py"
PYTHONS = ("/usr/bin/python3", sys.executable)
RECONNECT_S, AGE_MS, MEMORY_PERCENT = 5.0, 200.0, 5.0
_PROBE = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"


def python_with_rtsp() -> str | None:
    """A Python that can run the server; None where there is none."""
    for python in PYTHONS:
        probe = [python, "-c", _PROBE]
        if shutil.which(python) and subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return python
    return None


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Server:
    """The RTSP server, to be killed and started again."""

    def __init__(self, python: str, port: int, *arguments: Any) -> None:
        self.address = f"rtsp://127.0.0.1:{port}/camera"
        self._line = [python, str(SERVER), str(port), *map(str, arguments)]
        self._process: subprocess.Popen[str] | None = None

    def start(self, *arguments: Any) -> float:
        """Start it, with other arguments after the port if given; the monotonic time at which it listens."""
        line = [*self._line[:3], *map(str, arguments)] if arguments else self._line
        self._process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return time.monotonic()

    @property
    def pid(self) -> int | None:
        """Of the process that runs, or ran last."""
        return None if self._process is None else self._process.pid

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Seen(NamedTuple):
    """One record: when it was answered, and how old its frame was by the image and by the service's own word."""

    at_s: float
    age_ms: float
    told_ms: float


class Reader(threading.Thread):
    """Collects what the service says."""

    def __init__(self, service: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self.seen: list[Seen] = []
        self.unread = 0
        self._service = service
        self.start()

    def run(self) -> None:
        assert self._service.stdout is not None
        for line in self._service.stdout:
            record = json.loads(line)
            number = number_of(record["features"])
            if number is None:
                self.unread += 1
                continue
            age = (round(record["monotonic_s"] * 1000) - number) % (1 << BITS)
            self.seen.append(Seen(record["monotonic_s"], float(age), record["frame_age_ms"]))


def start_service(bundle: Path, address: str, *arguments: Any) -> subprocess.Popen[str]:
    """`sparsifiner-edge run` on an RTSP address."""
    line = [sys.executable, "-m", "sparsifiner_edge", "run", bundle, "--source", address, "--threads", 1, *arguments]
    return subprocess.Popen([str(x) for x in line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def resident_kb(pid: int) -> int:
    """Resident memory of a process and all that it started."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        if int(status.parent.name) == pid or int(fields["PPid"]) == pid:
            total += int(fields.get("VmRSS", "0 kB").split()[0])
    return total


def soak(python: str, bundle: Path, seconds: float, every_s: float, down_s: float = 3.0) -> dict[str, Any]:
    """Run the service for `seconds`, killing the server every `every_s`."""
    with Server(python, free_port()) as server, start_service(bundle, server.address) as service:
        reader, back, memory = Reader(service), [time.monotonic()], []
        events: list[str] = []
        assert service.stderr is not None
        threading.Thread(target=lambda: events.extend(service.stderr or []), daemon=True).start()
        wait_for_frames(reader, back[0], 30)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            due = time.monotonic() + every_s - down_s
            while time.monotonic() < min(due, began + seconds):
                memory.append((time.monotonic() - began, resident_kb(service.pid)))
                time.sleep(0.5)
            if time.monotonic() - began < seconds - every_s / 2:
                server.kill()
                time.sleep(down_s)
                back.append(server.start())
        service.terminate()
        code = service.wait(20)
    return _summary(reader, back, memory, code, events)


def wait_for_frames(reader: Reader, since: float, seconds: float) -> None:
    """Until a frame was answered after `since`."""
    deadline = time.monotonic() + seconds
    while not any(s.at_s > since for s in reader.seen[-1:]):
        if time.monotonic() > deadline:
            raise SystemExit("no frame came")
        time.sleep(0.05)


def _summary(reader: Reader, back: list[float], memory: list[Any], code: int, events: list[str]) -> dict[str, Any]:
    firsts = [next((s.at_s for s in reader.seen if s.at_s > at), None) for at in back]
    settled = [
        s
        for first, end in zip(firsts, [*back[1:], float("inf")], strict=True)
        for s in reader.seen
        if first is not None and first <= s.at_s < end
    ]
    ages = sorted(s.age_ms for s in settled)
    settling = min(60.0, memory[-1][0] / 3)
    base = max([kb for at, kb in memory if at <= settling] or [memory[0][1]])
    later = max([kb for at, kb in memory if at > settling] or [base])
    return {
        "exit_code": code,
        "kills": len(back) - 1,
        "frames": len(reader.seen),
        "unread": reader.unread,
        "reconnect_s": [None if f is None else round(f - at, 3) for f, at in zip(firsts, back, strict=True)][1:],
        "age_ms": {name: ages[int(share * (len(ages) - 1))] for name, share in _QUANTILES.items()},
        "told_less_ms": sorted(s.age_ms - s.told_ms for s in settled)[len(settled) // 2],
        "older_than_200_ms": sum(age > AGE_MS for age in ages),
        "memory_at_first_kb": base,
        "memory_later_kb": later,
        "memory_growth_percent": round(100 * (later / base - 1), 2),
        "events": [json.loads(line) for line in events if '"lost_s"' in line or '"done"' in line],
    }


_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


def verdict(found: dict[str, Any]) -> list[str]:
    """What misses its goal."""
    missed = [f"exit code {found['exit_code']}"] if found["exit_code"] else []
    for number, seconds in enumerate(found["reconnect_s"]):
        if seconds is None or seconds > RECONNECT_S:
            missed.append(f"kill {number + 1}: back after {seconds} s")
    if found["older_than_200_ms"]:
        missed.append(f"{found['older_than_200_ms']} frames older than {AGE_MS:.0f} ms")
    if found["memory_growth_percent"] > MEMORY_PERCENT:
        missed.append(f"memory grew by {found['memory_growth_percent']} %")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=60, help="seconds between two kills")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    python = python_with_rtsp()
    if python is None:
        raise SystemExit("no Python with gi and GstRtspServer: apt-get install python3-gi gir1.2-gst-rtsp-server-1.0")
    with tempfile.TemporaryDirectory() as scratch:
        bundle = make_cells_bundle(Path(scratch) / "cells")
        subject = Subject(path="tests/camera/cells.py", sha256=bundle_hash(bundle))
        found = soak(python, bundle, given.minutes * 60, given.every)
    missed = verdict(found)
    print(json.dumps(found | {"missed": missed}, indent=2))
    if given.output is not None:
        statistics = {name: x for name, x in found.items() if name != "events"} | {"missed": missed}
        goals = {"reconnect_s": RECONNECT_S, "age_ms": AGE_MS, "memory_growth_percent": MEMORY_PERCENT}
        method = {"minutes": given.minutes, "kill_every_s": given.every, "fps": 25, "goals": goals}
        method |= {"cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[1]}
        write_result(given.output, Result("evaluation", [subject], method, {}, statistics))
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
