"""The page from real results: what it says, and what it refuses."""

from __future__ import annotations

import json
import re
import sys

import pytest

from sparsifiner_edge.errors import ConfigError, GateError, MissingExtraError
from sparsifiner_edge.report import Prices
from sparsifiner_edge.report.texts import Texts
from tests.commands import call
from tests.plain import write_report
from tests.report.outline import file_name, written

KINDS = ("comparison", "evaluation", "robustness", "explanation", "estimate")


def test_the_whole_page_from_real_results(real, tmp_path):
    summary, page = written([real[kind] for kind in KINDS], tmp_path / "report.html")
    assert page.open == []
    recorded = json.loads(real["comparison"].read_text())
    ratio = recorded["statistics"]["comparison"]
    if ratio["verdict"] == "faster":
        assert "times as fast as" in summary["verdict"][0]
    mean = json.loads(real["evaluation"].read_text())["statistics"]["features_cosine"]["mean"]["value"]
    assert f"{mean:.4f}" in page.text
    for name in (
        "accuracy",
        "stability",
        "latency",
        "energy",
        "memory",
        "layers",
        "sparsity",
        "cost",
        "estimate",
        "method",
    ):
        assert name in summary["sections"]
    assert summary["differences"] == {}
    # Selection apart from attention, and the sparse bundle's settings, found by hash where the result says.
    assert "choosing keys" in page.text
    assert "25 %" in page.text
    costs = json.loads((real["sparse"] / "manifest.json").read_text())["costs"]["total_macs"]
    assert f"{costs / 1e6:.1f} (" in page.text
    assert "Nothing in this section was measured" in page.text
    assert "No prices were given" in page.text
    figures = [file_name(path) for path in summary["images"]]
    for name in ("accuracy-1", "stability-1-features", "latency", "memory", "layers-1", "estimate"):
        assert f"report-{name}.png" in figures


def test_nothing_is_loaded_and_nothing_runs(real, tmp_path):
    _, page = written([real[kind] for kind in KINDS], tmp_path / "report.html")
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "object", "embed", "form")]
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert links == ["data:,"]
    text = (tmp_path / "report.html").read_text()
    assert "@import" not in text
    assert "url(" not in text
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_every_measured_section_names_the_command_that_made_it(changed, tmp_path):
    path = changed("comparison", lambda r: r.update(command=["/x/__main__.py", "profile", "a b", "--against", "c"]))
    _, page = written([path], tmp_path / "report.html", images=False)
    command = "sparsifiner-edge profile 'a b' --against c"
    assert page.text.count(command) == 4  # latency, memory, layers, method
    path = changed("comparison", lambda r: r.update(command=["bench/x.py", "--all"]))
    _, page = written([path], tmp_path / "report.html", images=False)
    assert "python bench/x.py --all" in page.text


def test_the_command_line(capsys, real, tmp_path):
    target = tmp_path / "deep" / "page.html"
    outcome = call(capsys, "report", real["comparison"], "-o", target, "--json", "--lang", "ja")
    assert outcome.code == 0
    summary = json.loads(outcome.out)
    assert summary["page"] == str(target)
    assert '<html lang="ja">' in target.read_text()
    assert {"page.html", *map(file_name, summary["images"])} == {path.name for path in target.parent.iterdir()}
    outcome = call(capsys, "report", real["comparison"], "-o", target, "--no-images")
    assert f"{target}: page written" in outcome.out


# ---- what must not be compared


DIFFERENT = {
    "machine": lambda r: r["machine"].update(cpu_model="Another"),
    "power_mode": lambda r: r["method"]["conditions"]["subject"]["before"].update(power_mode={"id": 2, "name": "15W"}),
    "threads": lambda r: r["method"]["runtime"]["subject"].update(threads=7),
    "backend": lambda r: r["method"]["runtime"]["subject"].update(backend="tensorrt", version="10.0"),
    "precision": lambda r: r["method"]["runtime"]["subject"].update(precision="fp16"),
    "device": lambda r: r["method"]["runtime"]["subject"].update(device="NVIDIA L4"),
}


