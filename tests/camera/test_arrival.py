"""How a frame arrives: sources, fitting, waiting, clocks, messages of the decoder."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sparsifiner_edge.bounds import ImageSize, height_width
from sparsifiner_edge.camera.capture import Mailbox
from sparsifiner_edge.camera.decoder_protocol import Decoded, End, FrameTimes, ProtocolError, receive, send
from sparsifiner_edge.camera.libav import StreamClock, require_sane_size
from sparsifiner_edge.camera.pattern import BITS, cells_of, draw_pattern
from sparsifiner_edge.camera.prepare import cropped, fit_pillow, scaled_size
from sparsifiner_edge.camera.sources import parse_source, require_decoder
from sparsifiner_edge.errors import ConfigError, MissingExtraError
from sparsifiner_edge.images import centre_box, load_image
from sparsifiner_edge.process import StalledError
from tests.camera.cells import number_of


@pytest.mark.parametrize(
    ("text", "kind", "live", "shown"),
    [
        ("0", "gst", True, "/dev/video0"),
        ("/dev/video12", "gst", True, "/dev/video12"),
        ("test", "test", True, "test"),
        ("test:50", "test", True, "test"),
        ("rtsp://user:secret@h:554/x?y=1", "rtsp", True, "rtsp://h:554"),
        (
            "gst:videotestsrc pattern=ball ! video/x-raw,width=64 ! identity",
            "gst",
            True,
            "gst:videotestsrc ! *** ! identity",
        ),
        ("missing.mp4", "images", False, "missing.mp4"),
        ("folder/", "images", False, "folder"),
    ],
)
def test_sources(text: str, kind: str, live: bool, shown: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_text(f"{text}\nmore")
    for given in (text, f"@{tmp_path / 'source'}"):
        source = parse_source(given)
        assert (source.kind, source.live, source.shown) == (kind, live, shown)


@pytest.mark.parametrize("content", ["", " ", "\nfilm.mp4"])
def test_a_file_that_names_no_source(content: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_text(content)
    with pytest.raises(ConfigError, match="names no source in its first line"):
        parse_source(f"@{tmp_path / 'source'}")


def test_a_video_is_known_by_its_ending(video: Path) -> None:
    source = parse_source(str(video))
    assert (source.kind, source.live, source.location) == ("file", False, str(video))


def test_a_decoder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, video: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"sparsifiner-edge\[camera\]"):
        require_decoder(parse_source(str(video)))
    with pytest.raises(ConfigError, match=r"apt-get install gstreamer1\.0-tools"):
        require_decoder(parse_source("0"))
    require_decoder(parse_source("test"))


def test_the_number_in_an_image() -> None:
    for number in (0, 1, 12345, (1 << BITS) - 1, 1 << BITS):
        cells = [255.0 if cell else 0.0 for cell in cells_of(number)]
        assert number_of(cells) == number % (1 << BITS)
        cells[5] = 255 - cells[5]
        assert number_of(cells) is None
    for level in (0.0, 128.0, 255.0):
        assert number_of([level] * 64) is None
    square = fit_pillow(Image.fromarray(draw_pattern(777)), 64)
    assert number_of(square.reshape(8, 8, 8, 8, 3).mean((1, 3, 4)).ravel().tolist()) == 777


@pytest.mark.parametrize("model", [50, (30, 50), (50, 30), (7, 112)])
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (100, 100), (33, 500), (1, 16)])
def test_fitting(size: tuple[int, int], model: ImageSize) -> None:
    height, width = height_width(model)
    scaled = scaled_size(*size, model)
    assert scaled[0] == width or scaled[1] == height
    assert scaled[0] >= width
    assert scaled[1] >= height
    assert scaled[0] / scaled[1] == pytest.approx(size[0] / size[1], rel=0.6 / min(scaled))
    image = fit_pillow(Image.new("RGB", size, (200, 200, 200)), model)
    assert image.shape == (height, width, 3)
    assert (image > 0).all()
    assert cropped(np.ones((60, 120, 3), np.uint8), model).flags.c_contiguous


@pytest.mark.parametrize(
    ("frame", "model", "box"),
    [
        ((640, 480), 224, (80, 0, 560, 480)),
        ((480, 641), 224, (0, 80, 480, 560)),
        ((640, 480), (224, 224), (80, 0, 560, 480)),
        ((640, 480), (294, 518), (0, 58, 640, 421)),
        ((1920, 1080), (294, 518), (8, 0, 1911, 1080)),
        ((640, 480), (518, 294), (184, 0, 456, 480)),
        ((3, 1000), (16, 160), (0, 499, 3, 500)),
        ((1, 1), (14, 140), (0, 0, 1, 1)),
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


@pytest.mark.parametrize("size", [(0, 5), (-1, 4), (100_000, 100_000), (40_000, 2), (16, 273)])
def test_absurd_sizes(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="frames of"):
        require_sane_size(*size)


def test_a_backlog_is_part_of_a_frames_age() -> None:
    clock, second = StreamClock(), 1_000_000_000
    assert clock.captured_ns(5 * second, 100 * second) == 100 * second
    # Half a second late: taken when due, not when it came.
    assert clock.captured_ns(6 * second, 101 * second + second // 2) == pytest.approx(101 * second, abs=second // 1000)
    assert clock.captured_ns(7 * second, 102 * second - 1000) == 102 * second - 1000
    # The camera's clock jumps by an hour: a new beginning.
    assert clock.captured_ns(3607 * second, 103 * second) == 103 * second
    assert clock.captured_ns(None, 104 * second) == 104 * second


def test_clocks_that_run_apart_add_no_age() -> None:
    clock, second = StreamClock(), 1_000_000_000
    for at in range(3600):  # 200 ppm: 0.7 s in an hour.
        arrived = at * second + at * second // 5000
        age = arrived - clock.captured_ns(at * second, arrived)
        assert age < 0.02 * second


TIMES = dict.fromkeys(("captured_ns", "arrived_ns", "decoded_ns", "ready_ns"), 1)


def frame(number: int) -> Decoded:
    return Decoded(np.full((2, 2, 3), number, np.uint8), FrameTimes(number, number, number, number))


def test_the_newest_frame_and_the_count_of_the_others() -> None:
    box = Mailbox(live=True)
    assert [box.put(frame(n)) for n in range(4)] == [False, True, True, True]
    taken = box.take(0)
    assert taken is not None
    assert (taken.times.captured_ns, taken.skipped) == (3, 3)
    assert box.take(0.01) is None
    assert box.put(frame(9)) is False
    box.close()
    assert box.put(frame(10)) is False
    taken = box.take(0)
    assert taken is not None
    assert (taken.times.captured_ns, taken.skipped) == (9, 0)


def test_every_frame_of_a_file_waits_its_turn() -> None:
    box, seen = Mailbox(live=False), []
    writer = threading.Thread(target=lambda: [box.put(frame(n)) for n in range(20)])
    writer.start()
    while len(seen) < 20:
        taken = box.take(1)
        assert taken is not None
        seen.append(taken.times.captured_ns)
    writer.join(5)
    assert seen == list(range(20))


def test_messages_arrive_whole() -> None:
    ours, theirs = os.pipe()
    picture = np.arange(300 * 400 * 3, dtype=np.uint32).astype(np.uint8).reshape(300, 400, 3)
    writer = threading.Thread(target=send, args=(theirs, Decoded(picture, FrameTimes(**TIMES, pts_s=1.5))))
    writer.start()
    message = receive(ours, (300, 400), 5)
    writer.join()
    assert isinstance(message, Decoded)
    assert message.times == FrameTimes(**TIMES, pts_s=1.5)
    np.testing.assert_array_equal(message.image, picture)
    send(theirs, End("why"))
    assert receive(ours, 8, 5) == End("why")
    with pytest.raises(StalledError):
        receive(ours, 8, 0.05)
    os.write(theirs, b"\x10")
    os.close(theirs)
    with pytest.raises(ProtocolError, match="crashed"):
        receive(ours, 8, 1)
    os.close(ours)


def received(content: bytes) -> Decoded | End:
    """What a process that says this is understood to say."""
    ours, theirs = os.pipe()
    os.write(theirs, content + bytes(3))
    os.close(theirs)
    try:
        return receive(ours, 1, 1)
    finally:
        os.close(ours)


def message(**fields: Any) -> bytes:
    header = json.dumps(fields).encode()
    return len(header).to_bytes(4, "little") + header


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x02\0\0\0{}", b"\x02\0\0\0[]", b"\x04\0\0\0\xff\xfe\xfd\xfc"])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        received(data)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *(("frame", {name: value}) for name in TIMES for value in (-1, 1 << 63, -(10**400), 1.0, True, "1", None)),
        *(("frame", {"bad_packets": value}) for value in (-1, 1 << 63, 0.5, "x", None, [])),
        *(("frame", {"pts_s": value}) for value in (float("nan"), float("inf"), 1e300, 10**400, {}, "1", True)),
        *(("end", {"reason": value}) for value in (5, {}, "x" * 10_001, "\x1b[2J", "a\nb")),
        *((value, {}) for value in ("other", None, 5, ["frame"], {})),
    ],
)
def test_no_field_of_a_message_is_believed(kind: Any, fields: dict[str, Any]) -> None:
    needed = TIMES if kind == "frame" else {}
    with pytest.raises(ProtocolError):
        received(message(kind=kind, **needed | fields))


def test_what_a_message_may_say() -> None:
    times = TIMES | {"bad_packets": 2, "pts_s": -0.5}
    frame = received(message(kind="frame", **times, more="is dropped"))
    assert isinstance(frame, Decoded)
    assert frame.times == FrameTimes(**times)
    assert received(message(kind="end", reason="x" * 10_000)) == End("x" * 10_000)
    assert received(message(kind="end")) == End()
