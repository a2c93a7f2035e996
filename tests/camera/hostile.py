"""Damaged and hostile videos, made the same way each time."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from sparsifiner_edge.camera.pattern import draw_pattern
from sparsifiner_edge.camera.sources import VIDEO_SUFFIXES
from tests.camera.conftest import encode

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
