"""Tests of energy from power curves of known integral, and of the messages if it cannot be known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.plain import energy
from tests.sensors.curves import (
    RAIL,
    Power,
    record_counter,
    record_power,
    recording,
    sample_times,
    sensor_of,
    square,
    window,
)

IDLE_W, BEGIN, END, TOTAL, INFERENCES, WRAP = 5.0, 10.0, 40.0, 50.0, 300, 262143.328850
WINDOWS, IDLE = [window(BEGIN, END)], [window(0.5, 9.0), window(41.0, 49.5)]
TIMES = sample_times(TOTAL, 0.1, 0)
YEAR = window(0, 365 * 24 * 3600)[1]
GROSS, NET = "gross_j_per_inference", "net_j_per_inference"


def scene(low, high, after=IDLE_W):
    """Return ten idle seconds, thirty of work alternating between two levels, ten idle."""
    starts = np.arange(BEGIN, END, 1.1585)
    return Power([0, *starts, END, TOTAL], [IDLE_W, *np.resize([low, high], len(starts)), after])


CONSTANT, CHANGING = scene(20, 20), scene(12, 22)


def truth(power):
    """Return joules per inference, gross and net."""
    joules = float(power.joules(np.array(END)) - power.joules(np.array(BEGIN)))
    return joules / INFERENCES, (joules - IDLE_W * (END - BEGIN)) / INFERENCES


def judged(recorded, windows=WINDOWS, inferences=INFERENCES):
    """Compute energy at a CLOCK_MONOTONIC of one year, at which float seconds lose a few nanoseconds."""
    recorded.start_ns, recorded.times_ns = YEAR, [YEAR + moment for moment in recorded.times_ns]
    recorded.idle, windows = ([(YEAR + a, YEAR + b) for a, b in spans] for spans in (IDLE, windows))
    figures = energy(recorded, windows, inferences)
    assert "null" not in json.dumps(figures, allow_nan=False)
    return figures


@pytest.mark.parametrize("power", [CONSTANT, CHANGING])
@pytest.mark.parametrize("kind", ["power", "counter"])
def test_energy_of_known_integrals_is_within_one_percent(power, kind):
    gross, net = truth(power)
    for seed in range(20):
        times = sample_times(TOTAL, 0.1, seed)
        figures = judged(record_power(power, times) if kind == "power" else record_counter(power, times, WRAP))
        assert figures[GROSS]["value"] == pytest.approx(gross, rel=0.01)
        assert figures[NET]["value"] == pytest.approx(net, rel=0.015)
        assert figures["idle_w"] == pytest.approx(IDLE_W, rel=0.01)
        assert figures["mean_w"] == pytest.approx(gross * INFERENCES / (END - BEGIN), rel=0.01)
        assert figures["readings"] == pytest.approx(300, abs=5)


def uneven(seed, mean=20.0, deviation=4.0):
    """Random power that changes every 0.2 s: the average of a longer run is known."""
    levels = np.random.default_rng(seed).normal(mean, deviation, int(TOTAL / 0.2) + 1)
    return Power(np.arange(len(levels) + 1) * 0.2, levels)


@pytest.mark.parametrize("record", [record_power, record_counter])
def test_the_stated_interval_holds_the_mean(record):
    held = widths = 0.0
    for seed in range(60):
        found, wanted = judged(record(uneven(seed), sample_times(TOTAL, 0.1, seed)))[GROSS], 20.0 * 30 / INFERENCES
        held += found["low"] <= wanted <= found["high"]
        widths += (found["high"] - found["low"]) / wanted
    assert held / 60 >= 0.9
    assert widths / 60 < 0.15, "an interval that says nothing holds everything"
    short = judged(record(uneven(1), TIMES), [window(BEGIN, BEGIN + 1)], 10)
    assert "too few" in short[GROSS]["low"]["unavailable"]


def test_net_intervals_widen_with_the_drift_of_the_baseline():
    def width(after):
        figures = judged(record_power(scene(20, 20, after), TIMES))
        return figures[NET]["high"] - figures[NET]["low"], figures["idle_w"]

    quiet, drifted = width(5.0), width(7.0)
    assert drifted[1] == pytest.approx(6.0)
    # Half of two watts, over 30 seconds, either side.
    assert drifted[0] - quiet[0] == pytest.approx(2 * 1.0 * 30 / INFERENCES, rel=0.3)


@pytest.mark.parametrize("counted", [False, True])
def test_two_programs_in_turn_are_told_apart(counted):
    """`profile --against` runs blocks of 0.2 s in random order, one program at 10 W, the other at 20 W."""
    period, block, begin = (0.05, 0.2, 5.0) if counted else (0.1, 0.2, 5.0)
    for seed in range(20):
        turns = [t for _ in range(25) for t in ((0, 1, 1, 0), (1, 0, 0, 1))[np.random.default_rng(seed).integers(2)]]
        levels = np.array([5.0, *(20.0 if turn else 10.0 for turn in turns), 5.0])
        bounds = np.array([0.0, *(begin + block * n for n in range(len(turns) + 1)), begin * 2 + block * len(turns)])
        power, times = Power(bounds, levels), sample_times(float(bounds[-1]), period, seed)
        recorded = record_counter(power, times) if counted else record_power(power, times)
        for side, level in ((0, 10.0), (1, 20.0)):
            starts = [begin + block * n for n, turn in enumerate(turns) if turn == side]
            figures = energy(recorded, [window(a, a + block) for a in starts], 100)
            assert figures["mean_w"] == pytest.approx(level, rel=0.03)
            assert figures["window_s"] == pytest.approx(block * len(starts))


@pytest.mark.parametrize("wrap", [None, WRAP])
def test_a_counter_that_is_reset_leaves_a_gap_and_no_nonsense(wrap):
    recorded = record_counter(CONSTANT, TIMES, wrap, start=90000.0)
    at = int(np.searchsorted(TIMES, 25.0))
    base = recorded.readings[at][RAIL]
    recorded.readings[at:] = [{RAIL: reading[RAIL] - base} for reading in recorded.readings[at:]]
    assert judged(recorded)[GROSS]["value"] == pytest.approx(2.0, rel=0.01)


def test_rails_that_are_read_together_add_up():
    readings = [{"package-0": float(j % 500), "package-1": float(2 * j % 800)} for j in CHANGING.joules(TIMES)]
    sensor = sensor_of(counts=True, wraps_j={"package-0": 500.0, "package-1": 800.0})
    figures = judged(recording(TIMES, readings, sensor))
    assert figures[GROSS]["value"] == pytest.approx(3 * truth(CHANGING)[0], rel=0.01)


def test_readings_that_end_early_give_what_is_known_or_say_that_it_is_too_little():
    mostly, barely = (judged(record_power(CONSTANT, TIMES[end > TIMES])) for end in (37, 25))
    assert mostly[GROSS]["value"] == pytest.approx(2.0, rel=0.01)
    assert "50%" in barely[GROSS]["unavailable"]
    assert "50%" in barely["mean_w"]["unavailable"]
    assert barely["idle_w"] == pytest.approx(IDLE_W)


@pytest.mark.parametrize(("windows", "inferences"), [([], 10), ([window(10, 40)], 0), ([window(20, 10)], 5)])
def test_an_empty_window_or_no_inference_has_no_figure(windows, inferences):
    figures = judged(record_power(CONSTANT, TIMES), windows, inferences)
    for name in (GROSS, NET, "mean_w"):
        assert "too few for an energy" in figures[name]["unavailable"]


def test_windows_shorter_than_the_sensors_average_have_no_figure():
    """Two programs alternate every 0.2 s, so a one-second average cannot separate them."""
    blocks = [window(0.4 * n, 0.4 * n + 0.2) for n in range(20, 100)]
    figures = judged(record_power(square(5.0, 25.0, 0.2), TIMES, average_s=1.0), blocks)
    assert "averages over 1 s" in figures[GROSS]["unavailable"]
    # Consecutive blocks of one process are one window.
    close = [window(10 + n, 10.99 + n) for n in range(30)]
    assert "value" in judged(record_power(CONSTANT, TIMES, average_s=1.0), close)[GROSS]


def test_without_idle_or_where_the_sensor_reads_the_same_at_work_there_is_no_net():
    figures = energy(record_power(CONSTANT, TIMES), [window(BEGIN, END)], INFERENCES)
    assert figures[GROSS]["value"] == pytest.approx(2.0, rel=0.01)
    assert "no idle baseline" in figures[NET]["unavailable"]
    figures = judged(record_power(Power([0, TOTAL], [5.7]), TIMES))
    assert figures["mean_w"] == pytest.approx(5.7)
    assert "hangs" in figures[NET]["unavailable"]
