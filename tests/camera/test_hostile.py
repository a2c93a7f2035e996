"""Tests of more than 200 damaged or hostile inputs: no crash, no hang, nothing written."""

from __future__ import annotations

import json
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from sparsifiner_edge.camera.pattern import draw_pattern
from sparsifiner_edge.camera.sources import VIDEO_SUFFIXES
from tests.camera.conftest import encode
from tests.commands import process, snapshot
from tests.fuzz.mutate import mutated_bytes

PATIENCE_S = 10
READ = """
import json, os, re, signal, sys, time
from sparsifiner_edge.camera.child import import_decoder, reason_of
from sparsifiner_edge.camera.confine import confine
from sparsifiner_edge.camera.decoder_protocol import Wanted
from sparsifiner_edge.camera.libav import read_stream
from sparsifiner_edge.fitting import Framing
import_decoder()
files = [open(name, "rb", buffering=0) for name in sys.argv[1:]]
status = open("/proc/self/status")  # getrusage would tell of the process that started this one, too.
confine(os.getppid())
for file in files:
    signal.alarm(60)
    start, frames, reason = time.monotonic(), 0, None
    try:
        for decoded in read_stream(file, Wanted(Framing(32)), 3):
            assert decoded.image(Framing(32)).shape == (32, 32, 3)
            frames += 1
    except Exception as error:
        reason = reason_of(error)
    status.seek(0)
    most = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])
    print(json.dumps([frames, reason, time.monotonic() - start, most]), flush=True)
"""
FORMATS = {
    ".mp4": "libx264",
    ".mkv": "libx264",
    ".avi": "mpeg4",
    ".ts": "libx264",
    ".h264": "libx264",
    ".mjpeg": "mjpeg",
    ".mov": "mpeg4",
    ".flv": "libx264",
}
SECRET = "this text must not be read"


def damaged(suffix: str, data: bytes) -> dict[str, bytes]:
    """Yield files changed anywhere, in the header (sizes, counts, offsets), in the codec name or in the suffix."""
    files = {f"is{suffix[1:]}{'.ts' if suffix != '.ts' else '.mp4'}": data}
    for seed in range(20):
        rng, end = random.Random(f"{suffix}{seed}"), len(data) if seed < 14 else 400
        files[f"{seed}{suffix}"] = mutated_bytes(data[:end], rng) + data[end:]
    for old, new in ((b"avc1", b"hvc1"), (b"FMP4", b"VP90"), (b"mp4v", b"av01")):
        files |= {f"codec{suffix}": data.replace(old, new)} if old in data else {}
    return files


def absurd(sound: dict[str, bytes]) -> dict[str, bytes]:
    """Yield files with impossible sizes of frames, boxes and packets."""
    header = struct.pack("<4sHH4sHHIIII", b"DKIF", 0, 32, b"VP80", 65535, 65535, 30, 1, 0xFFFFFFFF, 0)
    files = {
        "wide.y4m": b"YUV4MPEG2 W1000000 H1000000 F25:1 C420\nFRAME\n" + bytes(1000),
        "thin.y4m": b"YUV4MPEG2 W60000 H2 F25:1 C420\n" + (b"FRAME\n" + bytes(180_000)) * 3,
        "none.y4m": b"YUV4MPEG2 W0 H0 F0:0 C420\nFRAME\n",
        "large.ivf": header + struct.pack("<IQ", 0x7FFFFFFF, 0) + bytes(500),
        "claims.ivf": header + struct.pack("<IQ", 500, 0) + bytes(500),
        "huge.mjpeg": re.sub(rb"(?s)(\xff\xc0...)....", rb"\1" + b"\xff\xdc" * 2, sound[".mjpeg"]),
        # A box that claims to be larger than any disk, and nested boxes.
        "box.mp4": struct.pack(">I4sQ", 1, b"moov", (1 << 63) - 1) + bytes(100),
        "nested.mp4": b"".join(struct.pack(">I4s", 8 * number, b"moov") for number in range(3000, 0, -1)),
    }
    for suffix in (".avi", ".mov", ".mp4"):
        patched = sound[suffix].replace(struct.pack("<II", 64, 48), struct.pack("<II", 60_000, 60_000))
        files[f"huge{suffix}"] = patched.replace(struct.pack(">HH", 64, 48), struct.pack(">HH", 65000, 65000))
        assert files[f"huge{suffix}"] != sound[suffix]
    return files


