"""Power, clocks, temperatures and throttling during a measurement, and energies with intervals.

    with Recording(find_sensor()) as recording:
        recording.stay_idle(3.0)             # the worker has loaded the model and waits
        windows = [...]                      # (start, end) of the inferences, time.monotonic_ns() in any process
        recording.stay_idle(3.0)
    figures = energy(recording, windows, inferences)      # for a result's `statistics`

A failing sensor raises no exception here. Unknown values are `records.Unavailable` or left out, and a recording's
`problems` list everything else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from sparsifiner_edge.profiles.sensors.energy import Energy, energy
from sparsifiner_edge.profiles.sensors.nvml import find_nvml
from sparsifiner_edge.profiles.sensors.power import PowerSensor, UnavailableError, find_ina, find_rapl, why
from sparsifiner_edge.profiles.sensors.recording import Recording
from sparsifiner_edge.records import MISSING

__all__ = ["Energy", "PowerSensor", "Recording", "energy", "find_sensor", "no_sensor"]

SENSORS: dict[str, Callable[[Path], PowerSensor]] = {"ina": find_ina, "nvml": find_nvml, "rapl": find_rapl}
"""Sensors by name, in the order of preference: a whole board, then a GPU, then a processor.

Each function raises UnavailableError if its sensor is missing or does not respond, and OSError or ValueError if its
files cannot be read.
"""

_ELSEWHERE: dict[tuple[str, str | None], str] = {
    ("nvml", "cpu"): "it measures the graphics card only, and inferences run on the processor",
    ("rapl", "gpu"): "it measures the processor only, and inferences run on a graphics card",
}
"""Reason why a sensor is not used, by its name and the device of the inferences."""


def find_sensor(root: Path = Path("/"), on: str | None = None) -> PowerSensor:
    """Return the best power sensor of this machine.

    Args:
        root: Folder that contains `proc`, `sys` and `usr`; for tests.
        on: Device of the inferences, "cpu" or "gpu"; a sensor that does not measure it is skipped. None skips none.

    Returns:
        A sensor, whose `not_used` gives the reason for each preferred sensor. If none responds, `no_sensor` with all
            reasons.
    """
    reasons: dict[str, str] = {}
    for name, find in SENSORS.items():
        if (name, on) in _ELSEWHERE:
            reasons[name] = _ELSEWHERE[name, on]
            continue
        try:
            return dataclasses.replace(find(root), not_used=reasons)
        except (UnavailableError, OSError, ValueError) as error:
            reasons[name] = why(error)
    return no_sensor(reasons)


def no_sensor(reasons: dict[str, str]) -> PowerSensor:
    """Return the placeholder for a missing sensor: it is never read, and its `total` begins with `records.MISSING`."""
    text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return PowerSensor("none", f"{MISSING}: no power sensor: {text}", 1.0, dict, not_used=reasons)
