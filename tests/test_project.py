"""Tests of the project: a light base install, claims of its pages, and the data folders in every kind of install.

The folders `export/`, `runtime/` and `profiles/` at the root must be found after a real build.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import sparsifiner_edge
from sparsifiner_edge.artifacts import read_toml
from sparsifiner_edge.cli.main import COMMANDS
from sparsifiner_edge.errors import pip_install
from sparsifiner_edge.ops.document import operators_markdown

ROOT = Path(__file__).parent.parent
BARE = ROOT / ".venv" / "bare" / "bin" / "python"
needs_bare = pytest.mark.skipif(not BARE.exists(), reason=f"{BARE} is made by `make test`")
SETTINGS = read_toml(ROOT / "pyproject.toml", "")
CONTRACTS = SETTINGS["tool"]["importlinter"]["contracts"]


def test_public_names() -> None:
    for name in sparsifiner_edge.__all__:
        assert callable(getattr(sparsifiner_edge, name))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = sparsifiner_edge.nonsense


@needs_bare
def test_base_install_without_extras() -> None:
    modules = [x for x in CONTRACTS[1]["source_modules"] if x.split(".")[1] not in ("demo", "corruptions")]  # Pillow
    modules += [f"sparsifiner_edge.cli.{name}" for name in COMMANDS]
    script = f"import importlib\nfor m in {modules!r}: importlib.import_module(m)"
    done = subprocess.run([BARE, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_bare
@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["sparsify", "vit_tiny_patch16_224", "-o", "x"], "train"),
        (["export", "vit_tiny_patch16_224", "-o", "x"], "train,cpu"),
        (["evaluate", "x", "--data", "."], "train,cpu"),
        (["bundle", "keygen", "-o", "k.pem"], "sign"),
    ],
)
def test_a_missing_extra_names_its_pip_command(arguments: list[str], extra: str, tmp_path: Path) -> None:
    command = [BARE, "-m", "sparsifiner_edge", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert re.search(rf"pip install .*\[{extra}\]", done.stderr)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@needs_bare
def test_help_and_doctor_in_the_base_install() -> None:
    for arguments in (["--help"], ["doctor", "--json"], *([name, "--help"] for name in COMMANDS)):
        command = [BARE, "-m", "sparsifiner_edge", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (arguments, done.stderr)


def test_the_operators_page_is_that_of_the_schema() -> None:
    assert (ROOT / "docs" / "operators.md").read_text(encoding="utf-8") == operators_markdown()


def test_lower_bounds_are_past_the_known_holes() -> None:
    bounds: dict[str, list[Version]] = {}
    for requirement in map(Requirement, re.findall(r'"([a-z0-9-]+>=[^"]*)"', (ROOT / "pyproject.toml").read_text())):
        bounds.setdefault(requirement.name, []).extend(Version(s.version) for s in requirement.specifier)
    table = (ROOT / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| ([a-z0-9-]+) \| ((?:CVE|GHSA)-\S+) \| (\S+) \|", table, re.MULTILINE)
    assert len(rows) > 20
    for package, hole, mended in rows:
        assert bounds[package], package
        assert min(bounds[package]) >= Version(mended), (package, hole)


def test_the_drawing_of_rooms_is_the_contract() -> None:
    layers = [" · ".join(re.findall(r"sparsifiner_edge\.(\w+)", layer)) for layer in CONTRACTS[0]["layers"]]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- layers -->\n```\n(.*?)\n```", page, re.DOTALL) == ["\n".join(layers)]
    for name in re.findall(r"`([\w/]+\.(?:py|cc))`", page):
        assert (ROOT / name).is_file() or list((ROOT / "sparsifiner_edge").glob(f"**/{name}")), name
    rooms = {path.name for path in (ROOT / "sparsifiner_edge").iterdir() if (path / "__init__.py").is_file()}
    assert rooms <= set(re.findall(r"`(\w+)`", page))


PROJECT = SETTINGS["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("sparsifiner_edge/**/*.py")])
NAMED = re.compile(r"(?:sparsifiner-edge\[|pip install [\"']?\.\[|pip_install\([\"'])([\w,-]+)[\]\"']")
JETSON = ("jetson", "cpu", "camera", "openvino", "report", "sign", "triton")


def wanted(*extras: str) -> dict[str, Requirement]:
    """Return packages of the base install and of extras by name, with extras resolved."""
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, texts):
        own = requirement.name == PROJECT["name"]
        found |= wanted(*requirement.extras) if own else {requirement.name: requirement}
    return found


def test_the_page_for_jetsons_brings_no_tensorrt_and_no_newer_cuda() -> None:
    page = (ROOT / "docs" / "jetson.md").read_text(encoding="utf-8")
    commands = [line for line in page.splitlines() if line.startswith("    ") and "pip install" in line]
    assert commands
    for command in commands:
        (extras,) = NAMED.findall(command)
        packages = wanted(*extras.split(","))
        assert not [name for name in packages if name.startswith(("tensorrt", "onnxruntime-gpu"))]
        assert "13.0" not in packages["cuda-python"].specifier
        assert set(extras.split(",")) <= set(JETSON)
    for extra in JETSON:
        assert f"`{extra}`" in page


@pytest.mark.parametrize(
    ("extras", "package", "taken", "refused"),
    [
        # An extra without a version in its name is for CUDA 12.
        ("gpu tensorrt tensorrt-rtx gpu-cu12 tensorrt-cu12 jetson", "cuda-python", "12.6.2 12.9.10", "13.0.0"),
        ("gpu-cu13 tensorrt-cu13", "cuda-python", "13.4.4", "12.9.10"),
        ("gpu", "onnxruntime-gpu", "1.21.0 1.26.0", "1.27.0 1.31.1"),
        ("gpu-cu13", "onnxruntime-gpu", "1.27.0", "1.26.0"),
    ],
)
def test_extras_by_cuda(extras: str, package: str, taken: str, refused: str) -> None:
    for extra in extras.split():
        versions = wanted(extra)[package].specifier
        assert [version for version in f"{taken} {refused}".split() if version in versions] == taken.split()
        assert "tensorrt" not in wanted(extra)  # tensorrt-cu13 is intended
    assert "tensorrt-cu12" in wanted("tensorrt")


def test_what_pip_is_to_install_is_a_checkout_or_a_file() -> None:
    """The package is on no index; one function formats the install commands of all messages."""
    name = re.compile(r"pip install [^`\n]*sparsifiner[-_]edge\[")
    assert [str(path) for path in PAGES if name.search(path.read_text(encoding="utf-8"))] == []
    assert pip_install("cpu") in (f"pip install '{ROOT}[cpu]'", 'pip install ".[cpu]" in a checkout')


def test_every_extra_that_is_named_exists() -> None:
    found = {path: NAMED.findall(path.read_text(encoding="utf-8")) for path in PAGES}
    named = {(path.name, extra) for path, lists in found.items() for text in lists for extra in text.split(",")}
    assert len({extra for _, extra in named}) > 6
    assert [(page, extra) for page, extra in sorted(named) if extra not in EXTRAS] == []


INSTALLED = {
    "boards": "profiles/boards",
    "recipes": "export/recipes",
    "deepstream": "export/deepstream",
    "triton": "export/triton",
    "gstreamer": "export/gstreamer",
}
"""Maps a folder of the installed package to its source."""
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
    "read": [len(board_names()), len(names()), "{" in template("triton/guide.md", name="n", shape="1", framing="")],
    **files,
}))
"""


def test_an_editable_install_reads_the_folders_themselves() -> None:
    """The install that tests run in. The root is not part of the package: its folders would become modules."""
    for name, source in INSTALLED.items():
        assert Path(str(importlib.resources.files(f"sparsifiner_edge.{name}"))) == ROOT / source
    assert str(ROOT) not in sparsifiner_edge.__path__


def agrees(wheel: Path, folder: Path, *, library: bool) -> None:
    """Assert that an installed wheel, without the editable install, holds all files of the folders."""
    into = folder / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", into, wheel]
    subprocess.run(command, check=True, cwd=folder)
    # Without `site` no editable install is found, but the dependencies of the package are.
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
    """Build the wheel of a source tree or archive."""
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
    """CMake fails and is skipped: the package is pure Python with all its data."""
    wheel = build(ROOT, tmp_path, CXX="/bin/false")
    assert wheel.name.endswith("-py3-none-any.whl")
    agrees(wheel, tmp_path, library=False)


def test_tables_and_figures_of_the_documentation_are_those_of_the_results() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "figures.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    assert len(re.findall(r"profiles/results/\S+\.json\)", text)) > 20
