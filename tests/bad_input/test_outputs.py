"""Tests of invalid or foreign output paths, full disks and signals: no output is partial or lost."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.artifacts import STUDENT_FILE, new_folder
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.cli.main import main
from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.files import _new_scratch, write_text
from tests.commands import PROGRAM, assert_refused, call, snapshot
from tests.everything import first
from tests.models import TINY
from tests.mounts import in_mount, needs_mounts

Capsys = pytest.CaptureFixture[str]
OCCUPIED = {
    "file": None,
    "link": None,
    "dangling link": None,
    "foreign": ("thesis.txt", "mine"),
    "another's": (STUDENT_FILE, '{"kind": "vit"}'),
    "damaged": (STUDENT_FILE, '{"kind": "student"'),
    "student and more": ("notes.txt", "mine"),
}


@pytest.fixture
def start(command: str, tiny_student: Path, tiny_weights: Path) -> list[Any]:
    """Return the command's arguments without the output."""
    return ["sparsify", TINY, "--weights", tiny_weights] if command == "sparsify" else ["export", tiny_student]


@pytest.mark.parametrize("how", OCCUPIED)
@pytest.mark.parametrize("command", ["sparsify", "export"])
def test_an_output_that_is_not_ours_is_left_alone(
    start: list[Any], how: str, tiny_student: Path, tmp_path: Path, capsys: Capsys
) -> None:
    folder = tmp_path / "target"
    if how == "file":
        folder.write_text("mine")
    elif "link" in how:
        shutil.copytree(tiny_student, tmp_path / "real")
        folder.symlink_to("real" if how == "link" else "nowhere")
    else:
        shutil.copytree(tiny_student, folder) if "student" in how else folder.mkdir()
        name, content = OCCUPIED[how] or ("", "")
        (folder / name).write_text(content)
    before = snapshot(tmp_path)
    assert_refused(call(capsys, *start, "-o", folder), str(folder), "hoose another")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("output", [".", "..", "", "thesis.txt/student", "x" * 300])
