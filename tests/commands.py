"""Helpers that run the command line in a separate process or, where that is sufficient, in this one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sparsifiner_edge.artifacts import BUNDLE_FILE
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.cli.main import main


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return the `manifest.json` of a bundle whose hashes match."""
    open_bundle(folder)
    return dict(json.loads((folder / BUNDLE_FILE).read_text(encoding="utf-8")))


PROGRESS = re.compile(r"^[^\n]+: (\d+%, )?\d:\d\d:\d\d(, \d:\d\d:\d\d left)?\n", re.MULTILINE)
"""Progress line that a command prints every ten seconds; on a busy machine, any command may print one."""
PROGRAM = [sys.executable, "-m", "sparsifiner_edge"]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def process(*arguments: Any, **options: Any) -> Outcome:
    """Run the command line in a process of its own."""
    # One thread: on a busy machine, torch's threads wait for each other longer than these small models take.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment, **options
    )
    return Outcome(done.returncode, done.stdout, PROGRESS.sub("", done.stderr))


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Restore signal handlers and exception hooks, which the command line replaces when it runs in this process."""
    hook = sys.unraisablehook
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Outcome:
    """Run the command line in this process."""
    capsys.readouterr()
    with handlers_kept(), pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return Outcome(caught.value.code, captured.out, PROGRESS.sub("", captured.err))


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> Any:
    """Poll until `condition` returns a true value, then return that value."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
    return found


def ended(pid: int) -> bool:
    """Return True if a process has exited, or is a zombie that its parent has not reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Return everything below a folder, hidden entries included: file contents, link targets, None for folders."""
    return {
        str(p.relative_to(folder)): str(p.readlink()) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def assert_refused(outcome: Outcome, *texts: str, out: str = "") -> None:
    """Assert exit code 2 and an error message on standard error alone that contains `texts` and a remedy."""
    assert outcome.code == 2, outcome
    assert outcome.out == out
    assert "Traceback" not in outcome.err
    for text in texts:
        assert text in " ".join(outcome.err.split()), outcome.err
    message = PROGRESS.sub("", outcome.err).strip().splitlines()
    # Our messages give the remedy on a second line; click's name the option and end with the accepted values.
    assert message[0].startswith("error: ") or message[0].startswith("Usage: ")
    assert len(message) >= 2, outcome.err
