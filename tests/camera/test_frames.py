"""Tests of frames: fitting, waiting, clocks, decoder messages and drawn answers."""

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
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparsifiner_edge.camera import capture
from sparsifiner_edge.camera.answers import Answered
from sparsifiner_edge.camera.capture import FIRST_WAIT_S, MOST_WAIT_S, Capture, wait_s
from sparsifiner_edge.camera.decoder_protocol import ProtocolError, Wanted, receive
from sparsifiner_edge.camera.libav import _StreamClock, read_stream
from sparsifiner_edge.camera.model import Model
from sparsifiner_edge.camera.overlay import Overlay, text_lines
from sparsifiner_edge.camera.pattern import draw_pattern
from sparsifiner_edge.camera.sources import parse_source
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.errors import ArtifactError
from sparsifiner_edge.fitting import BARS, FITS, Box, Fit, Framing
from sparsifiner_edge.images import fit_image, load_image, read_image
from tests.camera.conftest import encode, record
from tests.commands import wait_for

SIDES = st.integers(1, 300)


def test_the_largest_box_of_a_shape(tmp_path: Path) -> None:
    assert Framing(224).of(480, 641).box == (0, 80, 480, 480)
    assert Framing((16, 160)).of(3, 1000).box == (0, 499, 3, 1)
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    expected = Image.fromarray(pixels).crop((0, 58, 640, 421)).resize((518, 294), Image.Resampling.BICUBIC)
    assert np.array_equal(load_image(tmp_path / "image.png", (294, 518)), np.asarray(expected))


@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.sampled_from(FITS), st.tuples(*[st.floats(0, 1)] * 4))
def test_where_the_input_is_in_the_frame(
    frame: tuple[int, int], size: tuple[int, int], fit: Fit, shares: tuple[float, ...]
) -> None:
    x, y = (int(share * (side - 1)) for share, side in zip(shares[:2], frame, strict=True))
    width, height = 1 + int(shares[2] * (frame[0] - x - 1)), 1 + int(shares[3] * (frame[1] - y - 1))
    fitted = Framing(size, fit, (x, y, width, height)).of(*frame)
    for left, top, across, down, outer in (
        (*fitted.box, (x, y, x + width, y + height)),
        (*fitted.inner, (0, 0, *size[::-1])),
    ):
        assert outer[0] <= left < left + across <= outer[2]
        assert outer[1] <= top < top + down <= outer[3]
        # In the middle, as far as whole pixels allow.
        assert abs(left + across + left - outer[0] - outer[2]) <= 1
        assert abs(top + down + top - outer[1] - outer[3]) <= 1
    assert fit == "crop" or fitted.box == (x, y, width, height)
    assert fit == "letterbox" or fitted.inner[2:] == fitted.size
    left, top, across, down = fitted.inner
    assert fitted.to_frame(left, top) == fitted.box[:2]
    assert fitted.to_frame(left + across, top + down) == pytest.approx(np.add(fitted.box[:2], fitted.box[2:]))
    inside = np.zeros(size)
    inside[top : top + down, left : left + across] = 1
    assert fitted.cut(inside).shape == (down, across)
    assert fitted.cut(inside).min() == 1
    assert fitted.cut(np.zeros((3, 7, 5))).size > 0


def picture_of(frame: tuple[int, int]) -> Image.Image:
    """Return an image whose pixels encode their position: red across, green down, no blue."""
    across, down = np.meshgrid(np.arange(frame[0]), np.arange(frame[1]))
    return Image.fromarray(np.stack([across % 256, down % 256, 0 * down], -1).astype(np.uint8))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("region", [None, (100, 20, 120, 60)])
def test_images_and_videos_are_fitted_alike(fit: Fit, region: Box | None, tmp_path: Path) -> None:
    """A pixel is where the geometry puts it, in an image and in a decoded frame; bars have their colour."""
    framing, picture = Framing((96, 64), fit, region), picture_of((240, 120))
    picture.save(tmp_path / "image.png")
    # It may be decoded at a smaller size, which moves no bar.
    Image.new("RGB", (3779, 2234)).save(tmp_path / "large.jpg")
    image, fitted = read_image(tmp_path / "large.jpg", Framing(224, fit, region))
    rows = np.flatnonzero(image[:, 112].max(-1) < 40)
    assert (rows[0], len(rows)) == fitted.inner[1::2]
    image, fitted = read_image(tmp_path / "image.png", framing)
    video = encode(tmp_path / "v.mkv", [np.asarray(picture)] * 2, codec="ffv1")
    with video.open("rb") as file:
        frame = next(read_stream(file, Wanted(framing, view=True), 3))
        file.seek(0)
        alone = next(read_stream(file, Wanted(framing), 3))
    assert framing.of(frame.width, frame.height) == fitted
    assert np.abs(frame.whole().astype(int) - np.asarray(picture).astype(int))[5:-5, 5:-5].max() < 12
    left, top, across, down = fitted.inner
    for pixels in (image, frame.image(framing), alone.image(framing)):
        for x, y in ((left + 4, top + 4), (left + across - 5, top + down - 5)):
            place = fitted.to_frame(x + 0.5, y + 0.5)
            np.testing.assert_allclose(pixels[y, x, :2], np.subtract(place, 0.5), atol=8)
            assert pixels[y, x, 2] < 40
        bars = np.ones(pixels.shape[:2], bool)
        bars[top : top + down, left : left + across] = False
        assert bars.any() == (fit == "letterbox")
        assert (pixels[bars] == BARS).all()


