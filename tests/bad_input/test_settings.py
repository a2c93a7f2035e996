"""Settings that do not fit, and numbers that are none or larger than anything that is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.images import load_image
from sparsifiner_edge.profiles.measure.side import make_rules
from sparsifiner_edge.sparse.hosts.timm import create
from tests.commands import Outcome, assert_refused, call
from tests.models import TINY

Capsys = pytest.CaptureFixture[str]
DIGITS = "9" * 5000
"""More than Python's own reader takes."""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--keep 1.5", "keep is 1.5, not float <= 1.0"),
        ("--set tile=10 --set probe=4", "tile 10 is not a multiple of probe 4"),
        (f"--set tile={'9' * 30}", "tile is 999"),
        ("--set channels=33", "channels 33 exceed the head dimension 32"),
        ("--preset paper --set tile=16", "tile is 16, but the preset 'paper' has 1"),
        ("--token-keep 3:nan", "token_keep[0][1] is NaN, not float > 0.0"),
        (f"--token-keep {DIGITS}:.7", "token_keep holds '999"),
        ("--img-size 161", "161 is not a multiple of the patch size 16"),
        ("--img-size 96x170", "image width 170 is not a multiple of the patch size 16"),
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
        ("--precision int3", "'int3'"),
        ("--img-size 96x100", "image width 100 is not a multiple of the patch size 16"),
        ("--weights w.safetensors", "--weights cannot be combined with a student"),
    ],
)
def test_exports_that_cannot_be(options: str, said: str, tiny_student: Path, tmp_path: Path, capsys: Capsys) -> None:
    assert_refused(call(capsys, "export", tiny_student, "-o", tmp_path / "bundle", *options.split()), said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"keep": True}, {"value_power": 10**400}, {"value_power": 1e308}, {"token_keep": [[True, 0.5]]},
        {"tile": 2**40, "probe": 1}, {"keep": 10**400},
    ],
)  # fmt: skip
def test_settings_that_are_no_numbers(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SparsityConfig.from_dict(fields)
    assert type(SparsityConfig.from_dict({"value_power": 7}).value_power) is float, "as operators take them"


def test_the_same_from_python(tmp_path: Path) -> None:
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
