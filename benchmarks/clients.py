"""Compares the C++ client with a Python session on the same file, frames and threads: full frames and streaming.

Each runs in its own process, in turn. A frame's time is that of the call, in C++ as reported by `client`. The ratio is
the median over rounds of C++ over Python, with its interval.

    cmake -S examples/cpp-onnxruntime -B client && cmake --build client
    python benchmarks/clients.py client/client BUNDLE/ [--video FILE] [--rounds 11] [--frames 60] [-o FILE]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from camera_overhead import VIDEO
from summary import said, write_summary

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bundle.store import bundle_hash, open_bundle
from sparsifiner_edge.camera.fidelity import images_of
from sparsifiner_edge.camera.service import RunOptions, open_model
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.ops import native
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.profiles.measure.timing import call_ms
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.runtime import open_session

SHARE, WARM_UP = 0.125, 5


def in_python(bundle: Path, images: Array, way: str, threads: int) -> list[float]:
    """Return milliseconds of each frame in Python, without the warm-up."""
    with open_session(bundle, Execution(backend="onnxruntime", kernels="native", threads=threads)) as session:
        runs = session.stream(share=SHARE) if way == "stream" else session
        frames = iter(images)
        return call_ms(lambda: runs.infer({"image": next(frames)[None]}), len(images) - WARM_UP, warm_up=WARM_UP)


def in_cpp(client: Path, bundle: Path, images: Array, way: str, threads: int) -> list[float]:
    """Return milliseconds of each frame as reported by the C++ client."""
    line = [str(client), str(native.library_path()), str(bundle), "--threads", str(threads)]
    line += ["--share", str(SHARE)] if way == "stream" else []
    out = subprocess.run(line, input=images.tobytes(), stdout=subprocess.PIPE, check=True).stdout
    return [json.loads(text)["ms"] for text in out.splitlines()][WARM_UP:]


def measure(client: Path, bundle: Path, images: Array, rounds: int, threads: int) -> dict[str, Any]:
    """Measure both in turn, in each mode."""
    ways = ("whole", "stream") if open_bundle(bundle).manifest.stream else ("whole",)
    samples: dict[str, dict[str, list[list[float]]]] = {way: {"python": [], "cpp": []} for way in ways}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for way in ways:
            samples[way]["python"].append(in_python(bundle, images, way, threads))
            samples[way]["cpp"].append(in_cpp(client, bundle, images, way, threads))
    return {
        way: {name: float(np.median([np.median(block) for block in blocks])) for name, blocks in sides.items()}
        | {"ratio": write_record(stats.median(stats.round_ratios(sides["python"], sides["cpp"])))}
        for way, sides in samples.items()
    }


@click.command()
@click.argument("client", type=click.Path(exists=True, path_type=Path))
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--video", type=click.Path(path_type=Path), default=VIDEO, show_default=True)
@click.option("--rounds", default=11, show_default=True)
@click.option("--frames", default=60, show_default=True)
@click.option("--threads", type=int)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The result's file.")
def main(
    client: Path, bundle: Path, video: Path, rounds: int, frames: int, threads: int | None, output: Path | None
) -> None:
    """Compare the C++ client with a Python session."""
    with open_model(bundle, RunOptions()) as model:
        images = np.stack(list(images_of(model, str(video), frames)))
    found = measure(client, bundle, images, rounds, threads or available_cores())
    for way, figures in found.items():
        click.echo(f"{way}: {figures['python']:.1f} ms, in C++ {figures['cpp']:.1f} ms: {said(figures['ratio'], 3)}")
    if output is not None:
        method = {"frames": frames, "rounds": rounds, "share": SHARE, "threads": threads or available_cores()}
        subject = Subject(path=bundle.name, sha256=bundle_hash(bundle))
        write_summary(output, Result("evaluation", [subject], method, {}, found))


if __name__ == "__main__":
    main()
