"""Tests of invalid models, weights, settings, boards, images and numbers.

Each message names the value and the remedy.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.images import load_image, open_image
from sparsifiner_edge.profiles.boards.board import parse_board
from sparsifiner_edge.profiles.measure.side import make_rules
from sparsifiner_edge.sparse.hosts.timm import create
from tests.commands import Outcome, assert_refused, call, process, snapshot
from tests.models import TINY, vit

Capsys = pytest.CaptureFixture[str]
DIGITS = "9" * 5000
"""More digits than Python's own reader accepts."""


@pytest.fixture
def sparsify(tmp_path: Path, tiny_weights: Path, capsys: Capsys) -> Callable[..., Outcome]:
    """Run `sparsify` in this process; there must be no output afterwards, and no other file."""

    def run(*arguments: Any, model: str = TINY, weights: Path = tiny_weights) -> Outcome:
        target = tmp_path / "target"
        target.mkdir()
        outcome = call(capsys, "sparsify", model, "--weights", weights, "-o", target / "student", *arguments)
        assert snapshot(target) == {}
        return outcome

    return run


@pytest.mark.parametrize(
    ("model", "texts"),
    [
        ("vit_smal_patch16_224", ["'vit_smal_patch16_224'", "Did you mean vit_small_patch16_224"]),
        ("nonsense", ["timm has no model 'nonsense'", "list_models"]),
        ("swin_tiny_patch4_window7_224", ["is a SwinTransformer, not a VisionTransformer", "Choose a ViT"]),
        ("test_vit_relpos", ["is a VisionTransformerRelPos", "Choose a ViT"]),
    ],
)
def test_unknown_and_unsupported_models(model: str, texts: list[str], sparsify: Callable[..., Outcome]) -> None:
    assert_refused(sparsify(model=model), *texts)


def test_no_weights_and_no_net(tmp_path: Path) -> None:
    outcome = process("sparsify", "vit_tiny_patch16_224", "-o", tmp_path / "s", env={"HF_HOME": str(tmp_path / "hf")})
    assert_refused(outcome, "The weights of 'vit_tiny_patch16_224' could not be downloaded", "--weights")
    assert not (tmp_path / "s").exists()


