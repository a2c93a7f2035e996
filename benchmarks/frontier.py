"""The front of fidelity and time: ours against what a user would pick instead, on images that nothing was tuned on.

    python benchmarks/frontier.py [--size 518] [--rounds 11] [--int8] [-o FOLDER]

DINOv2 ViT-S/14, real weights, untrained, batch 1. Rivals: the dense model, and token merging by its published rule at
five constant and five falling rates (`tome.py`), each as one plain file in ONNX Runtime, OpenVINO and torch; with
`--int8` the quantised files too, and bf16 where the processor has it. Ours: five budgets of merging and sparse
attention. Fidelity is that of what ran, over the publication photographs (`demo/split.py`): cosine of patches and class
token to the dense model's. All are timed in turn in one process. "At equal fidelity": the best rival's time for a
fidelity, interpolated between its neighbouring points, over ours.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import tome
import torch
from cpu_engines import Run, openvino_run, ort_session, time_in_turn
from fidelity_subject import weights_file

from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.config import Keep, keep_text
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.export.check import smooth_images
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.export.int8 import LEAST_MEAN_COSINE, quantise
from sparsifiner_edge.images import evenly, load_image
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.profiles.measure.layers import measure_layers
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject, write_result
from sparsifiner_edge.sparse.models import load_model
from sparsifiner_edge.sparse.student import load_student, sparsify


@dataclasses.dataclass(frozen=True)
class Case:
    """One image size: our budgets as (what merges: see `tome.schedule`; keep), cells, the rivals' rates, and
    fidelities to compare at.
    """

    budgets: tuple[tuple[int | tuple[int, float], Keep], ...]
    cells: int
    constant: tuple[int, ...]
    falling: tuple[int, ...]
    compared: tuple[float, ...]


EARLY, LONG = (0.1, 0.1, 0.2, 1.0), (0.05, 0.05, 0.1, 0.35, 0.35, 0.35, 1.0)
"""The first layers have the most tokens and need the fewest keys: see `merging.py`."""
CASES = {
    224: Case(
        ((8, 1), (10, 1), (12, 1), ((20, 1), 1), ((24, 1), 1)), 16,
        (4, 6, 8, 10, 12), (8, 12, 16, 20, 24), (0.98, 0.985, 0.99),
    ),
    518: Case(
        (((140, 1), EARLY), ((160, 1), EARLY), ((200, 1.5), EARLY), ((240, 2), EARLY), ((300, 3), EARLY)), 49,
        (40, 60, 80, 90, 100), (80, 120, 140, 160, 180), (0.975, 0.98, 0.985),
    ),
    1036: Case(
        (((600, 1), LONG), ((700, 1), LONG), ((900, 1.5), LONG), ((1000, 2), LONG), ((1200, 2), LONG)), 49,
        (200, 300, 350, 400, 450), (400, 500, 600, 700, 800), (0.975, 0.98, 0.985),
    ),
}  # fmt: skip
REQUIRED = {(518, 0.98, "fp32"): (1.15, 1.4), (1036, 0.98, "fp32"): (1.6, 2.2)}
"""Times the best rival: required, aimed at."""
MOST_MERGING = (0.04, 0.02)
"""Share of a layer's time that matching and merging may take at 518 px, and should."""


@dataclasses.dataclass
class Point:
    """One file in one engine. family: what it is interpolated with; macs: of all layers."""

    family: str
    budget: str
    run: Run
    tokens: Callable[[np.ndarray], np.ndarray]
    macs: float
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.family} | {self.budget}"


def ours(case: Case, size: int, folder: Path, threads: int, int8: bool, tell: Any) -> list[Point]:
    """Our budgets."""
    tell("sparsify")
    images = folder / "calibration"
    images.mkdir()
    for path in split.calibration():
        (images / path.name).symlink_to(path)
    student = sparsify(
        material.DINOV2, folder / "student", weights=weights_file(), img_size=size, keep=0.25, cells=case.cells,
        merge=(case.constant[0],), calibrate=images,
    )  # fmt: skip
    points: list[Point] = []
    depth = len(load_student(student).model.blocks)
    for rate, keep in case.budgets:
        merge, named = tome.schedule(rate, depth)
        for precision in ("fp32", "int8") if int8 else ("fp32",):
            budget = f"merge {named}, keep {keep_text(keep)}"
            tell(f"export ours, {budget}, {precision}")
            more = {"precision": "int8", "calibrate": images} if precision == "int8" else {}
            bundle = export_bundle(student, folder / f"ours-{len(points)}", merge=merge, keep=keep, **more)
            macs = sum_of_layers(load_student(student, merge=merge, keep=keep))
            session = ort_session(str(bundle / "model.onnx"), threads)
            points.append(_ort_point(session, f"ours {precision}", budget, macs, precision, size))
    return points


