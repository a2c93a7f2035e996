"""Selection of the test cases that run only in `make everything`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first(values: Iterable[Any], here: int = 1) -> list[Any]:
    """Return values for `parametrize`: `make test` runs the first of them, `make everything` runs all."""
    return [value if number < here else _marked(value) for number, value in enumerate(values)]


def _marked(value: Any) -> Any:
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.everything)
