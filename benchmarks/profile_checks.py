"""Checks on this machine that `sparsifiner-edge profile` can be trusted.

    python benchmarks/profile_checks.py [--bundle FOLDER] [-o FOLDER]

1. The same bundle on both sides: no verdict in at least 19 of 20 runs.
2. `profile` and a plain ONNX Runtime loop in a separate process, which imports nothing of this package and times long
   stretches of queries: within 3 %. Both run in turn, round by round.

Run it on an idle machine. Without --bundle, DINOv2 ViT-S/14 at 224 px is exported with keep .25.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from msgspec.structs import replace
from summary import said, write_summary

from sparsifiner_edge import Execution, ProfileOptions
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.profiles.profile import profile_bundle
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result
from sparsifiner_edge.runtime.backend import native_library

REQUIRED = {"no_verdict_share": 0.95, "agreement": 0.03}
RUNS, ROUNDS, SECONDS = 20, 10, 5.0
"""Comparisons of a bundle with itself, rounds of `profile` and a plain loop, least seconds of each side."""
Tell = Callable[[str], None]

LOOP = """
import json, sys, time
import numpy as np, onnxruntime
model, library, threads, seconds, queries = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
if library:
    options.register_custom_ops_library(library)
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
image = session.get_inputs()[0]
shape = [size if isinstance(size, int) else 1 for size in image.shape]
feed = {image.name: np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)}
def stretch():
    start = time.perf_counter()
    for _ in range(int(queries)):
        session.run(None, feed)
    return (time.perf_counter() - start) / int(queries) * 1000
start = time.perf_counter()
while time.perf_counter() - start < 2:
    stretch()
found, start = [], time.perf_counter()
while time.perf_counter() - start < seconds or len(found) < 20:
    found.append(stretch())
print(json.dumps(found))
"""


def same_on_both_sides(bundle: Path, runs: int, seconds: float, threads: int, tell: Tell) -> list[dict[str, Any]]:
    """Compare a bundle with itself."""
    found = []
    for run in range(runs):
        tell(f"the same on both sides, {run + 1} of {runs}")
        result = profile_bundle(
            bundle, Execution(threads=threads), options=ProfileOptions(seconds=seconds, layers=False), against=bundle
        )
        marks = {flag.flag for figures in result.statistics.sides() for flag in figures.flags}
        found.append({**write_record(result.statistics.comparison), "flags": sorted(marks)})
    return found


def against_a_plain_loop(bundle: Path, rounds: int, seconds: float, threads: int, tell: Tell) -> list[dict[str, float]]:
    """Return milliseconds per query by `profile` and by a plain loop, in rounds of alternating order."""
    found = []
    queries = 1
    for number in range(rounds + 1):  # The first round finds the length of a stretch, and is dropped.
        tell(f"profile against a plain loop, {number} of {rounds}")
        measure = [lambda: ("profile", *_by_profile(bundle, seconds, threads))]
        measure.append(lambda q=queries: ("loop", _by_loop(bundle, seconds, threads, q), q))
        times: dict[str, float] = {}
        for one in measure if number % 2 else measure[::-1]:
            name, ms, size = one()
            times[name] = ms
            queries = size if name == "profile" else queries
        if number:
            found.append(times)
    return found


def _by_profile(bundle: Path, seconds: float, threads: int) -> tuple[float, int]:
    """Return the median over blocks of a block's mean, and the queries of a block."""
    result = profile_bundle(bundle, Execution(threads=threads), options=ProfileOptions(seconds=seconds, layers=False))
    size = result.method.block_queries["subject"]
    latency = np.array(result.samples["subject"]["latency_ms"])
    return float(np.median(latency.reshape(-1, size).mean(axis=1))), size


def _by_loop(bundle: Path, seconds: float, threads: int, queries: int) -> float:
    library = native_library("auto")
    command = [sys.executable, "-c", LOOP, str(bundle / "model.onnx"), str(library or ""), str(threads), str(seconds)]
    done = subprocess.run(
        [*command, str(queries)], capture_output=True, text=True, check=True, cwd=tempfile.gettempdir()
    )
    return float(np.median(json.loads(done.stdout)))


def ratio(pairs: list[dict[str, float]]) -> dict[str, Any]:
    """Return the median over rounds of profile's time over the loop's, with its interval."""
    ratios = [pair["profile"] / pair["loop"] for pair in pairs]
    return dict(write_record(stats.median(ratios, "order statistics of paired rounds")))


def show(statistics: dict[str, Any]) -> bool:
    same, agreement = statistics["same"], statistics["agreement"]
    share = same["no_verdict"] / same["runs"]
    rows = [
        (
            "the same on both sides, no verdict",
            f"{same['no_verdict']} of {same['runs']}",
            "19 of 20",
            share >= REQUIRED["no_verdict_share"],
        ),
        (
            "profile over a plain loop",
            said(agreement, 4),
            "1 +- .03",
            abs(agreement["value"] - 1) <= REQUIRED["agreement"],
        ),
    ]
    print_table(
        "Can profile be believed?",
        ["", "found", "required", ""],
        [[name, found, required, "yes" if met else "NO"] for name, found, required, met in rows],
    )
    return all(met for *_, met in rows)


def export(folder: Path) -> Path:
    from fidelity_subject import weights_file

    from sparsifiner_edge.demo import material
    from sparsifiner_edge.export.export import export_bundle
    from sparsifiner_edge.sparse.student import sparsify

    student = sparsify(
        material.DINOV2, folder / "student", weights=weights_file(), img_size=224, keep=0.25, background_tokens=16
    )
    return export_bundle(student, folder / "dinov2-224")


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle; by default DINOv2 ViT-S/14 is exported.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for profile_checks.json.")
def main(bundle: Path | None, output: Path | None) -> None:
    threads = available_cores()
    with contextlib.ExitStack() as stack:
        status = stack.enter_context(err_console.status("exporting"))
        if bundle is None:
            bundle = export(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        subject = replace(open_bundle(bundle).subject("subject"), path=bundle.name)
        same = same_on_both_sides(bundle, RUNS, SECONDS, threads, status.update)
        plain = against_a_plain_loop(bundle, ROUNDS, SECONDS, threads, status.update)
    quiet = sum(one["verdict"] == "no difference shown" for one in same)
    statistics = {"same": {"runs": RUNS, "no_verdict": quiet}, "agreement": ratio(plain)}
    met = show(statistics)
    if output:
        method = {"threads": threads, "seconds": SECONDS, "rounds": ROUNDS, "required": REQUIRED}
        samples = {"same": same, "agreement": plain}
        result = Result("comparison", [subject], method, samples, statistics)
        write_summary(output / "profile_checks.json", result)
    sys.exit(not met)


if __name__ == "__main__":
    main()
