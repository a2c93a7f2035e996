"""JSON lines: valid whatever a model gives, whole whatever a reader does, and of one run at a time."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from sparsifiner_edge.camera import json_lines as lines
from sparsifiner_edge.camera.json_lines import LineWriter, line_of, new_lines, open_output
from sparsifiner_edge.errors import ArtifactError
from tests.commands import PROGRAM, assert_refused, call, process

Capsys = pytest.CaptureFixture[str]
WRITE = """
import sys, threading
from sparsifiner_edge.camera import json_lines as lines
from sparsifiner_edge.camera.json_lines import LineWriter
hurry = threading.Event()
writer = LineWriter(1, patient=bool(int(sys.argv[1])), hurry=hurry)
for number in range(20):
    writer.write({"n": number, "text": "x" * 20_000})
hurry.set()
writer.close()
print(writer.dropped, file=sys.stderr)
"""
GROW = """
import sys
from pathlib import Path
from sparsifiner_edge.camera.json_lines import new_lines
with new_lines(Path(sys.argv[1])) as write:
    write({"a": 1})
    print("ready", flush=True)
    sys.stdin.read()
"""


def parsed(text: str) -> list[dict[str, Any]]:
    """Of lines that are JSON as others read it: without NaN."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(name)

    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


def parsed_but_last(text: str) -> list[dict[str, Any]]:
    """Of lines of which the last may be cut."""
    return parsed(text[: text.rfind("\n") + 1])


def written(path: Path) -> list[dict[str, Any]]:
    return parsed(path.read_text(encoding="utf-8"))


# What is in a line.


def test_numbers_that_are_none() -> None:
    ours, theirs = os.pipe()
    writer = LineWriter(theirs, patient=True)
    writer.write({"features": [1.5, float("nan"), -float("inf")], "change": float("inf")})
    writer.write({"features": [1.5]})
    writer.close()
    with os.fdopen(ours) as reader:
        bad, good = parsed(reader.read())
    assert bad == {"features": [1.5, None, None], "change": None, "not_finite": 3}
    assert good == {"features": [1.5]}


def test_hidden_characters_are_escaped() -> None:
    content = {"source": "\u009b2J\u202e\u2028\x1b\udcff\ue000 \u00fc\u4e2d.mp4"}
    line, bad = line_of(content)
    assert bad == 0
    assert line == b'{"source": "\\u009b2J\\u202e\\u2028\\u001b\\udcff\\ue000 ' + '\u00fc\u4e2d.mp4"}\n'.encode()
    assert json.loads(line) == content


# Readers.


@pytest.mark.parametrize("patient", [True, False])
def test_a_pipe_that_does_not_block(patient: bool) -> None:
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    writer, got = LineWriter(theirs, patient), []

    def read() -> None:
        time.sleep(0.3)
        with os.fdopen(ours) as file:
            got.extend(file)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(300):
        writer.write({"n": number, "text": "x" * (number * 40)})
    writer.close()
    reader.join(10)
    numbers = [record["n"] for record in parsed("".join(got))]
    assert len(numbers) + writer.dropped == 300
    assert writer.errors == 0
    if patient:
        assert numbers == list(range(300))


def test_a_hurry_ends_the_wait_for_a_pipe_that_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_DRAIN_S", 0.2)
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    hurry = threading.Event()
    writer = LineWriter(theirs, patient=True, hurry=hurry)
    for number in range(40):
        writer.write({"n": number, "text": "x" * 9000})
    timer = threading.Timer(0.2, hurry.set)
    timer.start()
    writer.close()
    with os.fdopen(ours) as reader:
        records = parsed_but_last(reader.read())
    assert len(records) + writer.dropped == 40
    assert [record["n"] for record in records] == list(range(len(records)))
    assert 0 < len(records) < 40  # What the pipe holds.
    assert writer.errors == 0


def test_a_video_into_a_pipe_that_does_not_block(cells: Path, video: Path) -> None:
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(theirs, False)
    line = [*PROGRAM, "run", str(cells), "--source", str(video)]
    with subprocess.Popen(line, stdout=theirs, stderr=subprocess.PIPE) as run, os.fdopen(ours) as reader:
        os.close(theirs)
        assert run.stderr is not None
        assert any(b'"streaming"' in said for said in run.stderr)
        time.sleep(0.5)
        assert [record["frame"] for record in parsed(reader.read())] == list(range(30))
        run.stderr.read()
    assert run.returncode == 0


