import re
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import asdict, replace

from sparsifiner_edge.profiles import flags
from sparsifiner_edge.profiles.flags import THRESHOLDS
from sparsifiner_edge.profiles.measure.layers import LAYER_KINDS
from sparsifiner_edge.profiles.measure.observe import busy_s, other_cores
from sparsifiner_edge.profiles.measure.side import WarmUp
from sparsifiner_edge.profiles.sensors.conditions import conditions, summarise_conditions
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.runtime.onnxruntime.session import FALLBACK

CALM = np.random.default_rng(0).normal(10.0, 0.1, 2000)


def names(found):
    assert all(all(asdict(flag).values()) for flag in found)
    return [flag.flag for flag in found]


def test_a_calm_measurement_has_no_flag():
    assert flags.spread_flags(CALM) == flags.length_flags(CALM) == flags.load_flags(0.04) == []
    assert flags.warm_up_flags(WarmUp(settled=True, queries=50, seconds=5.0)) == []


def test_scatter_and_drift_are_unstable_each_in_its_words():
    random = np.random.default_rng(2)
    wide = flags.spread_flags(random.normal(10, 1, 2000))
    assert names(wide) == ["unstable"]
    assert "p10 to p90 spans" in wide[0].what
    drifting = flags.spread_flags(CALM * np.linspace(1, 1.05, len(CALM)))
    assert drifting[-1].what.endswith("slower than the first")
    assert "faster" in flags.spread_flags(CALM * np.linspace(1.05, 1, len(CALM)))[-1].what
    # A few outliers are no scatter, and noise is no drift.
    assert flags.spread_flags(np.where(random.random(2000) < 0.02, 10.0, 1.0) * CALM) == []
    assert flags.spread_flags(np.tile(CALM, 3)) == []


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (CALM[:100], "1 s of queries, less than 3 s"),
        (1000 * CALM[:20], "20 queries, less than 64"),
        (np.repeat([10.0, 11.0, 12.0, 13.0], 200), "too few independent queries"),
    ],
)
def test_too_short_says_of_what_there_is_too_little(samples, reason):
    found = flags.length_flags(samples)
    assert names(found) == ["too-short"]
    assert reason in found[0].what


def test_a_run_that_was_cut_short_and_one_that_never_settled():
    assert "max_seconds" in flags.length_flags(CALM, "max_seconds came before 64 queries")[0].what
    assert names(flags.warm_up_flags(WarmUp(settled=False, queries=50, seconds=5.0))) == ["not-warmed-up"]


def tree(root, mhz, state=0, count=0):
    for name, text in {
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": str(mhz * 1000),
        "sys/class/thermal/cooling_device0/type": "cpu-throttle-alert",
        "sys/class/thermal/cooling_device0/cur_state": str(state),
        "sys/class/hwmon/hwmon0/oc1_event_cnt": str(count),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return conditions(root)


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ([{"mhz": 1500}, {"mhz": 1530}] * 2, []),
        # The clock before and after is that of an idle machine.
        ([{"mhz": 500}, {"mhz": 1500}, {"mhz": 1500}, {"mhz": 500}], []),
        ([{"mhz": 1500}, {"mhz": 1500}, {"mhz": 1100}, {"mhz": 1500}], ["clock-drift"]),
        ([{"mhz": 1500}, {"mhz": 1500, "state": 1}, {"mhz": 1500}, {"mhz": 1500}], ["throttled"]),
        ([{"mhz": 1500}, {"mhz": 1500}, {"mhz": 1500}, {"mhz": 1500, "count": 3}], ["throttled"]),
    ],
)
def test_clocks_and_throttling_are_read_from_the_boards_tree(tmp_path, looks, expected):
    before, *during, after = [tree(tmp_path / str(i), **look) for i, look in enumerate(looks)]
    assert names(flags.condition_flags(summarise_conditions(before, during, after), "cpu")) == expected


@pytest.mark.parametrize(("on", "expected"), [("gpu", ["clock-drift"]), ("cpu", [])])
def test_a_gpus_clock_counts_where_it_computes(tmp_path, on, expected):
    nothing = conditions(tmp_path)
    looks = [replace(nothing, clocks_mhz={"gpu": mhz}) for mhz in (1000.0, 900.0)]
    assert names(flags.condition_flags(summarise_conditions(nothing, looks, nothing), on)) == expected


@pytest.mark.parametrize(
    ("kernels", "do"),
    [
        ("function bodies (the native library is not built)", "Repair the native library"),
        (FALLBACK, "--backend tensorrt"),
        ("function bodies", None),
        ("none (standard operators), with pageable copies", None),
        (Unavailable("the session does not say"), None),
    ],
)
def test_function_bodies_in_the_place_of_kernels(kernels, do):
    found = flags.kernel_flags(kernels)
    assert names(found) == (["portable-kernels"] if do else [])
    assert all(do in flag.do and kernels in flag.what for flag in found)


def stat(root, busy):
    (root / "proc").mkdir(parents=True, exist_ok=True)
    # One line for all, then one for each core: user nice system idle iowait irq softirq steal guest guest_nice.
    cores = "\n".join(f"cpu{i} {busy} 0 0 99999 500 0 0 10 {busy} 0" for i in range(4096))
    (root / "proc/stat").write_text(f"cpu 1 2 3 4 5 6 7 8 9 10\n{cores}\nintr 5\n")
    return busy_s(root)


def test_busy_time_counts_the_allowed_cores_without_idle_waiting_and_guests(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3})
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    before, after = stat(tmp_path, busy=100), stat(tmp_path, busy=300)
    assert before == pytest.approx(2 * 1.1)
    assert after - before == pytest.approx(4.0)
    assert other_cores(100.0, 109.9, 9.5, 10.0) == pytest.approx(0.04)
    assert names(flags.load_flags(other_cores(100.0, 105.0, 1.0, 10.0))) == ["other-load"]


def test_without_procfs_there_is_a_reason(tmp_path):
    seen = other_cores(busy_s(tmp_path), busy_s(tmp_path), 0.0, 1.0)
    assert "not readable" in seen.why
    assert flags.load_flags(seen) == []


def test_the_documentation_names_every_flag_kind_and_figure():
    text = (Path(__file__).parents[1] / "docs/profiling.md").read_text(encoding="utf-8")
    source = Path(flags.__file__).read_text(encoding="utf-8")
    for name in {*re.findall(r'Flag\("([a-z-]+)"', source), *LAYER_KINDS}:
        assert f"| `{name}` |" in text
    assert "less than 3 s" in text
    assert (THRESHOLDS["seconds"], THRESHOLDS["spread"], THRESHOLDS["clock"]) == (3.0, 0.10, 0.05)