@pytest.mark.parametrize("field", sorted(DIFFERENT))
def test_results_that_differ_are_refused(capsys, real, changed, tmp_path, field):
    # The side named here is the dense one of the comparison, so that it alone could be compared.
    other = changed("profile", DIFFERENT[field])
    summary, page = written([real["comparison"], other], tmp_path / "r.html", images=False)
    assert list(summary["differences"]) == [field]
    assert summary["verdict"][0].startswith("No overall verdict")
    assert "must not be compared" in page.text
    strict = call(capsys, "report", real["comparison"], other, "-o", tmp_path / "s.html", "--strict")
    assert strict.code == 1
    assert "cannot be compared" in strict.err
    assert not (tmp_path / "s.html").exists()
    assert call(capsys, "report", real["comparison"], other, "-o", tmp_path / "s.html").code == 0


def test_no_ratio_across_precisions_even_within_one_result(changed, tmp_path):
    path = changed("comparison", DIFFERENT["precision"])
    summary, page = written([path], tmp_path / "r.html")
    assert summary["verdict"][0].startswith("No overall verdict")
    assert "times as" not in page.text
    assert not re.search(r"\d×", page.text)


def test_the_same_conditions_are_no_difference(real, tmp_path):
    summary, _ = written([real["comparison"], real["profile"]], tmp_path / "r.html", images=False, strict=True)
    assert summary["differences"] == {}


def test_an_estimate_is_no_measurement(real, tmp_path):
    summary, page = written([real["estimate"]], tmp_path / "r.html")
    assert summary["verdict"][0].startswith("Estimate, not a measurement")
    assert "latency" not in [name.removeprefix("r-") for name in summary["images"]]
    assert "raised no warnings" not in page.text
    _, page = written([real["comparison"], real["estimate"]], tmp_path / "r.html", prices=Prices(1, 1))
    assert "(estimate)" in page.text


# ---- verdicts


@pytest.mark.parametrize(
    ("verdict", "ratio", "text"),
    [
        ("faster", (2.0, 1.9, 2.1), "is 2.00 times as fast as"),
        ("slower", (0.5, 0.4, 0.8), "it takes 2.00 times as long (95 % interval 1.25 to 2.50)"),
        ("no difference shown", (1.001, 0.99, 1.01), "No difference in speed shown"),
        ("faster", (2.0, None, 2.1), "No difference in speed shown"),
    ],
)
def test_the_verdict(changed, tmp_path, verdict, ratio, text):
    value, low, high = ratio
    bounds = {"low": {"unavailable": "few"} if low is None else low, "high": high}

    def change(result):
        result["statistics"]["comparison"] |= {"verdict": verdict, "ratio": {"value": value, **bounds}}

    summary, _ = written([changed("comparison", change)], tmp_path / "r.html", images=False)
    assert text in summary["verdict"][0]
    assert "accuracy" in summary["verdict"][-1]


def test_accuracies_in_percent(changed, tmp_path):
    points = {"value": -0.5, "low": -1.25, "high": 0.25}

    def change(result):
        result["method"]["metric"] = "top 1"
        result["statistics"] = {
            "subject_percent": 91.0, "teacher_percent": 91.5, "difference_points": points, "queries": 400
        }  # fmt: skip

    path = changed("evaluation", change)
    summary, page = written([path], tmp_path / "r.html", images=False)
    assert (
        "91.00 % correct (top-1 accuracy), the dense model 91.50 %; difference -0.50 (-1.25 to +0.25)"
        in summary["verdict"][0]
    )
    # Wilson's interval of 364 of 400.
    assert "91.00 % (87.79–93.43)" in page.text


