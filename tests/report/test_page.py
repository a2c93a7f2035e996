"""Tests of the page made from real results: its content, and the claims it must not make."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from sparsifiner_edge.cli.common import print_page
from sparsifiner_edge.errors import ConfigError, MissingExtraError
from sparsifiner_edge.profiles.figures import ProfileResult
from sparsifiner_edge.report import texts
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import plain
from sparsifiner_edge.results import read_result
from tests.commands import call
from tests.plain import write_report
from tests.report.outline import written

KINDS = ("comparison", "evaluation", "robustness", "estimate")


def test_the_whole_page_from_real_results(real, tmp_path):
    summary, page = written([real[kind] for kind in KINDS], tmp_path / "report.html")
    assert page.open == []
    assert summary["sections"] == [
        "estimate",
        "accuracy",
        "stability",
        "latency",
        "energy",
        "memory",
        "layers",
        "conditions",
        "method",
    ]
    assert summary["differences"] == {}
    comparison, evaluation, robustness, _ = (json.loads(real[kind].read_text())["statistics"] for kind in KINDS)
    assert f"{evaluation['features_cosine']['mean']['value']:.4f}" in page.text
    losses = robustness["features"]
    assert f"{100 * losses['fog']['teacher']:.2f}" in page.text
    assert f"{100 * losses['all']['extra_drop']['value']:.2f}" in " ".join(summary["verdict"])
    peak = comparison["subject"]["peak_memory_bytes"] / 1e6
    assert f"{peak:,.0f}" in page.text or f"{peak:,.1f}" in page.text
    assert "ESTIMATE for Jetson Orin Nano 8 GB · JetPack 6.2, TensorRT 10.3" in page.text
    for said in ("choosing keys", "p99, ms", "sparsifiner", json.loads(real["comparison"].read_text())["created"]):
        assert said in page.text
    assert [tag for tag, _ in page.tags].count("polygon") == 2
    # Nothing is loaded, and no script runs.
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "object", "embed", "form")]
    attributes = [pair for _, attrs in page.tags for pair in attrs.items()]
    assert [value for name, value in attributes if name in ("src", "href") or name.startswith("on")] == ["data:,"]
    assert not re.search(r"@import|url\(", (tmp_path / "report.html").read_text())


def test_every_result_says_the_command_that_made_it(changed, tmp_path):
    for command, said in (
        (["/x/__main__.py", "profile", "a b", "--against", "c"], "sparsifiner-edge profile 'a b' --against c"),
        (["bench/x.py", "--all"], "python bench/x.py --all"),
    ):
        path = changed("comparison", lambda result, command=command: result.update(command=command))
        assert said in written([path], tmp_path / "report.html")[1].text


DIFFERENT = {
    "machine": lambda r: r["machine"].update(cpu_model="Another"),
    "power_mode": lambda r: r["method"]["conditions"]["subject"]["before"].update(power_mode="15W"),
    "threads": lambda r: r["method"]["runtime"]["subject"].update(threads=7),
    "precision": lambda r: r["method"]["runtime"]["subject"].update(precision="fp16"),
}


def test_a_precision_is_chosen_and_said(real, changed, tmp_path):
    """There is no ratio of two runs in any case."""
    summary, page = written([real["comparison"], changed("profile", DIFFERENT["precision"])], tmp_path / "r.html")
    assert summary["differences"] == {}
    assert all(f"· {value}" in page.text for value in ("fp32", "fp16"))


@pytest.mark.parametrize("field", sorted(DIFFERENT.keys() - {"precision"}))
def test_results_that_differ_stand_below_a_banner(real, changed, tmp_path, field):
    # The side named here is the dense one of the comparison, so that only it could be compared.
    summary, page = written([real["comparison"], changed("profile", DIFFERENT[field])], tmp_path / "r.html")
    assert list(summary["differences"]) == [field]
    assert summary["verdict"][0].startswith("No overall verdict")
    assert "must not be compared" in page.text
    assert all(f"· {value}" in page.text for value in summary["differences"][field])
    assert {attrs["style"] for _, attrs in page.tags if attrs.get("class", "").startswith("bar")} <= {"width:0.0%"}


def test_profile_and_report_say_the_same_of_one_file(capsys, real, changed, tmp_path):
    """For several precisions too, with known fidelity, and with equal figures."""

    def faster(result):
        DIFFERENT["precision"](result)
        result["subjects"][0]["to_float32"] = 0.98765
        result["statistics"]["comparison"]["verdict"] = "faster"
        result["statistics"]["comparison"]["ratio"] |= {"value": 7.6, "low": 7.1, "high": 8.0}

    path = changed("comparison", faster)
    summary, page = written([path], tmp_path / "r.html")
    assert summary["differences"] == {}
    sentence, exported, unknown = summary["verdict"]
    assert " is 7.60 times as fast as " in sentence
    assert sentence.endswith("(95 % interval 7.10 to 8.00); they differ in precision (fp16 | fp32).")
    assert "cosine 0.9877 to the same model in float32" in exported
    assert unknown.startswith("Fidelity to the dense model was not measured here")
    assert f" --against {real['dense']} --data" in unknown
    result = read_result(path, ProfileResult)
    print_page(result)
    printed = capsys.readouterr().out
    assert printed.endswith("\n".join([*summary["verdict"], ""]))
    peaks = [plain(figures.peak_memory_bytes / 1e6) for figures in result.statistics.sides()]
    for text in (printed, page.text):
        assert re.search("peak memory, MB[ │]+{}[ │]+{}".format(*peaks), text), text

    def twice(result):  # One bundle, unchanged and in bf16.
        result["subjects"][1] = {**result["subjects"][0], "role": "against", "path": "a b"}
        result["method"]["runtime"]["against"].update(precision="fp32, attention bf16")

    verdict, page = written([changed("comparison", twice, "twice.json")], tmp_path / "r.html")
    name = json.loads(path.read_text())["subjects"][0]["name"]
    assert f"{name} · fp32" in verdict["verdict"][0]
    assert (
        "evaluate 'a b' --against DENSE/ --data IMAGES/ --backend onnxruntime --compute-precision bf16"
        in verdict["verdict"][-1]
    )
    alike = changed("comparison", lambda r: r["subjects"][1].update(r["subjects"][0], role="against"), "alike.json")
    assert all(f"{name} · ({number})" in written([alike], tmp_path / "r.html")[1].text for number in (1, 2))
    # An evaluation in another precision does not apply to it.
    for precision, known in (("fp32", False), ("fp16", True)):
        change = {"precision": precision}
        judged = changed("evaluation", lambda r, c=change: r["method"]["runtime"]["subject"].update(c), "e.json")
        verdict = " ".join(written([path, judged], tmp_path / "r.html")[0]["verdict"])
        assert "cosine to the dense model's features" in verdict
        assert ("was not measured here" in verdict) != known


@pytest.mark.parametrize(
    ("verdict", "ratio", "text"),
    [
        ("faster", (2.0, 1.9, 2.1), "is 2.00 times as fast as"),
        ("slower", (0.5, 0.4, 0.8), "it takes 2.00 times as long (95 % interval 1.25 to 2.50)"),
        ("slower", (0.0, 0.0, 0.8), "No difference in speed was found"),
        ("faster", (2.0, None, 2.1), "No difference in speed was found"),
    ],
)
def test_the_verdict(changed, tmp_path, verdict, ratio, text):
    value, low, high = ratio
    bounds = {"low": {"unavailable": "few"} if low is None else low, "high": high}

    def change(result):
        result["statistics"]["comparison"]["verdict"] = verdict
        result["statistics"]["comparison"]["ratio"] |= {"value": value, **bounds}

    summary, _ = written([changed("comparison", change)], tmp_path / "r.html")
    assert text in summary["verdict"][0]
    assert "Fidelity to the dense model" in summary["verdict"][-1]


def test_energy(changed, tmp_path):
    def change(result):
        for role, joules in (("subject", 0.0072), ("against", 0.0144)):
            bounds = {"low": joules * 0.9, "high": joules * 1.1, "confidence": 0.95, "interval": "x"}
            result["statistics"][role]["energy"] = {
                "gross_j_per_inference": {"value": joules, **bounds},
                "mean_w": 7.5,
                "sensor": "ina",
                "net_j_per_inference": {"unavailable": "no idle baseline"},
                "idle_w": {"unavailable": "no baseline"},
                "total": "VDD_IN",
                "window_s": 1.0,
                "readings": 9,
            }

    _, page = written([changed("comparison", change)], tmp_path / "r.html")
    for said in ("7.20 (6.48–7.92)", "14.4 (13.0–15.8)", "ina · VDD_IN", "net energy per inference, mJ not available"):
        assert said in page.text


def test_what_is_missing_is_said(real, tmp_path):
    _, page = written([real["profile"]], tmp_path / "r.html")
    assert page.text.count("Not measured. Run:") == 2  # accuracy, layers
    assert "not available: " in page.text  # energy
    assert "None" not in page.text


def test_warnings_stand_out_in_both_languages(capsys, changed, tmp_path):
    def change(result):
        known = {"flag": "throttled", "what": "the GPU slowed down", "do": "Cool it."}
        new = {"flag": "brand-new", "what": "something else", "do": "Wait."}
        result["statistics"]["subject"]["flags"], result["statistics"]["against"]["flags"] = [known, new], []

    path, target = changed("comparison", change), tmp_path / "deep" / "page.html"
    summary, page = written([path], tmp_path / "r.html")
    assert summary["warnings"] == 2
    for said in ("2 warning(s)", "the clocks were throttled", "brand-new", "something else", "Wait."):
        assert said in page.text
    outcome = call(capsys, "report", path, "-o", target, "--json", "--lang", "ja")
    assert json.loads(outcome.out)["page"] == str(target)
    japanese = target.read_text(encoding="utf-8")
    assert '<html lang="ja">' in japanese
    assert "スロットリング" in japanese
    assert f"{target}: page written" in call(capsys, "report", path, "-o", target).out


def test_without_jinja2_the_pip_command_is_named(monkeypatch, real, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"\[report\]"):
        write_report([real["comparison"]], tmp_path / "r.html")


def test_both_languages_say_the_same():
    catalogue = json.loads(Path(texts.__file__).with_name("texts.json").read_text(encoding="utf-8"))
    for key, words in catalogue.items():
        assert list(words) == ["en", "ja"], key
        assert sorted(re.findall(r"{(\w+)}", words["en"])) == sorted(re.findall(r"{(\w+)}", words["ja"])), key
    same = [key for key, words in catalogue.items() if words["en"] == words["ja"]]
    assert [key for key in same if re.search("[a-z]{4}", catalogue[key]["en"])] == ["how.layers"]  # A command alone.
    with pytest.raises(ConfigError, match="lang is 'de'"):
        Texts("de")
