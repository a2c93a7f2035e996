"""Tests of started processes: no file of the working directory runs in them, and none outlives its parent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsifiner_edge.bundle.sign import sign_bundle
from tests.camera.conftest import encode
from tests.commands import ended, wait_for
from tests.tiny import make_bundle

SCRIPT = Path(sys.executable).with_name("sparsifiner-edge")
PLANTED = (
    "numpy",
    "json",
    "av",
    "PIL",
    "onnxruntime",
    "runpy",
    "ctypes",
    "subprocess",
    "sparsifiner_edge",
    "timm",
    "sitecustomize",
    "usercustomize",
)
COMMANDS = {
    "test": "run {bundle} --source test --frames 1 --require-signature {keys}/key.pub",
    "video": "run {bundle} --source {place}/video.mp4 --require-signature {keys}/key.pub",
    "image": "run {bundle} --source {pictures} --require-signature {keys}/key.pub",
    "profile": "profile {bundle} --seconds 0.2 -o {place}/result.json",
    "build": "build {bundle} --backend tensorrt-rtx --compute-capability 8.6",
    "verify": "bundle verify {bundle}",
}
PATHS = ("", ":/nowhere", "./:/nowhere")
"""Values of PYTHONPATH, which all started processes inherit: the first command tries each, the others one."""


@pytest.mark.parametrize(("command", "path"), [*(("test", path) for path in PATHS), *((c, PATHS[2]) for c in COMMANDS)])
def test_no_file_of_the_working_directory_runs(
    command: str, path: str, keys: Path, pictures: Path, tmp_path: Path
) -> None:
    """Every likely module in it would report that it ran."""
    hostile, ran = tmp_path / "hostile", tmp_path / "ran"
    hostile.mkdir()
    for name in PLANTED:
        (hostile / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write({name!r} + ' ')\nraise SystemExit(9)\n")
    bundle = make_bundle(tmp_path / "bundle", size=8, preprocessing={"size": 8})
    sign_bundle(bundle, keys / "key.pem")
    encode(tmp_path / "video.mp4", [np.zeros((64, 64, 3), np.uint8)] * 3)
    line = COMMANDS[command].format(bundle=bundle, keys=keys, pictures=pictures, place=tmp_path)
    # The parent's own PYTHONPATH is cleared by -I; what it passes on to its children is tested.
    done = subprocess.run(
        [sys.executable, "-I", str(SCRIPT), *line.split()],
        cwd=hostile,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not ran.exists(), ran.read_text()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_a_program_that_hears_nothing_ends_with_its_parent() -> None:
    """So do our worker processes: see tests/test_child.py."""
    code = (
        "import subprocess, sys, time\n"
        "from sparsifiner_edge.process import start_program\n"
        "deaf = 'trap \"\" TERM INT HUP; echo $$; exec sleep 60'\n"
        "start_program(['sh', '-c', deaf])\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert not ended(child)
        parent.kill()
    wait_for(lambda: ended(child), 2)


def test_ctrl_c_ends_the_command_quietly_before_anything_is_imported() -> None:
    code = (
        "import signal, sys\n"
        "import sparsifiner_edge.__main__\n"
        "print(signal.getsignal(signal.SIGINT) is signal.SIG_DFL, {'click', 'numpy', 'rich'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True", "set()"]
    assert "sparsifiner_edge.__main__" in SCRIPT.read_text()
