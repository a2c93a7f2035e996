"""Board and recipe files that are none: pipes, devices, numbers of thousands of digits, deep nesting, escapes."""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import random
from pathlib import Path

import pytest

from sparsifiner_edge.artifacts import MAX_TOML, parse_toml, read_toml
from sparsifiner_edge.distill.recipe import read_recipe
from sparsifiner_edge.errors import ConfigError, SparsifinerError
from sparsifiner_edge.export.board import _toolkit
from sparsifiner_edge.profiles.boards.board import load_board, parse_board
from tests.commands import assert_refused, process
from tests.fuzz.mutate import mutated_toml

BOARD = importlib.resources.files("sparsifiner_edge.boards").joinpath("jetson-orin-nano-8gb.toml").read_text()
RECIPE = importlib.resources.files("sparsifiner_edge.recipes").joinpath("cpu.toml").read_text()


def test_files_that_have_no_end_or_no_beginning(tmp_path: Path, bundle: Path) -> None:
    pipe, link, large = tmp_path / "pipe.toml", tmp_path / "link.toml", tmp_path / "large.toml"
    os.mkfifo(pipe)
    link.symlink_to("/dev/zero")
    large.write_text(BOARD + "#" * MAX_TOML)
    assert_refused(process("estimate", bundle, "--board", pipe, timeout=120), "pipe.toml", "not a regular file")
    for path in (pipe, link, large):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_board(path)
        with pytest.raises(ConfigError, match=r"cannot be read|There is no recipe"):
            read_recipe(str(path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sm = 87", f"sm = {'9' * 5000}", "is not TOML"),
        ("tdp_w = 15.0", f"tdp_w = 1{'0' * 400}", "tdp_w is 1000"),
        ("tdp_w = 15.0", "tdp_w = 1e999", "tdp_w is Infinity, not float <= 5000"),
        ("sm = 87", f"sm = {'[' * 3000}", "is not TOML"),
        ("sm = 87", f"sm = {'[' * 100}{']' * 100}", "nested deeper than 64 levels"),
        ("sm = 87", f"{'.'.join('a' * 500)} = 1", "nested deeper than 64 levels"),
        ("sm = 87", "sm = 8٧", "is not TOML"),
        ('tensorrt = "10.3"', 'tensorrt = "ten"', r"jetpack\[1\]\.tensorrt is \"ten\", not str of the form"),
        ('tensorrt = "10.3"', f'tensorrt = "{"9" * 5000}"', r"jetpack\[1\]\.tensorrt is \"999"),
        ('cuda = "12.6"', 'cuda = "12.6; rm"', r"jetpack\[1\]\.cuda is \"12\.6; rm\""),
    ],
)
def test_boards_with_values_that_are_none(old: str, new: str, message: str) -> None:
    assert old in BOARD
    with pytest.raises(ConfigError, match=message):
        parse_board(BOARD.replace(old, new, 1), "here")


def test_a_board_says_nothing_to_a_terminal(tmp_path: Path, bundle: Path) -> None:
    name, title = "\\u001b[31mred\\u202e", "\\u009b2J\\nsecond line"
    text = BOARD.replace('name = "jetson-orin-nano-8gb"', f'name = "{name}"')
    board = parse_board(text.replace('title = "Jetson Orin Nano 8 GB"', f'title = "{title}"'), "here")
    assert (board.name, board.title) == ("\\x1b[31mred\\u202e", "\\x9b2J\\x0asecond line")


def test_text_that_is_no_toml_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    for content in (b"\xff\xfe", b"\x00", b"a = 1\na = 2", b"[" * 10_000, b"a = " + b"1" * 5000, b"a = '\xed\xa0\x80'"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"cannot be read|is not TOML") as caught:
            read_toml(path, "Do this.")
        assert caught.value.fix == "Do this."
    assert parse_toml("a = nan", "here", "") != {}


def test_any_board_or_recipe_is_read_or_refused(tmp_path: Path) -> None:
    """A hundred and twenty files that were changed at random: none of them ends in a traceback."""
    path, read = tmp_path / "any.toml", 0
    for number in range(120):
        path.write_bytes(mutated_toml(BOARD, random.Random(number)))
        with contextlib.suppress(SparsifinerError):
            _toolkit(load_board(path))
            read += 1
        path.write_bytes(mutated_toml(RECIPE, random.Random(number)))
        with contextlib.suppress(SparsifinerError):
            read_recipe(str(path), (f"batch={path.read_bytes()[:50]!r}",) if number % 2 else ())
    assert read