def test_a_frame_is_resized_as_an_image_is_colours_too(tmp_path: Path) -> None:
    """Patches of any colour, in 4:2:0 as a camera sends them."""
    patches = np.random.default_rng(0).integers(0, 256, (18, 32, 3), np.uint8).repeat(40, 0).repeat(40, 1)
    video = encode(tmp_path / "v.mp4", [patches] * 2, crf="1")
    with av.open(str(video)) as opened:
        whole = next(opened.decode(video=0)).to_ndarray(format="rgb24")
    with video.open("rb") as file:
        frame = next(read_stream(file, Wanted(Framing(224)), 3)).image(Framing(224))
    assert np.abs(frame - np.asarray(fit_image(Image.fromarray(whole), 224)).astype(int)).mean() < 1.5


# Time.


def test_a_backlog_is_part_of_a_frames_age() -> None:
    clock, second = _StreamClock(), 1_000_000_000
    assert clock.capture_ns(5 * second, 100 * second) == 100 * second
    # Half a second late: the capture time is the due time, not the arrival time.
    assert clock.capture_ns(6 * second, 101 * second + second // 2) == pytest.approx(101 * second, abs=second // 1000)
    assert clock.capture_ns(7 * second, 102 * second - 1000) == 102 * second - 1000
    # The camera's clock jumps by an hour: the offset is estimated anew.
    assert clock.capture_ns(3607 * second, 103 * second) == 103 * second
    assert clock.capture_ns(None, 104 * second) == 104 * second


def test_clocks_that_run_apart_add_no_age() -> None:
    clock, second = _StreamClock(), 1_000_000_000
    for at in range(3600):  # 200 ppm: 0.7 s in an hour.
        arrived = at * second + at * second // 5000
        assert arrived - clock.capture_ns(at * second, arrived) < 0.02 * second


def test_no_clock_that_can_be_set_is_read() -> None:
    """A jump of the wall clock therefore changes nothing."""
    for path in Path(capture.__file__).parent.glob("*.py"):
        wrong = r"\btime\.(?!monotonic|sleep)\w+\(|from (?:time|datetime) import|import datetime"
        assert not re.findall(wrong, path.read_text(encoding="utf-8")), path


# Decoder messages.

GOOD: dict[str, Any] = {"kind": "frame", "pixels": bytes(3), "width": 9, "height": 9}
GOOD |= dict.fromkeys(("captured_ns", "arrived_ns", "decoded_ns", "ready_ns"), 1)


def message(**fields: Any) -> bytes:
    content = msgspec.msgpack.encode(fields)
    return len(content).to_bytes(4, "little") + content


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xff\xff\xff",
        b"\x01\0\0\0\x80",
        b"\x01\0\0\0\x90",
        b"\x04\0\0\0\xff\xfe\xfd\xfc",
        *(
            message(**GOOD | {name: value})
            for name in ("captured_ns", "ready_ns", "bad_packets", "skipped")
            for value in (-1, 1 << 63, 1.5, True, "1", None)
        ),
        *(message(**GOOD, pts_s=value) for value in (float("nan"), 1e300, {}, "1", True)),
        *(message(**GOOD | {"pixels": value}) for value in (b"", bytes(2), bytes(4), [1, 2, 3], "abc", None)),
        *(message(**GOOD | {name: value}) for name in ("width", "height") for value in (0, 8, -1, 1 << 17, None)),
        message(**GOOD, view=bytes(9 * 9 * 3)),
        *(message(kind="end", reason=value) for value in (5, {}, "x" * 10_001)),
        *(message(kind=value) for value in ("other", None, 5, ["frame"], {})),
    ],
)
def test_no_field_of_a_message_is_believed(content: bytes) -> None:
    for sent, wrong in ((message(**GOOD, pts_s=0.5), False), (content, True)):
        ours, theirs = os.pipe()
        os.write(theirs, sent)
        os.close(theirs)
        with os.fdopen(ours), pytest.raises(ProtocolError) if wrong else contextlib.nullcontext():
            receive(ours, Wanted(Framing(1, region=(2, 2, 7, 7))), 1)


# Answers.


def test_a_scene_that_stays_does_not_change(cells: Path) -> None:
    with Model(cells) as model:
        picture, other = (np.asarray(fit_image(Image.fromarray(draw_pattern(n)), model.framing)) for n in (1, 123456))
        found = [model.frame_answer(model.infer(p)).change for p in (picture, picture, other, picture)]
    assert found[:2] == [0, 0]
    assert found[2] is not None
    assert found[3] is not None
    assert found[2] > 0.05 > found[3]