def playlists(folder: Path) -> dict[str, bytes]:
    texts = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{folder / 'secret.txt'}\n#EXT-X-ENDLIST\n",
        "remote": "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile '{folder / 'sound.mp4'}'\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "dash": f"<?xml version='1.0'?><MPD><Period><BaseURL>file://{folder}/secret.txt</BaseURL></Period></MPD>",
    }
    return {f"{name}{suffix}": text.encode() for name, text in texts.items() for suffix in (".mp4", ".ts", ".avi")}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of files named after their defects, and a text file that the decoder must not read."""
    folder = tmp_path_factory.mktemp("hostile")
    pictures = [draw_pattern(n, 64, 48) for n in range(8)]
    sound = {s: encode(folder / f"sound{s}", pictures, codec).read_bytes() for s, codec in FORMATS.items()}
    (folder / "secret.txt").write_text(SECRET)
    files = absurd(sound) | playlists(folder) | {"zeros.mp4": bytes(100_000), "shell.avi": b"#!/bin/sh\ntouch pwned\n"}
    for suffix in VIDEO_SUFFIXES:
        files |= {f"random{suffix}": random.Random(suffix).randbytes(20_000), f"empty{suffix}": b""}
    for suffix, data in sound.items():
        files |= damaged(suffix, data)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_videos(hostile: Path) -> None:
    """Read by the decoding process with its limits, many in one process; once confined, it opens no file itself."""
    paths = sorted(path for path in hostile.iterdir() if path.suffix != ".txt" and path.stem != "sound")
    assert len(paths) >= 200
    before = snapshot(hostile)
    done = subprocess.run([sys.executable, "-c", READ, *paths], stdout=subprocess.PIPE, text=True, check=False)
    found = dict(zip([path.name for path in paths], map(json.loads, done.stdout.splitlines()), strict=False))
    assert len(found) == len(paths), f"{paths[len(found)].name}: the decoder hangs or crashed with {done.returncode}"
    assert {name: entry for name, entry in found.items() if entry[2] > PATIENCE_S} == {}
    assert max(most_kb for _, _, _, most_kb in found.values()) < 400_000  # FFmpeg 8: 130,000.
    assert snapshot(hostile) == before
    refused = {name: reason for name, (frames, reason, _, _) in found.items() if not frames}
    assert all(refused.values())
    assert refused.keys() >= {
        "huge.mjpeg",
        "wide.y4m",
        "thin.y4m",
        "hls.mp4",
        "remote.ts",
        "concat.avi",
        "sdp.mp4",
        "dash.ts",
    }
    # Most damage costs only some frames; a reader that rejects everything would pass the checks above.
    assert min(len(refused), len(found) - len(refused)) > 60


@pytest.mark.parametrize("name", ["huge.mjpeg", "concat.mp4", "box.mp4"])
def test_the_command_says_so(name: str, hostile: Path, cells: Path, tmp_path: Path) -> None:
    output, overlay = tmp_path / "lines", tmp_path / "o.mp4"
    run = ("run", cells, "--source", hostile / name, "--output", output, "--overlay", overlay)
    outcome = process(*run, cwd=tmp_path, timeout=30)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert SECRET not in outcome.err + output.read_text()
    assert f"error: {hostile / name}" in outcome.err
    assert {p.name for p in tmp_path.iterdir()} <= {"lines", "o.mp4"}
