"""Memory by phase, of real processes that allocate what is known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparsifiner_edge.profiles.measure.memory import MemoryPhases
from sparsifiner_edge.records import Unavailable, write_record
from tests.plain import read_memory
from tests.sensors.trees import write_tree

pytestmark = pytest.mark.usefixtures("no_nvml")

MB = 1_000_000
KNOWN = 800 * MB
PEAK = 200 * MB
CHILD = """
import sys
held = None
for line in sys.stdin:
    if line.startswith("allocate"):
        held = bytearray(int(line.split()[1]))
        held[::4096] = b"x" * len(held[::4096])
    elif line.strip() == "free":
        held = None
    print("done", flush=True)
"""


class Child:
    """A process that allocates and frees on demand."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.tell("hello")

    def tell(self, what: str) -> None:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def child():
    started = Child()
    yield started
    started.process.kill()
    started.process.communicate()


def test_a_known_allocation_is_found_in_its_phase_and_in_no_other(child):
    phases = MemoryPhases(child.process.pid)
    before = phases.end("nothing")
    child.tell(f"allocate {KNOWN}")
    held = phases.end("held")
    for name in ("rss_bytes", "peak_rss_bytes", "pss_bytes"):
        assert getattr(held, name) - getattr(before, name) == pytest.approx(KNOWN, rel=0.05), name
    child.tell("free")
    freed = phases.end("freed")
    assert freed.rss_bytes - before.rss_bytes < 0.05 * KNOWN
    # It was still there when this phase began; in the next it is not.
    assert freed.peak_rss_bytes - before.rss_bytes == pytest.approx(KNOWN, rel=0.05)
    after = phases.end("after")
    assert after.peak_rss_bytes - before.rss_bytes < 0.05 * KNOWN


def test_a_peak_between_two_looks_is_found(child):
    phases = MemoryPhases(child.process.pid)
    before = phases.end("nothing")
    child.tell(f"allocate {PEAK}")
    child.tell("free")
    load = phases.end("load")
    assert load.peak_rss_bytes - before.rss_bytes == pytest.approx(PEAK, rel=0.05)
    assert load.rss_bytes - before.rss_bytes < 0.05 * PEAK
    assert list(phases.phases) == ["nothing", "load"]


def test_a_process_that_ended_is_told(child):
    phases = MemoryPhases(child.process.pid)
    child.process.kill()
    child.process.wait()
    for name, value in write_record(phases.end("late")).items():
        assert "unavailable" in value, name


def proc(root: Path, peak_kb: int, rss_kb: int = 50_000) -> Path:
    text = f"Name:\tx\nVmHWM:\t  {peak_kb} kB\nVmRSS:\t  {rss_kb} kB"
    return write_tree(root, {"proc/7/status": text, "proc/7/smaps_rollup": "Rss: 9 kB\nPss:  40000 kB"})


def test_a_peak_that_cannot_be_reset_counts_only_when_it_rises(tmp_path):
    proc(tmp_path, 60_000)
    (tmp_path / "proc/7/clear_refs").mkdir()  # Writing to it fails, whoever tries.
    phases = MemoryPhases(7, tmp_path)
    first = phases.end("load")
    assert "cannot be reset" in first.peak_rss_bytes.why
    assert first.rss_bytes == 50_000 * 1024
    assert first.pss_bytes == 40_000 * 1024
    proc(tmp_path, 90_000)
    assert phases.end("first_inference").peak_rss_bytes == 90_000 * 1024
    assert isinstance(phases.end("steady").peak_rss_bytes, Unavailable)


def test_the_peak_is_reset_through_clear_refs(tmp_path):
    proc(tmp_path, 60_000)
    MemoryPhases(7, tmp_path)
    assert (tmp_path / "proc/7/clear_refs").read_text() == "5"


def test_unified_memory_is_the_fall_of_what_is_available(tmp_path):
    proc(tmp_path, 60_000)
    write_tree(
        tmp_path, {"etc/nv_tegra_release": "# R36", "proc/meminfo": "MemTotal: 7800000 kB\nMemAvailable:  5000000 kB"}
    )
    phases = MemoryPhases(7, tmp_path)
    write_tree(tmp_path, {"proc/meminfo": "MemTotal: 7800000 kB\nMemAvailable:  4200000 kB"})
    phase = phases.end("load")
    assert phase.unified_bytes == 800_000 * 1024
    assert "see unified_bytes" in phase.device_bytes.why
    write_tree(tmp_path, {"proc/meminfo": "MemTotal: 7800000 kB"})
    assert "MemAvailable" in phases.end("steady").unified_bytes.why


def test_what_cannot_be_read_says_why(tmp_path):
    write_tree(tmp_path, {"status": "VmHWM:\t  60 kB"})
    report = read_memory(tmp_path)
    assert report["peak_rss_bytes"] == 60 * 1024
    assert "has no VmRSS" in report["rss_bytes"]["unavailable"]
    assert "No such file" in report["pss_bytes"]["unavailable"]
