"""More than 200 damaged or hostile inputs: no crash, no hang, nothing written."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.camera.hostile import SECRET, make_hostile
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
                assert decoded.image.shape == (32, 32, 3)
                frames += 1
        except Exception as error:
            reason = reason_of(error)
    status.seek(0)
    most = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])
    found = {"frames": frames, "reason": reason, "seconds": time.monotonic() - start, "most_kb": most}
    print(json.dumps(found), flush=True)
"""


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