def test_only_the_last_line_is_cut_for_a_reader_that_did_not_read() -> None:
    with write_unread(patient=False) as live, write_unread(patient=True) as video:
        for run in (live, video):
            assert run.stdout is not None
            assert run.stderr is not None
            dropped = int(run.stderr.readline())
            assert run.wait(20) == 0
            numbers = [record["n"] for record in parsed_but_last(run.stdout.read().decode())]
            assert len(numbers) > 0
            assert numbers == list(range(len(numbers)))
            assert len(numbers) + dropped == 20


def write_unread(patient: bool) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-c", WRITE, str(int(patient))]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_lines_longer_than_any_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come whole where they are read; where they are not, they count as dropped."""
    monkeypatch.setattr(lines, "_DRAIN_S", 1.0)
    for read in (True, False):
        ours, theirs = os.pipe()
        with os.fdopen(ours, "rb") as reader:
            writer, got = LineWriter(theirs, patient=False), []
            thread = threading.Thread(target=lambda reader=reader, got=got: got.append(reader.read()))
            if read:
                thread.start()
            writer.write({"text": "x" * (3 << 20)})
            writer.close()
            assert writer.dropped == (0 if read else 1)
            if read:
                thread.join(10)
                assert len(parsed(got[0].decode())[0]["text"]) == 3 << 20


# One run at a time.


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_two_writers_of_one_file(first: bool, second: bool, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    writer = LineWriter(open_output(path, append=first), patient=True)
    writer.write({"a": 1})
    while not path.stat().st_size:
        time.sleep(0.01)
    with pytest.raises(ArtifactError, match="is written by another run"):
        open_output(path, append=second)
    with pytest.raises(ArtifactError, match="is written by another run"), new_lines(path):
        pass
    writer.close()
    assert written(path) == [{"a": 1}]
    os.close(open_output(path, append=second))
    assert written(path) == ([{"a": 1}] if second else [])
    assert [p.name for p in tmp_path.iterdir()] == ["lines"]


def test_two_runs_into_one_file(cells: Path, service: Any, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    run = service(cells, "--source", "test", "--output", path)
    run.event(state="streaming")
    outcome = process("run", cells, "--source", "test", "--frames", 3, "--output", path)
    assert_refused_last(outcome, f"{path} is written by another run")
    run.process.kill()
    run.process.wait()
    before = written(path)
    assert process("run", cells, "--source", "test", "--frames", 3, "--output", path).code == 0
    assert [record["frame"] for record in written(path)] == [*range(len(before)), 0, 1, 2]


def assert_refused_last(outcome: Any, text: str) -> None:
    """Events may have come before."""
    told = [line for line in outcome.err.splitlines(keepends=True) if not line.startswith("{")]
    assert_refused(outcome._replace(err="".join(told)), text)


def test_a_file_that_is_emptied_has_no_hole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("old\n")
    writer = LineWriter(open_output(path, append=False), patient=True)
    for number in range(2):
        writer.write({"n": number})
        while not path.stat().st_size:
            time.sleep(0.01)
        if not number:
            os.truncate(path, 0)
    writer.close()
    assert written(path) == [{"n": 1}]


# What a killed run leaves.


def test_what_a_killed_run_left_is_removed(cells: Path, pictures: Path, tmp_path: Path, capsys: Capsys) -> None:
    path = tmp_path / "lines"
    (tmp_path / ".lines.other").write_text("not ours")
    with grow(path) as living:
        with grow(path) as killed:
            killed.send_signal(signal.SIGKILL)
        assert len(list(tmp_path.iterdir())) == 3  # The living, the dead, and the other.
        assert call(capsys, "run", cells, "--source", pictures, "--output", path).code == 0
        assert len(written(path)) == 3
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()
        assert len(list(tmp_path.iterdir())) == 3  # The living, the other, and the lines.
        living.communicate(b"")
    assert living.returncode == 0
    assert written(path) == [{"a": 1}]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lines.other", "lines"]


def grow(path: Path) -> subprocess.Popen[bytes]:
    """A process in the middle of `new_lines`."""
    line = [sys.executable, "-c", GROW, str(path)]
    run = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.readline() == b"ready\n"
    return run


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
