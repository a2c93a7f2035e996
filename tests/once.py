"""Test data shared between the worker processes and made once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest

WORKER = "PYTEST_XDIST_WORKER" in os.environ
Once = Callable[[str, Callable[[Path], Any]], Path]
"""Takes a name and a function that fills a new folder; returns the filled folder."""


def make_once(factory: pytest.TempPathFactory) -> Once:
    """Return a maker: the first process to request a name makes it, the others wait."""
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
