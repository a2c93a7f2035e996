"""Options that commands pass on bear the names of their functions' arguments."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

import sparsifiner_edge
from sparsifiner_edge.camera.service import RunOptions

TAKES: dict[str, Callable[..., Any]] = {
    "sparsify": sparsifiner_edge.sparsify,
    "export": sparsifiner_edge.export_bundle,
    "distill": sparsifiner_edge.distill_student,
    "evaluate": sparsifiner_edge.evaluate_student,
    "run": RunOptions,
}


@pytest.mark.parametrize("name", TAKES)
def test_options_are_arguments(name: str) -> None:
    command = importlib.import_module(f"sparsifiner_edge.cli.{name}").command
    own = {p.name for p in inspect.signature(command.callback).parameters.values() if p.kind is p.KEYWORD_ONLY}
    passed = {option.name for option in command.params} - own
    assert passed
    assert passed <= set(inspect.signature(TAKES[name]).parameters)
