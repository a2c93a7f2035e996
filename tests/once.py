"""What the processes that run the tests share: what is made once, and whose turn it is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

WORKER = "PYTEST_XDIST_WORKER" in os.environ
Once = Callable[[str, Callable[[Path], Any]], Path]
"""(name, function that fills a new folder) -> that folder, filled."""


def make_once(factory: pytest.TempPathFactory) -> Once:
    """The first process that asks for a name makes it, others wait for it."""
    base = factory.getbasetemp()
    shared = (base.parent if WORKER else base) / "shared"
    shared.mkdir(exist_ok=True)

    def once(name: str, make: Callable[[Path], Any]) -> Path:
        folder, made = shared / name, shared / f"{name}.made"
        with filelock.FileLock(shared / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return once


@contextlib.contextmanager
def turn(folder: Path, alone: bool) -> Iterator[None]:
    """The time of one test: beside others, or alone among all processes that have this folder.

    Who wants to be alone holds the door, so that nobody enters while it waits for those inside.
    """
    with (folder / "door").open("w") as door, (folder / "room").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        yield
