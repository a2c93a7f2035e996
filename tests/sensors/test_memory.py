"""Tests of memory measurements of a process, and of a board with memory shared by CPU and GPU."""

from __future__ import annotations

import pytest

from sparsifiner_edge.profiles.measure.memory import PEAK, RESIDENT, device_bytes, process_bytes
from tests.sensors.trees import write_tree

pytestmark = pytest.mark.usefixtures("no_nvml")


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