def test_a_dense_map_in_a_few_numbers(cells: Path) -> None:
    mask = np.zeros((1, 4, 8), np.float32)
    mask[0, 1:3, 6:] = 0.9
    depth = np.linspace(2, 5, 32, dtype=np.float32).reshape(1, 1, 4, 8)
    others = {"tokens": mask, "patches": np.ones((1, 197, 192)), "last": np.ones((1, 4, 8, 3)), "boxes": depth[..., :4]}
    with Model(cells, top=2) as model:
        model.framing = Framing((32, 64))
        answer = model.answer({"mask": mask, "depth": depth, **others})
        assert answer.maps is not None
        first, second = answer.maps
        assert (first.output, first.area, first.centroid) == ("mask", 4 / 32, (7 / 8, 0.5))
        assert first.greatest == pytest.approx(0.9)
        assert (second.output, second.least, second.greatest, second.area) == ("depth", 2, 5, None)
        (heat,) = model.heats({"depth": depth})
        assert (heat.min(), heat.max()) == (0, 1)
        (heat,) = model.heats({"mask": mask, "depth": depth})
        assert np.array_equal(heat, mask[0])
        model.labels = ["background", "cat", "dog"]  # The map of a segmentation.
        logits = np.stack([mask[0] - 0.5, 0.1 - mask[0], mask[0] * 0 - 3])[None] * 20
        found = {x.output: x.area for x in model.answer({"mask": logits, "depth": depth}).maps or []}
        assert found == {"mask.cat": 28 / 32, "mask.background": 4 / 32, "depth": None}
        assert len(model.heats({"mask": logits})) == 2
        mask[0, 0, 0] = np.nan
        broken = model.answer({"mask": mask})
        assert (broken.maps, broken.not_finite) == ([], 1)
        with pytest.raises(ArtifactError, match="logits, features or a dense map are needed"):
            model.answer({"mask": np.zeros((1, 48, 4, 8), np.float32)})
    said = text_lines(record(maps=list(answer.maps), infer_ms=3.2), 25.0)
    assert said == ["mask  12% of the box", "depth  mean 3.5", "25.0 fps   model 3 ms"]


def test_what_a_model_sees_and_says_is_drawn(tmp_path: Path) -> None:
    """The overlay marks the map above the threshold inside the region that is read; the rest is unchanged."""
    heat = np.full((2, 4), 0.4)
    heat[:, 2:] = 1
    fitted = Framing((30, 60)).of(120, 30)
    with Overlay(tmp_path / "o.mp4", 0.5, False, Status("x", print)) as overlay:
        for at_s in (5.0, 5.2):
            said, view = record(infer_ms=3.0, pts_s=at_s), np.full((30, 120, 3), 90, np.uint8)
            overlay.write(Answered(0, 3.0, view, {}, said, fitted, view), [heat])
    with av.open(str(tmp_path / "o.mp4")) as file:
        frames = list(file.decode(video=0))
    assert [round(float(frame.time or 0), 3) for frame in frames] == [0, 0.2]
    pixels = frames[0].to_ndarray(format="rgb24").astype(int)
    assert pixels.shape == (120, 480, 3)
    unread, plain, hot = pixels[60:, :110], pixels[60:, 130:200], pixels[60:, 270:350]
    assert hot[..., 0].min() > 170
    assert abs(plain - 90).max() < 8
    assert abs(unread - 41).max() < 8
    assert abs(pixels[60:, 370:] - 41).max() < 8
    assert pixels[:24, :200].max() > 200  # Text.


# Decoders that cannot start, exit at once, or send invalid messages.


def test_waiting_grows_to_a_cap_and_varies() -> None:
    assert wait_s(0) == 0
    assert FIRST_WAIT_S / 2 <= wait_s(1) <= FIRST_WAIT_S
    waits = [wait_s(attempt) for attempt in range(5, 205)]
    assert all(MOST_WAIT_S / 2 <= wait <= MOST_WAIT_S for wait in waits)
    assert len({round(wait, 3) for wait in waits}) > 50


def fake_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Replace the decoding process by a script."""
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
    with Capture(parse_source("test"), Wanted(Framing(8)), 3, status):
        wait_for(lambda: status.counts["crashes"] > 17)
    attempts = [event["attempt"] for event in events if event["state"] == "lost"]
    assert attempts == [1, 2, 3, 4, 8, 16]
    assert [event["attempt"] for event in events if event["state"] == "connecting"] == [0, *attempts]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ("End(None)", "the stream ended"),
        ("End('no route')", "no route"),
        ("Frame(bytes(8 * 8 * 3), 9, 9, -1, 0, 0, 0)", "the decoder sent an invalid message: "),
    ],
)
def test_no_word_of_a_decoder_ends_a_live_source(
    sent: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_decoder(tmp_path, monkeypatch, f"send(1, {sent})")
    events: list[dict[str, Any]] = []
    status = Status("test", events.append)
    with Capture(parse_source("test"), Wanted(Framing(8)), 3, status) as running:
        wait_for(lambda: len([event for event in events if event["state"] == "lost"]) >= 2)
        assert not running.is_over
    assert str(status.last_reason).startswith(reason)
    assert bool(status.counts["crashes"]) == reason.startswith("the decoder")
