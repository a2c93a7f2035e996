"""The command line as tests call it: in a process of its own, or in this one where a process would tell no more."""

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
    """What a bundle whose hashes match has in its manifest, as JSON."""
    open_bundle(folder)
    return dict(json.loads((folder / BUNDLE_FILE).read_text(encoding="utf-8")))


PROGRESS = re.compile(r"^[^\n]+: (\d+%, )?\d:\d\d:\d\d(, \d:\d\d:\d\d left)?\n", re.MULTILINE)
"""What a command says every ten seconds, which on a busy machine one of any length may take."""
PROGRAM = [sys.executable, "-m", "sparsifiner_edge"]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def process(*arguments: Any, **options: Any) -> Outcome:
    """Run the command line in a process of its own."""
    # One thread: on a busy machine those of torch wait for one another longer than the small models take.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment, **options
    )
    return Outcome(done.returncode, done.stdout, PROGRESS.sub("", done.stderr))


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """The command line, called in this process, takes signals and lost exceptions over, and ignores them at its end."""
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
    """Until something has happened, however busy the machine is; what `condition` then gives."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
    return found


def ended(pid: int) -> bool:
    """Whether a process is gone, or waits for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below a folder, hidden entries too: contents of files, targets of links, None for folders."""
    return {
        str(p.relative_to(folder)): str(p.readlink()) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def assert_refused(outcome: Outcome, *texts: str, out: str = "") -> None:
    """Exit code 2, nothing but a message with `texts` and with what to do, and that on standard error."""
    assert outcome.code == 2, outcome
    assert outcome.out == out
    assert "Traceback" not in outcome.err
    for text in texts:
        assert text in " ".join(outcome.err.split()), outcome.err
    message = PROGRESS.sub("", outcome.err).strip().splitlines()
    # Ours say what to do on a second line; click's name the option and end with what it takes.
    assert message[0].startswith("error: ") or message[0].startswith("Usage: ")
    assert len(message) >= 2, outcome.err
