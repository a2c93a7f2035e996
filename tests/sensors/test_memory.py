"""Memory of real processes that allocate what is known, and of a board whose processor and GPU share it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sparsifiner_edge.profiles.measure.memory import PEAK, RESIDENT, device_bytes, process_bytes
from tests.sensors.trees import write_tree

pytestmark = pytest.mark.usefixtures("no_nvml")
MB = 1 << 20


def test_memory_of_a_known_allocation():
    code = (
        "from sparsifiner_edge.profiles.measure.memory import PEAK, RESIDENT, process_bytes\nimport json\n"
        "def now(): return [process_bytes(RESIDENT), process_bytes(PEAK)]\n"
        "before = now()\nblock = b'x' * (400 << 20)\nheld = now()\ndel block\nprint(json.dumps([before, held, now()]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    before, held, after = json.loads(output)
    for was, now in zip(before, held, strict=True):
        assert now - was == pytest.approx(400 * MB, rel=0.05)
    assert after[0] < before[0] + 40 * MB
    assert after[1] == pytest.approx(held[0], rel=0.05)  # The kernel counts in batches.


def test_what_cannot_be_read_says_why(tmp_path):
    write_tree(tmp_path, {"status": "VmHWM:\t  60 kB"})
    assert process_bytes(PEAK, tmp_path) == 60 * 1024
    assert "has no VmRSS" in process_bytes(RESIDENT, tmp_path).why
    assert "No such file" in process_bytes(PEAK, tmp_path / "none").why
    assert "nvidia-ml-py" in device_bytes(tmp_path)[0].why


def test_unified_memory_is_what_is_not_available(tmp_path):
    write_tree(tmp_path, {"etc/nv_tegra_release": "# R36", "proc/meminfo": "MemAvailable:  5000000 kB"})
    held, source = device_bytes(tmp_path)
    assert held == -5_000_000 * 1024
    assert "MemAvailable" in source
    write_tree(tmp_path, {"proc/meminfo": "MemTotal: 7800000 kB"})
    assert "MemAvailable" in device_bytes(tmp_path)[0].why
