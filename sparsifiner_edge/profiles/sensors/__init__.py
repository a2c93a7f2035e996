"""Power, clocks, temperatures and throttling beside a measurement, with energies that carry their error.

    with Recording(find_sensor()) as recording:
        recording.stay_idle(3.0)             # the worker is loaded and waits
        windows = [...]                      # (start, end) of the inferences, time.monotonic_ns() in any process
        recording.stay_idle(3.0)
    figures = energy(recording, windows, inferences)      # for a result's `statistics`

Nothing here raises for what a sensor does: what is not known is `records.Unavailable`, or is left out; a recording's
`problems` list the rest.
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
"""In the order of preference: whole boards before a GPU before a processor.

Each raises UnavailableError where its sensor is not there or does not answer, OSError or ValueError where its files are
not readable.
"""

_ELSEWHERE: dict[tuple[str, str | None], str] = {
    ("nvml", "cpu"): "it sees the card alone, and inferences run on the processor",
    ("rapl", "gpu"): "it sees the processor alone, and inferences run on a card",
}


def find_sensor(root: Path = Path("/"), on: str | None = None) -> PowerSensor:
    """The best power sensor of this machine; its `not_used` says why those before it are not there.

    Args:
        root: where `proc`, `sys` and `usr` are; tests give a made-up tree.
        on: "cpu" or "gpu", where inferences run: a sensor that does not see it is passed over. None passes over none.

    Returns:
        A sensor. Where none answers, `no_sensor`, with every reason.
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
    """What stands where no sensor answers: `total` begins with `records.MISSING`, and it is never read."""
    text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return PowerSensor("none", f"{MISSING}: no power sensor: {text}", 1.0, dict, not_used=reasons)
