"""The documentation as a site: every page, link and docstring is taken without a warning."""

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
    api, cli = ((tmp_path / page).read_text(encoding="utf-8") for page in ("api.html", "cli.html"))
    assert [name for name in se.__all__ if f'id="sparsifiner_edge.{name}"' not in api] == []
    assert [name for name in COMMANDS if f'id="sparsifiner-edge-{name}"' not in cli] == []
    index = (tmp_path / "llms.txt").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("**/*.md") if f"/{page.name}.txt" not in index] == []