def merging_in_first_layer(bundle: Path, threads: int, size: int) -> dict[str, float]:
    """Milliseconds of all that matches and merges in the first layer, and of the whole layer."""
    image = smooth_images(size)
    times = measure_layers(str(bundle), "onnxruntime", threads, "native", lambda _: {"image": image}, 200)
    rows = [row for row in times.layers if row.layer == 0]
    whole, merging = (sum(row.ms for row in rows if part in row.name) for part in ("", ".merging."))
    return {"layer_ms": whole, "merging_ms": merging, "share": merging / whole}


def sum_of_layers(student: Any) -> float:
    """Multiply-accumulates of all layers."""
    from sparsifiner_edge.costs import MAC_KINDS, layer_costs
    from sparsifiner_edge.export.export import model_shape

    costs = layer_costs(model_shape(student.model), student.sparsity)
    return float(sum(getattr(layer, kind) for layer in costs for kind in MAC_KINDS))


def _ort_point(session: Any, family: str, budget: str, macs: float, precision: str, size: int) -> Point:
    image = smooth_images(size)
    return Point(
        family, budget, lambda: session.run(None, {"image": image}),
        lambda x: session.run(["tokens"], {"image": x})[0], macs, precision,
    )  # fmt: skip


def rivals(case: Case, size: int, folder: Path, threads: int, int8: bool, tell: Any) -> list[Point]:
    """Dense and merging by its published rule in every engine."""
    model: Any = load_model(material.DINOV2, weights_file(), size)
    depth, tokens, width = len(model.blocks), model.patch_embed.num_patches + 1, model.embed_dim
    settings = [("dense", "dense", [0] * depth)]
    settings += [("ToMe", f"{rate} a layer", tome.constant(rate, depth)) for rate in case.constant]
    settings += [("ToMe falling", f"{first}..0", tome.falling(first, depth)) for first in case.falling]
    flags = Path("/proc/cpuinfo").read_text()
    bf16 = int8 and ("avx512_bf16" in flags or "amx_bf16" in flags)
    calibration = [load_image(path, size)[None] for path in split.calibration()]
    torch.set_num_threads(threads)
    points = []
    for kind, budget, rates in settings:
        tell(f"export {kind}, {budget}")
        path = tome.export(model, rates, size, folder / f"{kind}-{budget}.onnx")
        macs = float(tome.macs(rates, tokens, width, 4 * width))
        points.append(_ort_point(ort_session(str(path), threads, False), f"{kind}, ONNX Runtime fp32", budget, macs,
                                 "fp32", size))  # fmt: skip
        for hint in ("f32", "bf16") if bf16 else ("f32",):
            points.append(_openvino_point(path, f"{kind}, OpenVINO {hint}", budget, macs, hint, threads, size))
        points.append(_torch_point(tome.ToMe(model, rates).eval(), f"{kind}, torch fp32", budget, macs, size))
        if int8:
            tell(f"quantise {kind}, {budget}")
            quantised, _ = quantise(onnx.load(path), calibration, goal=LEAST_MEAN_COSINE)
            path8 = folder / f"{kind}-{budget}-int8.onnx"
            onnx.save(quantised, path8)
            session = ort_session(str(path8), threads, False)
            points.append(_ort_point(session, f"{kind}, ONNX Runtime int8", budget, macs, "int8", size))
            for hint in ("f32", "bf16") if bf16 else ("f32",):
                family = f"{kind}, OpenVINO int8, rest {hint}"
                points.append(_openvino_point(path8, family, budget, macs, hint, threads, size, "int8"))
    return points


def _openvino_point(
    path: Path, family: str, budget: str, macs: float, hint: str, threads: int, size: int, precision: str = ""
) -> Point:
    image = smooth_images(size)
    feed = {"image": image}
    run = openvino_run(str(path), feed, threads, hint)

    def tokens(x: np.ndarray) -> np.ndarray:
        feed["image"] = x
        found = np.array(run()["tokens"])
        feed["image"] = image
        return found

    return Point(family, budget, run, tokens, macs, precision or ("fp32" if hint == "f32" else "bf16"))


