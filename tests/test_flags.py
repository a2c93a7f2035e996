"""Tests of the flags for unreliable measurements: each cause has its message, and sound measurements have none."""

import re
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import asdict, replace

from sparsifiner_edge.profiles import flags
from sparsifiner_edge.profiles.measure.layers import LAYER_KINDS
from sparsifiner_edge.profiles.measure.observe import other_cores
from sparsifiner_edge.profiles.measure.side import WarmUp
from sparsifiner_edge.profiles.sensors.conditions import conditions, summarise_conditions
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.runtime.onnxruntime import FALLBACK

CALM = np.random.default_rng(0).normal(10.0, 0.1, 2000)
NOTHING = conditions(Path("/nowhere"))
SETTLED = WarmUp(settled=True, queries=50, seconds=5.0)


def flagged(latency=CALM, warm_up=SETTLED, seen=None, on="cpu", others=0.04, kernels="native, AVX2", cut_short=None):
    seen = seen or summarise_conditions(NOTHING, [], NOTHING)
    found = flags.flags_of(latency, warm_up, seen, on, others, kernels, cut_short)
    assert all(all(asdict(flag).values()) for flag in found)
    return {flag.flag: flag.what for flag in found}


def test_a_calm_measurement_has_no_flag():
    assert flagged() == {}
    # A few outliers are not scatter, and noise is not drift.
    assert flagged(np.where(np.random.default_rng(2).random(2000) < 0.02, 10.0, 1.0) * CALM) == {}
    assert flagged(np.tile(CALM, 3)) == {}


@pytest.mark.parametrize(
    ("samples", "flag", "reason"),
    [
        (np.random.default_rng(2).normal(10, 1, 2000), "unstable", "p10 to p90 spans"),
        (CALM * np.linspace(1, 1.05, len(CALM)), "unstable", "slower than the first"),
        (CALM * np.linspace(1.05, 1, len(CALM)), "unstable", "faster than the first"),
        (CALM[:100], "too-short", "1 s of queries, less than 3 s"),
        (1000 * CALM[:20], "too-short", "20 queries, less than 64"),
        (np.repeat([10.0, 11.0, 12.0, 13.0], 200), "too-short", "too few independent queries"),
    ],
)
def test_scatter_drift_and_too_few_samples(samples, flag, reason):
    assert reason in flagged(samples)[flag]


def test_a_run_that_was_cut_short_one_that_never_settled_and_one_that_was_not_alone():
    assert "max_seconds" in flagged(cut_short="max_seconds came before 64 queries")["too-short"]
    assert list(flagged(warm_up=replace(SETTLED, settled=False))) == ["not-warmed-up"]
    assert list(flagged(others=other_cores(100.0, 105.0, 1.0, 10.0))) == ["other-load"]
    assert other_cores(100.0, 109.9, 9.5, 10.0) == pytest.approx(0.04)
    assert flagged(others=Unavailable("it is not known")) == {}


def look(mhz, throttled=(), count=0):
    return replace(NOTHING, clocks_mhz={"cpu": mhz}, throttled_by=list(throttled), throttle_counts={"oc1": count})


@pytest.mark.parametrize(
    ("looks", "expected"),
    [
        ([look(1500), look(1530)] * 2, []),
        ([look(500), look(1500), look(1500), look(500)], []),  # Power before and after is that of an idle machine.
        ([look(1500), look(1500), look(1100), look(1500)], ["clock-drift"]),
        ([look(1500), look(1500, ["cpu-throttle-alert"]), look(1500), look(1500)], ["throttled"]),
        ([look(1500), look(1500), look(1500), look(1500, count=3)], ["throttled"]),
    ],
)
def test_clocks_and_throttling(looks, expected):
    before, *during, after = looks
    assert list(flagged(seen=summarise_conditions(before, during, after))) == expected


@pytest.mark.parametrize(("on", "expected"), [("gpu", ["clock-drift"]), ("cpu", [])])
def test_a_gpus_clock_counts_where_it_computes(on, expected):
    looks = [replace(NOTHING, clocks_mhz={"gpu": mhz}) for mhz in (1000.0, 900.0)]
    assert list(flagged(seen=summarise_conditions(NOTHING, looks, NOTHING), on=on)) == expected


@pytest.mark.parametrize(
    ("kernels", "is_flagged"),
    [
        ("function bodies (the native library is not built)", True),
        (FALLBACK, True),
        ("function bodies", False),
        (Unavailable("the session does not say"), False),
    ],
)
def test_function_bodies_in_the_place_of_kernels(kernels, is_flagged):
    found = flagged(kernels=kernels)
    assert list(found) == ["portable-kernels"] * is_flagged
    assert all(kernels in what for what in found.values())


def test_the_documentation_and_the_page_name_every_flag_and_kind():
    text = (Path(__file__).parents[1] / "docs/measure.md").read_text(encoding="utf-8")
    source = Path(flags.__file__).read_text(encoding="utf-8")
    found = re.findall(r'Flag\("([a-z-]+)"', source)
    assert len(found) == 7
    for name in (*found, *LAYER_KINDS):
        assert f"| `{name}` |" in text
    words = Texts("ja")
    assert all(words.get(f"flag.{name}{more}", "") for name in found for more in ("", ".do"))
    assert all(words.get(f"kind.{kind}", "") for kind in LAYER_KINDS)
    assert (flags.LEAST_SECONDS, flags.SCATTER, flags.CLOCK) == (3.0, 0.10, 0.05)
