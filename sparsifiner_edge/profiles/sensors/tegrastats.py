"""tegrastats, NVIDIA's own monitor on Jetson, JetPack 4 to 7: for boards that do not let their files be read."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path

from sparsifiner_edge.process import start_program
from sparsifiner_edge.profiles.sensors.base import PowerSensor, Reading, UnavailableError
from sparsifiner_edge.profiles.sensors.ina import board_sensor

# "VDD_IN 5704mW/5704mW": now, then a running average; JetPack 7 adds a third, JetPack 4 leaves the unit out.
# "RAM 2461/7620MB" looks alike but for its unit.
_RAIL = re.compile(r"(?<!\S)([A-Za-z]\w*) (-?\d+)(?:mW)?(?:/-?\d+(?:mW)?){1,2}(?!\S)")
# It is a program of its own on the measured machine: twice a second costs little.
_PERIOD_S = 0.5
_SILENCE_S = 3.0
_MILLI = 1e-3


def find_tegrastats(root: Path) -> PowerSensor:
    """tegrastats, tried for one line."""
    program = root / "usr/bin/tegrastats"
    if not program.exists():
        raise UnavailableError(f"{program} does not exist: not a Jetson")
    reader = _Reader(program)
    try:
        rails = list(reader.read().watts)
    finally:
        reader.close()
    return board_sensor("tegrastats", rails, _PERIOD_S, reader.read, reader.close)


def parse_line(line: str) -> dict[str, float]:
    """Watts by rail of a line of tegrastats: the values of the moment, not the averages."""
    return {name: int(now) * _MILLI for name, now in _RAIL.findall(line)}


class _Reader:
    """Runs the program from the first reading on, and again when it ended."""

    def __init__(self, program: Path) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def read(self) -> Reading:
        """Wait for a line; of several that wait, the newest."""
        try:
            line = self._line(self._process or self._start())
        except UnavailableError:
            self.close()
            raise
        watts = parse_line(line)
        if not watts:
            raise UnavailableError(f"{self._program} names no power rail: {line[:80]!r}")
        return Reading(watts)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [str(self._program), "--interval", str(int(_PERIOD_S * 1000))]
        quiet = subprocess.DEVNULL
        self._process = start_program(
            command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, start_new_session=True
        )
        self._buffer = b""
        return self._process

    def _line(self, process: subprocess.Popen[bytes]) -> str:
        assert process.stdout is not None
        deadline = time.monotonic() + _SILENCE_S
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                raise UnavailableError(f"{self._program} printed no line for {_SILENCE_S:g} s")
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise UnavailableError(f"{self._program} ended with exit status {process.wait()}")
            self._buffer += chunk
        lines, _, self._buffer = self._buffer.rpartition(b"\n")
        return lines.rpartition(b"\n")[2].decode("ascii", "replace")

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            # Its whole group, in case a script stands before the program.
            with process, contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
