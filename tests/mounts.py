"""Small file systems for tests, mounted at `disk/` in a mount namespace."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.commands import PROGRAM, Outcome


def in_mount(tmp_path: Path, size_kb: int, prepare: str, *arguments: Any) -> tuple[Outcome, list[str]]:
    """Run the command line with a file system of `size_kb` at `disk/`; return also what `disk/` holds afterwards."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f'mount -t tmpfs -o size={size_kb}k none "{disk}" || exit 99; cd "{disk}"; {prepare}; cd ..\n'
        '"$@"; code=$?\n'
        f'find "{disk}" -mindepth 1 -type f -exec sha256sum {{}} + > after; find "{disk}" -mindepth 1 >> names\n'
        "exit $code"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    names = (tmp_path / "names").read_text().splitlines() if (tmp_path / "names").exists() else []
    return Outcome(done.returncode, done.stdout, done.stderr), sorted(str(Path(n).relative_to(disk)) for n in names)


_PROBE = ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt"]
needs_mounts = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(_PROBE, capture_output=True, check=False).returncode != 0,
    reason="unshare -m and mount are not permitted here",
)
