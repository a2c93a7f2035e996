"""Tests of board files: every file loads and names a source per value, and errors in a user's own file are reported."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.profiles.boards.board import BOARD_COLUMNS, Board, board_names, board_row, load_board, parse_board
from tests.commands import assert_refused, call

DOCS = Path(__file__).parent.parent / "docs"
GOOD = """
name = "mine"
title = "My board"
kind = "gpu"
sm = 87
cuda_cores = 1024
clock_ghz = 1.0
fp32_tflops = 2.0
fp16_tflops = 16.0
memory_gb = 8
bandwidth_gb_s = 100
tdp_w = 20
power_modes = [{ id = 0, name = "MODE_10W", cap_w = 10, gpu_ghz = 0.5, cuda_cores = 512, bandwidth_gb_s = 50 }, { id = 1, name = "MAXN" }]
[sources]
"""  # noqa: E501
GOOD += "".join(f'{line.split(" = ")[0]} = "x"\n' for line in GOOD.splitlines()[3:-1])


@pytest.mark.parametrize("name", board_names())
def test_every_board_loads_and_names_a_source_for_every_value(name: str) -> None:
    board = load_board(name)
    assert board.name == name
    fields = msgspec.structs.fields(Board)
    values = {f.name for f in fields if getattr(board, f.name) not in (f.default, (), None)}
    unsourced = values - {"name", "title", "sources", "unverified"} - board.sources.keys()
    assert not unsourced
    assert all(len(source) > 8 for source in board.sources.values())
    if board.kind == "gpu":
        assert 0 < board.fp32_tflops < board.fp16_tflops < board.int8_tops
        # NVIDIA states the H100's float32 rate at a clock of its own, 1.98 GHz; other values are rounded.
        assert board.fp32_tflops == pytest.approx(2 * board.cuda_cores * board.clock_ghz / 1e3, rel=0.1)
        per_core_and_clock = board.fp16_tflops * 1e3 / board.cuda_cores / board.clock_ghz
        assert min(abs(per_core_and_clock / x - 1) for x in (4, 8, 16, 32)) < 0.05 or name == "jetson-agx-thor"
    if name.startswith("jetson"):
        assert len(board.jetpack) > 0 < len(board.power_modes)


def test_power_modes_lower_what_they_cap() -> None:
    board = parse_board(GOOD, "here")
    low = board.in_mode("10w")
    assert low == board.in_mode("mode_10W") == board.in_mode("0")
    assert (low.fp32_tflops, low.fp16_tflops) == (0.5, 4.0)
    assert (low.bandwidth_gb_s, low.tdp_w) == (50, 10)
    assert board.in_mode("MAXN") == board


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sm = 87", "smm = 87", "unknown key smm"),
        ("sm = 87\n", "", "sm is missing, for a board of kind 'gpu'"),
        ("sm = 87", "sm = 999", "sm is 999, not int <= 200"),
        ("fp32_tflops = 2.0", "fp32_tflops = nan", "fp32_tflops is NaN, not float"),
        ('kind = "gpu"', 'kind = "fpga"', 'kind is "fpga", not str of the form'),
        ("cuda_cores = 512", "cuda_cores = 4096", "power mode MODE_10W: cuda_cores exceeds the board's"),
        ('tdp_w = "x"\n', "", "tdp_w has no source"),
        ("sm = 87", "sm = = 87", "here is not TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=message) as caught:
        parse_board(GOOD.replace(old, new, 1), "here")
    assert caught.value.what.startswith("here")
    assert caught.value.fix


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no board 'nano'.\n  Choose one of: a100"):
        load_board("nano")
    with pytest.raises(ConfigError, match=r"missing\.toml cannot be read"):
        load_board(tmp_path / "missing.toml")
    assert load_board("a100").peak("fp16") == 312e12
    with pytest.raises(ConfigError, match=r"t4 states no peak for tf32.\n  Choose one of: fp32, fp16, int8"):
        load_board("t4").peak("tf32")


def test_the_page_holds_the_table_and_the_example_loads() -> None:
    page = (DOCS / "jetson.md").read_text("utf-8")
    rows = [BOARD_COLUMNS, ["---"] * len(BOARD_COLUMNS), *(board_row(load_board(name)) for name in board_names())]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    assert table in page, table
    example = page.split("```toml\n")[1].split("```")[0]
    assert parse_board(example, "docs/jetson.md").kind == "cpu"


def test_the_list_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "estimate", "--list")
    assert (done.code, done.err) == (0, "")
    assert all(name in done.out for name in board_names())
    assert_refused(call(capsys, "estimate", "x"), "Missing option '--board'")
    assert_refused(call(capsys, "estimate", "--board", "t4"), "Missing argument 'BUNDLE'")
