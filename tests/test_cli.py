"""Tests of the command line: help, the complete workflow on the smallest real model, standard output and error."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from sparsifiner_edge.camera.capture import frame_size
from sparsifiner_edge.camera.sources import parse_source
from sparsifiner_edge.cli.main import COMMANDS
from sparsifiner_edge.errors import ImageError
from sparsifiner_edge.sparse.student import size_like
from tests.commands import PROGRAM, PROGRESS, Outcome, call, manifest_of, process
from tests.models import TINY
from tests.plain import read_result
from tests.tiny import make_bundle

Capsys = pytest.CaptureFixture[str]
HEAVY = {"torch", "timm", "numpy", "onnx", "onnxruntime", "PIL", "safetensors", "matplotlib"}


def modules_after(*arguments: str) -> set[str]:
    """Return the top-level modules that are loaded when the command line exits."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr))\n"
        "from sparsifiner_edge.cli.main import main\n"
        "main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "sparsifiner_edge" in done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_is_light_and_explains_every_option(name: str | None, capsys: Capsys) -> None:
    # `export --help` may load the imports of its command file, but no model or array library.
    arguments = ("--help",) if name is None else (name, "--help")
    allowed = {"numpy", "onnx"} if name == "doctor" else set()
    assert not modules_after(*arguments) & (HEAVY - allowed)
    outcome = call(capsys, *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    if name is None:
        assert all(f"  {command} " in outcome.out for command in COMMANDS)
        return
    assert f"sparsifiner-edge {name}" in outcome.out
    for option in outcome.out.partition("Options:")[2].split("\n  -")[1:]:
        assert len(option.split()) > 2, option


WORK = """
import sys, time
from sparsifiner_edge.cli import common
common.EVERY_S = 0.2
with common.progress_bar("starting") as progress:
    for done in range(11):
        progress("half", done, 20)
        time.sleep(0.06)
    for done in range(1, 11):
        progress("growing\x1b", done, done)
        time.sleep(0.06)
print("{}")
"""


CLOSING = r"3 answered, [\d.]+ per second(; (infer|end to end) [\d.]+ ms \(95 % within [\d.]+\)){2}; 0 dropped\n"


def test_progress_off_a_terminal_is_lines_that_promise_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n"
    assert PROGRESS.sub("", done.stderr) == ""
    half, growing = (re.findall(f"^{stage}.*", done.stderr, re.MULTILINE) for stage in ("half", "growing"))
    assert half
    assert all(re.fullmatch(r"half: [1-5]\d?%, 0:00:0\d(, 0:00:0\d left)?", line) for line in half), half
    assert growing
    assert all(re.fullmatch(r"growing\\x1b: 0:00:0\d", line) for line in growing), growing


def test_progress_on_a_terminal_is_a_bar_that_promises_nothing() -> None:
    ours, theirs = os.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, stderr=theirs, env=environment) as run:
        os.close(theirs)
        shown = b""
        try:
            while more := os.read(ours, 4096):
                shown += more
        except OSError:  # Linux reports this when the last writer has closed the pipe.
            os.close(ours)
        assert run.stdout is not None
        assert run.stdout.read() == b"{}\n"
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"\u2501 half: \d+%, 0:00:0\d, 0:00:0\d left", text), text
    assert re.search(r"growing\\x1b: 0:00:01", text), text
    assert not re.search(r"growing.*(left|%)", text), text