def _torch_point(module: Any, family: str, budget: str, macs: float, size: int) -> Point:
    image = torch.from_numpy(smooth_images(size))

    def tokens(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(module(torch.from_numpy(x))[1].numpy())

    def run() -> Any:
        with torch.inference_mode():
            return module(image)

    return Point(family, budget, run, tokens, macs)


def photographs(size: int) -> list[Path]:
    """Of the publication set; at 1036 px, where a photograph takes a minute, 24 of them."""
    return evenly(split.publication(), 24) if size > 1000 else split.publication()


def fidelity(points: list[Point], size: int, tell: Any) -> dict[str, dict[str, Any]]:
    """Cosine of patches and class token to the dense model's, per publication photograph."""
    images = [load_image(path, size)[None] for path in photographs(size)]
    model = load_model(material.DINOV2, weights_file(), size)
    dense = tome.ToMe(model, [0] * len(model.blocks)).eval()
    with torch.inference_mode():
        wanted = [dense(torch.from_numpy(image))[1].numpy()[0] for image in images]
    found: dict[str, dict[str, Any]] = {}
    same: dict[tuple[str, str, str], dict[str, Any]] = {}
    for point in points:
        # One model in fp32 gives the same in every engine, to a millionth.
        key = (point.family.partition(",")[0], point.budget, point.precision)
        if point.precision != "fp32" or key not in same:
            tell(f"fidelity of {point.name}")
            rows = [cosine(point.tokens(x)[0], y) for x, y in zip(images, wanted, strict=True)]
            same[key] = {
                "patches_cosine": [float(row[1:].mean()) for row in rows],
                "class_cosine": [float(row[0]) for row in rows],
            }
        found[point.name] = same[key]
    return found


def time_at(points: list[tuple[float, float]], wanted: float) -> float:
    """Milliseconds for a fidelity on the way between points (fidelity, ms) of one family; infinite beyond its best.

    Linear in log(1 - fidelity). What its worst point exceeds costs what that point costs.
    """
    ordered = sorted(points)
    if wanted > ordered[-1][0]:
        return math.inf
    if wanted <= ordered[0][0]:
        return ordered[0][1]
    place = next(i for i, (value, _) in enumerate(ordered) if value >= wanted)
    (low, slow_low), (high, slow_high) = ordered[place - 1], ordered[place]
    errors = [math.log(max(1 - value, 1e-9)) for value in (low, wanted, high)]
    share = (errors[1] - errors[0]) / (errors[2] - errors[0]) if errors[2] != errors[0] else 1.0
    return slow_low + share * (slow_high - slow_low)


def compare(
    points: list[Point], found: dict[str, dict[str, Any]], times: dict[str, np.ndarray], wanted: float,
    precisions: tuple[str, ...], ours_family: str,
) -> dict[str, Any]:  # fmt: skip
    """The best rival's time at a fidelity over ours, with its interval over rounds."""
    families: dict[str, list[Point]] = {}
    for point in points:
        if point.family.startswith("ours") or point.precision in precisions:
            families.setdefault(point.family, []).append(point)
    for family in [name for name in families if name.startswith("ToMe")]:
        # Merging nothing is the end of its front.
        families[family] += families.get(f"dense,{family.split(',', 1)[1]}", [])

    def at(family: str, of_round: Callable[[np.ndarray], float]) -> float:
        return time_at(
            [(float(np.mean(found[p.name]["patches_cosine"])), of_round(times[p.name])) for p in families[family]],
            wanted,
        )

    rival = min((f for f in families if not f.startswith("ours")), key=lambda f: at(f, lambda x: float(np.median(x))))
    rounds = len(next(iter(times.values())))
    pairs = [
        (at(rival, lambda x, i=i: float(np.median(x[i]))), at(ours_family, lambda x, i=i: float(np.median(x[i]))))
        for i in range(rounds)
    ]
    ratios = [a / b if math.isfinite(b) else 0.0 for a, b in pairs]
    estimate = stats.estimate(
        float(np.median(ratios)), *stats.quantile_interval(ratios, 0.5), "order statistics of rounds"
    )
    return {
        "patches_cosine": wanted, "rival": rival,
        "rival_ms": at(rival, lambda x: float(np.median(x))), "ours_ms": at(ours_family, lambda x: float(np.median(x))),
        "ratio": write_record(estimate),
    }  # fmt: skip


def measure(size: int, threads: int, rounds: int, int8: bool, tell: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    case = CASES[size]
    with tempfile.TemporaryDirectory() as scratch:
        points = ours(case, size, Path(scratch), threads, int8, tell)
        first = merging_in_first_layer(Path(scratch) / "ours-0", threads, size)
        points += rivals(case, size, Path(scratch), threads, int8, tell)
        found = fidelity(points, size, tell)
        times = time_in_turn({p.name: p.run for p in points}, rounds, 2 if size < 1000 else 1, tell)
    rows = {
        point.name: {
            "family": point.family, "budget": point.budget, "precision": point.precision, "macs": point.macs,
            "median_ms": float(np.median(times[point.name])),
            "patches_cosine": write_record(stats.small_sample_mean(found[point.name]["patches_cosine"])),
            "class_cosine": float(np.mean(found[point.name]["class_cosine"])),
        }
        for point in points
    }  # fmt: skip
    compared = {}
    for wanted in case.compared:
        compared[f"{wanted}, fp32"] = compare(points, found, times, wanted, ("fp32",), "ours fp32")
        if int8:
            compared[f"{wanted}, any"] = compare(points, found, times, wanted, ("fp32", "bf16", "int8"), "ours int8")
    samples = {name: {"ms": times[name].tolist(), **found[name]} for name in rows}
    return samples, {"points": rows, "at_equal_fidelity": compared, "merging_in_first_layer": first}


def show(size: int, found: dict[str, Any]) -> None:
    rows = [
        [name, f"{row['macs'] / 1e9:.1f}", f"{row['median_ms']:.1f}", f"{row['patches_cosine']['value']:.4f}",
         f"{row['class_cosine']:.4f}"]
        for name, row in found["points"].items()
    ]  # fmt: skip
    print_table(f"{size} px, {len(photographs(size))} photographs", ["", "G MACs", "ms", "patches", "class"], rows)
    for label, row in found["at_equal_fidelity"].items():
        aim = REQUIRED.get((size, row["patches_cosine"], label.partition(", ")[2]))
        estimate = row["ratio"]
        bounds = " to ".join(f"{estimate[k]:.2f}" if isinstance(estimate[k], float) else "?" for k in ("low", "high"))
        click.echo(
            f"at {label}: {row['ours_ms']:.1f} ms against {row['rival_ms']:.1f} ({row['rival']}): "
            f"{estimate['value']:.2f} times ({bounds})" + (f", required {aim[0]}, aim {aim[1]}" if aim else "")
        )

    first = found["merging_in_first_layer"]
    click.echo(
        f"matching and merging take {first['merging_ms']:.2f} of {first['layer_ms']:.2f} ms of the first layer: "
        f"{first['share']:.1%}, required {MOST_MERGING[0]:.0%}, aim {MOST_MERGING[1]:.0%} at 518 px"
    )


def draw(size: int, found: dict[str, Any], path: Path) -> None:
    """Error against time, one line per family."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    families: dict[str, list[dict[str, Any]]] = {}
    for row in found["points"].values():
        families.setdefault(row["family"], []).append(row)
    for number, (family, rows) in enumerate(families.items()):
        if family.startswith("dense"):
            axis.plot([r["median_ms"] for r in rows], [1e-4] * len(rows), "|", color="grey", markersize=14)
            continue
        rows = sorted(rows, key=lambda r: float(r["median_ms"]))  # noqa: PLW2901
        mine = family.startswith("ours")
        axis.plot(
            [r["median_ms"] for r in rows], [1 - r["patches_cosine"]["value"] for r in rows], "o-" if mine else "x--",
            label=family, color="black" if mine else f"C{number % 10}", linewidth=2 if mine else 1,
        )  # fmt: skip
    axis.set(
        xscale="log", yscale="log", xlabel="ms", ylabel="1 - patch cosine (lower is better)",
        title=f"DINOv2 ViT-S/14, {size} px, untrained; grey: dense",
    )  # fmt: skip
    axis.grid(which="both", alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=90)


@click.command()
@click.option("--size", "sizes", type=click.Choice([str(size) for size in CASES]), multiple=True, default=["518"])
@click.option("--rounds", default=11, show_default=True, help="Six at least, for intervals.")
@click.option("--threads", default=None, type=int, help="Default: all cores.")
@click.option("--int8", is_flag=True, help="Quantised files too, ours and theirs.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for frontier_<size>.json and .png.")
def main(sizes: tuple[str, ...], rounds: int, threads: int | None, int8: bool, output: Path | None) -> None:
    """See the module's documentation."""
    warnings.simplefilter("ignore", FutureWarning)  # of torch's exporter, about its own calls
    threads = threads or available_cores()
    for size in map(int, sizes):
        with err_console.status("") as status:
            samples, statistics = measure(size, threads, rounds, int8, status.update)
        if output:
            output.mkdir(parents=True, exist_ok=True)
            method = {
                "photographs": [path.name for path in photographs(size)], "size": size, "threads": threads,
                "rounds": rounds, "interpolation": "linear in log(1 - patch cosine) between points of one family",
            }  # fmt: skip
            subject = Subject(path=material.DINOV2, sha256="")
            result = Result("comparison", [subject], method, samples, statistics)
            write_result(output / f"frontier_{size}.json", result)
            draw(size, statistics, output / f"frontier_{size}.png")
        show(size, statistics)


if __name__ == "__main__":
    main()
