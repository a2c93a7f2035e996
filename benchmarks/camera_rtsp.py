"""Measures the age of a camera's frames when they are answered: an RTSP stream at the rate that decoding sustains.

A real video is resized and encoded once in H.264 as by a camera. GStreamer's RTSP server serves it at the rate at which
`run`'s decoder alone reads it from a file, at most 30 per second. Ages are from capture, by the stream's timestamps, to
the answer, all waiting included. The bare model runs in turn; the goal for the 95th percentile of the age is two
periods plus one inference. Processor seconds per answer are those of the model's process and the decoder.

    python benchmarks/camera_rtsp.py BUNDLE/ [--size 3840x2160] [--rounds 3] [--seconds 15] [--threads N] [-o F]
"""

from __future__ import annotations

import json
import math
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from camera_overhead import VIDEO, WARM_UP, bare, encoded
from summary import write_summary

from sparsifiner_edge.bundle.store import bundle_hash, open_bundle
from sparsifiner_edge.camera.capture import Capture
from sparsifiner_edge.camera.decoder_protocol import Wanted
from sparsifiner_edge.camera.sources import parse_source
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.fitting import Framing
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.results import Result, Subject

SERVER = """
import sys, gi
gi.require_version("Gst", "1.0"); gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch(f"( filesrc location={sys.argv[2]} ! qtdemux ! h264parse ! rtph264pay name=pay0 config-interval=1 )")
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1"); server.set_service(sys.argv[1])
server.get_mount_points().add_factory("/camera", factory)
server.attach(None)
print("ready", flush=True)
GLib.MainLoop().run()
"""
SPARE_S = 10
"""Additional length of the stream in seconds beyond the measured part."""
START_S = 60
"""Timeout of the first answer in seconds."""
FRAMES = 60
"""Calls of the bare model, and frames that determine the sustained decoding rate."""


def sustained(video: Path, size: Any) -> float:
    """Return the frames per second of the decoder, resized to the model's size."""
    source = parse_source(str(video))
    with Capture(source, Wanted(Framing(size)), 10, Status(source.shown, lambda _event: None)) as capture:
        times = []
        while len(times) < FRAMES and not capture.is_over:
            if capture.take(0.1) is not None:
                times.append(time.monotonic())
    if len(times) < FRAMES:
        raise click.ClickException(f"{video} gave {len(times)} frames of {FRAMES}. {capture.failure or ''}")
    return 1 / float(np.median(np.diff(times[WARM_UP:])))


def frames_in(video: Path) -> int:
    """Return the number of frames that a video declares."""
    import av

    with av.open(str(video)) as file:
        return file.streams.video[0].frames


def serve(video: Path) -> tuple[subprocess.Popen[str], str]:
    """Run the server on a free port; yield the address of its stream."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    server = subprocess.Popen(
        ["/usr/bin/python3", "-c", SERVER, str(port), str(video)], stdout=subprocess.PIPE, text=True
    )
    if server.stdout is None or server.stdout.readline() != "ready\n":
        raise click.ClickException("No RTSP server: apt-get install python3-gi gir1.2-gst-rtsp-server-1.0")
    return server, f"rtsp://127.0.0.1:{port}/camera"


def watch(bundle: Path, address: str, seconds: float, threads: int | None, lines: Path) -> dict[str, Any]:
    """Return the output of `run` on a stream within a time; lines: file for the records."""
    line = [sys.executable, "-m", "sparsifiner_edge", "run", f"{bundle}", "--source", address, "--no-stream"]
    line += ["--output", str(lines)]
    line += ["--threads", str(threads)] if threads else []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    service = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + START_S
        while not (lines.exists() and lines.stat().st_size):
            if service.poll() is not None or time.monotonic() > until:
                service.kill()
                raise click.ClickException(f"No answer came. {service.communicate()[1]}")
            time.sleep(0.1)
        time.sleep(seconds)
        service.terminate()
        events = service.communicate()[1]
    finally:
        service.kill()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    records = [json.loads(text) for text in lines.read_text(encoding="utf-8").splitlines()][WARM_UP:]
    done = json.loads(events.splitlines()[-1])
    stages = ("capture_ms", "preprocess_ms", "queued_ms", "infer_ms", "postprocess_ms")
    return {
        "per_s": (len(records) - 1) / (records[-1]["monotonic_s"] - records[0]["monotonic_s"]),
        "age_ms": [record["frame_age_ms"] for record in records],
        "median_ms": {name: float(np.median([record[name] for record in records])) for name in stages},
        "processor_s": (sum(after[:2]) - sum(before[:2])) / (len(records) + WARM_UP),
        "captured": done["captured"],
        "processed": done["processed"],
        "bad_packets": done["bad_packets"],
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--video", type=click.Path(path_type=Path), default=VIDEO, show_default=True)
@click.option("--size", metavar="WIDTHxHEIGHT", default="3840x2160", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=15.0, show_default=True)
@click.option("--threads", type=int)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The result's file.")
def main(
    bundle: Path, video: Path, size: str, rounds: int, seconds: float, threads: int | None, output: Path | None
) -> None:
    """Measure the age of a camera's frames when they are answered."""
    with tempfile.TemporaryDirectory() as folder:
        first = encoded(video, size, FRAMES, Path(folder) / "first.mp4")
        rate = max(1, min(30, math.floor(sustained(first, open_bundle(bundle).image_size))))
        whole, count = Path(folder) / "camera.mp4", round((seconds + SPARE_S) * rate)
        if (there := frames_in(encoded(video, size, count, whole, rate))) < count:
            raise click.UsageError(f"{video} has {there} frames, and {count} are needed: give fewer --seconds")
        found: list[dict[str, Any]] = []
        alone: list[float] = []
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}, {rate} frames a second", file=sys.stderr)
            alone.append(float(np.median(bare(bundle, FRAMES, threads)[0])))
            server, address = serve(whole)
            try:
                found.append(watch(bundle, address, seconds, threads, Path(folder) / f"{number}.jsonl"))
            finally:
                server.kill()
                server.communicate()
    ages = [age for one in found for age in one["age_ms"]]
    goal = 2000 / rate + float(np.median(alone))
    statistics = {
        "rate": rate,
        "bare_ms": alone,
        "goal_ms": goal,
        "age_p50_ms": float(np.median(ages)),
        "age_p95_ms": float(np.quantile(ages, 0.95)),
        "rounds": [{name: value for name, value in one.items() if name != "age_ms"} for one in found],
    }
    click.echo(json.dumps(statistics, indent=2))
    if output is not None:
        method = {"video": f"{video.name}, {size}", "seconds": seconds, "threads": threads or available_cores()}
        subject = Subject(path=bundle.name, sha256=bundle_hash(bundle))
        write_summary(output, Result("evaluation", [subject], method, {"age_ms": ages}, statistics))
    raise SystemExit(0 if statistics["age_p95_ms"] <= goal else 1)


if __name__ == "__main__":
    main()
