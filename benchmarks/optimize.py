"""Compares the answers of `optimize` with the dense model and with plans of a simple family, on images it did not see.

    python benchmarks/optimize.py --size 518 [--case any] [--minutes 2 --minutes 8] [--loaded] -o FOLDER
    python benchmarks/optimize.py --seeds 10 [--minutes 2] -o FOLDER
    python benchmarks/optimize.py --size 518 --board h100 --board jetson-agx-thor [--minutes 8] -o FOLDER

The model is DINOv2 ViT-S/14 with real weights and no training. The command runs in a process of its own with the
default of every option but the precision: once in any precision, once in fp32 only. It gets the development and the
training photographs; its answers are evaluated on the publication photographs (`demo/split.py`).

The family has two parameters: merges that fall as `first * (1 - layer / (depth - 1)) ** power`, with the key shares
that `sparsify` takes by default. For each power, `first` is chosen so that the member has the answer's fidelity on the
publication photographs. Answers, members and the dense model in all deployments that the search timed are then measured
in turn. With `--loaded` one core computes something else meanwhile.

With `--board` the latency is estimated for float16 with kernels, and compared with the dense model and with the same
merging and dense attention.

With `--seeds` each search, at 224 px, gets another 25 of these images. Its answer is evaluated on the rest of them,
which are of the same kind, and on the publication photographs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from fidelity_subject import weights_file
from summary import said, write_summary

import sparsifiner_edge as se
from sparsifiner_edge.cli.common import err_console
from sparsifiner_edge.config import SparsityConfig, parse_keep, parse_merge
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.errors import GateError
from sparsifiner_edge.export.export import ExportOptions, model_shape
from sparsifiner_edge.files import scratch_folder
from sparsifiner_edge.optimizer.clock import Clock
from sparsifiner_edge.optimizer.family import DEPTH, Shape, falling, first_shares
from sparsifiner_edge.optimizer.models import Models, Stopwatch, link_images
from sparsifiner_edge.optimizer.trial import Trial
from sparsifiner_edge.pareto import Candidate, Deployment, SearchResult
from sparsifiner_edge.plan import LayerPlan
from sparsifiner_edge.profiles import roofline, stats
from sparsifiner_edge.profiles.boards.board import load_board
from sparsifiner_edge.profiles.measure.side import Rules
from sparsifiner_edge.profiles.roofline import GRAPH_FIT, Workload
from sparsifiner_edge.records import Unavailable, write_record
from sparsifiner_edge.results import Result, Subject, read_result
from sparsifiner_edge.sparse.student import Student, dense_twin, load_student

CASES = {"fp32": ("--precision", "fp32", "--compute-precision", "auto"), "any": ()}
"""Options of the command."""
ASKED = 0.98
DRAWN = 25
"""Number of images drawn per seed."""
POWERS = (1.0, 1.5, 2.0, 3.0)
"""Powers of the family's members."""
MEMBER_TRIES = 5
"""Number of evaluations to bring a member to the answer's fidelity."""
CALIBRATION = 9
"""Number of images that calibrate the int8 files of the family, as in a search."""
LAST = Rules(seconds=3.0, min_queries=20, max_seconds=60.0)
"""Rules for the last timing."""


