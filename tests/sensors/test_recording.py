"""Tests of the recording thread: the real-time path, and misbehaving sensors and clocks."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from sparsifiner_edge.profiles.sensors import PowerSensor, Recording
from sparsifiner_edge.profiles.sensors import recording as module
from tests.commands import wait_for
from tests.plain import energy
from tests.sensors.curves import RAIL, SECOND, square

pytestmark = [pytest.mark.usefixtures("no_nvml")]


def sensor_reading(read, **settings):
    return PowerSensor("synthetic", "synthetic", 0.005, read, **settings)


def steady():
    return {RAIL: 10.0 + 1e-6 * (time.monotonic_ns() % 1000)}


@pytest.mark.parametrize("counts", [False, True], ids=["power", "counter"])
def test_known_integrals_through_thread_and_clock(tmp_path, counts):
    """Each reading is delayed by up to 2 ms."""
    random, power = np.random.default_rng(0), square(8.0, 24.0, 0.11585)
    for _ in range(20):
        began = time.monotonic()

        def read(began=began):
            time.sleep(random.uniform(0, 0.002))
            return {RAIL: float((power.joules if counts else power.watts)(np.array(time.monotonic() - began)))}

        with Recording(sensor_reading(read, counts=counts), tmp_path) as recording:
            time.sleep(0.05)
            start = time.monotonic_ns()
            time.sleep(1.0)
            end = time.monotonic_ns()
            time.sleep(0.05)
        if max(np.diff(recording.times_ns)) < SECOND / 40:
            break  # On a busy machine the thread waits for a core, and missed readings cannot be recovered.
    figures = energy(recording, [(start, end)], 20)
    first, last = start / SECOND - began, end / SECOND - began
    expected = float(power.joules(np.array(last)) - power.joules(np.array(first))) / 20
    assert figures["gross_j_per_inference"]["value"] == pytest.approx(expected, rel=0.02)
    assert recording.problem_counts() == []


def test_a_thread_that_dies_is_told_with_what_was_known_until_then(tmp_path):
    turns = iter(range(10**6))

    def read():
        if next(turns) == 20:
            raise RuntimeError("driver bug")
        return steady()

    with Recording(sensor_reading(read), tmp_path) as recording:
        wait_for(lambda: recording.problems)
        time.sleep(0.2)
        end = time.monotonic_ns()
    assert recording.problem_counts() == ["the sampling thread died: RuntimeError: driver bug"]
    figures = energy(recording, [(recording.times_ns[0], recording.times_ns[-1])], 4)
    assert figures["mean_w"] == pytest.approx(10.0, rel=0.01)
    late = energy(recording, [(recording.times_ns[0], end)], 4)
    assert "cover" in late["gross_j_per_inference"]["unavailable"]


def test_a_sensor_that_never_answers_does_not_hold_the_measurement_up(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_JOIN_S", 0.2)
    release = threading.Event()
    began = time.monotonic()
    with Recording(sensor_reading(lambda: (release.wait(10), steady())[1]), tmp_path) as recording:
        time.sleep(0.05)
    assert time.monotonic() - began < 2
    assert any("did not answer" in problem for problem in recording.problem_counts())
    release.set()
