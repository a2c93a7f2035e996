"""Measures the Pareto front of fidelity and time, ours and the rivals', on images not used for tuning.

    python benchmarks/frontier.py [--size 518] [--rounds 11] [--int8] [-o FOLDER]
    python benchmarks/frontier.py --size 518 --front FOUND/front.json -o FOLDER
    python benchmarks/frontier.py --size 224 --int8 --base FOLDER/frontier_224_int8.json -o FOLDER

The model is DINOv2 ViT-S/14, real weights, untrained, batch 1. Rivals (`tome.py`): the dense model; token merging by
ToMe's and by MAT's published rule at falling rates, and at two that merge in the same layers as ours (at 224 px also at
constant rates: above, those take up to a fifth longer, and at their most faithful up to 2 % less); the dense model at
some smaller sizes, its tokens resized. Each is one plain file in ONNX Runtime and OpenVINO, the dense model in torch
too. With `--int8` the quantised files are added, and bf16 if the CPU has it (at 1036 px, and for a ViT-B/14, only with
int8; at 1036 px all in OpenVINO). Ours: some budgets of merging and sparse attention, in the same engines. Engines that
take a quarter longer than the fastest in the same precision, over a kind's files together, are left out and listed. All
files are open at a time: 20 GB of memory.

Fidelity is that of the model that ran, over the publication photographs (`demo/split.py`): cosine of patches and class
token to the dense model's. All are timed in turn in one process, three rounds; the points around the compared
fidelities that come near the best run all requested rounds. "At equal fidelity" is the best rival's time for a
fidelity, interpolated between its neighbouring points, over ours.

With `--front` our budgets are those of a search: the points of its front nearest to fidelities from .95 to .995. With
`--int8` as well, the fastest precision is compared. With `--base` a ViT-B/14 with random weights is used: times are its
own, fidelities are those that a result has for the same budgets.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import tome
import torch
from cpu_engines import time_in_turn
from fidelity_subject import weights_file
from frontier_points import Case, Point, Setting, Teacher, ours, photographs, quick_engines, rivals
from safetensors.torch import save_file
from summary import said, write_summary

from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.config import parse_keep
from sparsifiner_edge.demo import material
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.records import Unavailable, write_record
from sparsifiner_edge.results import Result, Subject, read_result
from sparsifiner_edge.sparse.defaults import default_keep
from sparsifiner_edge.sparse.hosts.timm import create

EARLY, LONG = default_keep(37 * 37, 12), default_keep(74 * 74, 12)
"""Shares of keys at 518 and 1036 px."""
CASES = {
    224: Case(
        tuple((rates, 1) for rates in tome.CHOSEN),
        16,
        (8, 10, 12, 14),
        (12, 16, 20, 24, *tome.CHOSEN[2:4]),
        (14, 12),
        (0.98, 0.985, 0.99),
    ),
    518: Case(
        (((140, 1), EARLY), ((160, 1), EARLY), ((200, 1.5), EARLY), ((240, 2), EARLY), ((300, 3), EARLY)),
        49,
        (),
        (80, 120, 140, 160, 180, (200, 1.5), (240, 2)),
        (34, 29),
        (0.98, 0.985, 0.99),
    ),
    1036: Case(
        (((700, 1), LONG), ((900, 1.5), LONG), ((1000, 2), LONG), ((1200, 2), LONG)),
        49,
        (),
        (700, 800, (900, 1.5), (1000, 2)),
        (68,),
        (0.98, 0.985),
    ),
}
BURSTS = {224: 5, 518: 2, 1036: 1}
"""Calls per round; their median counts."""
FEW, NEAR = 3, 1.15
"""Rounds of all points; times the best time up to which a point gets more rounds."""
BASE = "vit_base_patch14_dinov2.lvd142m"
FRONT = (0.95, 0.96, 0.97, 0.98, 0.99, 0.995)
"""Fidelities to compare at along a front."""
LOWER = {518: (200, 215), 1036: (850, 890)}
"""Merging rates of rivals in the first layer for the lowest of these."""


def of_base(case: Case) -> Case:
    """Return the case reduced to the lowest compared fidelity and to the falling rates, the faster ones there.

    All files of a ViT-B/14 would need more than 24 GB.
    """
    return dataclasses.replace(
        case,
        budgets=case.budgets[1:-1],
        constant=(),
        falling=(16, 20, tome.CHOSEN[2]),
        grids=(),
        compared=case.compared[:1],
    )


def of_front(path: Path, size: int) -> Case:
    """Return the case with the plans of a search's front nearest to these fidelities."""
    case = CASES[size]
    points = [point for point in read_result(path).statistics["points"] if point["pareto_optimal"]]
    nearest = [min(points, key=lambda p, at=at: abs(math.log((1 - p["fidelity"] + 1e-6) / (1 - at)))) for at in FRONT]
    chosen = dict.fromkeys((point["merge"], parse_keep(point["keep"])) for point in nearest)
    return dataclasses.replace(
        case,
        budgets=tuple(chosen),
        falling=(*case.falling, *LOWER.get(size, ())),
        compared=FRONT,
        start=path.parent / "start",
    )


