"""Power, clocks, temperatures and throttling beside a measurement, with energies that carry their error.

    with Recorder(find_sensor()) as recorder:
        recorder.idle(3.0)                   # the worker is loaded and waits
        windows = [...]                      # (start, end) of the inferences, time.monotonic_ns() in any process
        recorder.idle(3.0)
    figures = energy(recorder.recording, windows, inferences)      # for a result's `statistics`
    recorder.recording.samples()                                   # for its `samples`
    recorder.recording.described(), .conditions(windows), .told()  # for its `method`: sensor, conditions, problems

Nothing here raises for what a sensor does: what is not known is `records.Unavailable`; `problems` lists the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from sparsifiner_edge.profiles.sensors.base import PowerSensor, Reading, UnavailableError, why
from sparsifiner_edge.profiles.sensors.conditions import Seen, conditions
from sparsifiner_edge.profiles.sensors.energy import Energy, energy, least_window_s, too_short
from sparsifiner_edge.profiles.sensors.ina import find_ina238, find_ina3221
from sparsifiner_edge.profiles.sensors.nvml import find_nvml
from sparsifiner_edge.profiles.sensors.rapl import find_rapl
from sparsifiner_edge.profiles.sensors.recorder import Recorder, Recording
from sparsifiner_edge.profiles.sensors.tegrastats import find_tegrastats
from sparsifiner_edge.records import MISSING

__all__ = [
    "Energy", "PowerSensor", "Reading", "Recorder", "Recording", "Seen", "conditions", "energy", "least_window_s",
    "too_short",
]  # fmt: skip

PROBES: dict[str, Callable[[Path], PowerSensor]] = {
    "ina238": find_ina238,
    "ina3221": find_ina3221,
    "tegrastats": find_tegrastats,
    "nvml": find_nvml,
    "rapl": find_rapl,
}
"""In the order of preference: whole boards before a GPU before a processor, files before another program.

Each raises UnavailableError where its sensor is not there or does not answer, OSError or ValueError where its files are
not readable.
"""

_ELSEWHERE: dict[tuple[str, str | None], str] = {
    ("nvml", "cpu"): "it sees the card alone, and inferences run on the processor",
    ("rapl", "gpu"): "it sees the processor alone, and inferences run on a card",
}


def find_sensor(root: Path = Path("/"), on: str | None = None) -> PowerSensor:
    """The best power sensor of this machine; its `probes` say why those before it are not there.

    Args:
        root: where `proc`, `sys` and `usr` are; tests give a made-up tree.
        on: "cpu" or "gpu", where inferences run: a sensor that does not see it is passed over. None passes over none.

    Returns:
        A sensor. Where none answers, one named "none", whose `read` raises and whose `probes` hold every reason.
    """
    probes: dict[str, str] = {}
    for name, probe in PROBES.items():
        if (name, on) in _ELSEWHERE:
            probes[name] = _ELSEWHERE[name, on]
            continue
        try:
            sensor = probe(root)
        except (UnavailableError, OSError, ValueError) as error:
            probes[name] = why(error)
        else:
            return dataclasses.replace(sensor, probes=probes)
    return no_sensor(probes)


def no_sensor(probes: dict[str, str]) -> PowerSensor:
    """What stands where no sensor answers: `total` begins with `records.MISSING`."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in probes.items())

    def read() -> Reading:
        raise UnavailableError(f"no power sensor: {reasons}")

    return PowerSensor("none", f"{MISSING}: no power sensor: {reasons}", (), (), 1.0, read, probes=probes)
