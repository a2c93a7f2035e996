"""What the camera's pipeline costs over the bare model.

The bare model: `infer` again and again on one image. The pipeline: `sparsifiner-edge run` on a real video, every
frame, records read from a pipe; its period is the time between two answers. Both in turns, so that a busy machine hits
both alike; the overhead is the median over rounds of the ratio of their medians, with its interval (where there are
rounds enough for one).

    python benchmarks/camera_overhead.py BUNDLE/ [--video FILE] [--rounds 7] [--frames 60] [--threads N] [-o F]
"""

from __future__ import annotations

import json
import subprocess
import sys
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
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.runtime import open_session

VIDEO = Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi")
GOAL_PERCENT = 10.0
_STAGES = ("preprocess_ms", "queued_ms", "infer_ms", "postprocess_ms")


def bare_ms(bundle: Path, frames: int, threads: int | None) -> list[float]:
    """Milliseconds of each call of the bare model."""
    size = height_width(open_bundle(bundle).image_size)
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    with open_session(bundle, Execution(threads=threads)) as session:
        return call_ms(lambda: session.infer({"image": image}), frames - 5, warm_up=5)


def pipeline_ms(bundle: Path, video: Path, frames: int, threads: int | None) -> tuple[list[float], dict[str, float]]:
    """Milliseconds between two answers of the pipeline, and the medians of its stages."""
    line = [sys.executable, "-m", "sparsifiner_edge", "run", f"{bundle}", "--source", f"{video}"]
    line += ["--frames", str(frames)]
    line += ["--threads", str(threads)] if threads else []
    out = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    records = [json.loads(text) for text in out.splitlines()][5:]
    periods = np.diff([record["monotonic_s"] for record in records]) * 1000
    return periods.tolist(), {name: float(np.median([r[name] for r in records])) for name in _STAGES}


def measure(bundle: Path, video: Path, rounds: int, frames: int, threads: int | None) -> dict[str, Any]:
    """Both in turns."""
    bare, pipeline, stages = [], [], {}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        bare.append(bare_ms(bundle, frames, threads))
        periods, stages = pipeline_ms(bundle, video, frames, threads)
        pipeline.append(periods)
    ratios = [float(np.median(p) / np.median(b)) for p, b in zip(pipeline, bare, strict=True)]
    value, found = float(np.median(ratios)), stats.quantile_interval(ratios, 0.5)
    bounds = {name: 100 * (b - 1) for name, b in zip(("low", "high"), found, strict=True) if b is not None}
    return {
        "bare_ms": [float(np.median(b)) for b in bare],
        "pipeline_ms": [float(np.median(p)) for p in pipeline],
        "stages_ms": stages,
        "overhead_percent": {"value": 100 * (value - 1), **bounds},
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--video", type=click.Path(path_type=Path), default=VIDEO, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--frames", default=60, show_default=True)
@click.option("--threads", type=int)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The result's file.")
def main(bundle: Path, video: Path, rounds: int, frames: int, threads: int | None, output: Path | None) -> None:
    """See the module's documentation."""
    found = measure(bundle, video, rounds, frames, threads)
    click.echo(json.dumps(found | {"goal_percent": GOAL_PERCENT}, indent=2))
    if output is not None:
        subject = Subject(path=str(bundle), sha256=bundle_hash(bundle))
        method = {"goal_percent": GOAL_PERCENT, "frames": frames, "threads": threads or available_cores()}
        write_summary(output, Result("evaluation", [subject], method, {}, found))
    raise SystemExit(0 if found["overhead_percent"]["value"] <= GOAL_PERCENT else 1)


if __name__ == "__main__":
    main()
