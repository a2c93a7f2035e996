"""Tests that commands and options in the pages exist, and that their blocks run (in `make everything`)."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import safetensors.numpy

from sparsifiner_edge.cli.main import cli
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.ops import native
from tests.commands import PROGRAM
from tests.plain import read_result

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


IMAGES = 11
VIDEO = Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi")


def shortly(block: str) -> str:
    """Shorten a search to two minutes, which is enough for a result."""
    assert "minutes 8" in block or "minutes=8" in block
    return block.replace("minutes 8", "minutes 2").replace("minutes=8", "minutes=2")


def offline(block: str) -> str:
    """Use weights from a file, as the README describes, and a short measurement."""
    model = "vit_small_patch14_dinov2.lvd142m"
    assert block.count(model) == 2
    with_weights = block.replace(model, f"{model} --weights dinov2.safetensors")
    return with_weights.replace("--against dense/", "--against dense/ --seconds 2 -o result.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights and images that the blocks name."""
    folder = tmp_path_factory.mktemp("readme")
    safetensors.numpy.save_file(material.dinov2_state(), folder / "dinov2.safetensors")
    (folder / "images").mkdir()
    for path in split.images("calibration")[:IMAGES]:
        shutil.copy(path, folder / "images")
    return folder


def run(command: list[str], cwd: Path, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | {"PATH": path} | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_blocks_are_those_that_are_run_here() -> None:
    assert [kind for kind, _ in BLOCKS] == ["sh", "sh", "sh", "python", "sh", "sh"]
    compile(BLOCKS[3][1], "README.md", "exec")
    assert (
        BLOCKS[0][1].strip() == 'pip install ".[cpu,openvino,train,report]"'
    )  # tests/package/test_wheels.py installs them.
    assert BLOCKS[5][1].strip() == "make test"  # It runs this test.
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def commands(text: str) -> Iterator[list[str]]:
    """Return the arguments of each of our commands in a page's shell blocks."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            name, *arguments = shlex.split(line, comments=True) or [""]
            if name == "sparsifiner-edge":
                yield arguments


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda path: path.name)
def test_commands_of_every_page_are_there_with_their_options(page: Path) -> None:
    for arguments in commands(page.read_text(encoding="utf-8")):
        command: click.Command = cli
        while isinstance(command, click.Group) and not arguments[0].startswith("-"):
            command = command.get_command(click.Context(command), arguments.pop(0)) or pytest.fail(f"{arguments}")
        command.make_parser(click.Context(command)).parse_args(arguments)


@pytest.mark.everything
@pytest.mark.long
def test_the_main_path(place: Path) -> None:
    run(["bash", "-euc", shortly(BLOCKS[2][1])], place)
    assert len((place / "features.jsonl").read_text().splitlines()) == IMAGES
    assert {"front.png", "report.html"} <= {path.name for path in (place / "out").iterdir()}


@pytest.mark.everything
@pytest.mark.long
def test_in_memory(place: Path) -> None:
    said = run([sys.executable, "-c", shortly(BLOCKS[3][1])], place)
    assert [line.split(" (")[0] for line in said.splitlines()[-IMAGES:]] == [str(number) for number in range(IMAGES)]


@pytest.mark.everything
@pytest.mark.long
def test_make_demo(tmp_path: Path) -> None:
    assert BLOCKS[4][1].strip() == "make demo"
    # Use the environment of this run: `make demo` would install into .venv, which CI has just done.
    folders = f"DEMO={tmp_path / 'demo'}", f"BIN={Path(sys.executable).parent}"
    run(["make", "-o", ".venv/.demo", "demo", *folders], ROOT)
    task = read_result(tmp_path / "demo" / "task.json")["statistics"]
    assert task["iou"]["mean"]["value"] >= 0.85
    assert task["error"]["mean"]["value"] <= 0.05
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert "mean absolute error" in page
    assert (tmp_path / "demo" / "maps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.everything
@pytest.mark.long
def test_the_first_result(place: Path) -> None:
    folder = place / "first"
    folder.mkdir()
    (folder / "dinov2.safetensors").symlink_to(place / "dinov2.safetensors")
    said = run(["bash", "-euc", offline(BLOCKS[1][1])], folder)
    assert read_result(folder / "result.json")["kind"] == "comparison"
    if why := native.why_unusable():
        pytest.skip(f"native kernels: the library {why}")
    assert "times as fast as" in said


@pytest.mark.everything
@pytest.mark.long
def test_the_example_with_a_decoder(place: Path) -> None:
    folder = place / "saliency"
    folder.mkdir()
    (folder / "images").symlink_to(place / "images")
    text = (ROOT / "examples" / "saliency" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    run(["bash", "-euc", block], folder)
    assert read_result(folder / "task.json")["statistics"]["iou"]["mean"]["value"] > 0.8
    lines = [json.loads(line) for line in (folder / "maps.jsonl").read_text().splitlines()]
    assert len(lines) == IMAGES
    assert {"output", "area", "centroid"} <= lines[0]["maps"][0].keys()
    assert "intersection over union" in (folder / "report.html").read_text(encoding="utf-8").lower()


@pytest.mark.everything
@pytest.mark.long
def test_the_cookbook(place: Path) -> None:
    page = (ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8")
    processor, camera, *_ = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    (own,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    if not VIDEO.exists():
        pytest.skip(f"no {VIDEO}: `make everything` installs it (root, Debian)")
    folder = place / "cookbook"
    folder.mkdir()
    for name, origin in {"images": place / "images", "dinov2.safetensors": place / "dinov2.safetensors"}.items():
        (folder / name).symlink_to(origin)
    (folder / "video.mp4").symlink_to(VIDEO)
    run(["bash", "-euc", processor], folder)
    assert read_result(folder / "result.json")["kind"] == "comparison"
    run(["bash", "-euc", camera], folder)
    assert [len((folder / name).read_text().splitlines()) for name in ("answers.jsonl", "changed.jsonl")] == [30, 30]
    assert read_result(folder / "camera.json")["kind"] == "pace"
    assert "mask" in run([sys.executable, "-c", own], folder)


@pytest.mark.everything
@pytest.mark.long
def test_the_page_about_models(tmp_path: Path, pictures: Path) -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    live, *functions = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    lines = list(commands(page.split("## A function of your own")[1]))
    for name in ("images", "masks"):
        (tmp_path / name).symlink_to(pictures)
    run([sys.executable, "-c", live], tmp_path)
    assert (tmp_path / "bundle" / "model.onnx").is_file()
    module = "\n".join(functions[:3]).replace("    return Segmenter", "    torch.manual_seed(0)\n    return Segmenter")
    (tmp_path / "mymodels.py").write_text(module, encoding="utf-8")
    assert len(lines) == 4
    for line in lines:
        if "dense/" in line:
            dense = ["export", "mymodels:segmenter", "--img-size", "224", "-o", "dense"]
            run([*PROGRAM, *dense], tmp_path)
        run([*PROGRAM, *line], tmp_path)
