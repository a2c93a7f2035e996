"""Tests of the summaries that git keeps and the results next to them, and that every script starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # scripts here import each other by name

from summary import RESULTS, raw_of, read_raw, write_summary

from sparsifiner_edge.profiles.stats import small_sample_mean
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject, read_result

SAMPLES = [0.98 + 0.00123456789 * number for number in range(8)]


def result(rows: int = 2) -> Result:
    found = write_record(small_sample_mean(SAMPLES))
    statistics = {f"row {number}": {"cosine": found, "macs": 46387630080} for number in range(rows)}
    return Result("evaluation", [Subject(path="model", sha256="0")], {"images": 8}, {"cosine": SAMPLES}, statistics)


def test_figures_are_in_the_summary_and_samples_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "found.json"
    write_summary(path, result())
    summary, raw = read_result(path), read_raw(path)
    assert raw is not None
    assert raw.samples == {"cosine": SAMPLES}
    assert summary.samples == {"raw": "raw/found.json, where it was measured"}
    assert summary.method == {"images": 8, "intervals": ["95%: Student's t, 8 samples"]}
    row = summary.statistics["row 1"]
    assert row["macs"] == 46387630080
    assert row["cosine"].keys() == {"value", "low", "high"}
    assert row["cosine"]["value"] == pytest.approx(sum(SAMPLES) / 8, rel=1e-5)
    (line,) = [line for line in path.read_text().splitlines() if '"row 1"' in line]
    assert len(line) < 150


def test_a_summary_without_its_samples_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    write_summary(path, result())
    raw_of(path).unlink()
    assert read_raw(path) is None
    assert str(raw_of(path)) in capsys.readouterr().err
    assert read_raw(tmp_path / "never.json") is None


def test_a_long_summary_is_refused_and_its_samples_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    with pytest.raises(ValueError, match="250 at most"):
        write_summary(path, result(rows=300))
    assert not path.exists()
    assert read_raw(path) is not None


def test_every_committed_result_can_be_read() -> None:
    results = [path for path in RESULTS.rglob("*.json") if path.parent.name != "raw"]
    for path in results:
        assert path.name == "fuzz.json" or read_result(path).statistics, path


def test_every_script_can_be_imported() -> None:
    folder = Path(__file__).parent
    names = [path.stem for path in folder.glob("*.py") if not path.stem.startswith("test_")]
    code = "import importlib, sys; sys.path[:0] = sys.argv[1:3]; list(map(importlib.import_module, sys.argv[3:]))"
    command = [sys.executable, "-c", code, folder, folder.parent, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