@click.command()
@click.option("--size", type=click.Choice(["224", "518", "1036"]), help="Side of the image in pixels.")
@click.option("--minutes", multiple=True, type=float, default=(8.0,), show_default=True, help="Limit. Repeatable.")
@click.option("--loaded", is_flag=True, help="Keep one core busy meanwhile.")
@click.option("--seeds", default=0, help="Number of searches, each with other images.")
@click.option("--board", "boards", multiple=True, help="Board to search for. Repeatable.")
@click.option("--case", "cases", type=click.Choice(list(CASES)), multiple=True, help="[default: both]")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder.")
def main(
    size: str | None,
    minutes: tuple[float, ...],
    loaded: bool,
    seeds: int,
    cases: tuple[str, ...],
    boards: tuple[str, ...],
    output: Path,
) -> None:
    """Evaluate the answers of `optimize`."""
    output.mkdir(parents=True, exist_ok=True)
    method = {
        "script": "benchmarks/optimize.py",
        "minutes": list(minutes),
        "loaded": loaded,
        "publication": len(published()),
    }
    subject = Subject(path=Unavailable("computed here"), name=material.DINOV2, sha256=Unavailable("computed here"))
    if size and boards:
        estimated = {board: for_board(board, int(size), minutes[0], output) for board in boards}
        result = Result("search", [subject], method | {"size": int(size)}, {}, estimated)
        write_summary(output / f"optimize_boards_{size}.json", result)
    elif size:
        with busy() if loaded else contextlib.nullcontext():
            found = {case: searched(case, int(size), minutes, output) for case in cases or CASES}
        name = "_".join(["optimize", size, *cases, *["loaded"] * loaded]) + ".json"
        write_summary(output / name, Result("search", [subject], method | {"size": int(size)}, {}, found))
    if seeds:
        rows = [seeded(seed, minutes[0], output) for seed in range(seeds)]
        held = {str(least): sum(row["rest"] >= least for row in rows) for least in (0.97, 0.975, ASKED)}
        mean = fmean(row["rest"] for row in rows)
        click.echo(f"Of {seeds} answers, as many have at least this fidelity: {held}; mean {mean:.4f}")
        write_summary(
            output / "optimize_seeds.json",
            Result("search", [subject], method, {}, {"seeds": rows, "mean": mean} | held),
        )


def published() -> list[Path]:
    """Return photographs that nothing is tuned on."""
    return split.images("publication")


def users() -> list[Path]:
    """Return images that a user might provide: photographs that may be used for tuning."""
    return [*split.images("development"), *(path for path in split.training() if path.suffix == ".jpg")]


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Keep one core busy with other work meanwhile."""
    other = multiprocessing.get_context("spawn").Process(target=compute, daemon=True)
    other.start()
    try:
        yield
    finally:
        other.kill()


def compute() -> None:
    """Compute forever."""
    while True:
        sum(number * number for number in range(10**6))


def run(folder: Path, images: Sequence[Path], size: int, minutes: float, *options: str) -> tuple[SearchResult, float]:
    """Run the command; return its duration in seconds. Its result is in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data, out = link_images(folder / "images", images), folder / "out"
    words = [sys.executable, "-m", "sparsifiner_edge", "optimize", material.DINOV2, "--weights", weights_file()]
    words += ["--img-size", size, "--data", data, "--minutes", minutes, *options, "-o", out]
    begun = time.monotonic()
    done = subprocess.run([*map(str, words)], stdout=subprocess.DEVNULL, check=False)
    seconds = time.monotonic() - begun
    if not (out / "front.json").is_file():
        raise click.ClickException(f"optimize ended with {done.returncode}")
    return read_result(out / "front.json", SearchResult), seconds


def answer_of(result: SearchResult) -> Candidate:
    """Return the answer, or raise an error with the reason if there is none."""
    answer = result.statistics.answer
    if isinstance(answer, Unavailable):
        raise click.ClickException(answer.why)
    return answer


