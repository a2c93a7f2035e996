"""More than 200 damaged or hostile inputs: no crash, no hang, nothing written."""

from __future__ import annotations

import json
import select
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsifiner_edge.camera.pattern import draw_pattern
from sparsifiner_edge.camera.sources import VIDEO_SUFFIXES
from tests.camera.conftest import encode
from tests.commands import process, snapshot

PATIENCE_S = 10
READ = """
import io, json, os, re, socket, time
from pathlib import Path
from sparsifiner_edge.camera.child import import_decoder, reason_of
from sparsifiner_edge.camera.confine import confine
from sparsifiner_edge.camera.libav import read_stream
files = socket.socket(fileno=0)
import_decoder()
status = open("/proc/self/status")  # getrusage would tell of the process that started this one, too.
confine(os.getppid())
while True:
    name, handles, _, _ = socket.recv_fds(files, 1000, 1)
    if not name:
        break
    start, frames, reason = time.monotonic(), 0, None
    with io.FileIO(handles[0]) as data:
        class File:
            read, seek, tell, seekable = data.read, data.seek, data.tell, data.seekable
        File.name = name.decode()
        try:
            for decoded in read_stream(File, 32, 3):
                assert decoded.image(32).shape == (32, 32, 3)
                frames += 1
        except Exception as error:
            reason = reason_of(error)
    status.seek(0)
    most = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])
    found = {"frames": frames, "reason": reason, "seconds": time.monotonic() - start, "most_kb": most}
    print(json.dumps(found), flush=True)
"""


FORMATS = {
    ".mp4": "libx264", ".mkv": "libx264", ".avi": "mpeg4", ".ts": "libx264", ".h264": "libx264", ".mjpeg": "mjpeg",
    ".mov": "mpeg4", ".flv": "libx264",
}  # fmt: skip
SECRET = "this text must not be read"


def make_hostile(folder: Path) -> list[Path]:
    """More than 200 files, by names that say what is wrong with them."""
    sound = folder / "sound"
    sound.mkdir()
    for suffix, codec in FORMATS.items():
        encode(sound / f"v{suffix}", [draw_pattern(n, 64, 48) for n in range(8)], codec)
    (folder / "secret.txt").write_text(SECRET)
    for path in sorted(sound.iterdir()):
        _damaged(folder, path)
    _garbage(folder)
    _absurd(folder, sound)
    _playlists(folder)
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name != "secret.txt")


def _damaged(folder: Path, path: Path) -> None:
    """Cut short; changed at random, and at the beginning, where sizes, counts and offsets are; a codec's name changed
    for another's; a container under another ending.
    """
    data = path.read_bytes()
    for number, share in enumerate((0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)):
        (folder / f"truncated{number}{path.suffix}").write_bytes(data[: int(share * len(data))])
    for number, count in enumerate((3, 10, 30, 100, 300, 1000, 12, 12, 12, 12)):
        random, changed = np.random.default_rng(number), np.frombuffer(data, np.uint8).copy()
        places = random.integers(0, len(data) if number < 6 else min(400, len(data)), count)
        changed[places] = random.integers(0, 256, count) if number < 6 else random.choice([0, 127, 128, 255], count)
        (folder / f"noisy{number}{path.suffix}").write_bytes(changed.tobytes())
    for number, (old, new) in enumerate(((b"avc1", b"hvc1"), (b"FMP4", b"VP90"), (b"mp4v", b"av01"))):
        if old in data:
            (folder / f"codec{number}{path.suffix}").write_bytes(data.replace(old, new))
    other = {".mp4": ".avi", ".mkv": ".ts", ".avi": ".h264", ".ts": ".mp4"}.get(path.suffix, ".mkv")
    (folder / f"is{path.suffix[1:]}{other}").write_bytes(data)


def _garbage(folder: Path) -> None:
    for number, suffix in enumerate(sorted(VIDEO_SUFFIXES)):
        random = np.random.default_rng(1000 + number)
        (folder / f"random{suffix}").write_bytes(random.bytes(20_000))
        (folder / f"empty{suffix}").write_bytes(b"")
    (folder / "zeros.mp4").write_bytes(bytes(100_000))
    (folder / "text.mp4").write_text("no video\n" * 100)
    (folder / "shell.avi").write_text("#!/bin/sh\ntouch pwned\n")


