"""How a frame arrives, and what is said of it: fitting, waiting, clocks, messages of the decoder, answers."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pytest
from PIL import Image

from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.camera import capture
from sparsifiner_edge.camera.capture import FIRST_WAIT_S, MOST_WAIT_S, Capture, wait_s
from sparsifiner_edge.camera.decoder_protocol import ProtocolError, receive
from sparsifiner_edge.camera.libav import _StreamClock
from sparsifiner_edge.camera.model import Model
from sparsifiner_edge.camera.overlay import Overlay, text_lines
from sparsifiner_edge.camera.pattern import draw_pattern
from sparsifiner_edge.camera.sources import parse_source
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.images import centre_box, centre_crop, load_image
from tests.camera.conftest import record
from tests.commands import wait_for


@pytest.mark.parametrize(
    ("frame", "model", "box"),
    [
        ((480, 641), 224, (0, 80, 480, 560)),
        ((640, 480), (294, 518), (0, 58, 640, 421)),
        ((3, 1000), (16, 160), (0, 499, 3, 500)),
    ],
)
def test_the_largest_box_of_a_shape(
    frame: tuple[int, int], model: ImageSize, box: tuple[int, ...], tmp_path: Path
) -> None:
    assert centre_box(*frame, model) == box
    pixels = np.random.default_rng(0).integers(0, 256, (frame[1], frame[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    height, width = height_width(model)
    expected = Image.fromarray(pixels).crop(box).resize((width, height), Image.Resampling.BICUBIC)
    assert np.array_equal(load_image(tmp_path / "image.png", model), np.asarray(expected))


# Time.


def test_a_backlog_is_part_of_a_frames_age() -> None:
    clock, second = _StreamClock(), 1_000_000_000
    assert clock.capture_ns(5 * second, 100 * second) == 100 * second
    # Half a second late: taken when due, not when it came.
    assert clock.capture_ns(6 * second, 101 * second + second // 2) == pytest.approx(101 * second, abs=second // 1000)
    assert clock.capture_ns(7 * second, 102 * second - 1000) == 102 * second - 1000
    # The camera's clock jumps by an hour: a new beginning.
    assert clock.capture_ns(3607 * second, 103 * second) == 103 * second
    assert clock.capture_ns(None, 104 * second) == 104 * second


def test_clocks_that_run_apart_add_no_age() -> None:
    clock, second = _StreamClock(), 1_000_000_000
    for at in range(3600):  # 200 ppm: 0.7 s in an hour.
        arrived = at * second + at * second // 5000
        assert arrived - clock.capture_ns(at * second, arrived) < 0.02 * second


def test_no_clock_that_can_be_set_is_read() -> None:
    """A jump of the wall clock then changes nothing."""
    for path in Path(capture.__file__).parent.glob("*.py"):
        wrong = r"\btime\.(?!monotonic|sleep)\w+\(|from (?:time|datetime) import|import datetime"
        assert not re.findall(wrong, path.read_text(encoding="utf-8")), path


# Messages of the decoder.

GOOD = dict.fromkeys(("captured_ns", "arrived_ns", "decoded_ns", "ready_ns"), 1) | {"kind": "frame", "pixels": bytes(3)}


def message(**fields: Any) -> bytes:
    content = msgspec.msgpack.encode(fields)
    return len(content).to_bytes(4, "little") + content


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xff\xff\xff", b"\x01\0\0\0\x80", b"\x01\0\0\0\x90", b"\x04\0\0\0\xff\xfe\xfd\xfc",
        *(message(**GOOD | {name: value}) for name in ("captured_ns", "ready_ns", "bad_packets", "skipped")
          for value in (-1, 1 << 63, 1.5, True, "1", None)),
        *(message(**GOOD, pts_s=value) for value in (float("nan"), 1e300, {}, "1", True)),
        *(message(**GOOD | {"pixels": value}) for value in (b"", bytes(2), bytes(4), [1, 2, 3], "abc", None)),
        *(message(kind="end", reason=value) for value in (5, {}, "x" * 10_001)),
        *(message(kind=value) for value in ("other", None, 5, ["frame"], {})),
    ],
)  # fmt: skip
def test_no_field_of_a_message_is_believed(content: bytes) -> None:
    for sent, wrong in ((message(**GOOD, pts_s=0.5), False), (content, True)):
        ours, theirs = os.pipe()
        os.write(theirs, sent)
        os.close(theirs)
        with os.fdopen(ours), pytest.raises(ProtocolError) if wrong else contextlib.nullcontext():
            receive(ours, 1, 1)


# Answers.


def test_a_scene_that_stays_does_not_change(cells: Path) -> None:
    with Model(cells) as model:
        picture, other = (np.asarray(centre_crop(Image.fromarray(draw_pattern(n)), model.size)) for n in (1, 123456))
        found = [model.frame_answer(model.infer(p)).change for p in (picture, picture, other, picture)]
    assert found[:2] == [0, 0]
    assert found[2] is not None
    assert found[3] is not None
    assert found[2] > 0.05 > found[3]


def test_a_dense_map_in_a_few_numbers(cells: Path) -> None:
    mask = np.zeros((1, 4, 8), np.float32)
    mask[0, 1:3, 6:] = 0.9
    depth = np.linspace(2, 5, 16, dtype=np.float32).reshape(1, 1, 4, 4)
    with Model(cells) as model:
        answer = model.answer({"mask": mask, "depth": depth, "tokens": mask})
        assert answer.maps is not None
        first, second = answer.maps
        assert (first.output, first.area, first.centroid) == ("mask", 4 / 32, (7 / 8, 0.5))
        assert first.greatest == pytest.approx(0.9)
        assert (second.output, second.least, second.greatest, second.area) == ("depth", 2, 5, None)
        heat = model.heat({"depth": depth})
        assert heat is not None
        assert (heat.min(), heat.max()) == (0, 1)
        assert np.array_equal(model.heat({"mask": mask, "depth": depth}), mask[0])
        mask[0, 0, 0] = np.nan
        broken = model.answer({"mask": mask})
        assert (broken.maps, broken.not_finite) == ([], 1)
        with pytest.raises(ArtifactError, match="needed are logits, features or a dense map"):
            model.answer({"mask": np.zeros((1, 2, 4, 8), np.float32)})
    said = text_lines(record(maps=list(answer.maps), infer_ms=3.2), 25.0)
    assert said == ["mask  12% of the image", "depth  mean 3.5", "25.0 fps   model 3 ms"]


def test_what_a_model_sees_and_says_is_drawn(tmp_path: Path) -> None:
    heat = np.zeros((2, 4))
    heat[:, 2:] = 1
    with Overlay(tmp_path / "o.mp4", (30, 60), False, Status("x", print)) as overlay:
        for at_s in (5.0, 5.2):
            overlay.write(np.zeros((30, 60, 3), np.uint8), record(infer_ms=3.0), heat, at_s)
    with av.open(str(tmp_path / "o.mp4")) as file:
        frames = list(file.decode(video=0))
    assert [round(float(frame.time or 0), 3) for frame in frames] == [0, 0.2]
    pixels = frames[0].to_ndarray(format="rgb24").astype(int)
    assert pixels.shape == (240, 480, 3)
    assert pixels[100:, 360:, 0].min() > 100
    assert pixels[100:, :120, 0].max() < 60
    assert pixels[:24, :200].max() > 200  # Text.


# Decoders that cannot start, die at once, or say what they may not.


def test_waiting_grows_to_a_cap_and_varies() -> None:
    assert wait_s(0) == 0
    assert FIRST_WAIT_S / 2 <= wait_s(1) <= FIRST_WAIT_S
    waits = [wait_s(attempt) for attempt in range(5, 205)]
    assert all(MOST_WAIT_S / 2 <= wait <= MOST_WAIT_S for wait in waits)
    assert len({round(wait, 3) for wait in waits}) > 50


def fake_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A process that does something else in the place of the decoding one."""
    path = tmp_path / "decoder"
    names = "from sparsifiner_edge.camera.decoder_protocol import End, Frame, send\n"
    path.write_text(f"#!{sys.executable}\n{names if 'send' in script else ''}{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(capture, "MOST_WAIT_S", 0.001)


def test_a_decoder_that_crashes_all_night_fills_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_decoder(tmp_path, monkeypatch, "raise SystemExit(1)")
    events: list[dict[str, Any]] = []
    status = Status("test", events.append)
    with Capture(parse_source("test"), 8, 3, status):
        wait_for(lambda: status.counts["crashes"] > 17)
    attempts = [event["attempt"] for event in events if event["state"] == "lost"]
    assert attempts == [1, 2, 3, 4, 8, 16]
    assert [event["attempt"] for event in events if event["state"] == "connecting"] == [0, *attempts]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [("End(None)", "the stream ended"), ("End('no route')", "no route"),
     ("Frame(bytes(8 * 8 * 3), -1, 0, 0, 0)", "the decoder sent what is no message: ")],
)  # fmt: skip
def test_no_word_of_a_decoder_ends_a_live_source(
    sent: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_decoder(tmp_path, monkeypatch, f"send(1, {sent})")
    events: list[dict[str, Any]] = []
    status = Status("test", events.append)
    with Capture(parse_source("test"), 8, 3, status) as running:
        wait_for(lambda: len([event for event in events if event["state"] == "lost"]) >= 2)
        assert not running.is_over
    assert str(status.last_reason).startswith(reason)
    assert bool(status.counts["crashes"]) == reason.startswith("the decoder")