def test_version() -> None:
    script = Path(sys.executable).with_name("sparsifiner-edge")
    printed = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert printed == process("--version").out == f"sparsifiner-edge, version {version('sparsifiner-edge')}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: sparsifiner-edge"),
        (["sparsifie"], "No such command 'sparsifie'"),
        (["sparsify", TINY], "Missing option '-o'"),
        (["evaluate", "s", "--data", "d", "--metric", "beauty"], "Invalid value for '--metric': 'beauty' is not"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: Capsys) -> None:
    outcome = call(capsys, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert "--help" in outcome.err


def succeeded(outcome: Outcome) -> str:
    """Return standard output of a successful run; it may warn only about what the machine lacks."""
    assert (outcome.code, re.sub(r"^warning: Sparse attention runs as .*\n", "", outcome.err)) == (0, "")
    assert outcome.out
    return outcome.out


def test_a_classifier_the_whole_way(tmp_path: Path, tiny_weights: Path, pictures: Path, capsys: Capsys) -> None:
    """Every command runs in its own process and needs only the folder that the previous one wrote."""
    student, bundle, dense, result = (tmp_path / name for name in ("student", "bundle", "dense", "result.json"))
    settings = ["--keep", "0.2", "--set", "background_tokens=4", "--calibrate", pictures]
    out = succeeded(process("sparsify", TINY, "--weights", tiny_weights, *settings, "-o", student))
    assert f"{student}: sparse model written" in out
    assert {p.name for p in student.iterdir()} == {"config.json", "model.safetensors"}

    found = json.loads(succeeded(process("evaluate", student, "--data", pictures, "--json")))
    assert 0.5 < found["statistics"]["patches_cosine"]["mean"]["value"] <= 1
    assert len(found["samples"]["features_cosine"]) == 3

    manifest = json.loads(succeeded(process("export", student, "--tokens", "--json", "-o", bundle)))
    assert manifest == manifest_of(bundle)
    assert [output["name"] for output in manifest["outputs"]] == ["logits", "features", "tokens"]
    out = succeeded(call(capsys, "export", TINY, "--weights", tiny_weights, "-o", dense))
    assert "none: plain dense attention" in out
    assert manifest_of(dense)["sparsity"] is None

    measured = json.loads(
        succeeded(process("profile", bundle, "--against", dense, "--seconds", "0.3", "--json", "-o", result))
    )
    assert measured == read_result(result)
    assert measured["statistics"]["comparison"]["ratio"]["value"] > 0

    ran = process("run", bundle, "--source", pictures)
    assert re.fullmatch(CLOSING, ran.err.splitlines(keepends=True)[-1]), ran.err
    assert "60x60 of 80x60 pixels are read, 25 % is dropped; to read all, run with --fit letterbox" in ran.err
    records = [json.loads(line) for line in ran.out.splitlines()]
    assert [Path(record["source"]).name for record in records] == [f"picture{i}.png" for i in range(3)]
    for record in records:
        assert [top["label"] for top in record["top"]] == [f"class_{top['class']}" for top in record["top"]]
        assert 0 < sum(top["probability"] for top in record["top"]) <= 1


def test_outputs_are_replaced_and_repeatable(tmp_path: Path, tiny_weights: Path, capsys: Capsys) -> None:
    folder = tmp_path / "s"
    sparsify = ["sparsify", TINY, "--weights", tiny_weights, "-o", folder]
    succeeded(call(capsys, *sparsify))
    first = (folder / "model.safetensors").read_bytes()
    succeeded(call(capsys, *sparsify, "--keep", "0.5"))
    assert json.loads((folder / "config.json").read_text())["sparsity"]["keep"] == 0.5
    succeeded(call(capsys, *sparsify))
    assert (folder / "model.safetensors").read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_names_that_are_no_utf_8(tmp_path: Path, tiny_bundle: Path, pictures: Path) -> None:
    odd = tmp_path / "caf\udce9"
    odd.mkdir()
    (odd / "été.png").write_bytes((pictures / "picture0.png").read_bytes())
    run = process("run", tiny_bundle, "--source", odd, env={"PYTHONIOENCODING": "utf-8", "LC_ALL": "C.UTF-8"})
    assert json.loads(run.out)["source"] == str(odd / "été.png")
    assert process("run", tiny_bundle, "--source", odd, "--output", tmp_path / "lines").code == 0
    assert json.loads((tmp_path / "lines").read_text("utf-8"))["source"] == str(odd / "été.png")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "b", preprocessing={"size": 4})


def test_a_reader_that_leaves_ends_the_run_quietly(bundle: Path, tmp_path: Path, pictures: Path) -> None:
    for number in range(50):
        shutil.copy(pictures / "picture0.png", tmp_path / f"{number}.png")
    line = [*PROGRAM, "run", bundle, "--source", tmp_path, "--fit", "stretch"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert json.loads(run.stdout.readline())["features"]
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 141


@pytest.mark.parametrize("arguments", [["--help"], ["run", "{bundle}", "--source", "{pictures}", "--fit", "stretch"]])
def test_standard_output_on_a_full_disk(arguments: list[str], bundle: Path, pictures: Path) -> None:
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [*PROGRAM, *(a.format(bundle=bundle, pictures=pictures) for a in arguments)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert run.returncode == 2
    assert run.stderr.startswith("error: the output: No space left on device.")
    assert run.stderr.count("\n") == 2


def test_no_standard_output_at_all(bundle: Path, pictures: Path) -> None:
    line = ["sh", "-c", '"$@" >&-', "sh", *PROGRAM, "run", bundle, "--source", pictures]
    done = subprocess.run(line, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0
    assert re.fullmatch(CLOSING, done.stderr.splitlines(keepends=True)[-1]), done.stderr


@pytest.mark.parametrize(("given", "size"), [(None, None), ("518", 518), ("294x518", (294, 518)), ("518x518", 518)])
def test_an_image_size_is_one_number_or_two(given: str | None, size: object) -> None:
    for name in ("sparsify", "export"):
        command = importlib.import_module(f"sparsifiner_edge.cli.{name}").command
        words = ["thing", "-o", "x", *(["--img-size", given] if given else [])]
        assert command.make_context(name, words).params["img_size"] == size


def test_a_size_like_a_cameras_frames(tiny_student: Path, capsys: Capsys, tmp_path: Path) -> None:
    frame = tmp_path / "frame.png"
    Image.new("RGB", (320, 180)).save(frame)
    outcome = call(capsys, "export", tiny_student, "--like", frame, "-o", tmp_path / "wide")
    assert outcome.code == 0, outcome.err
    assert f"{frame}: frames are 320 pixels wide and 180 high. Using --img-size 128x224" in outcome.err
    assert manifest_of(tmp_path / "wide")["preprocessing"]["size"] == [128, 224]
    shutil.copy(tiny_student / "config.json", tmp_path)
    assert size_like(tmp_path, (320, 180)) == (128, 224), "a student's weights are not read"
    assert frame_size(parse_source("test")) == (640, 480)
    (tmp_path / "none.mp4").write_bytes(b"none")
    with pytest.raises(ImageError, match=r"none\.mp4 gave no frame: .*Invalid data"):
        frame_size(parse_source(str(tmp_path / "none.mp4")))
    for options, said in (
        (("--like", frame, "--img-size", "160"), "--img-size and --like cannot be combined"),
        (("--like", tmp_path / "nothing.png"), "nothing.png does not exist"),
    ):
        outcome = call(capsys, "export", tiny_student, *options, "-o", tmp_path / "none")
        assert outcome.code == 2
        assert said in outcome.err
