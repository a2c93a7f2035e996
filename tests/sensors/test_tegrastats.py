"""tegrastats: its lines from JetPack 4 to 7, and what becomes of a recording when the program misbehaves."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from sparsifiner_edge.profiles.sensors import Recorder, find_sensor
from sparsifiner_edge.profiles.sensors import tegrastats as module
from sparsifiner_edge.profiles.sensors.tegrastats import parse_line
from tests.plain import energy
from tests.sensors.curves import often, wait_for

pytestmark = pytest.mark.usefixtures("no_nvml")

ORIN_NANO = (
    "11-30-2025 13:26:01 RAM 2461/7620MB (lfb 3x2MB) SWAP 1243/3810MB (cached 5MB) CPU [19%@729,12%@729,off,off] "
    "EMC_FREQ 4%@2133 GR3D_FREQ 0%@[305] cpu@46.531C VDD_IN 5704mW/5704mW VDD_CPU_GPU_CV 831mW/831mW VDD_SOC "
    "1624mW/1624mW"
)
AGX_ORIN = (
    "RAM 9000/62840MB EMC_FREQ 1%@2133 GR3D_FREQ 14%@[407,407] VIC_FREQ 115 NVDLA0_FREQ @1600 APE 174 CV0@73.625C "
    "VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV 14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW VDDQ_VDD2_1V8AO 1091mW/1091mW"
)
JETPACK_7 = "GR3D_FREQ 12%@[1300,1300] VDD_GPU_SOC 5139mW/5139mW/5139mW"
THOR = "GR3D_FREQ @[314,314,314] VIN 19780mW/19780mW"
NANO = (
    "RAM 2175/3956MB (lfb 11x4MB) IRAM 0/252kB(lfb 252kB) CPU [2%@102,0%@102,0%@102,0%@102] EMC_FREQ 0% GR3D_FREQ 0% "
    "PLL@29C CPU@32C PMIC@100C GPU@32C AO@37.5C thermal@32.25C POM_5V_IN 4096/3500 POM_5V_GPU 0/12 POM_5V_CPU 289/301"
)
AGX_XAVIER = (
    "RAM 2461/31920MB (lfb 7x4MB) CPU [1%@1190,0%@1190] EMC_FREQ 0%@1331 GR3D_FREQ 0%@318 APE 150 MTS fg 0% bg 0% "
    "GPU 0/0 CPU 311/345 SOC 932/932 CV 0/0 VDDRQ 155/155 SYS5V 1564/1564"
)


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        (ORIN_NANO, {"VDD_IN": 5.704, "VDD_CPU_GPU_CV": 0.831, "VDD_SOC": 1.624}),
        (AGX_ORIN, {"VDD_GPU_SOC": 3.150, "VDD_CPU_CV": 14.312, "VIN_SYS_5V0": 4.968, "VDDQ_VDD2_1V8AO": 1.091}),
        (JETPACK_7, {"VDD_GPU_SOC": 5.139}),
        (THOR, {"VIN": 19.780}),
        (NANO, {"POM_5V_IN": 4.096, "POM_5V_GPU": 0.0, "POM_5V_CPU": 0.289}),
        (AGX_XAVIER, {"GPU": 0.0, "CPU": 0.311, "SOC": 0.932, "CV": 0.0, "VDDRQ": 0.155, "SYS5V": 1.564}),
        ("RAM 2461/7620MB SWAP 0/3810MB IRAM 0/252kB(lfb 252kB) GR3D_FREQ 0%@[305] cpu@46.5C", {}),
        ("VDD_IN 5704mW", {}),
        ("VDD_IN -12mW/40mW", {"VDD_IN": -0.012}),
        ("VDD_IN mW/mW VDD_SOC 1x/2", {}),
        ("", {}),
        ("\x00\xff", {}),
    ],
)
def test_lines(line, watts):
    assert parse_line(line) == {rail: pytest.approx(value) for rail, value in watts.items()}


def install(root: Path, script: str) -> Path:
    """A program that behaves as the script says; "$2" is the interval in ms."""
    program = root / "usr/bin/tegrastats"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return root


def printing(line: str, every_s: float = 0.02) -> str:
    return f'while true; do echo "{line}"; sleep {every_s}; done'


@pytest.mark.parametrize(
    ("line", "total", "watts"),
    [
        (ORIN_NANO, ("VDD_IN",), 5.704),
        (AGX_ORIN, ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"), 23.521),
        (JETPACK_7, ("VDD_GPU_SOC",), 5.139),
        (THOR, ("VIN",), 19.780),
        (f"{THOR} VDD_GPU 4920mW/4920mW VDD_CPU_SOC_MSS 6240mW/6240mW VIN_SYS_5V0 4500mW/4500mW", ("VIN",), 19.780),
        (NANO, ("POM_5V_IN",), 4.096),
    ],
)
def test_a_recording_of_each_format(tmp_path, line, total, watts):
    sensor = find_sensor(install(tmp_path, printing(line)))
    assert (sensor.name, sensor.total_rails) == ("tegrastats", total)
    with Recorder(often(sensor), tmp_path) as recorder:
        seen = recorder.recording.readings
        wait_for(lambda: seen)
        start = time.monotonic_ns()
        wait_for(lambda: len(seen) > 5)
        end = time.monotonic_ns()
        wait_for(lambda: len(seen) > 8)
    figures = energy(recorder.recording, [(start, end)], 10)
    assert figures["mean_w"] == pytest.approx(watts)
    assert figures["problems"] == []


def test_the_interval_is_that_of_the_sensor(tmp_path):
    sensor = find_sensor(install(tmp_path, f'echo "{THOR} ARGS $2/$2"; sleep 60'))
    assert sensor.read().watts["ARGS"] * 1000 == pytest.approx(sensor.period_s * 1000)
    sensor.close()


def test_the_newest_line_counts_when_several_wait(tmp_path):
    sensor = find_sensor(install(tmp_path, 'for n in 1 2 3 4; do echo "VDD_IN $n/0"; done; sleep 60'))
    sensor.close()
    time.sleep(0.05)
    assert sensor.read().watts["VDD_IN"] in (0.004, 0.003, 0.002, 0.001)
    sensor.close()


def test_missing(tmp_path):
    assert "does not exist: not a Jetson" in find_sensor(tmp_path).probes["tegrastats"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "ended with exit status 3"),
        ('echo "RAM 1/2MB GR3D_FREQ 0%"; sleep 60', "names no power rail"),
        ("sleep 60", "printed no line for"),
        ('printf "VDD_IN 5704mW/57"; sleep 60', "printed no line for"),
    ],
)
def test_a_program_that_is_no_use(tmp_path, monkeypatch, script, reason):
    monkeypatch.setattr(module, "_SILENCE_S", 0.3)
    sensor = find_sensor(install(tmp_path, script))
    assert sensor.name == "none"
    assert reason in sensor.probes["tegrastats"]


def test_a_program_that_may_not_be_run(tmp_path):
    install(tmp_path, "exit 0")
    (tmp_path / "usr/bin/tegrastats").chmod(0o644)
    assert "Permission denied" in find_sensor(tmp_path).probes["tegrastats"]


def running(root: Path) -> list[int]:
    """Processes that run the program of `root`, or were started by it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(root).encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def test_a_program_that_is_killed_is_started_again_and_the_gap_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsifiner_edge.profiles.sensors.recorder._RETRY_S", 0.05)
    with Recorder(often(find_sensor(install(tmp_path, printing(ORIN_NANO)))), tmp_path) as recorder:
        wait_for(lambda: len(recorder.recording.readings) > 3)
        before = len(recorder.recording.readings)
        for pid in running(tmp_path):
            with contextlib.suppress(ProcessLookupError):  # One that was ending already.
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len(recorder.recording.readings) > before + 3)
    assert any("exit status -9" in p for p in recorder.recording.told())
    wait_for(lambda: running(tmp_path) == [], 2)


def test_a_program_that_stays_dead(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsifiner_edge.profiles.sensors.recorder._RETRY_S", 0.05)
    again = f'if [ -e "$0.probed" ]; then echo "{THOR}"; rm "$0"; exit 1; fi'
    install(tmp_path, f'{again}; touch "$0.probed"; echo "{THOR}"; sleep 60')
    with Recorder(often(find_sensor(tmp_path)), tmp_path) as recorder:
        wait_for(lambda: any("No such file" in p for p in recorder.recording.problems))
    recording = recorder.recording
    figures = energy(recording, [(recording.start_ns, recording.end_ns)], 10)
    assert "cover 0%" in figures["gross_j_per_inference"]["unavailable"]
    assert any("No such file" in p for p in figures["problems"])


def test_nothing_runs_after_probing(tmp_path):
    find_sensor(install(tmp_path, printing(THOR)))
    wait_for(lambda: running(tmp_path) == [], 2)
