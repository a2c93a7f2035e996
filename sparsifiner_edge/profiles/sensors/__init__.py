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

from sparsifiner_edge.profiles.sensors.base import PowerSensor, Reading
from sparsifiner_edge.profiles.sensors.conditions import conditions
from sparsifiner_edge.profiles.sensors.energy import Energy, energy, least_window_s, too_short
from sparsifiner_edge.profiles.sensors.find import PROBES, find_sensor
from sparsifiner_edge.profiles.sensors.recorder import Recorder, Recording

__all__ = [
    "PROBES", "Energy", "PowerSensor", "Reading", "Recorder", "Recording", "conditions", "energy", "find_sensor",
    "least_window_s", "too_short",
]  # fmt: skip
