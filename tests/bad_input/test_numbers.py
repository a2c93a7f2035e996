"""Numbers that are none, or larger than anything that is counted, wherever the command line takes one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsifiner_edge.bounds import MOST_DEPTH, flaw, is_number, whole_number
from sparsifiner_edge.config import SparsityConfig, parse_token_keep
from sparsifiner_edge.distill.recipe import read_recipe
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
    ("arguments", "texts"),
    [
        (["build", "--timeout", "nan"], ["--timeout", "nan"]),
        (["build", "--timeout", "1e300"], ["--timeout", "is not in the range"]),
        (["build", "--batch", "2147483648"], ["--batch"]),
        (["profile", "--seconds", "nan"], ["--seconds", "nan"]),
        (["profile", "--seconds", "inf"], ["--seconds", "inf"]),
        (["profile", "--threads", "2147483648"], ["--threads", "is not in the range"]),
    ],
)
def test_numbers_that_no_command_takes(
    arguments: list[str], texts: list[str], bundle: Path, tmp_path: Path, capsys: Capsys
) -> None:
    command, *options = arguments
    assert_refused(call(capsys, command, bundle, *options), *texts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--token-keep", f"{DIGITS}:.7"], ["token_keep holds '999"]),
        (["--token-keep", "٣:.7"], ["token_keep holds"]),
        (["--token-keep", "3:nan"], ["token_keep holds '3:nan'"]),
        (["--token-keep", "3:٠.٧"], ["token_keep holds"]),
        (["--set", "tile=" + "9" * 30], ["tile is 999"]),
        (["--set", "cells=" + "9" * 30], ["cells is 999"]),
        (["--img-size", "64000"], ["--img-size", "is not in the range"]),
    ],
)
def test_numbers_that_no_model_takes(arguments: list[str], texts: list[str], sparsify: Callable[..., Outcome]) -> None:
    assert_refused(sparsify(*arguments), *texts)


@pytest.mark.parametrize("name", ["batch", "distil.steps", "distil.epochs", "losses.patches", "budgets"])
@pytest.mark.parametrize("value", [DIGITS, "٣", "nan", "inf", "[" * 5000, "1e999", "9223372036854775808"])
def test_overrides_that_are_no_numbers(name: str, value: str) -> None:
    if (name, value) == ("losses.patches", "9223372036854775808"):
        return
    with pytest.raises(ConfigError, match=name):
        read_recipe("cpu", (f"{name}={value}",))


@pytest.mark.parametrize(
    "fields",
    [
        {"keep": True}, {"value_power": 10**400}, {"value_power": 1e308}, {"basis_threshold": 10**400},
        {"token_keep": [[True, 0.5]]}, {"tile": 2**40, "probe": 1}, {"keep": 10**400},
    ],
)  # fmt: skip
def test_settings_that_are_no_numbers(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SparsityConfig.from_dict(fields)


def test_whole_numbers_of_a_setting_become_what_operators_take() -> None:
    found = SparsityConfig.from_dict({"value_power": 7, "basis_threshold": 1})
    assert [type(x) for x in (found.value_power, found.basis_threshold)] == [float, float]


def test_the_same_from_python(bundle: Path, tmp_path: Path) -> None:
    for wrong in ((math.nan, None), (1e300, None), (None, 2**31)):
        with pytest.raises(ConfigError, match=r"seconds is|min_queries is"):
            make_rules(wrong[0], wrong[1])
    with pytest.raises(ConfigError, match="image size 64000 is too large"):
        create(TINY, 64000)
    with pytest.raises(ConfigError, match="num_classes is 1000000000"):
        create(TINY, num_classes=10**9)
    with pytest.raises(ConfigError, match="64000 px"):
        load_image(tmp_path / "none.png", 64000)
    with pytest.raises(ConfigError, match="Images of 8x64000 px"):
        load_image(tmp_path / "none.png", (8, 64000))
    with pytest.raises(ConfigError, match="image size 96x64000 is too large"):
        create(TINY, (96, 64000))
    for size in ("160", (96, 160, 3), (96,), (96.0, 160.0), 160.5, (96, None)):
        with pytest.raises(ConfigError, match=r"The image size is .*\n.*height and width"):
            create(TINY, size)
    assert create(TINY, [96, np.int64(160)]).patch_embed.grid_size == (6, 10)


def test_what_a_number_is() -> None:
    assert parse_token_keep("3:.7, 6:5e-1") == ((3, 0.7), (6, 0.5))
    assert whole_number(" 7 ", "x") == 7
    assert parse_token_keep("3:1.5E-1") == ((3, 0.15),)
    for text in ("", "1e9999", "0x1", "1_0", "nan", "infinity", "٣", "1" * 400, "1e400"):
        with pytest.raises(ConfigError, match="token_keep holds"):
            parse_token_keep(f"3:{text}")
    assert [is_number(x) for x in (1, 1.5, -0.0, 10**300)] == [True] * 4
    assert not any(map(is_number, (True, None, "1", math.nan, math.inf, -math.inf, 10**400, [1])))


def test_what_is_wrong_with_content_is_told_with_its_place() -> None:
    assert flaw({"a": [1, {"b": "x"}], "c": None}) is None
    assert flaw({"a": [1, {"b": math.nan}]}) == "a[1].b is nan"
    assert flaw({"a": [math.inf]}, finite=False) is None
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    found = flaw({"samples": deep})
    assert found is not None
    assert found.startswith("samples[0][0]")
    assert found.endswith(f"is nested deeper than {MOST_DEPTH} levels")
