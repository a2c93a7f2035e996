"""The recorder's thread: the whole path in real time, and sensors and clocks that do their worst."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from sparsifiner_edge.profiles.sensors import PowerSensor, Reading, Recorder
from sparsifiner_edge.profiles.sensors import recorder as module
from sparsifiner_edge.records import write_record
from tests.plain import energy
from tests.sensors import curves
from tests.sensors.curves import RAIL, SECOND, wait_for

pytestmark = [pytest.mark.usefixtures("no_nvml")]


def sensor_reading(read, **settings):
    return PowerSensor("synthetic", "synthetic", (RAIL,), (RAIL,), 0.005, read, **settings)


def live(power, began, jitter=0.0, counted=False):
    """A sensor of a curve that began at a moment (s), each reading after a delay of up to `jitter` seconds."""
    random = np.random.default_rng(0)

    def read():
        time.sleep(random.uniform(0, jitter))
        t = np.array(time.monotonic() - began)
        return Reading(joules={RAIL: float(power.joules(t))}) if counted else Reading({RAIL: float(power.watts(t))})

    return sensor_reading(read)


def steady():
    return Reading({RAIL: 10.0 + 1e-6 * (time.monotonic_ns() % 1000)})


@pytest.mark.parametrize(
    "power",
    [curves.constant(20.0), curves.ramp(10.0, 12.0), curves.sine(15.0, 6.0, 0.31), curves.square(8.0, 24.0, 0.2317)],
    ids=["constant", "ramp", "sine", "square"],
)
@pytest.mark.parametrize("counted", [False, True], ids=["power", "counter"])
@pytest.mark.alone
def test_known_integrals_through_thread_and_clock(tmp_path, power, counted):
    for _ in range(5):
        began = time.monotonic()
        with Recorder(live(power, began, jitter=0.002, counted=counted), tmp_path) as recorder:
            time.sleep(0.05)
            start = time.monotonic_ns()
            time.sleep(1.0)
            end = time.monotonic_ns()
            time.sleep(0.05)
        if max(np.diff(recorder.recording.times_ns)) < SECOND / 40:
            break  # On a busy machine the thread waits its turn, and no rule integrates what was not read.
    figures = energy(recorder.recording, [(start, end)], 20)
    first, last = start / SECOND - began, end / SECOND - began
    expected = float(power.joules(np.array(last)) - power.joules(np.array(first))) / 20
    assert figures["gross_j_per_inference"]["value"] == pytest.approx(expected, rel=0.01)
    assert figures["problems"] == []


def test_windows_of_another_process_share_the_clock(tmp_path):
    script = "import time; a = time.monotonic_ns(); time.sleep(.2); print(a, time.monotonic_ns())"
    with Recorder(sensor_reading(steady), tmp_path) as recorder:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        time.sleep(0.05)
    start, end = map(int, done.stdout.split())
    assert recorder.recording.start_ns < start < end < recorder.recording.end_ns
    figures = energy(recorder.recording, [(start, end)], 1)
    assert figures["gross_j_per_inference"]["value"] == pytest.approx(10.0 * (end - start) / SECOND, rel=0.01)


def test_what_a_recording_gives_to_a_result(tmp_path):
    with Recorder(sensor_reading(steady), tmp_path) as recorder:
        recorder.idle(0.1)
        recorder.idle(0.05)
    recording = recorder.recording
    samples, described = recording.samples(), recording.described()
    json.dumps([samples, write_record(described), write_record(recording.conditions([]))], allow_nan=False)
    assert len(samples["time_s"]) == len(samples[f"{RAIL}_w"]) == described.readings > 5
    assert 0.1 <= described.idle_s[0] < (recording.end_ns - recording.start_ns) / 1e9
    assert len(described.idle_s) == 2
    assert described.name == "synthetic"
    assert recording.told() == []
    assert write_record(recording.before).keys() == write_record(recording.after).keys()


def test_a_gap_of_one_rail_is_told_in_the_samples(tmp_path):
    turns = iter(range(10**6))
    sensor = sensor_reading(lambda: Reading({RAIL: 3.0} if next(turns) % 2 else {"other": 1.0}))
    with Recorder(sensor, tmp_path) as recorder:
        time.sleep(0.1)
    samples = recorder.recording.samples()
    assert set(samples) == {"time_s", f"{RAIL}_w", "other_w"}
    assert "unavailable" in samples["other_w"]


@pytest.mark.parametrize("error", [OSError(19, "No such device", "power1_input"), ValueError("holds '?'")])
def test_errors_of_a_sensor_are_counted_and_it_is_asked_less_often(tmp_path, monkeypatch, error):
    monkeypatch.setattr(module, "_RETRY_S", 0.1)
    asked = []

    def read():
        asked.append(1)
        raise error

    with Recorder(sensor_reading(read), tmp_path) as recorder:
        time.sleep(0.35)
    assert 2 <= len(asked) <= 10  # Every 5 ms it would have been 70.
    assert recorder.recording.told() == [
        f"{'power1_input: No such device' if isinstance(error, OSError) else error} ({len(asked)} times)"
    ]


@pytest.mark.parametrize("error", [RuntimeError("driver bug"), KeyError("x"), ZeroDivisionError()])
def test_a_thread_that_dies_is_told_with_what_was_known_until_then(tmp_path, error):
    turns = iter(range(10**6))

    def read():
        if next(turns) == 20:
            raise error
        return steady()

    with Recorder(sensor_reading(read), tmp_path) as recorder:
        wait_for(lambda: recorder.recording.problems)
        time.sleep(0.2)
    recording = recorder.recording
    assert len(recording.readings) == 20
    assert any(type(error).__name__ in p and "thread died" in p for p in recording.told())
    figures = energy(recording, [(recording.times_ns[0], recording.times_ns[-1])], 4)
    assert figures["mean_w"] == pytest.approx(10.0, rel=0.01)
    late = energy(recording, [(recording.times_ns[0], recording.end_ns)], 4)
    assert "cover" in late["gross_j_per_inference"]["unavailable"]


def test_a_sensor_that_never_answers_does_not_hold_the_measurement_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_JOIN_S", 0.2)
    release = threading.Event()
    began = time.monotonic()
    with Recorder(sensor_reading(lambda: (release.wait(10), steady())[1]), tmp_path) as recorder:
        time.sleep(0.05)
    assert time.monotonic() - began < 2
    assert any("did not answer" in p for p in recorder.recording.told())
    release.set()


@pytest.mark.parametrize(("value", "problem"), [(math.nan, "no number"), (math.inf, "no number"), (-3.0, "below zero")])
def test_values_that_cannot_be_are_dropped(tmp_path, value, problem):
    turns = iter(range(10**6))
    sensor = sensor_reading(lambda: Reading({RAIL: value}) if next(turns) % 3 == 0 else steady())
    with Recorder(sensor, tmp_path) as recorder:
        time.sleep(0.3)
    recording = recorder.recording
    assert any(problem in p for p in recording.told())
    figures = energy(recording, [(recording.times_ns[0], recording.times_ns[-1])], 4)
    assert figures["mean_w"] == pytest.approx(10.0, rel=0.01)


def test_steps_of_the_wall_clock_do_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with Recorder(sensor_reading(steady), tmp_path) as recorder:
        time.sleep(0.1)
    recording = recorder.recording
    assert "value" in energy(recording, [(recording.times_ns[0], recording.times_ns[-1])], 4)["gross_j_per_inference"]


def test_closing_that_fails_is_told(tmp_path):
    def close():
        raise RuntimeError("busy")

    sensor = dataclasses.replace(sensor_reading(steady), close=close)
    with Recorder(sensor, tmp_path) as recorder:
        time.sleep(0.02)
    assert recorder.recording.told() == ["closing the sensor: busy"]


def test_an_error_of_the_measurement_passes_through(tmp_path):
    closed = []
    sensor = dataclasses.replace(sensor_reading(steady), close=lambda: closed.append(1))
    with pytest.raises(KeyError), Recorder(sensor, tmp_path):
        raise KeyError("measurement")
    assert closed == [1]


def test_reading_takes_little_of_the_processor(tmp_path):
    """What a board's sensor costs at its own period: well under a hundredth of a core, thread and files together."""
    from sparsifiner_edge.profiles.sensors import find_sensor
    from tests.sensors import trees

    trees.orin_nano(tmp_path)
    sensor = find_sensor(tmp_path)
    before = time.thread_time()
    for _ in range(100):
        sensor.read()
    cost_s = (time.thread_time() - before) / 100
    assert cost_s / sensor.period_s < 0.01
