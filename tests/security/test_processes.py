"""Processes that the package starts: no file of the working directory runs in them, and none outlives its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from sparsifiner_edge.bundle.sign import sign_bundle
from tests.camera.conftest import encode
from tests.tiny import make_bundle

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sys.executable).with_name("sparsifiner-edge")
PLANTED = ("numpy", "json", "av", "PIL", "onnxruntime", "runpy", "ctypes", "subprocess", "sparsifiner_edge", "timm")

PATHS = (None, "", ":/nowhere", "./:/nowhere")
"""Of PYTHONPATH, which commands hand on to the processes that they start, all by one function: the first command is
tried with each of these, the others with one.
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A working directory in which every likely module says that it ran."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in (*PLANTED, "sitecustomize", "usercustomize"):
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\nraise SystemExit(9)\n"
        )
    return folder


@pytest.fixture
def bundle(tmp_path: Path, keys: Path) -> Path:
    folder = make_bundle(tmp_path / "bundle", size=8, preprocessing={"size": 8})
    sign_bundle(folder, keys / "key.pem")
    return folder


@pytest.mark.parametrize(
    ("command", "path"),
    [
        *(("test", path) for path in PATHS), *((name, "./:/nowhere") for name in ("video", "profile", "build")),
        ("image", None), ("verify", None),
    ],
)  # fmt: skip
def test_no_file_of_the_working_directory_runs(
    command: str, path: str | None, hostile: Path, bundle: Path, keys: Path, tmp_path: Path
) -> None:
    image, video = tmp_path / "image.png", tmp_path / "video.mp4"
    Image.new("RGB", (8, 8)).save(image)
    if command == "video":
        import numpy as np

        encode(video, [np.zeros((64, 64, 3), np.uint8)] * 3)
    key = ["--require-signature", str(keys / "key.pub")]
    arguments = {
        "test": ["run", str(bundle), "--source", "test", "--frames", "1", *key],
        "video": ["run", str(bundle), "--source", str(video), *key],
        "image": ["run", str(bundle), "--source", str(image), *key],
        "profile": ["profile", str(bundle), "--seconds", "0.2", "-o", str(tmp_path / "result.json")],
        "build": ["build", str(bundle), "--backend", "tensorrt-rtx", "--compute-capability", "8.6"],
        "verify": ["bundle", "verify", str(bundle)],
    }[command]
    environment = os.environ | ({} if path is None else {"PYTHONPATH": path})
    # The parent's own PYTHONPATH is cleared by -I; what it hands on to its children is what is tested.
    line = [sys.executable, "-I", str(SCRIPT), *arguments]
    done = subprocess.run(line, cwd=hostile, env=environment, capture_output=True, text=True, check=False)
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_program_that_hears_nothing_ends_with_its_parent() -> None:
    """As do processes of ours: see tests/test_child.py."""
    code = (
        "import subprocess, sys, time\n"
        "from sparsifiner_edge.process import start_program\n"
        "deaf = 'trap \"\" TERM INT HUP; echo deaf; exec sleep 60'\n"
        "child = start_program(['sh', '-c', deaf], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.kill()
    deadline = time.monotonic() + 2
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    gone = not alive(pid)
    if not gone:
        os.kill(pid, signal.SIGKILL)
    assert gone


def test_children_are_limited_and_quiet() -> None:
    code = (
        "import subprocess, sys\n"
        "from sparsifiner_edge.process import start_python\n"
        "print(start_python('tests.security.tell', stdout=subprocess.PIPE).communicate()[0].decode())\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("TELEMETRY")}
    told = json.loads(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment))
    assert told["telemetry"] == "1"
    assert told["core"] == 0
    assert told["files"] <= 4096
    assert told["session"] == told["pid"]
    assert "" not in told["path"]


def test_ctrl_c_ends_the_command_quietly_before_anything_is_imported() -> None:
    code = (
        "import signal, sys\n"
        "import sparsifiner_edge.__main__\n"
        "print(signal.getsignal(signal.SIGINT) is signal.SIG_DFL, {'click', 'numpy', 'rich'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["True", "set()"]
    assert "sparsifiner_edge.__main__" in SCRIPT.read_text()