def base(size: int, folder: Path) -> tuple[str, Path]:
    """Return name and file of a ViT-B/14 with random weights."""
    torch.manual_seed(0)
    save_file(create(BASE, size, 0).state_dict(), folder / "random.safetensors")
    return BASE, folder / "random.safetensors"


def fidelity(
    points: list[Point], size: int, photographs: list[Path], file: Path, tell: Any
) -> dict[str, dict[str, Any]]:
    """Return cosines of patches and class token to the dense model per publication photograph; file: cache."""
    teacher = Teacher(size, photographs)
    found: dict[str, dict[str, Any]] = {}
    same: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for point in points:
        # One model in fp32 gives the same in every engine, up to a millionth.
        key = f"{point.kind} | {point.budget}" if point.precision == "fp32" else point.name
        if key not in same:
            tell(f"fidelity of {point.name}")
            same[key] = teacher.cosines(point.tokens_of, point.images.shape[1])
            point.rest()
            file.write_text(json.dumps(same))
        found[point.name] = same[key]
    return found


def fidelity_of(points: list[Point], result: Path) -> dict[str, dict[str, Any]]:
    """Return a result's values for points of these names, or for fp32 points with the same files in another engine."""
    rows: dict[str, dict[str, Any]] = read_result(result).statistics["points"]
    files = {(name.partition(",")[0], row["budget"]): row for name, row in rows.items() if row["precision"] == "fp32"}
    found = {}
    for point in points:
        row = files.get((point.kind, point.budget)) if point.precision == "fp32" else rows.get(point.name)
        if row:
            found[point.name] = {
                "patches_cosine": [row["patches_cosine"]["value"]],
                "class_cosine": [row["class_cosine"]],
            }
    return found


@dataclasses.dataclass(frozen=True)
class Fronts:
    """Points of some precisions by family, and their times: milliseconds [rounds, burst] by name."""

    families: dict[str, list[Point]]
    found: dict[str, dict[str, Any]]
    times: dict[str, np.ndarray]

    @classmethod
    def of(
        cls, points: list[Point], found: dict[str, dict[str, Any]], times: dict[str, np.ndarray], any_precision: bool
    ) -> Fronts:
        families: dict[str, list[Point]] = {}
        for point in points:
            if any_precision or point.precision == "fp32":
                families.setdefault(point.family, []).append(point)
        for family in [name for name in families if name.startswith(("ToMe", "MAT", "ours"))]:
            # The dense model ends the front, except for fewer pixels, whose tokens are resized.
            families[family] += families.get(f"dense,{family.split(',', 1)[1]}", [])
        return cls(families, found, times)

    def ways(self, family: str, wanted: float) -> list[list[tuple[float, Point]]]:
        """Return the sets of timed points, with weights, that give a fidelity.

        A set is the two neighbouring points, linear in log(1 - fidelity), or one point at least as faithful. There is
        none beyond the best.
        """
        valued = [(float(np.mean(self.found[p.name]["patches_cosine"])), p) for p in self.families[family]]
        below = max((pair for pair in valued if pair[0] < wanted), key=lambda pair: pair[0], default=None)
        above = [pair for pair in valued if pair[0] >= wanted]
        options = [[(1.0, point)] for _, point in above]
        if above and below:
            nearest = min(above, key=lambda pair: pair[0])
            low, middle, high = (math.log(max(1 - value, 1e-9)) for value in (below[0], wanted, nearest[0]))
            share = (middle - low) / (high - low)
            options.append([(1 - share, below[1]), (share, nearest[1])])
        return [option for option in options if all(point.name in self.times for _, point in option)]

    def _median(self, option: list[tuple[float, Point]], number: int | None = None) -> float:
        times = [(share, self.times[point.name]) for share, point in option]
        return sum(share * float(np.median(x if number is None else x[number])) for share, x in times)

    def ms(self, family: str, wanted: float, number: int | None = None) -> float:
        """Return the time for a fidelity, the median or that of a round; infinite if no point is as faithful."""
        ways = self.ways(family, wanted)
        return self._median(min(ways, key=self._median), number) if ways else math.inf

    def side(self, ours: bool) -> list[str]:
        """Return our families, or those of rivals."""
        return [family for family in self.families if family.startswith("ours") == ours]

    def kinds(self, wanted: float) -> dict[str, str]:
        """Return the fastest family of each kind of rival."""
        best: dict[str, str] = {}
        for family in sorted(self.side(False), key=lambda family: self.ms(family, wanted)):
            best.setdefault(family.partition(",")[0], family)
        return best

    def contenders(self, wanted: float) -> dict[str, Point]:
        """Return the points that give a fidelity in a time near the best.

        They are those of the best family of each kind, and of all families near their side's best.
        """
        chosen = set(self.kinds(wanted).values())
        for side in map(self.side, (True, False)):
            best = min(self.ms(family, wanted) for family in side)
            chosen |= {family for family in side if self.ms(family, wanted) <= NEAR * best}
        return {
            point.name: point
            for family in chosen
            for way in self.ways(family, wanted)
            if self._median(way) <= NEAR * self.ms(family, wanted)
            for _, point in way
        }

    def compare(self, wanted: float) -> dict[str, Any]:
        """Return the best rival's time at a fidelity over ours, with its interval over rounds."""
        rival, mine = (min(self.side(ours), key=lambda family: self.ms(family, wanted)) for ours in (False, True))
        rounds = range(len(next(iter(self.times.values()))))
        pairs = [(self.ms(rival, wanted, n), self.ms(mine, wanted, n)) for n in rounds]
        ratios = [a / b if math.isfinite(b) else 0.0 for a, b in pairs]
        return {
            "patches_cosine": wanted,
            "rival": rival,
            "ours": mine,
            "rival_ms": _finite(self.ms(rival, wanted)),
            "ours_ms": _finite(self.ms(mine, wanted)),
            "ratio": write_record(stats.median(ratios)),
            "each_ms": {kind: _finite(self.ms(family, wanted)) for kind, family in self.kinds(wanted).items()},
        }


