"""Outputs that are no place, are not ours, or lie on a full or read-only disk: nothing is half-written or lost."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparsifiner_edge.artifacts import STUDENT_FILE, new_folder
from sparsifiner_edge.cli.main import main
from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.files import _new_scratch, write_text
from tests.commands import assert_refused, call, snapshot
from tests.everything import first
from tests.models import TINY
from tests.mounts import in_mount, needs_mounts

Capsys = pytest.CaptureFixture[str]
OCCUPIED = {
    "file": None, "link": None, "dangling link": None, "foreign": ("thesis.txt", "mine"),
    "another's": (STUDENT_FILE, '{"kind": "vit"}'), "damaged": (STUDENT_FILE, '{"kind": "student"'),
    "student and more": ("notes.txt", "mine"),
}  # fmt: skip


@pytest.mark.parametrize("how", OCCUPIED)
@pytest.mark.parametrize("command", ["sparsify", "export"])
def test_an_output_that_is_not_ours_is_left_alone(
    command: str, how: str, tiny_student: Path, tiny_weights: Path, tmp_path: Path, capsys: Capsys
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
    start = ["sparsify", TINY, "--weights", tiny_weights] if command == "sparsify" else ["export", tiny_student]
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
    with pytest.raises(ZeroDivisionError):  # A bug stays a traceback.
        main(["run", str(tmp_path), "--source", str(tmp_path)])


# Disks.


def hashes(paths: Any) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@needs_mounts
@pytest.mark.parametrize(("command", "earlier"), first([("sparsify", True), ("sparsify", False), ("export", True)]))
def test_a_full_disk_leaves_what_was_there(
    command: str, earlier: bool, tiny_student: Path, tiny_bundle: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    old = tiny_student if command == "sparsify" else tiny_bundle
    # Room for the earlier folder and for half of a new one.
    size = (sum(4 * -(-p.stat().st_size // 4096) for p in old.iterdir()) + 64) * (3 if earlier else 1) // 2
    prepare = f"cp -r {old} target" if earlier else "true"
    start = ["sparsify", TINY, "--weights", tiny_weights] if command == "sparsify" else ["export", tiny_student]
    outcome, names = in_mount(tmp_path, size, prepare, *start, "-o", "disk/target")
    assert_refused(outcome, "disk/target cannot be written: No space left on device", "Free space")
    assert names == (["target", *sorted(f"target/{p.name}" for p in old.iterdir())] if earlier else [])
    if earlier:
        assert {line.split()[0] for line in (tmp_path / "after").read_text().splitlines()} == hashes(old.iterdir())


@needs_mounts
@pytest.mark.parametrize(("command", "state"), [("profile", "full"), ("profile", "read-only"), ("run", "read-only")])
def test_results_on_a_full_or_read_only_disk(
    command: str, state: str, bundle: Path, pictures: Path, tmp_path: Path
) -> None:
    fill = "cat /dev/zero > fill 2> /dev/null" if state == "full" else 'mount -o remount,ro "$PWD"'
    start = {
        "profile": ["profile", bundle, "--seconds", "0.05", "-o"],
        "run": ["run", bundle, "--source", pictures, "--output"],
    }
    outcome, names = in_mount(tmp_path, 64, f"echo old > result; {fill}", *start[command], "disk/result")
    reason = "No space left on device" if state == "full" else "Read-only file system"
    # What was measured is shown all the same: the reader keeps the figures.
    figures = outcome.out if command == "profile" else ""
    assert ("latency p50" in figures) == (command == "profile")
    assert_refused(outcome, f"cannot be written: {reason}", "Free space or choose another place", out=figures)
    assert names == (["fill", "result"] if state == "full" else ["result"])
    assert hashlib.sha256(b"old\n").hexdigest() in (tmp_path / "after").read_text()


# Folders and files are replaced whole.


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
    """Leftovers of one output, known by their name and by a lock that nobody holds."""
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
