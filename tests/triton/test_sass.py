"""Tests of properties that only the machine code of kernels shows.

Threads of a block that write and read the same global memory meet at a barrier in between.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from sparsifiner_edge.ops.triton.compile import Compiled, compile_launch
from sparsifiner_edge.ops.triton.schedule import Schedule
from sparsifiner_edge.ops.triton.schedule_merge import schedule_merging
from tests.everything import first
from tests.triton.test_compile import layer

KINDS = {"STG": "store", "LDG": "load", "BAR": "barrier"}
"""Instruction-name prefixes. Loads of inputs into shared memory (LDGSTS) are excluded."""


MOST_CLOCKS = {
    ("select", 87): 280,
    ("attend", 87): 680,
    ("select", 90): 270,
    ("attend", 90): 570,
    ("select", 120): 300,
    ("attend", 120): 1180,
}
"""Limits for the longest matrix-multiplying loop: the compiled value at the time of writing plus a twentieth."""


def disassembled(made: Compiled, folder: Path, *options: str) -> list[str]:
    """Return the lines of machine code."""
    import triton.backends.nvidia

    (folder / "code.cubin").write_bytes(made.cubin)
    program = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    line = [program, *options, "-c", folder / "code.cubin"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()


def loops(lines: list[str]) -> list[tuple[list[str], int]]:
    """Return the instructions of each loop and the clocks that a warp waits between them.

    The clocks are in the control bits of every instruction (bits 105 to 108). They are a lower bound: waits for memory
    come on top.
    """
    code: list[tuple[str, int]] = []
    labels, text = dict[str, int](), ""
    for line in lines:
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            labels[match[1]] = len(code)
        elif match := re.match(r"\s+/\*[0-9a-f]{4,6}\*/\s+(.*?)\s*;\s*/\* 0x", line):
            text = match[1]
        elif (match := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)) and text:
            code.append((text, int(match[1], 16) >> 41 & 15))
            text = ""
    ends = [(re.search(r"BRA.*(\.L_x_\d+)", text), number) for number, (text, _) in enumerate(code)]
    bodies = [code[labels[match[1]] : number + 1] for match, number in ends if match and labels[match[1]] <= number]
    return [([name for name, _ in body], sum(clocks for _, clocks in body)) for body in bodies]


def accesses(made: Compiled, folder: Path) -> list[str]:
    """Return stores, loads and barriers in the order of the code, without repetitions."""
    found = []
    for line in disassembled(made, folder):
        _, _, text = line.partition("*/")
        words = [word for word in text.split() if not word.startswith("@")]
        name = words[0].split(".")[0].rstrip(";") if words else ""
        if name in KINDS and (name != "BAR" or "SYNC" in words[0]):
            found.append(KINDS[name])
    return [kind for kind, _ in itertools.groupby(found)]


def matching() -> Schedule:
    """Return MatchTokens for an image of 518 px."""
    a: dict[str, Any] = {"num_heads": 6, "num_prefix": 1, "window": 16, "merged": 160}
    return schedule_merging([(1, 1370, 3 * 6 * 64), (1, 1370), (1, 1370, 384), (1, 1369)], a, "float16")


@pytest.mark.parametrize("capability", first([87, 90, 120]))
@pytest.mark.parametrize(
    ("schedule", "kernel", "stores"),
    [(matching(), "pairs", None), (layer(tile=64), "select", 1)],
    ids=["pairs", "select"],
)
def test_what_threads_of_a_block_share_is_behind_a_barrier(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    schedule: Schedule,
    kernel: str,
    stores: int | None,
    capability: int,
) -> None:
    """`pairs` and `select` read back global memory that they wrote, but not after the last barrier.

    `pairs` reads which tokens are chosen and free, and its pairs; `select` reads its scores.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    launch = next(each for each in schedule.launches if each.kernel == kernel)
    found = accesses(compile_launch(schedule, launch, capability), tmp_path)
    last = len(found) - found[::-1].index("barrier")
    places = [place for place, kind in enumerate(found[:last]) if kind == "store"][:stores]
    assert places
    for place in places:
        behind = found[place + 1 :]
        assert not behind or behind[0] == "barrier" or "load" not in behind, (kernel, found[place - 2 :][:6])


@pytest.mark.parametrize("capability", first([87, 90, 120]))
@pytest.mark.parametrize("kernel", ["select", "attend"])
def test_loops_that_multiply_take_no_more_clocks_than_they_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, capability: int
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    schedule = layer(tile=64)
    launch = next(each for each in schedule.launches if each.kernel == kernel)
    found = loops(disassembled(compile_launch(schedule, launch, capability), tmp_path, "-hex"))
    clocks = [clocks for body, clocks in found if any("MMA" in text for text in body)]
    assert MOST_CLOCKS[kernel, capability] / 1.2 < max(clocks) <= MOST_CLOCKS[kernel, capability]
