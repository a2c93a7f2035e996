"""Measures the overhead of the camera pipeline over the bare model.

The bare model: repeated `infer` on one image. The pipeline: `sparsifiner-edge run` on a real video, every frame,
records read from a pipe; its period is the time between two answers. Both alternate, so that other load affects both
equally. The rate is the median over rounds of the ratio of the pipeline's rate to the bare model's, with its interval
(if there are enough rounds). The overhead is the same ratio for the time. Processor seconds per frame are those of all
processes.

    python benchmarks/camera_overhead.py BUNDLE/ [--video FILE] [--encode 1920x1080] [--rounds 7] [--frames 60]
        [--threads N] [--share X] [-o F]

With `--encode` the video's frames are resized and encoded again in H.264 as by a camera: 30 frames a second, a key
frame a second, no frame that waits for a later one. With `--share` both compute that share of the patches of each frame
(`export --stream`), otherwise all.
"""

from __future__ import annotations

import itertools
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import numpy as np
from summary import write_summary

from sparsifiner_edge.bounds import height_width
from sparsifiner_edge.bundle.store import bundle_hash, open_bundle
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.profiles.measure.timing import call_ms
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.runtime import open_session

VIDEO = Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi")
GOAL_PERCENT = 10.0
WARM_UP = 5
"""Warm-up frames, which are not counted."""
_STAGES = ("preprocess_ms", "queued_ms", "infer_ms", "postprocess_ms")


def encoded(video: Path, size: str, frames: int, path: Path, rate: int = 30) -> Path:
    """Encode a video's first frames in H.264, `rate` per second. size: WIDTHxHEIGHT, both even."""
    import av

    found = re.fullmatch(r"(\d{2,4})x(\d{2,4})", size)
    if found is None or int(found[1]) % 2 or int(found[2]) % 2:
        raise click.UsageError(f"--encode {size} is no WIDTHxHEIGHT of even numbers, as 1920x1080")
    width, height = int(found[1]), int(found[2])
    options = {"crf": "23", "preset": "veryfast", "tune": "zerolatency"}
    with av.open(str(video)) as source, av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.gop_size = width, height, "yuv420p", rate
        for number, frame in enumerate(itertools.islice(source.decode(video=0), frames)):
            scaled = frame.reformat(width, height, "yuv420p", interpolation="BICUBIC")
            scaled.pts, scaled.time_base = number, Fraction(1, rate)
            file.mux(stream.encode(scaled))
        file.mux(stream.encode(None))
    return path


def bare(bundle: Path, frames: int, threads: int | None, share: float | None = None) -> tuple[list[float], float]:
    """Return milliseconds of each call of the bare model, and processor seconds of one."""
    size = height_width(open_bundle(bundle).image_size)
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    with open_session(bundle, Execution(threads=threads)) as session:
        start, runs = time.process_time(), session.stream(share=share) if share else session
        taken = call_ms(lambda: runs.infer({"image": image}), frames - WARM_UP, warm_up=WARM_UP)
        return taken, (time.process_time() - start) / frames


def run(
    bundle: Path, video: Path, frames: int, threads: int | None, share: float | None
) -> tuple[list[dict[str, Any]], float]:
    """Return records of the pipeline, and processor seconds of all its processes."""
    line = [sys.executable, "-m", "sparsifiner_edge", "run", f"{bundle}", "--source", f"{video}"]
    line += ["--frames", str(frames), *(["--share", str(share)] if share else ["--no-stream"])]
    line += ["--threads", str(threads)] if threads else []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return [json.loads(text) for text in out.splitlines()], sum(after[:2]) - sum(before[:2])


def pipeline(
    bundle: Path, video: Path, frames: int, threads: int | None, share: float | None
) -> tuple[list[float], dict[str, float], float]:
    """Return milliseconds between two answers, medians of stages, and processor seconds per frame without the start."""
    started = run(bundle, video, WARM_UP, threads, share)[1]
    records, seconds = run(bundle, video, frames, threads, share)
    records = records[WARM_UP:]
    periods = np.diff([record["monotonic_s"] for record in records]) * 1000
    stages = {name: float(np.median([r[name] for r in records])) for name in _STAGES}
    return periods.tolist(), stages, (seconds - started) / (frames - WARM_UP)


def measure(
    bundle: Path, video: Path, rounds: int, frames: int, threads: int | None, share: float | None
) -> dict[str, Any]:
    """Measure both in turn."""
    alone, piped = [], []
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        alone.append(bare(bundle, frames, threads, share))
        piped.append(pipeline(bundle, video, frames, threads, share))
    ratios = [float(np.median(p[0]) / np.median(b[0])) for p, b in zip(piped, alone, strict=True)]
    rate = stats.median([1 / ratio for ratio in ratios])
    value, found = float(np.median(ratios)), stats.quantile_interval(ratios, 0.5)
    bounds = {name: 100 * (b - 1) for name, b in zip(("low", "high"), found, strict=True) if b is not None}
    return {
        "bare_ms": [float(np.median(b[0])) for b in alone],
        "pipeline_ms": [float(np.median(p[0])) for p in piped],
        "stages_ms": piped[-1][1],
        "bare_processor_s": float(np.median([b[1] for b in alone])),
        "pipeline_processor_s": float(np.median([p[2] for p in piped])),
        "rate_over_bare": write_record(rate),
        "overhead_percent": {"value": 100 * (value - 1), **bounds},
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--video", type=click.Path(path_type=Path), default=VIDEO, show_default=True)
@click.option("--encode", metavar="WIDTHxHEIGHT", help="Of the video, in H.264.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--frames", default=60, show_default=True)
@click.option("--threads", type=int)
@click.option("--share", type=float, help="Of a stream: of the patches, of each frame.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The result's file.")
def main(
    bundle: Path,
    video: Path,
    encode: str | None,
    rounds: int,
    frames: int,
    threads: int | None,
    share: float | None,
    output: Path | None,
) -> None:
    """Measure the overhead of the camera pipeline over the bare model."""
    with tempfile.TemporaryDirectory() as folder:
        source = encoded(video, encode, frames, Path(folder) / "encoded.mp4") if encode else video
        found = measure(bundle, source, rounds, frames, threads, share)
    click.echo(json.dumps(found | {"goal_percent": GOAL_PERCENT}, indent=2))
    if output is not None:
        subject = Subject(path=str(bundle), sha256=bundle_hash(bundle))
        method = {
            "goal_percent": GOAL_PERCENT,
            "frames": frames,
            "threads": threads or available_cores(),
            "share": share or 1.0,
            "video": f"{video.name}, {encode or 'as it is'}",
        }
        write_summary(output, Result("evaluation", [subject], method, {}, found))
    raise SystemExit(0 if found["overhead_percent"]["value"] <= GOAL_PERCENT else 1)


if __name__ == "__main__":
    main()
