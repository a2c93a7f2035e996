"""What the page makes of damaged, hostile and large results."""

from __future__ import annotations

import time

import numpy as np
import pytest

from sparsifiner_edge.report import Prices
from tests.commands import assert_refused, call, snapshot
from tests.report.outline import written

HOSTILE = "<script>alert(1)</script>\"'&\u202e$x^2$"


def test_names_are_never_markup(changed, tmp_path):
    def change(result):
        for subject in result["subjects"]:
            subject["name"] = HOSTILE
            subject["path"] = "/tmp/" + HOSTILE + subject["role"]
        result["command"] = [HOSTILE]
        result["machine"]["cpu_model"] = HOSTILE
        result["environment"]["packages"][HOSTILE] = HOSTILE
        result["statistics"]["subject"]["flags"] = [{"flag": HOSTILE, "what": HOSTILE, "do": HOSTILE}]
        result["statistics"]["subject"]["layers"] = [{"name": HOSTILE, "kind": HOSTILE, "ms": 1.0}]

    summary, page = written([changed("comparison", change, "<b>.json")], tmp_path / "r.html")
    assert not [tag for tag, _ in page.tags if tag in ("script", "b.json")]
    assert page.open == []
    assert "<script>alert(1)</script>" in page.text  # As text, it is all there.
    assert "\u202e" not in (tmp_path / "r.html").read_text()
    assert len(summary["images"]) >= 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "has no schema_version"),
        ("[1]", "has no schema_version"),
        ("not JSON", "cannot be read"),
        ('{"schema_version": 99}', "has schema 99; this version reads 2 alone"),
        ('{"schema_version": 2}', "kind is missing"),
        ("[" * 5000, "cannot be read"),
    ],
)
def test_what_is_no_result_is_refused(capsys, real, tmp_path, content, message):
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    outcome = call(capsys, "report", real["comparison"], bad, "-o", tmp_path / "r.html")
    assert_refused(outcome, "bad.json", message)
    assert not (tmp_path / "r.html").exists()


def test_nan_is_refused(capsys, changed, tmp_path):
    for name, change in (
        ("samples.subject.latency_ms[3]", lambda r: r["samples"]["subject"]["latency_ms"].__setitem__(3, float("nan"))),
        ("statistics.against.load_ms", lambda r: r["statistics"]["against"].update(load_ms=float("inf"))),
    ):
        outcome = call(capsys, "report", changed("comparison", change), "-o", tmp_path / "r.html")
        assert_refused(outcome, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "There is no result to report"),
        (["{real}", "--price-kwh", "-1"], "price-kwh is -1.0"),
        (["{real}", "--price-kwh", "nan"], "price-kwh is nan"),
        (["{real}", "--currency", "EUR"], "a currency but no price"),
        (["{real}", "--lang", "tlh"], "--lang"),
        (["{real}", "-o", "{real}"], "is one of the results"),
        (["{real}", "-o", "{folder}"], "is a folder"),
        (["{folder}"], "is a folder"),
        (["nowhere.json"], "does not exist"),
        (["{real}", "--bundle", "{folder}"], "does not exist"),
    ],
)
def test_bad_use(capsys, real, tmp_path, arguments, message):
    before = snapshot(tmp_path)
    given = [a.format(real=real["comparison"], folder=tmp_path) for a in arguments]
    target = [] if "-o" in arguments else ["-o", tmp_path / "r.html"]
    assert_refused(call(capsys, "report", *given, *target), message)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("value", [None, 3, "x", [], [1], {}, {"a": {}}, True, {"value": "x"}, 10**400, -1.5])
def test_figures_of_another_shape_are_left_out(real, changed, tmp_path, value):
    """Only what the schema of results checks can be relied on; null it refuses itself."""
    given = {"unavailable": "x"} if value is None else value

    def one_of_latency(result):
        result["statistics"]["subject"]["latency_ms"]["p50"] = given

    def latency(result):
        result["statistics"]["subject"]["latency_ms"] = given

    def all_others(result):
        result["statistics"]["subject"] |= dict.fromkeys(("energy", "memory", "layers", "flags"), given)

    for number, change in enumerate((one_of_latency, latency, all_others)):
        target = tmp_path / f"{number}.html"
        _, page = written([changed("comparison", change)], target, images=False, prices=Prices(1, 1))
        assert page.open == []


def test_a_result_that_holds_no_figure_of_the_page_is_named(changed, tmp_path):
    def change(result):
        result["subjects"] = [{"path": "x", "sha256": "y"}]
        result["statistics"] = {"edge, keep 0.1": {"patches": {"value": 0.98, "low": 0.97, "high": 0.99}}}

    summary, page = written([changed("evaluation", change)], tmp_path / "r.html")
    assert "changed.json: this page shows none of its figures" in page.text
    assert summary["verdict"][0].startswith("These results hold none")


def test_a_million_samples(changed, tmp_path):
    values = np.random.default_rng(0).lognormal(0, 0.3, 1_000_000).tolist()
    path = changed("comparison", lambda r: r["samples"]["subject"].update(latency_ms=values))
    start = time.monotonic()
    _, page = written([path], tmp_path / "r.html")
    assert time.monotonic() - start < 30
    assert (tmp_path / "r.html").stat().st_size < 3_000_000
    assert page.open == []


@pytest.mark.everything
def test_many_results_on_one_page(changed, tmp_path):
    paths = [
        changed("comparison", lambda r, n=n: r["machine"].update(cpu_model=f"CPU {n}"), f"{n}.json") for n in range(12)
    ]
    summary, _ = written(paths, tmp_path / "r.html", images=False)
    assert len(summary["differences"]["machine"]) == 12
    assert (tmp_path / "r.html").stat().st_size < 3_000_000
