"""Tests that every public name has an example in its docstring and that the example runs."""

from __future__ import annotations

import doctest
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sparsifiner_edge as se
from sparsifiner_edge.cli.common import group
from sparsifiner_edge.errors import ConfigError
from tests.repository import ROOT, code

PUBLIC = {name: getattr(se, name) for name in se.__all__}
WITHOUT = ("SparsifinerError", "SparsityConfig")
LONG = ("build_engine", "optimize")
MOST_PARAMETERS = 8


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_student: Path,
    tiny_bundle: Path,
    stream_bundle: Path,
    tiny_weights: Path,
    pictures: Path,
) -> Path:
    place = tmp_path_factory.mktemp("examples")
    for name, origin in {
        "student": tiny_student,
        "bundle": tiny_bundle,
        "dense": tiny_bundle,
        "streaming": stream_bundle,
        "images": pictures,
    }.items():
        shutil.copytree(origin, place / name)
    for path in sorted(pictures.iterdir()):  # A search takes at least eight.
        for number in (1, 2):
            shutil.copy(path, place / "images" / f"more-{number}-{path.name}")
    shutil.copy(tiny_weights, place / "weights.safetensors")
    return place


def things() -> Iterator[Any]:
    for name, thing in {**PUBLIC, "group": group}.items():
        if name not in WITHOUT:
            yield pytest.param(thing, marks=[pytest.mark.everything] if name in LONG else [], id=name)


@pytest.mark.parametrize("thing", list(things()))
def test_the_example_runs(thing: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (example,) = doctest.DocTestFinder(recurse=False).find(
        thing, thing.__name__, globs={**PUBLIC, "group": group, "Path": Path}
    )
    assert example.examples, f"{thing.__name__} has no example"
    said: list[str] = []
    assert doctest.DocTestRunner().run(example, out=said.append).failed == 0, "".join(said)


def test_no_public_function_takes_many_parameters() -> None:
    wide = {}
    for name in code():
        module = name.removesuffix(".py").replace("/", ".")
        if not name.endswith(".py") or "/triton/" in name:
            continue
        tree = compile((ROOT / name).read_text(encoding="utf-8"), name, "exec", flags=0x400)
        for node in tree.body:  # type: ignore[attr-defined]
            if type(node).__name__ == "FunctionDef" and not node.name.startswith("_"):
                count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
                if count > MOST_PARAMETERS:
                    wide[f"{module}.{node.name}"] = count
    assert not wide


@pytest.mark.parametrize(
    "make",
    [
        lambda: se.ExportOptions(labels="cat"),
        lambda: se.ExportOptions(boards="t4"),
        lambda: se.ModelOptions(trust="m"),
        lambda: se.OptimizeOptions(backends="openvino"),
        lambda: se.TrainingOptions(overrides="distil.steps=1"),
    ],
)
def test_a_text_is_no_list(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"is '.*'\.\n  Give a list"):
        make()


def test_the_version_is_that_of_the_package() -> None:
    assert se.__version__.count(".") >= 2
