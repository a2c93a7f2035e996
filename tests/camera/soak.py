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
import time
from pathlib import Path
from typing import Any

from sparsifiner_edge.bundle.store import bundle_hash
from sparsifiner_edge.camera.pattern import BITS
from sparsifiner_edge.results import Result, Subject, write_result
from tests.camera.cells import make_cells_bundle, number_of

SERVER = Path(__file__).resolve().parent / "rtsp_server.py"
PYTHONS = ("/usr/bin/python3", sys.executable)
GOALS = {"reconnect_s": 5.0, "age_ms": 200.0, "memory_growth_percent": 5.0}
_PROBE = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
_QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


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
        "age_ms": {name: ages[int(share * (len(ages) - 1))] for name, share in _QUANTILES.items()},
        "told_less_ms": less[len(less) // 2],
        "older_than_200_ms": sum(age > GOALS["age_ms"] for age in ages),
        "memory_at_first_kb": base,
        "memory_later_kb": later,
        "memory_growth_percent": round(100 * (later / base - 1), 2),
    }


def verdict(found: dict[str, Any]) -> list[str]:
    """What misses its goal."""
    missed = [f"exit code {found['exit_code']}"] if found["exit_code"] else []
    for number, seconds in enumerate(found["reconnect_s"]):
        if seconds is None or seconds > GOALS["reconnect_s"]:
            missed.append(f"kill {number + 1}: back after {seconds} s")
    if found["older_than_200_ms"]:
        missed.append(f"{found['older_than_200_ms']} frames older than 200 ms")
    if found["memory_growth_percent"] > GOALS["memory_growth_percent"]:
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
        method = {"minutes": given.minutes, "kill_every_s": given.every, "fps": 25, "goals": GOALS}
        method |= {"cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[1]}
        write_result(given.output, Result("evaluation", [subject], method, {}, statistics))
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
