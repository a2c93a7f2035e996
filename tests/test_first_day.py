"""Tests of ten first-day tasks of a new user with the installed script, in the folder of the user's own module.

The commands are those of the documentation and of the printed "Next" lines.

1. My module normalises its input: the bundle answers as my own call does; without the flag, a message names it.
2. `optimize` on my model and frames returns a bundle, a table, a page and a picture within the given minutes.
3. The bundle runs in the precision it was optimised for; each side of a comparison has its own backend.
4. The printed "Next" commands work unchanged up to `run`, for my own model too.
5. My class names appear in the lines of `run`.
6. Command line and page use the same sentence for the same file.
7. For a board that I do not have, with its JetPack: which of two bundles is faster, in words.
8. A mistake gets a message about that mistake.
9. Long commands report progress, and `run --output` reports its result.
10. A wide frame: cropping is reported and can be turned off, a model has its shape, Python gets the answers.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import commands
from tests.commands import PROGRESS, Outcome, assert_refused, manifest_of, process
from tests.once import Once
from tests.test_cli import CLOSING

SCRIPT, PAGE = Path(sys.executable).with_name("sparsifiner-edge"), Path(__file__).parents[1] / "docs" / "camera.md"
MODULE = """
import timm, torch

class Sorter(torch.nn.Module):
    output_names = ("logits",)
    def __init__(self, img_size):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = timm.create_model("test_vit", img_size=img_size, num_classes=0, dynamic_img_size=False)
        self.head = torch.nn.Linear(64, 3)
    def forward(self, pixels):  # from 0 to 1
        return self.head(self.encoder((pixels - 0.4) / 0.3))

def sorter(img_size=160):
    return Sorter(img_size).eval()
def predict(image):
    return sorter()(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
"""
slow = pytest.mark.everything
MINE, NAMES = "mymodels:sorter --no-normalise", ["car", "bus", "cyclist"]


def typed(line: str, place: Path) -> Outcome:
    """Run a command line as typed in `place`, with the installed script: `python -m` would find the module anyway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "PROGRAM", [SCRIPT])
        return process(*shlex.split(line.removeprefix("sparsifiner-edge ")), cwd=place)


def done(line: str, place: Path) -> Outcome:
    """Run a command line that must succeed."""
    outcome = typed(line, place)
    assert outcome.code == 0, outcome
    return outcome


def following(printed: str) -> str:
    """Return the commands printed under "Next"."""
    (line,) = re.findall(r"Next: (sparsifiner-edge .*?)(?:  |$)", printed, re.MULTILINE)
    return str(line)


