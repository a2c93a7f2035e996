"""The page about models says what runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import PROGRAM

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^    sparsifiner-edge (.*?)(?: +#.*)?$", PAGE, re.MULTILINE)


def run(arguments: list[str], place: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(place)}
    done = subprocess.run(arguments, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.everything
@pytest.mark.long
def test_every_block_runs(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "images").symlink_to(pictures)
    (tmp_path / "masks").symlink_to(pictures)
    run([sys.executable, "-c", BLOCKS[0]], tmp_path)
    assert (tmp_path / "bundle" / "model.onnx").is_file()
    (tmp_path / "mymodels.py").write_text(f"{BLOCKS[1]}\n{BLOCKS[2]}", encoding="utf-8")
    assert len(COMMANDS) == 4
    for line in COMMANDS:
        if "--against dense/" in line:
            run([*PROGRAM, "export", "mymodels:segmenter", "--img-size", "224", "-o", "dense"], tmp_path)
        run([*PROGRAM, *line.split()], tmp_path)
