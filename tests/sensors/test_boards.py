"""Tests of sensors on each board's files: choice of sensor, parts of its total, and messages for unreadable files."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest

from sparsifiner_edge.profiles.sensors import SENSORS, Recording, find_sensor
from sparsifiner_edge.profiles.sensors import power as sensor_files
from sparsifiner_edge.records import write_record
from tests.plain import conditions, energy
from tests.sensors import trees
from tests.sensors.curves import often

pytestmark = pytest.mark.usefixtures("no_nvml")
ORIN = Path(trees.I2C) / "ina3221/1-0040/hwmon/hwmon1"


@pytest.fixture
def deny(monkeypatch):
    """Make files with these endings fail with an error number, since root may read everything."""

    def refuse(ending: str, number: int = errno.EACCES) -> None:
        read = sensor_files.Path.read_bytes

        def refusing(path: Path) -> bytes:
            if str(path).endswith(ending):
                raise OSError(number, "refused" if number != errno.EACCES else "Permission denied", str(path))
            return read(path)

        monkeypatch.setattr(sensor_files.Path, "read_bytes", refusing)

    return refuse


AGX_ORIN = {
    "VDD_GPU_SOC": 19.104 * 0.165,
    "VDD_CPU_CV": 19.104 * 0.749,
    "VIN_SYS_5V0": 4.968,
    "VDDQ_VDD2_1V8AO": 4.968 * 0.22,
}


@pytest.mark.parametrize(
    ("board", "rails", "total", "clocks", "mode"),
    [
        (trees.orin_nano, {"VDD_IN": 5.040 * 1.132}, "feeds the other rails", {"cpu": 1344.0}, "MAXN_SUPER"),
        (trees.thor, {"VIN": 19.78}, "feeds the other rails", {"gpu": 314.0, "memory": 4266.0}, "120W"),
        (trees.agx_orin, AGX_ORIN, "lower than a wall meter", {"gpu": 407.0}, "MAXN"),
    ],
)
def test_a_jetsons_total_is_the_rail_that_feeds_the_others_or_their_sum(tmp_path, board, rails, total, clocks, mode):
    sensor = find_sensor(board(tmp_path))
    assert sensor.name == "ina"
    assert sensor.read() == {rail: pytest.approx(watts) for rail, watts in rails.items()}
    assert total in sensor.total
    assert all(rail in sensor.total for rail in rails)
    look = conditions(tmp_path)
    assert look["clocks_mhz"].items() >= clocks.items()
    assert look["power_mode"] == mode


def test_rapl_counts_each_package_once_and_is_for_the_processor(tmp_path):
    sensor = find_sensor(trees.x86(tmp_path), on="cpu")
    assert (sensor.name, sensor.counts) == ("rapl", True)
    assert sensor.read() == {
        "package-0": 1000.0,
        "dram (package-0)": 200.0,
        "package-1": 3000.0,
        "dram (package-1)": 500.0,
    }
    assert sensor.wraps_j["dram (package-1)"] == pytest.approx(65712.999613)
    assert "graphics card only" in sensor.not_used["nvml"]
    assert "processor only" in find_sensor(tmp_path, on="gpu").not_used["rapl"]


def test_what_only_root_may_read_says_so(tmp_path, deny):
    trees.orin_nano(trees.x86(tmp_path))
    deny("in1_label")
    sensor = find_sensor(tmp_path)
    assert sensor.name == "rapl"
    assert "in1_label: Permission denied" in sensor.not_used["ina"]
    deny("energy_uj")
    assert "chmod a+r" in find_sensor(tmp_path).not_used["rapl"]


def test_no_sensor_says_why_for_every_one(tmp_path):
    sensor = find_sensor(tmp_path)
    assert not sensor.available
    assert list(sensor.not_used) == list(SENSORS)
    assert all(reason and name in sensor.total for name, reason in sensor.not_used.items())
    with Recording(sensor, tmp_path) as recording:
        recording.stay_idle(0.05)
    assert recording.samples() == {}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file, deny: deny(file.name), "Permission denied"),
        (lambda file, deny: file.write_text("-4"), "below zero"),
        (lambda file, deny: file.write_text("\xff??", encoding="latin-1"), "curr1_input holds"),
    ],
)
def test_what_goes_wrong_midway_is_told_and_leaves_a_gap(tmp_path, deny, change, problem):
    trees.orin_nano(tmp_path)
    with Recording(often(find_sensor(tmp_path)), tmp_path) as recording:
        time.sleep(0.2)
        change(tmp_path / ORIN / "curr1_input", deny)
        time.sleep(0.2)
    assert any(problem in text for text in recording.problem_counts())
    assert all(reading["VDD_IN"] > 0 for reading in recording.readings)
    figures = energy(recording, [(recording.start_ns, time.monotonic_ns())], 10)
    assert "cover" in figures["gross_j_per_inference"]["unavailable"]


def test_conditions_of_an_orin_nano_and_what_refuses_is_left_out(tmp_path, deny):
    assert conditions(trees.orin_nano(tmp_path)) == {
        "clocks_mhz": {"cpu": pytest.approx(1344.0), "gpu": pytest.approx(305.0), "memory": pytest.approx(2133.0)},
        "temperature_c": {"cpu-thermal": 46.531, "gpu-thermal": 46.093, "soc0-thermal": 45.406},
        "throttled_by": [],
        "throttle_counts": {"oc1_event_cnt": 0, "oc2_event_cnt": 0, "oc3_event_cnt": 0},
        "power_mode": "MAXN_SUPER",
    }
    (tmp_path / "etc/nvpmodel.conf").unlink()
    deny("thermal_zone1/temp", errno.EAGAIN)
    deny("clk/emc/rate")
    look = conditions(tmp_path)
    assert set(look["temperature_c"]) == {"cpu-thermal", "soc0-thermal"}
    assert look["power_mode"] == "2"
    assert "memory" not in look["clocks_mhz"]
    (tmp_path / "var/lib/nvpmodel/status").write_text("???")
    assert "power_mode" not in conditions(tmp_path)


def test_conditions_of_a_pc_and_of_an_empty_machine(tmp_path):
    look = conditions(trees.x86(tmp_path / "pc"))
    assert look["clocks_mhz"] == {"cpu": 4700.0}
    assert look["temperature_c"] == {"x86_pkg_temp": 51.0, "acpitz": 27.8}
    assert look["throttle_counts"] == {"core_throttle_count": 0, "package_throttle_count": 7}
    empty = conditions(tmp_path / "empty")
    assert {name for name, value in empty.items() if value} == {"throttled_by"}
    assert "no cooling device" in empty["throttled_by"]["unavailable"]


def test_throttling_and_clocks_are_those_within_the_windows(tmp_path):
    trees.orin_nano(tmp_path)
    clock, alert = (
        tmp_path / "sys/class" / file for file in ("devfreq/17000000.gpu/cur_freq", "thermal/cooling_device1/cur_state")
    )
    with Recording(often(find_sensor(tmp_path)), tmp_path, conditions_period_s=0.03) as recording:
        recording.stay_idle(0.15)
        clock.write_text("1020000000")
        alert.write_text("1")
        start = time.monotonic_ns()
        time.sleep(0.3)
        alert.write_text("0")
        (tmp_path / "sys/class/hwmon/hwmon3/oc3_event_cnt").write_text("4")
        clock.write_text("306000000")
        time.sleep(0.3)
        end = time.monotonic_ns()
        falling = threading.Timer(0.1, clock.write_text, ["114000000"])
        falling.start()
        recording.stay_idle(0.3)
        falling.join()
    seen = write_record(recording.conditions([(start, end)]))
    assert seen["throttled_by"] == ["cpu-throttle-alert", "oc3_event_cnt"]
    assert seen["before"]["throttled_by"] == []
    assert min(seen["during"]["gpu_mhz"]) >= 305
    assert max(seen["during"]["gpu_mhz"]) == 1020
    assert seen["during"]["temperature_c.cpu-thermal"][0] == pytest.approx(46.531)
