"""Tests of answers in a Python program: every answer arrives, and no process is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparsifiner_edge as se
from sparsifiner_edge.camera.answers import FrameRecord
from sparsifiner_edge.errors import ConfigError, ImageError
from tests.camera.conftest import lines, make_cells_bundle, number_of
from tests.commands import ended, process
from tests.seal import reseal

CHILDREN = Path(f"/proc/{os.getpid()}/task")
NO_LIBRARY = "from sparsifiner_edge.ops import native\nnative.library_path = lambda: None\n"


def decoders() -> list[int]:
    """Return the live child processes of this process."""
    found = [int(pid) for path in CHILDREN.glob("*/children") for pid in path.read_text().split()]
    return [pid for pid in found if not ended(pid)]


def test_every_frame_with_its_image(cells: Path, video: Path) -> None:
    before, seen = decoders(), []
    for answered in se.run(cells, str(video)):
        assert answered.index == len(seen)
        assert answered.image.shape == (64, 64, 3)
        grid = answered.image.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3, 4)).ravel()
        assert number_of(grid) == number_of(answered.outputs["features"][0]) == answered.index
        assert isinstance(answered.record, FrameRecord)
        assert answered.ms == answered.record.end_to_end_ms > 0
        seen.append(answered.record.pts_s)
    assert seen == pytest.approx([n / 10 for n in range(30)])
    assert decoders() == before


@pytest.mark.parametrize("source", ["video", "test"])
def test_a_loop_that_is_left_ends_the_decoder(source: str, cells: Path, video: Path) -> None:
    """The file's decoder is waiting for a free buffer at that time."""
    before, named = decoders(), str(video) if source == "video" else "test"
    for answered in se.run(cells, named):
        assert len(decoders()) == len(before) + 1
        if answered.index == 2:
            break
    assert decoders() == before


def test_a_program_that_ends_in_the_middle_says_nothing(cells: Path, video: Path) -> None:
    """Nor does an iterator that the program still holds print anything."""
    code = f"import sparsifiner_edge as se\nfound = se.run({str(cells)!r}, {str(video)!r})\nprint(next(found).index)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_outputs_of_another_kind_are_the_programs_own(tmp_path: Path, video: Path) -> None:
    """`run` on the command line has no record for them."""
    bundle = make_cells_bundle(tmp_path / "bundle")
    model = bundle / "model.onnx"
    model.write_bytes(model.read_bytes().replace(b"features", b"embedded"))
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace("features", "embedded"))
    reseal(bundle)
    first = next(iter(se.run(bundle, str(video))))
    assert number_of(first.outputs["embedded"][0]) == 0
    assert first.record.features is None
    assert "logits, features or a dense map are needed" in process("run", bundle, "--source", video).err


def test_what_a_program_is_refused(cells: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "good.png").symlink_to(pictures / "picture0.png")
    answers = se.run(cells, str(tmp_path))
    assert next(answers).record.source == str(tmp_path / "good.png")
    with pytest.raises(ImageError, match="1 of 2 images could not be read"):
        next(answers)
    with pytest.raises(ConfigError, match="output is set, but run writes no output"):
        se.run(cells, "test", se.RunOptions(output=tmp_path / "lines"))
    with pytest.raises(ImageError, match="nowhere does not exist"):
        se.run(cells, "nowhere")


@pytest.fixture
def no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every Python started from here on behave as if the native library was not built."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_LIBRARY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


@pytest.mark.everything
@pytest.mark.usefixtures("no_library")
def test_kernels_that_are_not_installed_are_said_once(
    tiny_bundle: Path, cells: Path, video: Path, pictures: Path
) -> None:
    said = "Sparse attention runs as function bodies (the native library is not built: install a C++17 compiler"
    stills = process("run", tiny_bundle, "--source", pictures)
    assert (stills.code, stills.err.count(said)) == (0, 1)
    assert stills.err.startswith(f"warning: {said}")
    film = process("run", tiny_bundle, "--source", video, "--frames", 3)
    warned = [event for event in lines(film.err) if event["event"] == "warning"]
    assert [event["reason"].startswith(said) for event in warned] == [True]
    profiled = process("profile", tiny_bundle, "--seconds", "0.2")
    assert "portable-kernels: sparse attention ran as function bodies (the native library is not built" in profiled.out
    judged = process("evaluate", tiny_bundle, "--against", tiny_bundle, "--data", pictures)
    assert (judged.code, judged.err.count("warning: Sparse attention runs")) == (0, 1)
    chosen = process("run", tiny_bundle, "--source", pictures, "--kernels", "portable")
    assert "warning" not in chosen.err + process("run", cells, "--source", pictures).err  # no sparse operator in it
    code = f"import sparsifiner_edge as se\nfor _ in se.run({str(tiny_bundle)!r}, {str(pictures)!r}): pass"
    program = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert program.stderr.count(f"SlowKernelsWarning: {said}") == 1
