"""The project itself: a base install that stays light, public names, and no trace of what must not be there."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sparsifiner_edge
from sparsifiner_edge.artifacts import read_toml
from sparsifiner_edge.cli.main import COMMANDS
from sparsifiner_edge.ops.document import operators_markdown

ROOT = Path(__file__).parent.parent
BARE = ROOT / ".venv" / "bare" / "bin" / "python"
SETTINGS = read_toml(ROOT / "pyproject.toml", "")
CONTRACTS = SETTINGS["tool"]["importlinter"]["contracts"]


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
        (["bundle", "keygen", "-o", "k.pem"], "sign"),
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


PROJECT = SETTINGS["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("sparsifiner_edge/**/*.py")])
NAMED = re.compile(r"(?:sparsifiner-edge|pip install [\"']?\.)\[([\w,-]+)\]")
JETSON = ("jetson", "cpu", "camera", "openvino", "report", "sign", "triton")


def wanted(*extras: str) -> dict[str, Requirement]:
    """Packages of the base install and of extras by name, what extras name each other for included."""
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, texts):
        own = requirement.name == PROJECT["name"]
        found |= wanted(*requirement.extras) if own else {requirement.name: requirement}
    return found


def admits(extra: str, package: str, version: str) -> bool:
    return version in wanted(extra)[package].specifier


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


@pytest.mark.parametrize("extra", ["gpu", "tensorrt", "tensorrt-rtx", "gpu-cu12", "tensorrt-cu12", "jetson"])
def test_without_a_version_in_its_name_an_extra_is_for_cuda_12(extra: str) -> None:
    assert admits(extra, "cuda-python", "12.6.2")
    assert admits(extra, "cuda-python", "12.9.10")
    assert not admits(extra, "cuda-python", "13.0.0")
    assert "tensorrt" not in wanted(extra)  # it means tensorrt-cu13


def test_onnxruntime_and_tensorrt_by_cuda() -> None:
    for version, cuda12 in {"1.21.0": True, "1.26.0": True, "1.27.0": False, "1.31.1": False}.items():
        assert admits("gpu", "onnxruntime-gpu", version) == cuda12
    assert admits("gpu-cu13", "onnxruntime-gpu", "1.27.0")
    assert not admits("gpu-cu13", "onnxruntime-gpu", "1.26.0")
    assert "tensorrt-cu12" in wanted("tensorrt")
    for extra in ("gpu-cu13", "tensorrt-cu13"):
        assert admits(extra, "cuda-python", "13.4.4")
        assert not admits(extra, "cuda-python", "12.9.10")


def test_every_extra_that_is_named_exists() -> None:
    found = {path: NAMED.findall(path.read_text(encoding="utf-8")) for path in PAGES}
    named = {(path.name, extra) for path, lists in found.items() for text in lists for extra in text.split(",")}
    assert len({extra for _, extra in named}) > 6
    assert [(page, extra) for page, extra in sorted(named) if extra not in EXTRAS] == []
