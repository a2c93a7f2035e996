"""Options that commands pass on bear the names of their functions' arguments."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

import sparsifiner_edge
from sparsifiner_edge.sparse.defaults import SparsityOptions

THREE = {"mean", "std", "no_normalise"}
"""Options that are one argument."""
TAKES: dict[str, Callable[..., Any]] = {
    "sparsify": sparsifiner_edge.sparsify,
    "export": sparsifiner_edge.export_bundle,
    "distill": sparsifiner_edge.distill_student,
    "evaluate": sparsifiner_edge.evaluate_student,
    "search": sparsifiner_edge.search_model,
}


@pytest.mark.parametrize(("given", "size"), [(None, None), ("518", 518), ("294x518", (294, 518)), ("518x518", 518)])
def test_an_image_size_is_one_number_or_two(given: str | None, size: object) -> None:
    for name in ("sparsify", "export"):
        command = importlib.import_module(f"sparsifiner_edge.cli.{name}").command
        words = ["thing", "-o", "x", *(["--img-size", given] if given else [])]
        assert command.make_context(name, words).params["img_size"] == size


@pytest.mark.parametrize("name", TAKES)
def test_options_are_arguments(name: str) -> None:
    command = importlib.import_module(f"sparsifiner_edge.cli.{name}").command
    own = {p.name for p in inspect.signature(command.callback).parameters.values() if p.kind is p.KEYWORD_ONLY}
    passed = {str(option.name) for option in command.params} - own
    if passed >= THREE:
        passed = passed - THREE | {"normalise"}
    assert passed
    taken = inspect.signature(TAKES[name]).parameters
    assert passed <= {*taken, *(SparsityOptions.__annotations__ if "options" in taken else ())}