class Evil:
    """Unpickling it would write a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def weights_with(change: Callable[[dict[str, torch.Tensor]], object], model: str = TINY) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        state = {key: value.clone() for key, value in vit(model, num_classes=10).state_dict().items()}
        change(state)
        (torch.save if path.suffix == ".pth" else safetensors.torch.save_file)(state, path)

    return write


def truncated(path: Path) -> None:
    weights_with(lambda _: None)(path)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("name", "write", "texts"),
    [
        ("w.safetensors", lambda p: None, ["does not exist"]),
        ("w.safetensors", lambda p: p.write_bytes(b""), ["cannot be read as weights"]),
        ("w.safetensors", lambda p: p.write_bytes(struct.pack("<Q", 1 << 62) + b"{}"), ["cannot be read as weights"]),
        ("w.safetensors", truncated, ["cannot be read as weights", "create the file again"]),
        ("w.safetensors", weights_with(lambda _: None, "test_vit3"), ["does not fit this model", "same architecture"]),
        ("w.safetensors", weights_with(lambda s: s.pop("cls_token")), ["missing cls_token; left over nothing"]),
        ("w.safetensors", weights_with(lambda s: s.update({"cls_token": torch.ones(3)})), ["cls_token has shape [3]"]),
        ("w.safetensors", weights_with(lambda s: s["norm.bias"].fill_(torch.nan)), ["norm.bias holds NaN"]),
        ("w.pth", lambda p: p.write_text("Not Found"), ["damaged, or is a pickle with more than tensors"]),
        ("w.pth", lambda p: torch.save(vit(), p), ["pickle with more than tensors", "preferably as .safetensors"]),
    ],
)
def test_weights_that_do_not_serve(
    name: str, write: Callable[[Path], object], texts: list[str], tmp_path: Path, sparsify: Callable[..., Outcome]
) -> None:
    path = tmp_path / name
    write(path)
    assert_refused(sparsify(weights=path), str(path), *texts)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_pickle_is_not_run(save: Any, tmp_path: Path, sparsify: Callable[..., Outcome]) -> None:
    path, marker = tmp_path / "w.pth", tmp_path / "marker"
    save({"cls_token": Evil(marker)}, path)
    assert_refused(sparsify(weights=path), str(path), "No code in it was run")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--keep 1.5", "keep is 1.5, not float <= 1.0"),
        ("--set tile=10 --set query_pool=4", "tile 10 is not a multiple of query_pool 4"),
        (f"--set tile={'9' * 30}", "tile is 999"),
        ("--preset paper --set tile=16", "tile is 16, but the preset 'paper' has 1"),
        ("--token-keep 3:nan", "token_keep[0][1] is NaN, not float > 0.0"),
        (f"--token-keep {DIGITS}:.7", "token_keep holds '999"),
        ("--img-size 161", "161 is not a multiple of the patch size 16"),
        ("--img-size 96x64000", "is 64000"),
        ("--calibrate nowhere", "nowhere does not exist"),
    ],
)
def test_settings_that_do_not_fit(options: str, said: str, sparsify: Callable[..., Outcome]) -> None:
    assert_refused(sparsify(*options.split()), said)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("build --timeout nan", "nan"),
        ("build --batch 2147483648", "--batch is 2147483648"),
        ("profile --seconds inf", "inf"),
    ],
)
def test_numbers_that_no_command_takes(command: str, said: str, bundle: Path, capsys: Capsys) -> None:
    name, *options = command.split()
    assert_refused(call(capsys, name, bundle, *options), options[0], said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--batch ²", "is ²"),
        (f"--batch {DIGITS}", "is 99"),
        ("--img-size 96x100", "image width 100 is not a multiple of the patch size 16"),
        ("--weights w.safetensors", "--weights cannot be combined with a sparse model"),
    ],
)
def test_exports_that_cannot_be(options: str, said: str, tiny_student: Path, tmp_path: Path, capsys: Capsys) -> None:
    assert_refused(call(capsys, "export", tiny_student, "-o", tmp_path / "bundle", *options.split()), said)
    assert list(tmp_path.iterdir()) == []


def test_the_same_from_python(tmp_path: Path) -> None:
    for fields in ({"keep": True}, {"keep": 10**400}, {"token_keep": [[True, 0.5]]}, {"tile": 2**40, "query_pool": 1}):
        with pytest.raises(ConfigError):
            SparsityConfig.from_dict(fields)
    assert type(SparsityConfig.from_dict({"value_power": 7}).value_power) is float, "as operators take them"
    for wrong in ((math.nan, None), (1e300, None), (None, 2**31)):
        with pytest.raises(ConfigError, match=r"seconds is|min_queries is"):
            make_rules(wrong[0], wrong[1])
    with pytest.raises(ConfigError, match="num_classes is 1000000000"):
        create(TINY, num_classes=10**9)
    with pytest.raises(ConfigError, match="Images of 8x64000 px"):
        load_image(tmp_path / "none.png", (8, 64000))
    with pytest.raises(ConfigError, match="image size 96x64000 is too large"):
        create(TINY, (96, 64000))
    for size in ("160", (96, 160, 3), (96.0, 160.0), (96, None)):
        with pytest.raises(ConfigError, match=r"The image size is .*\n.*height and width"):
            create(TINY, size)
    assert create(TINY, [96, np.int64(160)]).patch_embed.grid_size == (6, 10)


BOARD = importlib.resources.files("sparsifiner_edge.boards").joinpath("jetson-orin-nano-8gb.toml").read_text()

# Boards and recipes. Random changes are covered by tests.fuzz.


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


def bitmap(side: int) -> bytes:
    """Return a BMP that declares a size and contains almost nothing."""
    return struct.pack("<2sIHHIIiiHHIIIIII", b"BM", 1054, 0, 0, 54, 40, side, side, 1, 24, *[0] * 6) + bytes(1000)


def noise(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)


BAD_IMAGES: dict[str, Callable[[Path], object]] = {
    "truncated.png": lambda p: (noise(p), os.truncate(p, 2000)),
    "truncated.jpg": lambda p: (noise(p), os.truncate(p, 1500)),
    "text.png": lambda p: p.write_text("not an image"),
    "empty.jpg": lambda p: p.write_bytes(b""),
    "bomb.bmp": lambda p: p.write_bytes(bitmap(30_000)),
    "sizeless.bmp": lambda p: p.write_bytes(bitmap(0)),
    "page.html": lambda p: p.write_text("<html>"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_cannot_be_read(name: str, bundle: Path, tmp_path: Path, capsys: Capsys) -> None:
    BAD_IMAGES[name](tmp_path / name)
    outcome = call(capsys, "run", bundle, "--source", tmp_path / name)
    assert_refused(outcome, f"{tmp_path / name} cannot be read as an image", "Replace or remove it")


def test_what_is_no_file_or_another_programs(tmp_path: Path) -> None:
    """Nobody writes into the pipe; Pillow starts another program for EPS, whatever the file name."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "eps.png")
    for name, text in (
        ("pipe", "not a regular file"),
        ("zero", "not a regular file"),
        ("eps", "its format is none of BMP,"),
    ):
        for read in (open_image, lambda path: load_image(path, 8)):
            with pytest.raises(ImageError, match=rf"{name}\.png cannot be read as an image: .*{text}"):
                read(tmp_path / f"{name}.png")


@pytest.mark.parametrize(("where", "said"), [("missing", "does not exist"), ("empty", "holds no image")])
def test_folders_without_images(
    where: str,
    said: str,
    bundle: Path,
    tiny_student: Path,
    tmp_path: Path,
    sparsify: Callable[..., Outcome],
    capsys: Capsys,
) -> None:
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
        assert "error: 1 of 4 images could not be read: " in outcome.err
        assert "picture1_bad.png" in outcome.err
        records = [json.loads(line) for line in (lines.read_text() if to_file else outcome.out).splitlines()]
        assert ["error" in record for record in records] == [False, False, True, False]
        assert "picture1_bad.png cannot be read as an image" in records[2]["error"]