def _finite(ms: float) -> Any:
    return ms if math.isfinite(ms) else write_record(Unavailable("no point is as faithful"))


def measure(
    case: Case,
    of: Setting,
    judge: Callable[[list[Point]], dict[str, dict[str, Any]]],
    rounds: int,
    folder: Path,
    tell: Any,
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Measure samples and statistics; without rounds, none of speed. judge: fidelities by point name, if known."""
    along_a_front = case.start is not None and of.int8
    points = ours(case, of, folder, tell)
    points += rivals(case, of, folder, tell)
    points, left_out = quick_engines(points, not along_a_front, tell)
    found = judge(points)
    points = [point for point in points if point.name in found]
    if not rounds:
        return None
    rests = {point.name: point.rest for point in points}
    turns = functools.partial(time_in_turn, burst=BURSTS[of.size], tell=tell, after=lambda name: rests[name]())
    times = turns({point.name: point.run for point in points}, FEW)
    kinds = {"fp32": False} if not along_a_front else {}
    kinds |= {"any": True} if of.int8 else {}
    near: dict[str, Point] = {}
    for wanted in case.compared:
        for any_precision in kinds.values():
            near |= Fronts.of(points, found, times, any_precision).contenders(wanted)
    again = turns({name: point.run for name, point in near.items()}, rounds)
    rows = {
        point.name: {
            "family": point.family,
            "budget": point.budget,
            "precision": point.precision,
            "macs": point.macs,
            "median_ms": float(np.median(again.get(point.name, times[point.name]))),
            "rounds": len(again.get(point.name, times[point.name])),
            "patches_cosine": write_record(stats.small_sample_mean(found[point.name]["patches_cosine"])),
            "class_cosine": float(np.mean(found[point.name]["class_cosine"])),
        }
        for point in points
    }
    compared = {
        f"{wanted}, {kind}": Fronts.of(points, found, again, any_precision).compare(wanted)
        for wanted in case.compared
        for kind, any_precision in kinds.items()
    }
    samples = {name: {**found[name], "ms": again.get(name, times[name]).tolist()} for name in rows}
    return samples, {"points": rows, "at_equal_fidelity": compared, "left_out": left_out}


def show(title: str, found: dict[str, Any]) -> None:
    rows = [
        [
            name,
            f"{row['macs'] / 1e9:.1f}",
            f"{row['median_ms']:.1f}",
            f"{row['patches_cosine']['value']:.4f}",
            f"{row['class_cosine']:.4f}",
        ]
        for name, row in found["points"].items()
    ]
    print_table(title, ["", "G MACs", "ms", "patches", "class"], rows)
    for label, row in found["at_equal_fidelity"].items():
        ms, rival_ms = (f"{x:.1f}" if isinstance(x, float) else "?" for x in (row["ours_ms"], row["rival_ms"]))
        click.echo(
            f"at {label}: {ms} ms ({row['ours']}) against {rival_ms} ({row['rival']}): {said(row['ratio'])} times"
        )
        click.echo("   " + ", ".join(f"{kind} {x:.1f}" for kind, x in row["each_ms"].items() if isinstance(x, float)))
    for engine, ratio in found["left_out"].items():
        click.echo(f"left out: {engine}, {ratio:.2f} times the fastest")


def draw(title: str, found: dict[str, Any], path: Path) -> None:
    """Draw error against time, one line per family."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    families: dict[str, list[dict[str, Any]]] = {}
    for row in found["points"].values():
        families.setdefault(row["family"], []).append(row)
    marks = itertools.cycle("osD^v")
    for number, (family, rows) in enumerate(families.items()):
        if family.startswith("dense"):
            axis.plot([r["median_ms"] for r in rows], [1e-4] * len(rows), "|", color="grey", markersize=14)
            continue
        ordered = sorted(rows, key=lambda r: float(r["median_ms"]))
        mine = family.startswith("ours")
        axis.plot(
            [r["median_ms"] for r in ordered],
            [1 - r["patches_cosine"]["value"] for r in ordered],
            f"{next(marks)}-" if mine else "x--",
            label=family,
            color="black" if mine else f"C{number % 10}",
            linewidth=1.6 if mine else 0.8,
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="ms",
        ylabel="1 - patch cosine (lower is better)",
        title=f"{title}, untrained; grey: dense",
    )
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.xaxis.set_minor_formatter("{x:.0f}")
    axis.grid(which="both", alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)


@click.command()
@click.option("--size", "sizes", type=click.Choice([str(size) for size in CASES]), multiple=True, default=["518"])
@click.option("--rounds", default=11, show_default=True, help="Of contenders; six at least; 0 prepares --work.")
@click.option("--threads", default=None, type=int, help="Default: all cores.")
@click.option("--int8", is_flag=True, help="Quantised files too, ours and theirs.")
@click.option("--front", type=click.Path(exists=True, path_type=Path), help="Our budgets from a search's front.json.")
@click.option(
    "--base", "result", type=click.Path(exists=True, path_type=Path), help="ViT-B/14, at the fidelities of this result."
)
@click.option(
    "--photographs", "count", type=click.IntRange(1), help="Of the publication set, evenly; default all, at 1036 px 24."
)
@click.option("--work", type=click.Path(path_type=Path), help="Keep files and fidelities here, for another run.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for frontier_<size>.json and .png.")
def main(
    sizes: tuple[str, ...],
    rounds: int,
    threads: int | None,
    int8: bool,
    front: Path | None,
    result: Path | None,
    count: int | None,
    work: Path | None,
    output: Path | None,
) -> None:
    """Measure the Pareto front of fidelity and time, ours and the rivals'."""
    if (front or result) and (len(sizes) > 1 or (front and result)):
        raise click.UsageError("--front and --base are of one size, and not of each other")
    if result and read_result(result).method["size"] != int(sizes[0]):
        raise click.UsageError(f"--base {result} is of another size than --size {sizes[0]}")
    if not (rounds or work):
        raise click.UsageError("--rounds 0 prepares --work: name it")
    warnings.simplefilter("ignore", FutureWarning)  # of torch's exporter, about its own calls
    more = "_base" * bool(result) + "_searched" * bool(front) + "_int8" * int8
    for size in map(int, sizes):
        paths = photographs(size, count)
        with err_console.status("") as status, tempfile.TemporaryDirectory() as scratch:
            of_search = f"-{zlib.crc32(front.read_bytes()):x}" if front else ""
            folder = (work or Path(scratch)) / f"{size}{more}{of_search}"
            folder.mkdir(parents=True, exist_ok=True)
            model, weights = base(size, folder) if result else (material.DINOV2, weights_file())
            of = Setting(size, threads or available_cores(), int8, model, weights)
            case = of_front(front, size) if front else CASES[size]
            case = of_base(case) if result else case
            judge = (
                functools.partial(fidelity_of, result=result)
                if result
                else functools.partial(
                    fidelity, size=size, photographs=paths, file=folder / f"{len(paths)}.json", tell=status.update
                )
            )
            measured = measure(case, of, judge, rounds, folder, status.update)
        if measured is None:
            continue
        samples, statistics = measured
        title = f"{'DINOv2 ViT-B/14, random weights' if result else 'DINOv2 ViT-S/14'}, {size} px"
        if output:
            method = {
                "photographs": len(paths),
                "rounds": rounds,
                "rounds_of_all": FEW,
                "near": NEAR,
                "calls": BURSTS[size],
                "size": size,
                "threads": of.threads,
                "int8": int8,
                "interpolation": "linear in log(1 - patch cosine) between points of one family",
                "fidelity": "of the same budgets in ViT-S/14" if result else "of what ran",
            }
            record = Result("comparison", [Subject(path=model, sha256="")], method, samples, statistics)
            write_summary(output / f"frontier_{size}{more}.json", record)
            draw(title, statistics, output / f"frontier_{size}{more}.png")
        show(f"{title}, {len(paths)} photographs", statistics)


if __name__ == "__main__":
    main()
