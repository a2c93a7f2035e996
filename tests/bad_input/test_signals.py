"""Signals: no partial files stay."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsifiner_edge.bundle.store import open_bundle
from tests.commands import PROGRAM, snapshot
from tests.everything import first
from tests.models import TINY


def scratch_folders(target: Path) -> list[Path]:
    return [p for p in target.parent.iterdir() if p.name.startswith(".")]


def wait_for(condition: Callable[[], object], run: subprocess.Popen[str]) -> bool:
    deadline = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.002)
    return False


@pytest.mark.parametrize("moment", first(["writing", "importing", "working"]))
@pytest.mark.parametrize("number", first([signal.SIGINT, signal.SIGTERM]))
@pytest.mark.parametrize("command", first(["sparsify", "export"]))
def test_a_signal_at_any_moment(
    command: str, number: signal.Signals, moment: str, tiny_student: Path, tiny_bundle: Path, tiny_weights: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    target = tmp_path / "target"
    shutil.copytree(tiny_student if command == "sparsify" else tiny_bundle, target)
    before = snapshot(target)
    start = ["sparsify", TINY, "--weights", str(tiny_weights)] if command == "sparsify" else ["export", tiny_student]
    with subprocess.Popen(
        [*PROGRAM, *map(str, start), "-o", str(target)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        # As soon as torch is loaded the command is at work.
        assert wait_for(lambda: "libtorch_cpu" in Path(f"/proc/{run.pid}/maps").read_text(), run)
        if moment == "writing":
            wait_for(lambda: scratch_folders(target), run)
        elif moment == "working":
            time.sleep(random.uniform(0.5, 3.5 if command == "sparsify" else 7))  # The moment is the point.
        run.send_signal(number)
        out, remarks = run.communicate(timeout=120)
    assert scratch_folders(target) == []
    assert "Traceback" not in remarks
    if run.returncode == 0:  # It was done before.
        assert "written" in out
        assert set(snapshot(target)) == set(before)
        assert command == "sparsify" or open_bundle(target)
    else:
        assert run.returncode == 128 + number, remarks
        # Before it, NumPy may say that its import was cut short.
        assert remarks.endswith("error: interrupted; no partial files were left.\n")
        assert out == ""
        assert snapshot(target) == before


def test_a_signal_while_folders_are_swapped_waits(tmp_path: Path, tiny_student: Path) -> None:
    """Swapped whole, then the signal is heard; with an earlier folder in place."""
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


def test_nohup_is_respected(bundle: Path, pictures: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from sparsifiner_edge.cli.main import main\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "import sparsifiner_edge.camera.service as stills\n"
        "run = stills.run_images\n"
        "stills.run_images = lambda *a: (os.kill(os.getpid(), signal.SIGHUP), run(*a))[1]\n"
        "main(['run', sys.argv[1], '--source', sys.argv[2]])"
    )
    done = subprocess.run([sys.executable, "-c", code, bundle, pictures], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
