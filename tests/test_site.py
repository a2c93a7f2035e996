"""Tests that the documentation site builds without a warning: pages, links and docstrings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sparsifiner_edge as se
from sparsifiner_edge.cli.main import COMMANDS
from tests.repository import ROOT

pytestmark = pytest.mark.everything


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reference.html").read_text(encoding="utf-8")
    assert [name for name in se.__all__ if f'id="sparsifiner_edge.{name}"' not in page] == []
    assert [name for name in COMMANDS if f'id="sparsifiner-edge-{name}"' not in page] == []
    index = (tmp_path / "llms.txt").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("**/*.md") if f"/{page.name}.txt" not in index] == []
