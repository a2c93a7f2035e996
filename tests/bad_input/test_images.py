"""Images that cannot be read, and folders without any."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sparsifiner_edge.errors import ImageError
from sparsifiner_edge.images import load_image, open_image
from tests.bad_images import BAD_IMAGES
from tests.commands import Outcome, assert_refused, call

Capsys = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_cannot_be_read(
    name: str, bundle: Path, tiny_student: Path, tmp_path: Path, capsys: Capsys
) -> None:
    BAD_IMAGES[name](tmp_path / name)
    for command in (["run", bundle, "--source"], ["evaluate", tiny_student, "--data"]):
        outcome = call(capsys, *command, tmp_path / name)
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


@pytest.mark.parametrize("where", ["missing", "empty", "without"])
def test_folders_without_images(
    where: str, bundle: Path, tiny_student: Path, tmp_path: Path, sparsify: Callable[..., Outcome], capsys: Capsys
) -> None:
    folder = tmp_path / where
    if where != "missing":
        folder.mkdir()
    if where == "without":
        (folder / "notes.txt").write_text("no image")
    said = f"{folder} does not exist" if where == "missing" else f"{folder} holds no image"
    assert_refused(call(capsys, "run", bundle, "--source", folder), said)
    assert_refused(call(capsys, "evaluate", tiny_student, "--data", folder), said)
    assert_refused(sparsify("--calibrate", folder), said)


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


def test_a_bad_image_stops_calibration(pictures: Path, tmp_path: Path, sparsify: Callable[..., Outcome]) -> None:
    source = Path(shutil.copytree(pictures, tmp_path / "source"))
    BAD_IMAGES["truncated.png"](source / "a.png")
    assert_refused(sparsify("--calibrate", source), f"{source / 'a.png'} cannot be read")
