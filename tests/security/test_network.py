"""Tests that nothing uses the network unless requested: every command runs in a network namespace that sees packets."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsifiner_edge.cli.main import COMMANDS
from tests.camera.conftest import encode
from tests.commands import PROGRAM, process
from tests.models import TINY
from tests.tiny import make_bundle

ROOT = Path(__file__).parents[2]
SECONDS = 30
"""ONNX Runtime sends telemetry some 20 s after its import."""


def isolated(commands: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.isolated", str(seconds)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=seconds + 60,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


_PROBE = [sys.executable, "-c", "from tests.security.isolated import enter; enter()"]
needs_namespaces = pytest.mark.skipif(
    subprocess.run(_PROBE, capture_output=True, check=False, cwd=ROOT).returncode != 0,
    reason="network namespaces are not permitted here",
)


@needs_namespaces
def test_a_packet_is_seen() -> None:
    """The test detects a look-up and a connection."""
    asks = "import socket\ntry: socket.getaddrinfo('report.example.org', 443)\nexcept OSError: pass"
    calls = "import socket\nsocket.create_connection(('192.0.2.7', 443), 1)"
    for code, sign in ((asks, "example"), (calls, "c0000207")):
        found = isolated([{"name": "it", "arguments": [sys.executable, "-c", code]}], 10)
        assert any(sign in packet for packet in found["packets"]), found


@pytest.mark.everything
@needs_namespaces
def test_no_command_uses_the_network(tmp_path: Path, tiny_student: Path, tiny_weights: Path, pictures: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", size=8, preprocessing={"size": 8})
    video = encode(tmp_path / "video.mp4", [np.zeros((64, 64, 3), np.uint8)] * 3)
    result, many = tmp_path / "result.json", tmp_path / "many"
    many.mkdir()
    for number, picture in enumerate(2 * sorted(pictures.iterdir())):
        shutil.copyfile(picture, many / f"{number}{picture.suffix}")
    assert process("profile", bundle, "--seconds", ".1", "-o", result).code == 0
    lines = {
        # Cameras and measurements run for the whole time.
        "run test": f"{bundle} --source test:2",
        "profile": f"{bundle} --seconds {SECONDS} -o {tmp_path}/long.json",
        "run video": f"{bundle} --source {video}",
        "run images": f"{bundle} --source {pictures}",
        "sparsify": f"{TINY} --weights {tiny_weights} --img-size 160 -o {tmp_path}/student",
        "distill": f"{tiny_student} --data {pictures} --set distil.steps=1 -o {tmp_path}/better",
        "evaluate": f"{tiny_student} --data {pictures}",
        "explain": f"{tiny_student} --data {pictures} --images 1 -o {tmp_path}/explained.html",
        "export": f"{tiny_student} -o {tmp_path}/exported",
        "build": f"{bundle} --backend tensorrt-rtx --compute-capability 8.6",
        "bundle openvino": f"verify {bundle} --backend openvino",
        "optimize": f"{tiny_student} --data {many} --at-least .9 --board t4 -o {tmp_path}/found",
        "estimate": f"{bundle} --board jetson-orin-nano-8gb",
        "report": f"{result} -o {tmp_path}/page.html",
        "package": f"{bundle} --for triton -o {tmp_path}/package",
        "bundle": f"verify {bundle}",
        "doctor": "",
    }
    assert {name.split()[0] for name in lines} == set(COMMANDS)
    commands = [
        {"name": n, "arguments": [*PROGRAM, n.split()[0], *line.split()], "environment": {"OMP_NUM_THREADS": "1"}}
        for n, line in lines.items()
    ]
    asked = {"name": "asked", "arguments": commands[0]["arguments"], "environment": {"ORT_DISABLE_TELEMETRY": "0"}}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        reporting = pool.submit(isolated, [asked], SECONDS + 5)
        found = isolated(commands, SECONDS + 5)
    assert found["packets"] == []
    # Telemetry that would be seen if it were enabled; older versions report less.
    if tuple(map(int, version("onnxruntime").split(".")[:2])) >= (1, 32):
        assert any("microsoft" in packet for packet in reporting.result()["packets"])
    assert found["codes"]["run test"] is None, found["errors"]["run test"]
    for name, text in found["errors"].items():
        assert "Traceback" not in text, (name, text)


def test_telemetry_is_off_before_anything_is_imported() -> None:
    code = "import os, sparsifiner_edge, sys\nprint(os.environ['ORT_DISABLE_TELEMETRY'], 'onnxruntime' in sys.modules)"
    line, environment = [sys.executable, "-c", code], {"PATH": "/usr/bin"}
    assert subprocess.check_output(line, text=True, cwd=ROOT, env=environment).split() == ["1", "False"]
    kept = environment | {"ORT_DISABLE_TELEMETRY": "0"}  # The user can enable it.
    assert subprocess.check_output(line, text=True, cwd=ROOT, env=kept).split()[0] == "0"
    told = subprocess.check_output([sys.executable, "-m", "sparsifiner_edge", "doctor"], text=True, cwd=ROOT, env=kept)
    assert "on: ORT_DISABLE_TELEMETRY is '0'" in told