def test_outputs_that_are_no_place(
    output: str, tiny_weights: Path, tmp_path: Path, monkeypatch: Any, capsys: Capsys
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if output != ".":
        Path("thesis.txt").write_text("mine")
    before = snapshot(tmp_path)
    assert_refused(call(capsys, "sparsify", TINY, "--weights", tiny_weights, "-o", output), output[:40])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("output", ["/dev/null", "."])
def test_results_do_not_replace_folders_or_devices(
    output: str, bundle: Path, tiny_student: Path, pictures: Path, tmp_path: Path, monkeypatch: Any, capsys: Capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(call(capsys, "run", bundle, "--source", pictures, "--output", output), f"{output} is a folder")
    assert_refused(call(capsys, "evaluate", tiny_student, "--data", pictures, "-o", output), f"{output} is a folder")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error", "disk"), SparsifinerError("a", "b")])
def test_errors_anywhere_become_messages(error: Exception, monkeypatch: Any, tmp_path: Path, capsys: Capsys) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("sparsifiner_edge.camera.service.Model", fail)
    assert_refused(call(capsys, "run", tmp_path, "--source", tmp_path))
    monkeypatch.setattr("sparsifiner_edge.camera.service.Model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # A bug keeps its traceback.
        main(["run", str(tmp_path), "--source", str(tmp_path)])


@needs_mounts
@pytest.mark.parametrize(("command", "earlier"), first([("sparsify", True), ("sparsify", False), ("export", True)]))
def test_a_full_disk_leaves_what_was_there(
    command: str, earlier: bool, start: list[Any], tiny_student: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    old = tiny_student if command == "sparsify" else tiny_bundle
    # Space for the earlier folder and for half of a new one.
    size = (sum(4 * -(-p.stat().st_size // 4096) for p in old.iterdir()) + 64) * (3 if earlier else 1) // 2
    prepare = f"cp -r {old} target" if earlier else "true"
    outcome, names = in_mount(tmp_path, size, prepare, *start, "-o", "disk/target")
    assert_refused(outcome, "disk/target cannot be written: No space left on device", "Free space")
    assert names == (["target", *sorted(f"target/{p.name}" for p in old.iterdir())] if earlier else [])
    if earlier:
        hashes = {hashlib.sha256(path.read_bytes()).hexdigest() for path in old.iterdir()}
        assert {line.split()[0] for line in (tmp_path / "after").read_text().splitlines()} == hashes


@needs_mounts
@pytest.mark.parametrize(("command", "state"), [("profile", "full"), ("profile", "read-only"), ("run", "read-only")])
def test_results_on_a_full_or_read_only_disk(
    command: str, state: str, bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    fill = "cat /dev/zero > fill 2> /dev/null" if state == "full" else 'mount -o remount,ro "$PWD"'
    more = (
        ["--seconds", "0.05", "-o"] if command == "profile" else ["--source", pictures, "--fit", "stretch", "--output"]
    )
    outcome, names = in_mount(tmp_path, 64, f"echo old > result; {fill}", command, bundle, *more, "disk/result")
    reason = "No space left on device" if state == "full" else "Read-only file system"
    # The measurement is printed nevertheless, so the figures are not lost.
    figures = outcome.out if command == "profile" else ""
    assert ("p50 (median), ms" in figures) == (command == "profile")
    assert_refused(outcome, f"cannot be written: {reason}", "Free space or choose another place", out=figures)
    assert names == (["fill", "result"] if state == "full" else ["result"])
    assert hashlib.sha256(b"old\n").hexdigest() in (tmp_path / "after").read_text()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_and_nothing_else_is_left(
    exchange: bool, tmp_path: Path, tiny_student: Path, monkeypatch: Any
) -> None:
    folder = Path(shutil.copytree(tiny_student, tmp_path / "student"))
    if not exchange:
        monkeypatch.setattr("sparsifiner_edge.files._exchange", lambda *_: False)
    with new_folder(folder, "student") as scratch:
        assert scratch.name.startswith(".student.")
        (scratch / "new").write_text("new")
    assert snapshot(tmp_path) == {"student": None, "student/new": b"new"}


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """Leftovers of an output are recognised by their name and by a lock that nobody holds."""
    target = tmp_path / "result.json"
    dead, folder = tmp_path / ".result.json.0123abcd.tmp", tmp_path / ".result.json.89abcdef.tmp"
    dead.write_text("half")
    folder.mkdir()
    (folder / "inner").write_text("half")
    others = [".result.json.tmp", ".result.json.0123abcdef.tmp", ".result2.json.0123abcd.tmp", "result.json.0.tmp"]
    for name in others:
        (tmp_path / name).write_text("mine")
    handle, living = _new_scratch(target, folder=False)
    assert not dead.exists()
    assert not folder.exists()
    write_text(target, "{}")
    assert {path.name for path in tmp_path.iterdir()} == {*others, "result.json", living.name}
    os.close(handle)
    write_text(target, "{}")
    assert {path.name for path in tmp_path.iterdir()} == {*others, "result.json"}


@pytest.mark.parametrize("number", first([signal.SIGINT, signal.SIGTERM]))
@pytest.mark.parametrize("command", first(["sparsify", "export"]))
def test_a_signal_at_any_moment(
    command: str, number: signal.Signals, start: list[Any], tiny_student: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    shutil.copytree(tiny_student if command == "sparsify" else tiny_bundle, target)
    before = snapshot(target)
    with subprocess.Popen(
        [*PROGRAM, *map(str, start), "-o", str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        deadline = time.monotonic() + random.uniform(1, 9)  # The moment matters; at the latest while it writes.
        while run.poll() is None and time.monotonic() < deadline and not list(tmp_path.glob(".*")):
            time.sleep(0.002)
        run.send_signal(number)
        out, remarks = run.communicate(timeout=120)
    assert list(tmp_path.glob(".*")) == []
    assert "Traceback" not in remarks
    if run.returncode == 0:  # It was done before.
        assert "written" in out
        assert set(snapshot(target)) == set(before)
        assert command == "sparsify" or open_bundle(target)
    else:
        assert run.returncode == 128 + number, remarks
        # Before that, NumPy may report that its import was interrupted.
        assert remarks.endswith("error: interrupted; no partial files were left.\n")
        assert out == ""
        assert snapshot(target) == before


def test_a_signal_while_folders_are_swapped_waits(tmp_path: Path, tiny_student: Path) -> None:
    """The swap completes before the signal takes effect; an earlier folder exists."""
    folder = Path(shutil.copytree(tiny_student, tmp_path / "student"))
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from sparsifiner_edge.artifacts import new_folder\n"
        "from sparsifiner_edge import files\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "swap = files._swap\n"
        "def slow(scratch, target):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    swap(scratch, target)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "files._swap = slow\n"
        "with new_folder(Path(sys.argv[1]), 'student') as folder:\n"
        "    (folder / 'new').write_text('new')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert "KeyboardInterrupt" in done.stderr
    assert snapshot(tmp_path) == {"student": None, "student/new": b"new"}


@needs_mounts
@pytest.mark.everything
def test_a_search_on_a_full_disk_loses_no_bundle(
    tiny_student: Path, tiny_bundle: Path, tiny_weights: Path, folder: Path, tmp_path: Path
) -> None:
    """There is space for the first bundle and no second one."""
    start, bundle = (
        sum(4 * -(-p.stat().st_size // 4096) for p in each.iterdir()) for each in (tiny_student, tiny_bundle)
    )
    size = 64 + start + 3 * bundle // 2
    words = ["optimize", TINY, "--weights", tiny_weights, "--data", folder, "--at-least", 0.5, "--minutes", 2]
    outcome, names = in_mount(
        tmp_path, size, "true", *words, "--backend", "onnxruntime", "--precision", "fp32", "-o", "disk/found"
    )
    assert (outcome.code, outcome.out) == (2, "")
    assert "So far: " in outcome.err
    last = (
        r"error: disk/found/\w+ cannot be written: No space left on device\.\n  Free space or choose another place\.\n$"
    )
    assert re.search(last, outcome.err), outcome.err
    kept = {name.removeprefix("found/bundle/") for name in names if name.startswith("found/bundle/")}
    assert kept >= {path.name for path in tiny_bundle.iterdir()}
    assert not [name for name in names if "/." in name]
