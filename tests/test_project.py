"""The project itself: a base install that stays light, public names, and no trace of what must not be there."""

from __future__ import annotations

import ast
import collections
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparsifiner_edge
from sparsifiner_edge.artifacts import read_toml
from sparsifiner_edge.cli.main import COMMANDS
from sparsifiner_edge.ops.document import operators_markdown

ROOT = Path(__file__).parent.parent
BARE = ROOT / ".venv" / "bare" / "bin" / "python"
CONTRACTS = read_toml(ROOT / "pyproject.toml", "")["tool"]["importlinter"]["contracts"]
MIRRORED = {"reference", "torch", "torch_merge", "torch_landmarks", "select", "attention", "merge", "run"}
INTERFACES = {"command", "main", "write", "open_device", "MODULE"}
"""One meaning, several modules: an operator in each of its implementations, what every command or target has."""


def test_public_names() -> None:
    assert set(sparsifiner_edge.__all__) == {
        "SparsifinerError", "SparsityConfig", "build_engine", "distill_student", "evaluate_student", "explain_student",
        "export_bundle", "export_model", "load_student", "open_session", "package_bundle", "profile_bundle",
        "restore_model", "search_model", "sparsify", "sparsify_model", "verify_bundle",
    }  # fmt: skip
    for name in sparsifiner_edge.__all__:
        assert callable(getattr(sparsifiner_edge, name))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = sparsifiner_edge.nonsense


def test_every_module_imports() -> None:
    for module in pkgutil.walk_packages(sparsifiner_edge.__path__, "sparsifiner_edge."):
        # The native library is no Python module, whatever its ending.
        if not module.name.endswith(("__main__", "libsparsifiner_ops")):
            importlib.import_module(module.name)


@pytest.mark.skipif(not BARE.exists(), reason=f"{BARE} is made by `make test`")
def test_base_install_without_extras() -> None:
    modules = [x for x in CONTRACTS[1]["source_modules"] if x.split(".")[1] not in ("demo", "corruptions")]  # Pillow
    modules += [f"sparsifiner_edge.cli.{name}" for name in COMMANDS]
    script = f"import importlib\nfor m in {modules!r}: importlib.import_module(m)"
    done = subprocess.run([BARE, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not BARE.exists(), reason=f"{BARE} is made by `make test`")
@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["sparsify", "vit_tiny_patch16_224", "-o", "x"], "train"),
        (["export", "vit_tiny_patch16_224", "-o", "x"], "train,cpu"),
        (["evaluate", "x", "--data", "."], "train,cpu"),
    ],
)
def test_a_missing_extra_names_its_pip_command(arguments: list[str], extra: str, tmp_path: Path) -> None:
    command = [BARE, "-m", "sparsifiner_edge", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert f'pip install "sparsifiner-edge[{extra}]"' in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not BARE.exists(), reason=f"{BARE} is made by `make test`")
def test_help_and_doctor_in_the_base_install() -> None:
    for arguments in (["--help"], ["doctor", "--json"], *([name, "--help"] for name in COMMANDS)):
        done = subprocess.run(
            [BARE, "-m", "sparsifiner_edge", *arguments], capture_output=True, text=True, check=False
        )  # fmt: skip
        assert done.returncode == 0, (arguments, done.stderr)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom sparsifiner_edge.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'onnx', 'timm', 'onnxruntime', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_requirements_are_ranges() -> None:
    wanted = importlib.metadata.requires("sparsifiner-edge") or []
    assert len(wanted) > 10
    assert all("==" not in requirement.partition(";")[0] for requirement in wanted)
    base = {re.split(r"[^\w-]", r)[0] for r in wanted if "extra ==" not in r}
    assert base == {"click", "msgspec", "numpy", "onnx", "rich", "tomli"}


def test_the_operators_page_is_that_of_the_schema() -> None:
    assert (ROOT / "docs" / "operators.md").read_text(encoding="utf-8") == operators_markdown()


def test_lower_bounds_are_past_the_known_holes() -> None:
    from packaging.requirements import Requirement
    from packaging.version import Version

    project = re.findall(r'"((?:[a-z0-9-]+)>=[^"]*)"', (ROOT / "pyproject.toml").read_text())
    bounds: dict[str, list[Version]] = {}
    for text in project:
        requirement = Requirement(text)
        bounds.setdefault(requirement.name, []).extend(Version(s.version) for s in requirement.specifier)
    table = (ROOT / "docs" / "dependencies.md").read_text()
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


def public_names(path: Path) -> set[str]:
    """Names that a module defines at its top level, without what it keeps to itself."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        found |= {node.name} if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else set()
    return {name for name in found if not name.startswith("_")}


def test_no_public_name_means_two_things() -> None:
    package = ROOT / "sparsifiner_edge"
    defined: dict[str, list[Path]] = collections.defaultdict(list)
    for path in package.rglob("*.py"):
        for name in public_names(path) - INTERFACES:
            defined[name].append(path.relative_to(package))
    several = {name: paths for name, paths in defined.items() if len(paths) > 1}
    assert {n: x for n, x in several.items() if any(p.parts[0] != "ops" or p.stem not in MIRRORED for p in x)} == {}


def test_tests_import_no_benchmark() -> None:
    """Not by name, not from a file: what both need is the package's, or each has its own."""
    scripts = "|".join(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    used = rf'^\s*(from|import) (benchmarks|{scripts})\b|/ ["]benchmarks" /'
    for path in (ROOT / "tests").rglob("*.py"):
        found = re.search(used, path.read_text(encoding="utf-8"), re.MULTILINE)
        assert found is None, (path, found)


def test_committed_results_are_summaries() -> None:
    """Figures, not samples, which stay where they were measured (`benchmarks/summary.py`)."""
    results = [x for x in (ROOT / "profiles" / "results").rglob("*.json") if "raw" not in x.parts]
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in results}
    assert results
    assert {path: count for path, count in lines.items() if count > 250} == {}
    assert sum(lines.values()) < 6_000
    # What every command of the documentation printed (`benchmarks/commands.py`) is long because they are many.
    assert all(path.stat().st_size < 80_000 for path in results if path.name != "commands.json")
