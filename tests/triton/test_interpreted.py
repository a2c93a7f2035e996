"""Runs `check_interpreted.py` and `check_merging.py` with Triton's interpreter, which must be set before import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")

ROOT = Path(__file__).parent.parent.parent
CHECKS = [str(Path(__file__).with_name(f"check_{name}.py")) for name in ("interpreted", "merging")]
EACH = "that_run or (agrees_at_every and 64) or ties_go or taken_again or wild or stays_within or (at_every and 24)"
"""Some ten cases: each operator and its special cases."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("chosen", "count"), [(["-k", EACH], 8), pytest.param([], 60, marks=pytest.mark.everything)], ids=["each", "all"]
)
def test_kernels_in_the_interpreter(chosen: list[str], count: int) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in [x for x in environment if x.startswith("PYTEST_")]:  # those of an outer xdist
        del environment[name]
    command = [sys.executable, "-m", "pytest", *CHECKS, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > count
    assert "skipped" not in done.stdout