class Referee:
    """Evaluates and times plans of one model, and answers, on the publication photographs.

    Args:
        folder: Result folder of a search, for its model.
        scratch: Scratch folder.
        images: Images that calibrate.
        judged: Images for the evaluation.
    """

    def __init__(self, folder: Path, scratch: Path, images: Sequence[Path], judged: Sequence[Path]) -> None:
        self.student: Student = load_student(folder / "start")
        self.clock, dense = Clock(36000), dense_twin(self.student)
        self.trial = Trial(self.student, dense.model, judged, "patches")
        self.models = Models(scratch, self.student, dense, self.clock, images[:CALIBRATION], ExportOptions())
        self.patches, self.depth = self.student.backbone.patches, len(self.student.backbone.layers)

    def fidelities(self, bundle: Path, deployment: Deployment) -> list[float]:
        """Return the cosine of a bundle for each image of the evaluation."""
        with se.open_session(bundle, deployment.execution) as session:
            return [1 - error for error in self.trial.errors_of(session.infer)]

    def member(self, power: float, deployment: Deployment, wanted: float) -> Path | None:
        """Return the fastest member of the family with at least a fidelity; None if there is none."""
        shape, scale, slope = (
            Shape(falling(self.depth / DEPTH, power, self.depth), first_shares(self.student)),
            0.15,
            2.0,
        )
        errors, allowed = dict[float, float](), 1 - wanted
        try:
            while len(errors) < MEMBER_TRIES and scale not in errors:
                bundle = self.models.trial(shape.plan(scale, self.patches), deployment.precision)
                errors[scale] = 1 - fmean(self.fidelities(bundle, deployment))
                nearest = sorted(errors, key=lambda one: abs(math.log(errors[one] / allowed)))[:2]
                if len(nearest) > 1:
                    slope = math.log(errors[nearest[1]] / errors[nearest[0]]) / math.log(nearest[1] / nearest[0])
                step = (allowed / errors[nearest[0]]) ** (1 / min(max(slope, 1.0), 5.0))
                scale = round(nearest[0] * min(max(step, 0.5), 2.0), 4)
        except GateError as error:
            err_console.print(f"power {power:g} in {deployment}: {error.what}")
        kept = [scale for scale, error in errors.items() if error <= allowed]
        if not kept:
            return None
        return self.models.trial(shape.plan(max(kept), self.patches), deployment.precision, own=True)

    def dense(self, deployment: Deployment) -> Path:
        """Return the bundle of the dense model."""
        return self.models.trial(LayerPlan.dense(self.depth), deployment.precision, own=True)


def fidelities_on(judged: Sequence[Path], folder: Path, answer: Candidate) -> list[float]:
    """Return the cosine of a search's answer for each of some images."""
    with scratch_folder() as scratch:
        return Referee(folder, scratch, users(), judged).fidelities(folder / "bundle", answer.deployment)


def searched(case: str, size: int, minutes: Sequence[float], output: Path) -> dict[str, Any]:
    """Run the searches of one case, and compare their answers in turn."""
    runs: dict[float, dict[str, Any]] = {}
    folders = {limit: output / "work" / f"{size}-{case}-{limit:g}" for limit in minutes}
    for limit, folder in folders.items():
        result, seconds = run(folder, users(), size, limit, *CASES[case])
        runs[limit] = {"result": result, "wall_s": seconds}
    last = max(minutes)
    answers = {limit: answer_of(one["result"]) for limit, one in runs.items()}
    with scratch_folder() as scratch:
        referee = Referee(folders[last] / "out", scratch, users(), published())
        bundles = {
            f"answer, {limit:g} minutes": (folders[limit] / "out" / "bundle", answers[limit].deployment)
            for limit in minutes
        }
        quality = {name: referee.fidelities(*bundle) for name, bundle in bundles.items()}
        where = answers[last].deployment
        wanted = fmean(quality[f"answer, {last:g} minutes"])
        others = [one.deployment for one in runs[last]["result"].statistics.finalists if one.deployment != where]
        for power in POWERS:
            for deployment in dict.fromkeys([where, *others[:1]]):
                member = referee.member(power, deployment, wanted)
                if member is not None:
                    bundles[f"family, power {power:g}, {deployment}"] = member, deployment
                    quality[f"family, power {power:g}, {deployment}"] = referee.fidelities(member, deployment)
        dense = dict.fromkeys(row.deployment for one in runs.values() for row in one["result"].statistics.dense)
        bundles |= {f"dense, {deployment}": (referee.dense(deployment), deployment) for deployment in dense}
        with Stopwatch(referee.clock) as stopwatch:
            ms = dict(zip(bundles, stopwatch.last(list(bundles.values()), LAST), strict=True))

    def best(kind: str) -> str:
        return min((name for name in ms if name.startswith(kind)), key=lambda name: ms[name].value)

    found = dict[str, Any]()
    for limit in minutes:
        name, answer, front = f"answer, {limit:g} minutes", answers[limit], runs[limit]["result"].statistics
        ours = ms[name]
        low, high = (edge if isinstance(edge, float) else ours.value for edge in (ours.low, ours.high))
        fastest = ms[best("dense")].value
        found[f"{limit:g}"] = {
            "wall_s": runs[limit]["wall_s"],
            "engine": str(answer.deployment),
            "merge": answer.merge,
            "keep": answer.keep,
            "fidelity": answer.fidelity,
            "held_out_fidelity": answer.held_out_fidelity,
            "publication": write_record(stats.small_sample_mean(quality[name])),
            "ms": write_record(ours),
            "times": write_record(stats.quantity(fastest / ours.value, fastest / high, fastest / low, ours.interval)),
            "levers": {lever.change: lever.candidate.ms.value for lever in front.levers},
            "points": len(front.points),
        }
        err_console.print(
            f"{size} px, {case}, {limit:g} minutes ({runs[limit]['wall_s']:.0f} s): {answer.deployment}, "
            f"{ours.value:.1f} ms, {said(found[f'{limit:g}']['times'])} times; held out "
            f"{answer.held_out_fidelity:.4f}, publication {said(found[f'{limit:g}']['publication'], 4)}"
        )
    found["others"] = {
        name: {"ms": ms[name].value} | ({"publication": fmean(quality[name])} if name in quality else {})
        for name in ms
        if not name.startswith("answer")
    }
    found["over_family"] = ms[f"answer, {last:g} minutes"].value / ms[best("family")].value
    found["over_longest"] = {
        f"{limit:g}": ms[f"answer, {limit:g} minutes"].value / ms[f"answer, {last:g} minutes"].value
        for limit in minutes
    }
    err_console.print(
        f"over the best member of the family {found['over_family']:.3f} ({best('family')}); {found['over_longest']}"
    )
    return found