@pytest.fixture(scope="module")
def desk(once: Once) -> Path:
    """Folder with module, frames, names, `my student` and `BUNDLE` of the printed commands, and the dense model."""

    def make(place: Path) -> None:
        (place / "mymodels.py").write_text(MODULE)
        (place / "names.txt").write_text("\n".join(NAMES))
        (place / "IMAGES").mkdir()
        for number in range(12):
            coarse = np.random.default_rng(number).integers(0, 256, (5, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((320, 180)).save(place / "IMAGES" / f"{number:02d}.png")
        sparsified = done(f"sparsify {MINE} --calibrate IMAGES/ -o 'my student/'", place).out
        (place / "next").write_text(following(done(following(sparsified), place).out))
        checked = f"export {MINE} --check mymodels:predict --data IMAGES/ --labels names.txt -o dense/"
        (place / "checked").write_text(done(checked, place).out)

    return once("first_day", make)


@slow
def test_1_my_module_normalises_inside(desk: Path, tmp_path: Path) -> None:
    (apart,) = re.findall(
        r"12 images; logits of the file differs by (\S+) of its range", (desk / "checked").read_text()
    )
    assert float(apart) < 1e-3
    refused = typed(f"export mymodels:sorter -o {tmp_path / 'out'}", desk)
    assert_refused(refused, "the normalisation of pixels is unknown", "Give --no-normalise if the module")


@slow
@pytest.mark.long
def test_2_the_fastest_in_a_minute_and_3_as_it_was_found(desk: Path, tmp_path: Path) -> None:
    engine, out = "--backend onnxruntime --precision fp32 --compute-precision auto", tmp_path / "found"
    line, begun = f"optimize {MINE} --data IMAGES/ --labels names.txt --minutes 1 {engine} -o {out}", time.monotonic()
    found = subprocess.run([SCRIPT, *line.split()], cwd=desk, capture_output=True, text=True, check=False)
    assert time.monotonic() - begun < 63
    assert (found.returncode, bool(PROGRESS.search(found.stderr))) == (0, True), found
    assert re.match(r"\d+\.\d\d times faster than the dense model at a patch cosine of [01]\.\d{3} \(", found.stdout)
    for said in ("speed-up", "dense: onnxruntime, fp32", "sparse: onnxruntime, fp32", f"Answer: {out / 'bundle'}"):
        assert said in found.stdout
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (out / "report.html").read_text(encoding="utf-8")
    ran = done(following(found.stdout), desk)
    assert "onnxruntime runs this bundle, which is intended for it" in ran.err
    tops = [json.loads(line)["top"] for line in ran.out.splitlines()]
    assert [{top["label"] for top in each} for each in tops] == [set(NAMES)] * 12


@slow
def test_3_a_backend_each_6_one_sentence_and_7_a_board_elsewhere(desk: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    sides = "BUNDLE/ --against dense/ --backend onnxruntime --against-backend openvino"
    printed = done(f"profile {sides} --seconds 0.3 -o {result}", desk).out
    runtime = json.loads(result.read_text())["method"]["runtime"]
    assert [runtime[role]["backend"] for role in ("subject", "against")] == ["onnxruntime", "openvino"]
    verdict = json.loads(done(f"report {result} --json -o {tmp_path / 'report.html'}", desk).out)["verdict"]
    assert printed.endswith("\n".join([*verdict, ""]))
    text = done("estimate BUNDLE/ --against dense/ --board jetson-orin-nano-8gb --jetpack 6", desk).out
    said = r"Estimated for Jetson Orin Nano 8 GB, not measured: .*(as fast as|as long|not certain)"
    assert re.search(said, " ".join(text.split())), text


@slow
def test_4_as_printed_5_with_my_names_and_9_not_in_silence(desk: Path, tmp_path: Path) -> None:
    assert "Latency" in done(f"{(desk / 'next').read_text()} --seconds 0.3", desk).out
    ran = done(f"run BUNDLE/ --source IMAGES/ --output {tmp_path / 'lines'}", desk)
    assert re.fullmatch(CLOSING.replace("3", "12", 1), ran.err.splitlines(keepends=True)[-1]), ran.err
    assert len((tmp_path / "lines").read_text().splitlines()) == 12
    tops = [json.loads(line)["top"] for line in done("run dense/ --source IMAGES/", desk).out.splitlines()]
    assert [{top["label"] for top in each} for each in tops] == [set(NAMES)] * 12


def test_8_slips(tiny_student: Path, tmp_path: Path) -> None:
    (tmp_path / "mymodels.py").write_text(MODULE)
    (tmp_path / "student").symlink_to(tiny_student)
    for line, said in (
        ("run student/ --source .", "student is a student, not a bundle. Export it: sparsifiner-edge export student"),
        ("export ../nothere/ -o out", "../nothere/ does not exist."),
        ("export vit_small_patch14_dinov2.lvd142 -o out", "Did you mean vit_small_patch14_dinov2.lvd142m"),
        ("sparsify mymodls:sorter -o out", f"'mymodls' in {tmp_path}. Did you mean mymodels?"),
    ):
        assert_refused(typed(line, tmp_path), said)


@slow
def test_10_a_wide_frame(desk: Path, tmp_path: Path) -> None:
    one, wide = "--source IMAGES/00.png", tmp_path / "wide"
    cut, whole = (done(f"run dense/ {one} {fit}", desk) for fit in ("", "--fit letterbox"))
    assert "180x180 of 320x180 pixels are read, 44 % is dropped; to read all, run with --fit letterbox" in cut.err
    assert ("% is dropped" in whole.err, json.loads(whole.out)["box"]) == (False, [0, 0, 320, 180])
    done(f"export {MINE} --like IMAGES/00.png -o {wide}", desk)
    assert manifest_of(wide)["preprocessing"]["size"] == [128, 224]
    assert "--like" not in done(f"run {wide} {one}", desk).err
    block, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    program = block.replace("bundle/", str(wide)).replace("video.mp4", "IMAGES/")
    answers = subprocess.run([sys.executable, "-c", program], cwd=desk, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in answers.stdout.splitlines()] == [str(number) for number in range(12)]
