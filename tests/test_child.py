"""Tests of worker processes: calls, detection of crashes and hangs, and termination together with the parent."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import to_builtins

from sparsifiner_edge.errors import ArtifactError, BackendError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.profiles.measure.side import start_worker
from sparsifiner_edge.runtime.child import start_child
from tests.commands import ended, wait_for

SOURCES = {
    "aborts": "import os, sys; sys.stderr.write('corrupted list'); sys.stderr.flush(); os.abort()",
    "leaves": "import os; os._exit(3)",
    "raves": "import os, time; os.write(int(os.environ['SPARSIFINER_PIPE']), b'\\xff' * 99); time.sleep(99)",
}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("aborts", r"The child was ended by SIGABRT during 'work'. It wrote: corrupted list\n  Do this"),
        ("leaves", r"The child exited with status 3 during 'work'. It wrote: nothing\n  Do this"),
        ("raves", r"The child was ended by SIGKILL during 'work'"),
    ],
)
def test_one_that_dies_is_told_with_what_it_wrote(name, said, tmp_path, monkeypatch):
    (tmp_path / "the_child.py").write_text(SOURCES[name])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("sparsifiner_edge.runtime.child._ENDING_S", 1.0)
    with start_child("the_child", "The child", "Do this.") as child, pytest.raises(BackendError, match=said):
        child.ask("work", 60, dict)


def test_an_error_keeps_its_class_and_its_message(tmp_path: Path) -> None:
    with start_worker() as worker:
        with pytest.raises(ArtifactError, match=r"does not exist"):
            worker.ask("load", 60, dict, bundle=str(tmp_path / "none"), execution=to_builtins(Execution()))
        assert worker.ask("processor_s", 60, float) > 0  # The worker is still alive.
        with pytest.raises(BackendError, match=r"(?s)exited with status 1 during 'nonsense'.*KeyError"):
            worker.ask("nonsense", 60, object)


def test_prints_of_libraries_do_not_reach_the_replies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "the_child.py").write_text(
        "import os\nfrom sparsifiner_edge.runtime.child import serve\n"
        "def noisy():\n    print('noise', flush=True); os.write(1, b'more noise\\n')\n    return 7\n"
        "serve({'noisy': noisy})"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with start_child("the_child", "The child", "Do this.") as child:
        assert child.ask("noisy", 60, int) == 7


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_its_parent(number: signal.Signals) -> None:
    code = (
        "import time\nfrom sparsifiner_edge.profiles.measure.side import start_worker\n"
        "with start_worker() as worker:\n"
        "    worker.ask('processor_s', 60, float)\n    print(worker.pid, flush=True)\n    time.sleep(600)"
    )
    line = [sys.executable, "-c", code]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(number)
        parent.wait(30)
    wait_for(lambda: ended(pid), 30)
