"""Tests of the page made from damaged, hostile and large results."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.commands import assert_refused, call, process, snapshot
from tests.report.outline import Outline, written

HOSTILE = "<script>alert(1)</script>\"'&\u202e$x^2$\x1b[31m\x9b\ud800"


def test_names_are_no_markup_and_do_nothing_to_a_terminal(capsys, changed, tmp_path):
    def change(result):
        for subject in result["subjects"]:
            subject["name"] = HOSTILE
            subject["path"] = "/tmp/" + HOSTILE + subject["role"]
        result["command"] = [HOSTILE]
        result["machine"]["cpu_model"] = HOSTILE
        result["environment"]["packages"][HOSTILE] = HOSTILE
        result["statistics"]["subject"]["flags"] = [{"flag": HOSTILE, "what": HOSTILE, "do": HOSTILE}]
        result["statistics"]["subject"]["layers"] = [{"name": HOSTILE, "op": HOSTILE, "kind": HOSTILE, "ms": 1.0}]

    outcome = call(capsys, "report", changed("comparison", change, "<b>.json"), "-o", tmp_path / "r.html")
    assert outcome.code == 0
    assert "\\u202e$x^2$\\x1b[31m" in outcome.out
    content = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Outline(content)
    assert not [tag for tag, _ in page.tags if tag in ("script", "b.json")]
    assert page.open == []
    assert "<script>alert(1)</script>" in page.text  # All of it is present as text.
    assert not set(outcome.out + outcome.err + content) & set("\x1b\u202e\x9b")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: r["statistics"].update(x=[[[float("-inf")]]]), "statistics.x[0][0][0] is -inf"),
        (lambda r: r["method"].update(x=json.loads("[" * 300 + "]" * 300)), "nested deeper than 64 levels"),
        (lambda r: r.update(created="٢٠٢٥-01-31T12:00:00Z\n"), "created is"),
    ],
)
def test_a_head_that_is_none_is_refused(capsys, changed, tmp_path, change, text):
    assert_refused(call(capsys, "report", changed("profile", change), "-o", tmp_path / "r.html"), text)
    assert not (tmp_path / "r.html").exists()


def test_files_that_have_no_end(capsys, real, tmp_path):
    pipe, loop = tmp_path / "pipe.json", tmp_path / "loop.json"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    assert_refused(process("report", pipe, "-o", tmp_path / "r.html", timeout=120), "pipe.json is not a regular file")
    for path in (loop, Path("/dev/zero")):
        assert_refused(call(capsys, "report", path, "-o", tmp_path / "r.html"), str(path))
    assert_refused(call(capsys, "report", real["profile"], "-o", loop), "loop.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "There is no result to report"),
        (["{real}", "-o", "{real}"], "is one of the results"),
        (["{folder}"], "is a folder"),
        (["{explanation}"], "is of kind explanation"),
    ],
)
def test_bad_use(capsys, real, changed, tmp_path, arguments, message):
    explanation = changed("estimate", lambda result: result.update(kind="explanation"))
    before = snapshot(tmp_path)
    given = [a.format(real=real["comparison"], explanation=explanation, folder=tmp_path) for a in arguments]
    target = [] if "-o" in arguments else ["-o", tmp_path / "r.html"]
    assert_refused(call(capsys, "report", *given, *target), message)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("value", [-1e308, 5e-324, 10**400, 0, float("nan")])
def test_numbers_that_no_one_measured_are_refused(capsys, changed, tmp_path, value):
    def sample(result):
        result["samples"]["subject"]["latency_ms"][3] = value

    def figure(result):
        result["statistics"]["subject"]["latency_ms"]["p50"]["value"] = value

    for change in (sample, figure):
        assert_refused(call(capsys, "report", changed("comparison", change), "-o", tmp_path / "r.html"), "changed.json")


def test_a_million_samples(changed, tmp_path):
    values = np.random.default_rng(0).lognormal(0, 0.3, 1_000_000).tolist()
    path = changed("comparison", lambda r: r["samples"]["subject"].update(latency_ms=values))
    start = time.monotonic()
    _, page = written([path], tmp_path / "r.html")
    assert time.monotonic() - start < 30
    assert (tmp_path / "r.html").stat().st_size < 1_000_000
    assert page.open == []
