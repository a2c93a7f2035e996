"""What lies at the root in `export/`, `runtime/` and `profiles/` is found in every kind of install, by a real build."""

from __future__ import annotations

import importlib.resources
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparsifiner_edge

ROOT = Path(__file__).parent.parent
INSTALLED = {
    "boards": "profiles/boards",
    "recipes": "export/recipes",
    "deepstream": "export/deepstream",
    "triton": "export/triton",
    "gstreamer": "export/gstreamer",
}
"""Folder of the installed package to where it comes from."""
LOOK = """
import importlib.resources, json, pathlib, sys
import sparsifiner_edge
from sparsifiner_edge.distill.recipe import names
from sparsifiner_edge.ops.native import library_path
from sparsifiner_edge.package import template
from sparsifiner_edge.profiles.boards.board import board_names
def walk(folder):
    for x in folder.iterdir():
        if x.name != "__pycache__":
            yield from walk(x) if x.is_dir() else [(x.name, x.read_text("utf-8"))]
files = {name: dict(walk(importlib.resources.files(f"sparsifiner_edge.{name}"))) for name in sys.argv[1:]}
print(json.dumps({
    "from": str(pathlib.Path(sparsifiner_edge.__file__).parents[1]), "library": library_path() is not None,
    "read": [len(board_names()), len(names()), "{" in template("triton/guide.md", name="n", shape="1")], **files,
}))
"""


def test_an_editable_install_reads_the_folders_themselves() -> None:
    """The install that tests run in. The root is no part of the package: its folders would be modules."""
    for name, source in INSTALLED.items():
        assert Path(str(importlib.resources.files(f"sparsifiner_edge.{name}"))) == ROOT / source
    assert str(ROOT) not in sparsifiner_edge.__path__


def agrees(wheel: Path, folder: Path, *, library: bool) -> None:
    """That the package which a wheel installs, without the install that tests run in, has all that the folders hold."""
    into = folder / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", into, wheel]
    subprocess.run(command, check=True, cwd=folder)
    # Without `site` no editable install is found; what the package needs is.
    paths = {"PYTHONPATH": os.pathsep.join([str(into), *filter(None, sys.path)])}
    look = [sys.executable, "-S", "-c", LOOK, *INSTALLED]
    said = subprocess.run(look, check=True, cwd=folder, capture_output=True, text=True, env=os.environ | paths).stdout
    files = {
        name: {x.name: x.read_text("utf-8") for x in (ROOT / place).rglob("*.*") if x.suffix != ".pyc"}
        for name, place in INSTALLED.items()
    }
    read = [len(files["boards"]), len(files["recipes"]), False]
    found = json.loads(said)
    assert found == {"from": str(into), "library": library, "read": read, **files}


def build(source: Path, folder: Path, **environment: str) -> Path:
    """The wheel of a source tree or archive."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", folder, source], check=True, env=os.environ | environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.everything
def test_a_wheel_of_the_tree(tmp_path: Path) -> None:
    agrees(build(ROOT, tmp_path), tmp_path, library=True)
    native = tmp_path / "installed" / "sparsifiner_edge" / "ops" / "native"
    assert (native / "sparsifiner.h").is_file()
    assert not list(native.glob("*.cc"))


@pytest.mark.everything
def test_a_wheel_of_an_archive(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    agrees(build(archive, tmp_path), tmp_path, library=True)


@pytest.mark.everything
def test_a_wheel_without_a_compiler(tmp_path: Path) -> None:
    """CMake fails, and is left out: the package is pure Python, with all its data."""
    wheel = build(ROOT, tmp_path, CXX="/bin/false")
    assert wheel.name.endswith("-py3-none-any.whl")
    agrees(wheel, tmp_path, library=False)
