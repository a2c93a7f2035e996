"""Boards, recipes and images that are none: pipes, devices, numbers of thousands of digits, deep nesting, escapes."""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.images import load_image, open_image
from sparsifiner_edge.profiles.boards.board import parse_board
from tests.bad_images import BAD_IMAGES
from tests.commands import Outcome, assert_refused, call

Capsys = pytest.CaptureFixture[str]
BOARD = importlib.resources.files("sparsifiner_edge.boards").joinpath("jetson-orin-nano-8gb.toml").read_text()

# Boards and recipes. Those that are changed at random are tried by tests.fuzz.


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sm = 87", f"sm = {'9' * 5000}", "is not TOML"),
        ("tdp_w = 15.0", "tdp_w = 1e999", "tdp_w is Infinity, not float <= 5000"),
        ("sm = 87", f"sm = {'[' * 3000}", "is not TOML"),
        ("sm = 87", f"{'.'.join('a' * 500)} = 1", "nested deeper than 64 levels"),
        ('cuda = "12.6"', 'cuda = "12.6; rm"', r"jetpack\[1\]\.cuda is \"12\.6; rm\""),
    ],
)
def test_boards_with_values_that_are_none(old: str, new: str, message: str) -> None:
    assert old in BOARD
    with pytest.raises(ConfigError, match=message):
        parse_board(BOARD.replace(old, new, 1), "here")


def test_a_board_says_nothing_to_a_terminal() -> None:
    name, title = "\\u001b[31mred\\u202e", "\\u009b2J\\nsecond line"
    text = BOARD.replace('name = "jetson-orin-nano-8gb"', f'name = "{name}"')
    board = parse_board(text.replace('title = "Jetson Orin Nano 8 GB"', f'title = "{title}"'), "here")
    assert (board.name, board.title) == ("\\x1b[31mred\\u202e", "\\x9b2J\\x0asecond line")


# Images.


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_cannot_be_read(name: str, bundle: Path, tmp_path: Path, capsys: Capsys) -> None:
    BAD_IMAGES[name](tmp_path / name)
    outcome = call(capsys, "run", bundle, "--source", tmp_path / name)
    assert_refused(outcome, f"{tmp_path / name} cannot be read as an image", "Replace or remove it")


def test_what_is_no_file_or_another_programs(tmp_path: Path) -> None:
    """Nobody writes into the pipe; EPS is what Pillow starts another program for, whatever the file is called."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "eps.png")
    for name, text in (("pipe", "not a regular file"), ("zero", "not a regular file"), ("eps", "it is none of BMP,")):
        for read in (open_image, lambda path: load_image(path, 8)):
            with pytest.raises(ImageError, match=rf"{name}\.png cannot be read as an image: .*{text}"):
                read(tmp_path / f"{name}.png")


@pytest.mark.parametrize(("where", "said"), [("missing", "does not exist"), ("empty", "holds no image")])
def test_folders_without_images(
    where: str, said: str, bundle: Path, tiny_student: Path, tmp_path: Path, sparsify: Callable[..., Outcome],
    capsys: Capsys,
) -> None:  # fmt: skip
    folder = tmp_path / where
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    for command in (("run", bundle, "--source"), ("evaluate", tiny_student, "--data")):
        assert_refused(call(capsys, *command, folder), f"{folder} {said}")
    assert_refused(sparsify("--calibrate", folder), f"{folder} {said}")


def test_one_bad_image_among_good_ones(bundle: Path, pictures: Path, tmp_path: Path, capfd: Capsys) -> None:
    source, lines = Path(shutil.copytree(pictures, tmp_path / "source")), tmp_path / "lines"
    BAD_IMAGES["text.png"](source / "picture1_bad.png")
    for to_file in (False, True):
        outcome = call(capfd, "run", bundle, "--source", source, *(["--output", lines] if to_file else []))
        assert outcome.code == 2
        assert outcome.err == "error: 1 of 4 images could not be read; their lines say why.\n"
        records = [json.loads(line) for line in (lines.read_text() if to_file else outcome.out).splitlines()]
        assert ["error" in record for record in records] == [False, False, True, False]
        assert "picture1_bad.png cannot be read as an image" in records[2]["error"]