def _absurd(folder: Path, sound: Path) -> None:
    (folder / "wide.y4m").write_bytes(b"YUV4MPEG2 W1000000 H1000000 F25:1 C420\nFRAME\n" + bytes(1000))
    (folder / "thin.y4m").write_bytes(b"YUV4MPEG2 W60000 H2 F25:1 C420\n" + (b"FRAME\n" + bytes(180_000)) * 3)
    (folder / "none.y4m").write_bytes(b"YUV4MPEG2 W0 H0 F0:0 C420\nFRAME\n")
    header = struct.pack("<4sHH4sHHIIII", b"DKIF", 0, 32, b"VP80", 65535, 65535, 30, 1, 0xFFFFFFFF, 0)
    (folder / "large.ivf").write_bytes(header + struct.pack("<IQ", 0x7FFFFFFF, 0) + bytes(500))
    (folder / "claims.ivf").write_bytes(header + struct.pack("<IQ", 500, 0) + bytes(500))
    jpeg = bytearray((sound / "v.mjpeg").read_bytes())
    place = jpeg.find(b"\xff\xc0")
    while place >= 0:
        jpeg[place + 5 : place + 9] = struct.pack(">HH", 65500, 65500)
        place = jpeg.find(b"\xff\xc0", place + 1)
    (folder / "huge.mjpeg").write_bytes(jpeg)
    for name in ("v.avi", "v.mov", "v.mp4"):
        data = (sound / name).read_bytes()
        patched = data.replace(struct.pack("<II", 64, 48), struct.pack("<II", 60_000, 60_000))
        patched = patched.replace(struct.pack(">HH", 64, 48), struct.pack(">HH", 65000, 65000))
        assert patched != data
        (folder / f"huge_{name}").write_bytes(patched)
    # A box that claims to be larger than any disk; boxes within boxes.
    (folder / "box.mp4").write_bytes(struct.pack(">I4sQ", 1, b"moov", (1 << 63) - 1) + bytes(100))
    boxes = [struct.pack(">I4s", 8 * number, b"moov") for number in range(3000, 0, -1)]
    (folder / "nested.mp4").write_bytes(b"".join(boxes))


def _playlists(folder: Path) -> None:
    secret = folder / "secret.txt"
    texts = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "remote": "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{folder / 'sound' / 'v.mp4'}'\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "dash": f"<?xml version='1.0'?><MPD><Period><BaseURL>file://{secret}</BaseURL></Period></MPD>",
    }
    for name, text in texts.items():
        for suffix in (".mp4", ".ts", ".avi"):
            (folder / f"{name}{suffix}").write_text(text)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_hostile(tmp_path_factory.mktemp("hostile"))


def test_videos(hostile: list[Path]) -> None:
    """As the decoding process reads them, with its limits, many in one process."""
    assert len(hostile) >= 200
    before = snapshot(hostile[0].parent)
    ours, theirs = socket.socketpair()
    streams: dict[str, Any] = {"stdin": theirs, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with ours, subprocess.Popen([sys.executable, "-c", READ], **streams) as reader:
        theirs.close()
        assert reader.stdout is not None
        found = {}
        for path in hostile:
            # Confined, it opens none by itself.
            with path.open("rb") as file:
                socket.send_fds(ours, [path.name.encode()], [file.fileno()])
            if not select.select([reader.stdout], [], [], 6 * PATIENCE_S)[0]:
                reader.kill()
                pytest.fail(f"{path.name}: the decoder hangs")
            line = reader.stdout.readline()
            assert line, f"{path.name}: the decoder crashed with {reader.wait()}"
            found[path.name] = json.loads(line)
        ours.shutdown(socket.SHUT_RDWR)
    assert {name: f["seconds"] for name, f in found.items() if f["seconds"] > PATIENCE_S} == {}
    assert max(f["most_kb"] for f in found.values()) < 400_000  # FFmpeg 8: 130,000.
    assert snapshot(hostile[0].parent) == before
    refused = [name for name, f in found.items() if not f["frames"]]
    assert len(refused) > 60
    assert [name for name in refused if not found[name]["reason"]] == []
    for name in ("huge.mjpeg", "wide.y4m", "thin.y4m", "hls.mp4", "remote.ts", "concat.avi", "sdp.mp4", "dash.ts"):
        assert name in refused, found[name]
    # Most damage costs some frames; a reader that refused everything would pass the above.
    assert sum(f["frames"] > 0 for f in found.values()) > 60


@pytest.mark.parametrize(
    ("name", "refused"),
    [("truncated3.mp4", False), ("noisy5.ts", False), ("huge.mjpeg", True), ("concat.mp4", True), ("box.mp4", True)],
)
def test_the_command_says_so(name: str, refused: bool, hostile: list[Path], cells: Path, tmp_path: Path) -> None:
    path = hostile[0].parent / name
    output, overlay = tmp_path / "lines", tmp_path / "o.mp4"
    outcome = process(
        "run", cells, "--source", path, "--output", output, "--overlay", overlay, cwd=tmp_path, timeout=30
    )
    assert outcome.code in ((2,) if refused else (0, 2))
    assert "Traceback" not in outcome.err
    assert SECRET not in outcome.err + output.read_text()
    assert outcome.code == 0 or f"error: {path}" in outcome.err
    assert {p.name for p in tmp_path.iterdir()} <= {"lines", "o.mp4"}
