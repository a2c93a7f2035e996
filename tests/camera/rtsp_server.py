"""RTSP server on 127.0.0.1 for tests and measurements, run by a Python with gi and GstRtspServer.

Each image carries the monotonic time in milliseconds at which it was drawn (see `camera.pattern`), encoded as H.264
without delay. Usage: rtsp_server.py PORT [basic|digest]. With a method, the server requires user `us@er` and password
`p ss:/`.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtsp", "1.0")
gi.require_version("GstRtspServer", "1.0")
# Load only the module that draws numbers: this Python may lack the package's dependencies.
sys.path.append(str(Path(__file__).resolve().parents[2] / "sparsifiner_edge" / "camera"))
import pattern  # noqa: E402
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402

FPS, WIDTH, HEIGHT = 25, 640, 480
USER, PASSWORD = "us@er", "p ss:/"
ENCODE = (
    "videoconvert ! video/x-raw,format=I420 ! x264enc tune=zerolatency speed-preset=ultrafast bitrate=2000 "
    "key-int-max=25 threads=1 ! rtph264pay name=pay0 pt=96 config-interval=1"
)


def draw(number: int) -> bytes:
    """Return an I420 image with the squares of `number` on grey."""
    cell, left = HEIGHT // pattern.GRID, (WIDTH - HEIGHT) // 2
    cells = pattern.cells_of(number)
    rows = [b"\x60" * WIDTH] * HEIGHT
    for row in range(4):
        bits = cells[row * pattern.GRID : (row + 1) * pattern.GRID]
        line = b"\x60" * left + b"".join((b"\xeb" if white else b"\x10") * cell for white in bits)
        rows[row * cell : (row + 1) * cell] = [line.ljust(WIDTH, b"\x60")] * cell
    return b"".join(rows) + b"\x80" * (WIDTH * HEIGHT // 2)


def push(source: Any) -> None:
    """Feed images until the pipeline stops."""
    start, number = time.monotonic(), 0
    while True:
        time.sleep(max(0.0, start + number / FPS - time.monotonic()))
        data = draw(time.monotonic_ns() // 1_000_000)
        if source.emit("push-buffer", Gst.Buffer.new_wrapped(data)) != Gst.FlowReturn.OK:
            return
        number += 1


def ask_for_password(server: Any, factory: Any, way: str) -> None:
    """Admit only USER with PASSWORD, by HTTP authentication `way`: basic or digest."""
    allowed = GstRtspServer.RTSPToken()
    allowed.set_string("media.factory.role", "user")
    auth = GstRtspServer.RTSPAuth()
    auth.set_supported_methods(getattr(GstRtsp.RTSPAuthMethod, way.upper()))
    auth.add_basic(GstRtspServer.RTSPAuth.make_basic(USER, PASSWORD), allowed)
    auth.add_digest(USER, PASSWORD, allowed)
    permissions = GstRtspServer.RTSPPermissions()
    permissions.add_permission_for_role("user", "media.factory.access", True)
    permissions.add_permission_for_role("user", "media.factory.construct", True)
    factory.set_permissions(permissions)
    server.set_auth(auth)


def main() -> None:
    port, *way = sys.argv[1:]
    Gst.init(None)
    factory = GstRtspServer.RTSPMediaFactory()
    caps = f"video/x-raw,format=I420,width={WIDTH},height={HEIGHT},framerate={FPS}/1"
    begin = f"appsrc name=source is-live=true format=time do-timestamp=true block=false max-bytes=2000000 caps={caps}"
    factory.set_launch(f"( {begin} ! {ENCODE} )")
    factory.set_shared(True)

    def configure(_factory: Any, media: Any) -> None:
        source = media.get_element().get_by_name("source")
        threading.Thread(target=push, args=(source,), daemon=True).start()

    factory.connect("media-configure", configure)
    server = GstRtspServer.RTSPServer()
    if way:
        ask_for_password(server, factory, way[0])
    server.set_address("127.0.0.1")
    server.set_service(port)
    server.get_mount_points().add_factory("/camera", factory)
    server.attach(None)
    print("ready", flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
