"""Every room keeps within its lines, and says as much of itself as before: `python -m tests.rooms` counts.

A room that shrinks has its number lowered with it, so that what was won stays won.
"""

from __future__ import annotations

from tests.rooms import ROOMS, ROOT, Lines, code, counted, lines_of, room_of, tracked

BUDGET = {
    "base": 3053, "ops": 2221, "native": 4502, "triton": 1885, "sparse": 3303, "distill": 1502,
    "export": 2341, "bundle": 1184, "runtime": 3928, "profiles": 2802, "evaluate": 1814, "optimizer": 2364,
    "report": 1127, "camera": 2835, "package": 518, "cli": 1707, "demo, doctor": 384,
}  # fmt: skip
"""Lines that each room may have."""
DOCUMENTED = 0.18
"""Share of docstrings and comments, of all lines of the package, at least."""
BESIDE = {"tests": 21139, "benchmarks": 6388}
"""Lines of code that these folders may have."""
RESULTS = 8000
"""Lines of all committed JSON."""


def test_every_file_of_code_belongs_to_one_room() -> None:
    assert [name for name in code() if room_of(name) is None] == []
    assert set(BUDGET) == set(ROOMS)


def test_rooms_keep_within_their_lines() -> None:
    over = {room: lines.all - BUDGET[room] for room, lines in counted().items() if lines.all > BUDGET[room]}
    assert not over, f"lines above the budget: {over}"


def test_the_package_says_as_much_of_itself() -> None:
    lines = sum(counted().values(), Lines())
    assert lines.documentation >= DOCUMENTED * lines.all


def test_what_stands_beside_the_package_keeps_within_its_lines() -> None:
    ends = (".py", ".cc", ".cpp", ".c", ".h")
    for folder, budget in BESIDE.items():
        files = [ROOT / name for name in tracked() if name.startswith(f"{folder}/") and name.endswith(ends)]
        found = sum(lines_of(path).all for path in files)
        assert found <= budget, f"{folder}: {found - budget} lines above the budget"


def test_a_committed_result_is_a_summary() -> None:
    named = [ROOT / name for name in tracked() if name.endswith((".json", ".jsonl"))]
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in named) <= RESULTS


def test_a_file_of_no_room_is_seen() -> None:
    assert room_of("sparsifiner_edge/attic/old.py") is None
    assert room_of("runtime/native/select.cc") == "native"
    assert room_of("sparsifiner_edge/ops/native/interface.py") == "ops"
