"""Which cases of a test run wherever the package is installed, and which in `make everything` alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], here: int = 1) -> list[Any]:
    """Values for `parametrize`: the first of them run in `make test`, all in `make everything`."""
    return [value if number < here else _marked(value) for number, value in enumerate(values)]


def _marked(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.everything)