def for_board(name: str, size: int, minutes: float, output: Path) -> dict[str, Any]:
    """Return the result of a search for a board, as estimated."""
    folder = output / "work" / f"{size}-{name}"
    result, seconds = run(folder, users(), size, minutes, "--board", name, "--precision", "fp16")
    answer, board = answer_of(result), load_board(name)
    student = load_student(folder / "out" / "start")
    keep, merge = parse_keep(answer.keep), parse_merge(answer.merge)
    budget = dataclasses.replace(student.sparsity, keep=keep, merge=merge)

    def ms(sparsity: SparsityConfig) -> float:
        work = Workload(model_shape(student.model), sparsity, kernels="kernels")
        return 1e3 * roofline.seconds(roofline.costs(work, board, "fp16", GRAPH_FIT))

    merged = ms(dataclasses.replace(budget, keep=1.0))
    dense, ours = ms(dataclasses.replace(budget, keep=1.0, merge=())), ms(budget)
    found = {
        "wall_s": seconds,
        "merge": answer.merge,
        "keep": answer.keep,
        "fidelity": answer.fidelity,
        "held_out_fidelity": answer.held_out_fidelity,
        "publication": write_record(stats.small_sample_mean(fidelities_on(published(), folder / "out", answer))),
        "ms": ours,
        "dense_ms": dense,
        "times": dense / ours,
        "merged_alone_over_ours": merged / ours,
        "estimated_ms": answer.ms.value,
    }
    err_console.print(f"{size} px, {name}: {found}")
    return found


def seeded(seed: int, minutes: float, output: Path) -> dict[str, Any]:
    """Run a search with other images; evaluate it on those it did not get, and on the publication photographs."""
    images = sorted(random.Random(seed).sample(users(), DRAWN))
    folder = output / "work" / f"seed-{seed}"
    result, seconds = run(folder, images, 224, minutes)
    answer = answer_of(result)
    row = {
        "seed": seed,
        "engine": str(answer.deployment),
        "wall_s": seconds,
        "fidelity": answer.fidelity,
        "held_out_fidelity": answer.held_out_fidelity,
        "rest": fmean(fidelities_on([path for path in users() if path not in images], folder / "out", answer)),
        "publication": fmean(fidelities_on(published(), folder / "out", answer)),
    }
    err_console.print(str(row))
    return row


if __name__ == "__main__":
    main()
