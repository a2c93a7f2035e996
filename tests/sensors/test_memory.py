"""Memory of real processes that allocate what is known, and of a board whose processor and GPU share it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sparsifiner_edge.profiles.measure.memory import DeviceMemory
from tests.plain import read_memory
from tests.sensors.trees import write_tree

pytestmark = pytest.mark.usefixtures("no_nvml")
MB = 1 << 20


def test_memory_of_a_known_allocation():
    code = (
        "from tests.plain import read_memory\nimport json\n"
        "before = read_memory()\nblock = b'x' * (400 << 20)\nheld = read_memory()\ndel block\n"
        "print(json.dumps([before, held, read_memory()]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    before, held, after = json.loads(output)
    for key in ("rss_bytes", "pss_bytes", "peak_rss_bytes"):
        assert held[key] - before[key] == pytest.approx(400 * MB, rel=0.05)
    assert after["rss_bytes"] < before["rss_bytes"] + 40 * MB
    assert after["peak_rss_bytes"] == pytest.approx(held["rss_bytes"], rel=0.05)  # The kernel counts in batches.


def test_what_cannot_be_read_says_why(tmp_path):
    write_tree(tmp_path, {"status": "VmHWM:\t  60 kB"})
    report = read_memory(tmp_path)
    assert report["peak_rss_bytes"] == 60 * 1024
    assert "has no VmRSS" in report["rss_bytes"]["unavailable"]
    assert "No such file" in report["pss_bytes"]["unavailable"]


def test_unified_memory_is_the_fall_of_what_is_available(tmp_path):
    write_tree(tmp_path, {"etc/nv_tegra_release": "# R36", "proc/meminfo": "MemAvailable:  5000000 kB"})
    memory = DeviceMemory(tmp_path)
    write_tree(tmp_path, {"proc/meminfo": "MemTotal: 7800000 kB\nMemAvailable:  4200000 kB"})
    assert memory.taken() == 800_000 * 1024
    assert "MemAvailable" in memory.source
    write_tree(tmp_path, {"proc/meminfo": "MemTotal: 7800000 kB"})
    assert "MemAvailable" in memory.taken().why


def test_without_a_device_there_is_a_reason(tmp_path):
    assert "nvidia-ml-py" in DeviceMemory(tmp_path).taken().why
