"""Helpers that list the files of the repository with git."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE_FOLDERS = ("sparsifiner_edge/", "runtime/", "export/")
CODE_SUFFIXES = (".py", ".cc", ".cpp", ".c", ".h")


def tracked() -> list[str]:
    """Return the path of every tracked file that exists, relative to the root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def code() -> list[str]:
    """Return the path of every source file of the package, the native library and the export folder."""
    return [name for name in tracked() if name.startswith(CODE_FOLDERS) and name.endswith(CODE_SUFFIXES)]