def test_what_was_read(real, changed, tmp_path):
    images = json.loads(real["explanation"].read_text())["statistics"]["images"]
    for language, named in (("en", "read as averages"), ("ja", "平均として読んだ割合")):
        summary, page = written([real["explanation"]], tmp_path / f"{language}.html", language=language, images=False)
        assert "explained" in summary["sections"]
        assert "accuracy" not in summary["sections"]
        assert named in page.text
        for image in images:
            assert f"{image['faithful']['ours']['saco']:.3f}" in page.text
        assert ("2 images" if language == "en" else "2 枚中") in " ".join(summary["verdict"])

    def worse(result):
        result["statistics"]["images"][0] = {"image": "<b>", "faithful": {"ours": 3}, "layers": "all"}

    _, page = written([changed("explanation", worse)], tmp_path / "worse.html", images=False)
    assert page.open == []


def test_what_corruptions_cost(real, changed, tmp_path):
    recorded = json.loads(real["robustness"].read_text())["statistics"]["stability"]["features"]
    for language, named in (("en", "rain"), ("ja", "雨")):
        summary, page = written([real["robustness"]], tmp_path / f"{language}.html", language=language, images=False)
        assert "stability" in summary["sections"]
        assert "accuracy" not in summary["sections"]
        assert f"{100 * recorded['fog']['teacher']:.2f}" in page.text
        assert f"{100 * recorded['all']['extra_lost']['value']:.2f}" in " ".join(summary["verdict"])
        assert named in page.text

    def worse(result):
        result["method"]["corruptions"] = ["<b>mist</b>", 7]
        result["statistics"]["stability"]["features"]["fog"] = "much"

    _, page = written([changed("robustness", worse)], tmp_path / "worse.html", images=False)
    assert page.open == []
    assert "fog" not in page.text.replace("fog,rain", "")


def test_energy_and_its_cost(changed, tmp_path):
    def change(result):
        for role, joules in (("subject", 0.0072), ("against", 0.0144)):
            result["statistics"][role]["energy"] = {
                "gross_j_per_inference": {"value": joules, "low": joules * 0.9, "high": joules * 1.1},
                "net_j_per_inference": {"unavailable": "no idle baseline"},
                "mean_w": 7.5, "idle_w": {"unavailable": "no idle baseline"},
                "sensor": "ina3221", "total": "VDD_IN",
            }  # fmt: skip
            result["statistics"][role]["latency_ms"]["mean"] = {"value": 3.6, "low": 3.5, "high": 3.7}

    path = changed("comparison", change)
    summary, page = written([path], tmp_path / "r.html", prices=Prices(0.5, 2.0, "EUR"))
    assert "7.20 mJ (6.48–7.92)" in page.text
    assert "ina3221 · VDD_IN" in page.text
    # 7200 J are 2 Wh, a million times 7.2 mJ; 3.6 ms a million times are an hour.
    assert "0.00100 (0.00090–0.00110)" in page.text
    assert "2.00 (1.94–2.06)" in page.text
    assert "r-energy.png" in map(file_name, summary["images"])


def test_what_is_missing_is_said(changed, tmp_path):
    def strip(result):
        result["samples"] = {}
        for role in ("subject", "against"):
            kept = result["statistics"][role]
            result["statistics"][role] = {"latency_ms": {"p50": kept["latency_ms"]["p50"]}}

    summary, page = written([changed("comparison", strip)], tmp_path / "r.html")
    assert summary["images"] == []
    assert "contains no raw samples" in page.text
    assert page.text.count("Not measured. Run:") >= 4
    assert "None" not in page.text
    assert "nan" not in page.text.lower().split()


def test_flags_stand_out(changed, tmp_path):
    def change(result):
        result["statistics"]["subject"]["flags"] = [
            {"flag": "throttled", "what": "the GPU slowed down", "do": "Cool it."},
            {"flag": "brand-new", "what": "something else", "do": "Wait."},
        ]
        result["statistics"]["against"]["flags"] = []

    path = changed("comparison", change)
    summary, page = written([path], tmp_path / "r.html", images=False)
    assert [flag["name"] for flag in summary["flags"]] == ["the clocks were throttled", "brand-new"]
    assert "2 warning(s)" in page.text
    summary, _ = written([path], tmp_path / "r.html", images=False, language="ja")
    assert "スロットリング" in summary["flags"][0]["name"]
    assert "冷却" in summary["flags"][0]["do"]


