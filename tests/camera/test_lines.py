"""JSON lines: valid whatever a model gives, whole whatever a reader does, and of one run at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sparsifiner_edge.camera.json_lines import LineWriter, line_of
from tests.camera.conftest import lines
from tests.commands import process


def written(path: Path) -> list[dict[str, Any]]:
    return lines(path.read_text(encoding="utf-8"))


def test_numbers_that_are_none_and_hidden_characters() -> None:
    line = line_of({"features": [1.5, float("nan"), -float("inf")], "change": float("inf")})
    assert lines(line.decode()) == [{"features": [1.5, None, None], "change": None, "not_finite": 3}]
    content = {"source": "\u009b2J\u202e\u2028\x1b\udcff\ue000 \u00fc\u4e2d.mp4"}
    line = line_of(content)
    assert line == b'{"source": "\\u009b2J\\u202e\\u2028\\u001b\\udcff\\ue000 ' + '\u00fc\u4e2d.mp4"}\n'.encode()
    assert json.loads(line) == content


# Readers.


# Files.


def test_a_run_that_is_killed_leaves_its_lines_and_no_lock(cells: Path, service: Any, tmp_path: Path) -> None:
    path, again = tmp_path / "lines", ("run", cells, "--source", "test", "--frames", 3, "--output", tmp_path / "lines")
    run = service(cells, "--source", "test", "--output", path)
    run.event(state="streaming")
    outcome = process(*again)
    assert outcome.code == 2
    assert f"error: {path} is written by another run" in outcome.err
    run.process.kill()
    run.process.wait()
    before = written(path)
    assert process(*again).code == 0
    assert [record["frame"] for record in written(path)] == [*range(len(before)), 0, 1, 2]


def test_a_file_that_is_emptied_has_no_hole(tmp_path: Path) -> None:
    """As logrotate does (copytruncate)."""
    path = tmp_path / "lines"
    path.write_text("old\n")
    with LineWriter(path, live=False) as writer:
        for number in range(2):
            writer.write({"n": number})
            if not number:
                os.truncate(path, 0)
    assert written(path) == [{"n": 1}]


def test_a_line_that_a_power_cut_left_half_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for before, expected in (("", []), ('{"a": 1}\n', ['{"a": 1}']), ('{"a": 1}\n{"a"', ['{"a": 1}', '{"a"'])):
        path.write_text(before)
        with LineWriter(path, live=True) as writer:
            writer.write({"b": 2})
        assert path.read_text().splitlines() == [*expected, '{"b": 2}']
