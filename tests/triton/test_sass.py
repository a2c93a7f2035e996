"""What the machine code of kernels shows that their interpreter cannot: threads of a block that write and read the same
global memory meet at a barrier in between.
"""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from sparsifiner_edge.ops.triton.compile import Compiled, compile_launch
from sparsifiner_edge.ops.triton.schedule import Schedule
from sparsifiner_edge.ops.triton.schedule_merge import schedule_match
from tests.everything import first
from tests.triton.test_compile import layer

KINDS = {"STG": "store", "LDG": "load", "BAR": "barrier"}
"""Of instructions, by the beginning of their names. What fetches inputs into shared memory (LDGSTS) is none of them."""


def accesses(made: Compiled, folder: Path) -> list[str]:
    """Stores, loads and barriers in the order of the code, without repetitions."""
    import triton.backends.nvidia

    (folder / "code.cubin").write_bytes(made.cubin)
    program = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    done = subprocess.run([program, "-c", folder / "code.cubin"], capture_output=True, text=True, check=True)
    found = []
    for line in done.stdout.splitlines():
        _, _, text = line.partition("*/")
        words = [word for word in text.split() if not word.startswith("@")]
        name = words[0].split(".")[0].rstrip(";") if words else ""
        if name in KINDS and (name != "BAR" or "SYNC" in words[0]):
            found.append(KINDS[name])
    return [kind for kind, _ in itertools.groupby(found)]


def matching() -> Schedule:
    """Of an image of 518 px."""
    a: dict[str, Any] = {"num_heads": 6, "num_prefix": 1, "window": 16, "merged": 160}
    return schedule_match([(1, 1370, 3 * 6 * 64), (1, 1370)], a, "float16")


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
    """`pairs` reads again which tokens are chosen and free; `select` its scores, and later nothing that it wrote."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    launch = next(each for each in schedule.launches if each.kernel == kernel)
    found = accesses(compile_launch(schedule, launch, capability), tmp_path)
    places = [place for place, kind in enumerate(found) if kind == "store"][:stores]
    assert places
    for place in places:
        behind = found[place + 1 :]
        assert not behind or behind[0] == "barrier" or "load" not in behind, (kernel, found[place - 2 :][:6])
