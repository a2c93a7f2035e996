"""Extras by CUDA's major version and for Jetsons: what the ranges admit, and that the pages name extras that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sparsifiner_edge.artifacts import read_toml

ROOT = Path(__file__).parent.parent
PROJECT = read_toml(ROOT / "pyproject.toml", "")["project"]
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
