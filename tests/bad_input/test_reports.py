"""Files that are no results, or hold what no measurement gives, to whoever makes a page of them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.records import write_record
from sparsifiner_edge.report import Prices
from sparsifiner_edge.results import Result, Subject, check_result, write_result
from tests.commands import assert_refused, call, process
from tests.fuzz.mutate import mutated_json
from tests.plain import estimate, estimate_bundle, summarise, write_report

Capsys = pytest.CaptureFixture[str]
Json = dict[str, Any]


def profiled() -> Json:
    samples = [1.0 + number % 7 / 10 for number in range(200)]
    figures = summarise(samples) | {"flags": [], "layers": [{"name": "x", "kind": "mlp", "layer": 0, "ms": 0.5}]}
    figures |= {"energy": {"gross_j_per_inference": estimate(0.1, 0.09, 0.11, "x")}, "peak_rss_bytes": 10**8}
    runtime = {"subject": {"backend": "onnxruntime", "precision": "fp32", "threads": 1}}
    subjects = [Subject(role="subject", path="bundle", name="model", sha256="0" * 64)]
    held = {"runtime": runtime}, {"subject": {"latency_ms": samples}}, {"subject": figures}
    return dict(write_record(Result("profile", subjects, *held)))


def evaluated() -> Json:
    subjects = [Subject(role=role, path=role, sha256=role) for role in ("subject", "teacher")]
    statistics = {
        "subject_percent": 71.5, "teacher_percent": 72.0, "difference_points": estimate(-0.5, -1, 0, "x"), "queries": 90
    }  # fmt: skip
    return dict(write_record(Result("evaluation", subjects, {"metric": "top 1"}, {}, statistics)))


class Tags(HTMLParser):
    """What a page's elements and their attributes are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(f"@{name}" for name, _ in attrs)}


def names_in(page: Path) -> set[str]:
    tags = Tags()
    tags.feed(page.read_text(encoding="utf-8"))
    return tags.names


def written(tmp_path: Path, change: Callable[[Json], object], make: Callable[[], Json] = profiled) -> Path:
    content = make()
    change(content)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r["samples"].update(x=float("nan")), "samples.x is nan"),
        (lambda r: r["statistics"].update(x=[[[float("-inf")]]]), "statistics.x[0][0][0] is -inf"),
        (lambda r: r["method"].update(x=json.loads("[" * 300 + "]" * 300)), "nested deeper than 64 levels"),
        (lambda r: r.update(subjects={}), "subjects is {}, not list"),
        (lambda r: r.update(kind=["profile"]), 'kind is ["profile"], not str'),
        (lambda r: r.update(created="٢٠٢٥-01-31T12:00:00Z\n"), "created is"),
        (lambda r: r["machine"].pop("board"), "machine.board is missing"),
    ],
)
def test_what_is_no_result(change: Callable[[Json], object], text: str, tmp_path: Path, capsys: Capsys) -> None:
    assert_refused(call(capsys, "report", written(tmp_path, change), "-o", tmp_path / "r.html"), text)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "wrong", [1e308, -1e308, 5e-324, 1e-300, 10**400, -(10**30), 0, -1, "x", True, {"value": 1e300}]
)
def test_figures_that_no_one_measured_are_left_out(wrong: Any, tmp_path: Path) -> None:
    def change(result: Json) -> None:
        result["statistics"]["subject"]["latency_ms"]["p50"] |= {"value": wrong, "low": wrong, "high": wrong}
        result["statistics"]["subject"]["throughput_per_s"] = {"value": wrong}
        result["statistics"]["subject"]["energy"]["gross_j_per_inference"] = {"value": wrong, "error": wrong}
        result["statistics"]["subject"]["peak_rss_bytes"] = wrong
        result["statistics"]["subject"]["layers"][0] |= {"ms": wrong, "layer": wrong}
        result["samples"]["subject"]["latency_ms"][5] = wrong
        result["machine"]["memory_bytes"] = wrong

    prices = Prices(kwh=1.0, device_hour=1.0)
    for language in ("en", "ja"):
        write_report([written(tmp_path, change)], tmp_path / "r.html", language=language, prices=prices, images=False)
    assert "inf" not in (tmp_path / "r.html").read_text().replace("information", "").replace("inference", "")


@pytest.mark.parametrize("name", ["subject_percent", "teacher_percent", "difference_points"])
def test_an_accuracy_alone_whose_figures_are_none(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, lambda r: r["statistics"].update({name: {"unavailable": "x"}}), evaluated)
    summary = write_report([path], tmp_path / "r.html", images=False)
    assert summary["verdict"][0].startswith("These results hold none")


def test_names_do_nothing_to_a_page_or_a_terminal(tmp_path: Path, capsys: Capsys) -> None:
    name = "<script>alert(1)</script>\x1b[31m\u202e\ud800\x9b"

    def change(result: Json) -> None:
        result["subjects"][0]["name"] = result["machine"]["cpu_model"] = name
        result["method"]["runtime"]["subject"]["backend"] = name
        result["statistics"]["subject"]["flags"] = [{"flag": name, "what": name, "do": name}]

    path = written(tmp_path, change)
    outcome = call(capsys, "report", path, "-o", tmp_path / "r.html", "--no-images")
    assert outcome.code == 0
    assert "\\x1b[31m\\u202e\\ud800\\x9b" in outcome.out
    page = (tmp_path / "r.html").read_text()
    assert not set(outcome.out + outcome.err + page) & set("\x1b\u202e\ud800\x9b")
    assert not {"script", "@onclick"} & names_in(tmp_path / "r.html")


def test_files_that_have_no_end(tmp_path: Path, capsys: Capsys) -> None:
    pipe, loop = tmp_path / "pipe.json", tmp_path / "loop.json"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    assert_refused(process("report", pipe, "-o", tmp_path / "r.html", timeout=120), "pipe.json is not a regular file")
    for path in (loop, Path("/dev/zero")):
        assert_refused(call(capsys, "report", path, "-o", tmp_path / "r.html"), str(path))
    assert_refused(call(capsys, "report", written(tmp_path, lambda _: None), "-o", loop), "loop.json")


@pytest.mark.everything
def test_any_result_makes_a_page_or_is_refused(counted: Path, tmp_path: Path) -> None:
    """A hundred results that were changed at random: no traceback, and no element that a page of ours has not."""
    path, page = tmp_path / "any.json", tmp_path / "any.html"
    good = [profiled(), evaluated(), estimate_bundle(counted, "t4", precision="fp16")]
    known: set[str] = set()
    for content in good:
        write_result(path, check_result(content, path, Result))
        write_report([path], page, images=False)
        known |= names_in(page)
    made = 0
    for number in range(100):
        path.write_bytes(mutated_json(good[number % 3], random.Random(number)))
        try:
            write_report([path], page, language=("en", "ja")[number % 2], images=False)
        except SparsifinerError:
            continue
        made += 1
        assert names_in(page) <= known | {"ul", "li", "b", "div", "dl", "dt", "dd"}
    assert made