# ---- bundles


def test_a_bundle_made_anew_is_not_taken_for_the_one_measured(real, changed, tmp_path):
    def change(result):
        for subject in result["subjects"]:
            subject["sha256"] = "0" * 63 + subject["role"][0]

    path = changed("comparison", change)
    _, page = written([path], tmp_path / "r.html", images=False)
    assert "was exported again since" in page.text
    with pytest.raises(ConfigError, match="measured by none"):
        write_report([path], tmp_path / "x.html", bundles=[real["dense"]])
    assert not (tmp_path / "x.html").exists()


def test_choices_by_measurement_are_shown(real, changed, tmp_path):
    import shutil

    from sparsifiner_edge.bundle.store import bundle_hash

    bundle = tmp_path / "moved"
    shutil.copytree(real["sparse"], bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["measured"] = {"choices": [{"layers": [0, 1], "sparse_ms": 2.5, "dense_ms": 1.25, "kept_dense": True}]}
    (bundle / "manifest.json").write_text(json.dumps(manifest))

    def change(result):
        result["subjects"][0] |= {"path": "gone", "sha256": bundle_hash(bundle)}

    _, page = written([changed("comparison", change)], tmp_path / "r.html", bundles=[bundle], images=False)
    assert "0, 1 2.50 1.25 kept dense: sparse was slower" in page.text


# ---- extras, files, words


def test_without_matplotlib_there_is_the_page_alone(monkeypatch, real, tmp_path):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.font_manager", None)
    summary, page = written([real["comparison"]], tmp_path / "r.html")
    assert "sparsifiner-edge[report]" in summary["images"]["unavailable"]
    assert page.text.count('pip install "sparsifiner-edge[report]"') == 1
    assert not [tag for tag, _ in page.tags if tag == "svg"]
    assert re.search(r"layer 0: [0-9.]+ ms", page.text)  # What a chart shows stands there in words.
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_without_jinja2_the_pip_command_is_named(monkeypatch, real, tmp_path):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtraError, match=r"sparsifiner-edge\[report\]"):
        write_report([real["comparison"]], tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_a_refused_page_leaves_the_earlier_one(real, changed, tmp_path):
    target = tmp_path / "r.html"
    write_report([real["comparison"]], target, images=False)
    before = target.read_bytes()
    with pytest.raises(GateError):
        write_report([real["comparison"], changed("profile", DIFFERENT["machine"])], target, strict=True)
    assert target.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_both_languages_have_the_same_texts_with_the_same_fields():
    english, japanese = (Texts(language)._texts for language in ("en", "ja"))
    assert list(english) == list(japanese)
    for key, text in english.items():
        assert sorted(re.findall(r"{(\w+)}", text)) == sorted(re.findall(r"{(\w+)}", japanese[key])), key
    same = [key for key in english if english[key] == japanese[key] and re.search("[a-z]{4}", english[key])]
    assert same == ["how.layers"]  # A command alone.
    with pytest.raises(ConfigError, match="lang is 'de'"):
        Texts("de")


def test_every_flag_and_kind_of_a_measurement_has_words():
    from pathlib import Path

    from sparsifiner_edge import profiles
    from sparsifiner_edge.profiles.measure.layers import LAYER_KINDS

    source = (Path(profiles.__file__).parent / "flags.py").read_text()
    flags = set(re.findall(r'Flag\(\s*"([a-z-]+)"', source))
    assert len(flags) > 5
    known = Texts("ja")._texts
    assert not [flag for flag in flags if f"flag.{flag}" not in known or f"flag.{flag}.do" not in known]
    assert not [kind for kind in LAYER_KINDS if f"kind.{kind}" not in known]
