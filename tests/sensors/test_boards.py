"""Each board's files: which sensor is found, what its total is made of, and what it reads."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from pathlib import Path

import pytest

from sparsifiner_edge.profiles.sensors import PROBES, find_sensor
from sparsifiner_edge.profiles.sensors import base as sensor_base
from sparsifiner_edge.profiles.sensors.recorder import Recorder
from sparsifiner_edge.records import write_record
from tests.plain import conditions, energy
from tests.sensors import trees
from tests.sensors.curves import often

pytestmark = pytest.mark.usefixtures("no_nvml")
ORIN = Path(trees.I2C) / "ina3221/1-0040/hwmon/hwmon1"


@pytest.fixture
def deny(monkeypatch):
    """Root may read everything, so refusals are made up: files whose name ends so answer with an error number."""

    def refuse(ending: str, number: int = errno.EACCES) -> None:
        read = sensor_base.Path.read_bytes

        def refusing(path: Path) -> bytes:
            if str(path).endswith(ending):
                raise OSError(number, "refused" if number != errno.EACCES else "Permission denied", str(path))
            return read(path)

        monkeypatch.setattr(sensor_base.Path, "read_bytes", refusing)

    return refuse


def total_w(sensor):
    watts = sensor.read().watts
    return sum(watts[rail] for rail in sensor.total_rails)


@pytest.mark.parametrize(
    ("board", "name", "total", "rails", "watts"),
    [
        (trees.orin_nano, "ina3221", ["VDD_IN"], 3, 5.040 * 1.132),
        (trees.xavier_nx, "ina3221", ["VDD_IN"], 3, 4.960 * 0.9),
        (trees.thor, "ina238", ["VIN"], 4, 19.78),
        (
            trees.agx_orin,
            "ina3221",
            ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"],
            4,
            19.104 * 0.165 + 19.104 * 0.749 + 4.968 * 1.0 + 4.968 * 0.22,
        ),
    ],
)
def test_boards(tmp_path, board, name, total, rails, watts):
    sensor = find_sensor(board(tmp_path))
    assert sensor.name == name
    assert list(sensor.total_rails) == total
    assert len(sensor.rails) == rails
    assert total_w(sensor) == pytest.approx(watts, rel=1e-3)
    assert all(rail in sensor.total for rail in total)
    assert ("below a wall meter" in sensor.total) == (len(total) > 1)
    # What was preferred to it says why it is not there.
    preferred = list(PROBES)[: list(PROBES).index(name)]
    assert list(sensor.probes) == preferred
    assert all(sensor.probes.values())


def test_thors_rails_are_shown_but_not_added(tmp_path):
    sensor = find_sensor(trees.thor(tmp_path))
    assert set(sensor.read().watts) == {"VIN", "VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"}
    assert total_w(sensor) == pytest.approx(19.78)


def test_shunt_sums_and_channels_that_are_not_wired_are_no_rails(tmp_path):
    rails = find_sensor(trees.agx_orin(tmp_path)).rails
    assert "NC" not in rails
    assert not any("sum" in rail for rail in rails)


def test_a_channel_that_is_switched_off_is_no_rail(tmp_path):
    trees.orin_nano(tmp_path)
    (tmp_path / ORIN / "in3_enable").write_text("0\n")
    assert "VDD_SOC" not in find_sensor(tmp_path).rails


def test_several_ina238_without_names_are_not_guessed_at(tmp_path):
    trees.thor(tmp_path)
    trees.write_tree(tmp_path, {f"{trees.I2C}/ina238/2-0045/hwmon/hwmon9/power1_input": 5000000})
    sensor = find_sensor(tmp_path)
    assert "only one alone is known as the board's input" in sensor.probes["ina238"]
    assert sensor.name == "ina3221"


def test_a_sensor_that_does_not_see_where_inferences_run_is_passed_over(tmp_path):
    trees.x86(tmp_path)
    assert find_sensor(tmp_path, on="cpu").name == "rapl"
    assert "card alone" in find_sensor(tmp_path, on="cpu").probes["nvml"]
    sensor = find_sensor(tmp_path, on="gpu")
    assert sensor.name == "none"
    assert "processor alone" in sensor.probes["rapl"]


def test_rapl_counts_each_package_once(tmp_path):
    sensor = find_sensor(trees.x86(tmp_path))
    assert sensor.name == "rapl"
    assert sensor.total_rails == ("package-0", "dram (package-0)", "package-1", "dram (package-1)")
    joules = sensor.read().joules
    assert sum(joules[rail] for rail in sensor.total_rails) == pytest.approx(1000 + 200 + 3000 + 500)
    assert sensor.wraps_j["package-0"] == pytest.approx(262143.32885)
    assert sensor.wraps_j["dram (package-1)"] == pytest.approx(65712.999613)
    assert sensor.rails == sensor.total_rails


def test_rapl_that_only_root_may_read(tmp_path, deny):
    trees.x86(tmp_path)
    deny("energy_uj")
    reason = find_sensor(tmp_path).probes["rapl"]
    assert "Permission denied" in reason
    assert "chmod a+r" in reason


def test_a_board_whose_files_are_closed(tmp_path, deny):
    trees.orin_nano(tmp_path)
    deny("in1_label")
    assert "in1_label: Permission denied" in find_sensor(tmp_path).probes["ina3221"]


@pytest.mark.parametrize("text", ["garbage", "", "nan", "inf", "\xff\xfe", "12x"])
def test_garbage_is_no_number(tmp_path, text):
    trees.orin_nano(tmp_path)
    (tmp_path / ORIN / "curr1_input").write_text(text, encoding="latin-1")
    sensor = find_sensor(tmp_path)
    assert sensor.name == "none"
    assert "curr1_input holds" in sensor.probes["ina3221"]


def test_no_sensor_says_why_for_every_probe(tmp_path):
    sensor = find_sensor(tmp_path)
    assert sensor.name == "none"
    assert not sensor.available
    assert list(sensor.probes) == list(PROBES)
    assert sensor.total.startswith("unavailable: ")
    for name, reason in sensor.probes.items():
        assert reason
        assert name in sensor.total
    with Recorder(sensor, tmp_path) as recorder:
        recorder.idle(0.05)
    figures = energy(recorder.recording, [(recorder.recording.start_ns, recorder.recording.end_ns)], 3)
    assert "no power sensor" in figures["total"]
    assert "unavailable" in figures["gross_j_per_inference"]
    assert recorder.recording.samples() == {}


def record(root, during, seconds=0.4):
    """The sensor of `root`, and `during` called in the middle of the recording."""
    with Recorder(often(find_sensor(root)), root, conditions_period_s=0.1) as recorder:
        time.sleep(seconds / 2)
        during()
        time.sleep(seconds / 2)
    recording = recorder.recording
    return recording, energy(recording, [(recording.start_ns, recording.end_ns)], 10)


def test_a_file_that_vanishes_midway(tmp_path):
    trees.orin_nano(tmp_path)
    recording, figures = record(tmp_path, (tmp_path / ORIN / "curr1_input").unlink)
    assert any("No such file" in p for p in figures["problems"])
    assert "cover" in figures["gross_j_per_inference"]["unavailable"]
    assert "No such file" in " ".join(recording.told())
    # The other rails are still known.
    assert recording.readings[-1].watts.keys() == {"VDD_CPU_GPU_CV", "VDD_SOC"}


def test_a_folder_that_vanishes_midway(tmp_path):
    trees.orin_nano(tmp_path)
    _, figures = record(tmp_path, lambda: shutil.rmtree(tmp_path / "sys"))
    assert any("No such file" in p for p in figures["problems"])


def test_permission_that_is_withdrawn_midway(tmp_path, deny):
    trees.orin_nano(tmp_path)
    _, figures = record(tmp_path, lambda: deny("in1_input"))
    assert any("Permission denied" in p for p in figures["problems"])


@pytest.mark.parametrize(
    ("text", "problem"), [("-4", "below zero"), ("nan", "holds 'nan'"), ("??", "holds '??'"), ("", "holds ''")]
)
def test_nonsense_midway_is_dropped_and_told(tmp_path, text, problem):
    trees.orin_nano(tmp_path)
    recording, figures = record(tmp_path, lambda: (tmp_path / ORIN / "curr1_input").write_text(text))
    assert any(problem in p for p in figures["problems"])
    assert all(watts > 0 for watts in recording.series(["VDD_IN"], "watts")[1])


def test_conditions_of_an_orin_nano(tmp_path):
    look = conditions(trees.orin_nano(tmp_path))
    assert look["cpu_mhz"] == {"lowest": pytest.approx(729.6), "highest": pytest.approx(1344.0)}
    assert look["cpu_limit_mhz"] == pytest.approx(1728.0)
    assert look["governor"] == "schedutil"
    assert look["gpu_mhz"] == pytest.approx(305.0)
    assert look["gpu_limit_mhz"] == pytest.approx(1020.0)
    assert look["gpu_governor"] == "nvhost_podgov"
    assert look["emc_mhz"] == pytest.approx(2133.0)
    assert look["temperature_c"] == {"cpu-thermal": 46.531, "gpu-thermal": 46.093, "soc0-thermal": 45.406}
    assert look["throttled_by"] == []
    assert look["throttle_counts"] == {"over-current oc1": 0, "over-current oc2": 0, "over-current oc3": 0}
    assert look["power_mode"] == {"id": 2, "name": "MAXN_SUPER"}
    assert look["l4t"] == "R36.4.7"
    assert "nvidia-ml-py" in look["nvml"]["unavailable"]


@pytest.mark.parametrize(
    ("board", "gpu", "emc", "mode"),
    [
        (trees.agx_orin, 407.0, None, "MAXN"),
        (trees.thor, 314.0, 4266.0, "120W"),
        (trees.nano, 76.8, 1600.0, "MAXN"),
    ],
)
def test_conditions_of_other_boards(tmp_path, board, gpu, emc, mode):
    look = conditions(board(tmp_path))
    assert look["gpu_mhz"] == pytest.approx(gpu)
    assert look["emc_mhz"] == pytest.approx(emc) if emc else "root" in look["emc_mhz"]["unavailable"]
    assert look["power_mode"]["name"] == mode


def test_conditions_of_a_pc(tmp_path):
    look = conditions(trees.x86(tmp_path))
    assert look["cpu_mhz"] == {"lowest": 800.0, "highest": 4700.0}
    assert look["temperature_c"] == {"x86_pkg_temp": 51.0, "acpitz": 27.8}
    assert look["throttle_counts"] == {"cpu0 core": 0, "cpu0 package": 7}
    assert "not a Jetson" in look["power_mode"]["unavailable"]


def test_an_unknown_mode_and_a_missing_conf(tmp_path):
    trees.orin_nano(tmp_path)
    (tmp_path / "var/lib/nvpmodel/status").write_text("pmode:0009")
    mode = conditions(tmp_path)["power_mode"]
    assert mode["id"] == 9
    assert "no mode 9" in mode["name"]["unavailable"]
    (tmp_path / "etc/nvpmodel.conf").unlink()
    assert "No such file" in conditions(tmp_path)["power_mode"]["name"]["unavailable"]
    (tmp_path / "var/lib/nvpmodel/status").write_text("???")
    assert "names no mode" in conditions(tmp_path)["power_mode"]["unavailable"]


def test_the_memory_clock_that_only_root_may_read(tmp_path, deny):
    trees.orin_nano(tmp_path)
    deny("clk/emc/rate")
    assert "only root" in conditions(tmp_path)["emc_mhz"]["unavailable"]


def test_a_zone_that_does_not_answer_is_left_out(tmp_path, deny):
    trees.orin_nano(tmp_path)
    deny("thermal_zone1/temp", errno.EAGAIN)
    assert set(conditions(tmp_path)["temperature_c"]) == {"cpu-thermal", "soc0-thermal"}


def test_an_empty_machine_has_reasons_and_no_nulls(tmp_path):
    look = conditions(tmp_path)
    for name, value in look.items():
        assert value is not None, name
        assert value == {} or "unavailable" in value, name


def test_throttling_that_came_and_went_is_told(tmp_path):
    trees.orin_nano(tmp_path)
    alert = tmp_path / "sys/class/thermal/cooling_device1/cur_state"

    def during():
        alert.write_text("1")
        time.sleep(0.6)
        alert.write_text("0")
        (tmp_path / "sys/class/hwmon/hwmon3/oc3_event_cnt").write_text("4")

    recording, _ = record(tmp_path, during)
    told = write_record(recording.conditions([(recording.start_ns, recording.end_ns)]))
    assert told["throttled_by"] == ["cpu-throttle-alert", "over-current oc3"]
    assert told["before"]["throttled_by"] == told["after"]["throttled_by"] == []
    assert told["looks"] >= 2


def test_clocks_during_are_those_within_the_windows(tmp_path):
    trees.orin_nano(tmp_path)
    clock = tmp_path / "sys/class/devfreq/17000000.gpu/cur_freq"
    with Recorder(often(find_sensor(tmp_path)), tmp_path, conditions_period_s=0.03) as recorder:
        recorder.idle(0.15)
        clock.write_text("1020000000")
        start = time.monotonic_ns()
        time.sleep(0.3)
        clock.write_text("306000000")
        time.sleep(0.3)
        end = time.monotonic_ns()
        falling = threading.Timer(0.1, clock.write_text, ["114000000"])
        falling.start()
        recorder.idle(0.3)
        falling.join()
    seen = write_record(recorder.recording.conditions([(start, end)]))["during"]
    assert seen["gpu_mhz"]["lowest"] >= 305
    assert seen["gpu_mhz"]["highest"] == 1020
    assert seen["temperature_c.cpu-thermal"]["median"] == pytest.approx(46.531)
    assert "cpu_mhz.highest" in seen
