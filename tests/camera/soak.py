"""A camera service beside an RTSP server that is killed again and again.

A real server (gst-rtsp-server, run by a Python that has gi) on 127.0.0.1 gives 25 frames a second, each with the time
of its drawing in the image; `sparsifiner-edge run` reads it with a bundle whose features are those cells, so that
each record tells the true age of its frame: from drawing to answer, encoder, network and decoder included. The server
is killed (SIGKILL) and started again a few seconds later.

Judged: seconds from the server's being back to the first answer; age of every frame answered, from the first one on;
resident memory of the service and its decoder against the most that they took in the first minute (in a shorter run:
its first third).

    python -m tests.camera.soak [--minutes 10]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparsifiner_edge.camera.pattern import BITS
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


class Server:
    """The RTSP server on a port that was free, to be killed and started again."""

    def __init__(self, python: str, *arguments: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
        self.address = f"rtsp://127.0.0.1:{port}/camera"
        self._start, self._arguments = [python, str(SERVER), str(port)], arguments

    def start(self, *arguments: Any) -> float:
        """Start it, with other arguments if given; the monotonic time at which it listens."""
        line = [*self._start, *map(str, arguments or self._arguments)]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        return time.monotonic()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def resident_kb(service: int) -> int:
    """Resident memory of a process and all that it started."""
    children = [path.read_text().split() for path in Path(f"/proc/{service}/task").glob("*/children")]
    total = 0
    for pid in (service, *(pid for some in children for pid in some)):
        with contextlib.suppress(OSError):  # It has ended meanwhile.
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() // 1024
    return total


def soak(python: str, bundle: Path, seconds: float, every_s: float, down_s: float = 3.0) -> dict[str, Any]:
    """Run the service for `seconds`, killing the server every `every_s`."""
    with Server(python) as server, tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "e").open("w+") as events:
        lines, memory, back = Path(scratch) / "lines", [], [time.monotonic()]
        run = [sys.executable, "-m", "sparsifiner_edge", "run", bundle, "--source", server.address, "--threads", 1]
        with subprocess.Popen([str(x) for x in (*run, "--output", lines)], stderr=events) as service:
            while not (lines.exists() and lines.stat().st_size):
                assert time.monotonic() < back[0] + 30, "no frame came"
                time.sleep(0.05)
            began = time.monotonic()
            while time.monotonic() - began < seconds:
                due = min(time.monotonic() + every_s - down_s, began + seconds)
                while time.monotonic() < due:
                    memory.append((time.monotonic() - began, resident_kb(service.pid)))
                    time.sleep(0.5)
                if time.monotonic() - began < seconds - every_s / 2:
                    server.kill()
                    time.sleep(down_s)
                    back.append(server.start())
            service.terminate()
            service.wait(20)
        events.seek(0)
        told = [json.loads(line) for line in events if '"lost_s"' in line or '"done"' in line]
        records = [json.loads(line) for line in lines.read_text().splitlines()]
    return {"exit_code": service.returncode, "events": told} | _summary(records, back, memory)


def _summary(records: list[dict[str, Any]], back: list[float], memory: list[tuple[float, int]]) -> dict[str, Any]:
    """What is judged; the age that a frame has by the time in its image is beside what the service says of it."""
    seen = []
    for record in records:
        if (number := number_of(record["features"])) is not None:
            age = (round(record["monotonic_s"] * 1000) - number) % (1 << BITS)
            seen.append((record["monotonic_s"], age, age - record["frame_age_ms"]))
    firsts = [next((at for at, _, _ in seen if at > since), None) for since in back]
    ages, less = sorted(age for _, age, _ in seen), sorted(less for _, _, less in seen)
    settling = min(60.0, memory[-1][0] / 3)
    base = max([kb for at, kb in memory if at <= settling] or [memory[0][1]])
    later = max([kb for at, kb in memory if at > settling] or [base])
    return {
        "kills": len(back) - 1,
        "frames": len(seen),
        "unread": len(records) - len(seen),
        "reconnect_s": [None if f is None else round(f - at, 3) for f, at in zip(firsts, back, strict=True)][1:],
        "age_ms": {"p50": ages[len(ages) // 2], "max": ages[-1]},
        "told_less_ms": less[len(less) // 2],
        "older_than_200_ms": sum(age > AGE_MS for age in ages),
        "memory_growth_percent": round(100 * (later / base - 1), 2),
    }


def missed(found: dict[str, Any]) -> list[str]:
    """Which goals."""
    slow = any(seconds is None or seconds > RECONNECT_S for seconds in found["reconnect_s"])
    wrong = {
        "exit_code": found["exit_code"], "reconnect_s": slow, "older_than_200_ms": found["older_than_200_ms"],
        "memory_growth_percent": found["memory_growth_percent"] > MEMORY_PERCENT,
    }  # fmt: skip
    return [name for name, is_wrong in wrong.items() if is_wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    given = parser.parse_args()
    python = python_with_rtsp()
    if python is None:
        raise SystemExit("no Python with gi and GstRtspServer: apt-get install python3-gi gir1.2-gst-rtsp-server-1.0")
    with tempfile.TemporaryDirectory() as scratch:
        found = soak(python, make_cells_bundle(Path(scratch) / "cells"), given.minutes * 60, 60)
    print(json.dumps(found | {"missed": missed(found)}, indent=2))
    raise SystemExit(1 if missed(found) else 0)


if __name__ == "__main__":
    main()
