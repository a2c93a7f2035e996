"""Write the tables and charts of the documentation from the result files.

    python benchmarks/figures.py            write docs/figures.md, the tables of README and cookbook, docs/pareto.png
    python benchmarks/figures.py --check    exit with 1 if a page differs from the results

Every number comes from a file in `profiles/results`. A printed ratio is the ratio of the two printed times.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "profiles" / "results"
PAGE = ROOT / "docs" / "figures.md"
CHART = ROOT / "docs" / "pareto.png"
FRONTIERS = {
    "DINOv2 ViT-S/14, 224 px": "frontier/frontier_224_int8.json",
    "DINOv2 ViT-S/14, 518 px": "frontier/frontier_518_int8.json",
    "DINOv2 ViT-S/14, 1036 px": "frontier/frontier_1036_int8.json",
    "ViT-B/14 (random weights), 224 px": "frontier/frontier_224_base_int8.json",
}
"""Heading to the result of `benchmarks/frontier.py`."""
STREAMS = {
    "vtest.avi, fixed camera, 518 px": "stream_dinov2_518_vtest.json",
    "vtest.avi, 518 px, int8 and bf16": "stream_dinov2_518_int8_vtest.json",
    "vtest.avi, 224 px": "stream_dinov2_224_vtest.json",
    "vtest.avi, saliency model, 518 px": "stream_saliency_518_vtest.json",
    "square (made from photographs), 518 px": "stream_dinov2_518_square.json",
    "street (made from photographs), 518 px": "stream_dinov2_518_street.json",
    "garden (made from photographs), 518 px": "stream_dinov2_518_garden.json",
    "bikes.mp4, moving camera, 518 px": "stream_dinov2_518_bikes.json",
}
"""Video to the result of `benchmarks/stream.py`."""
PRECISIONS = {"fp32": "fp32", "any": "int8 + bf16"}
"""Key of a frontier's comparison to the precision that was fastest there."""
Result = dict[str, Any]


def read(name: str) -> Result:
    """Return the content of a result file."""
    content: Result = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def milliseconds(value: float) -> str:
    """Format a time with three digits: 41.2, 162, 4,540."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def number(text: str) -> float:
    """Return the number that a table shows."""
    return float(text.replace(",", ""))


def ratio(slower: str, faster: str) -> str:
    """Return the ratio of two printed times."""
    return f"{number(slower) / number(faster):.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def device(result: Result) -> str:
    """Return the processor and the number of cores that a result was measured on."""
    machine = result["machine"]
    return f"{machine['cpu_model']}, {machine['affinity_cores']} cores"


def link(name: str) -> str:
    """Return a link from a page in docs/ to a result file."""
    return f"[{Path(name).name}](../profiles/results/{name})"


def frontier_rows(name: str, fidelities: Sequence[str]) -> list[list[str]]:
    """Return fidelity, precision, our, the rivals' and the dense model's time, and the ratios of these."""
    equal, rows = read(name)["statistics"]["at_equal_fidelity"], []
    for fidelity in fidelities:
        for key, precision in PRECISIONS.items():
            point = equal.get(f"{fidelity}, {key}")
            if point is None:
                continue
            known = {family: ms for family, ms in point["each_ms"].items() if isinstance(ms, float)}
            each = {
                method: min(ms for family, ms in known.items() if family.startswith(method))
                for method in ("ToMe", "MAT", "dense")
            }
            ours, tome, mat, dense = (
                milliseconds(value) for value in (point["ours_ms"], each["ToMe"], each["MAT"], each["dense"])
            )
            rival = min((tome, mat), key=number)
            rows.append([fidelity, precision, ours, tome, mat, dense, ratio(rival, ours), ratio(dense, ours)])
    return rows


def stream_way(result: Result, way: str) -> tuple[Result, str, str]:
    """Return the figures of one way to answer a video, its time and the dense model's in its fastest backend."""
    figures = result["statistics"]["ways"][way]
    dense = min(result["statistics"]["dense_ms"].values())
    return figures, milliseconds(figures["ms"]), milliseconds(dense)


def readme_table() -> str:
    """Return the table of the README."""
    rows = []
    for title, name in list(FRONTIERS.items())[:3]:
        result = read(name)
        for fidelity, precision, ours, tome, mat, dense, over_rival, over_dense in frontier_rows(name, ["0.98"]):
            rate = f"{1000 / number(ours):.1f}"
            size = title.rpartition(", ")[2]
            rival = min((tome, mat), key=number)
            rows.append([size, precision, fidelity, ours, rate, rival, over_rival, dense, over_dense, device(result)])
    result = read(STREAMS["vtest.avi, fixed camera, 518 px"])
    figures, ours, dense = stream_way(result, "stream at 0.98")
    rate, fidelity = f"{1000 / number(ours):.1f}", f"{figures['patches']:.2f}"
    rows.append(
        ["518 px, stream", "fp32", fidelity, ours, rate, "-", "-", dense, ratio(dense, ours), device(result)],
    )
    head = [
        "input",
        "precision",
        "cosine",
        "ours, ms",
        "ours, fps",
        "faster of ToMe and MAT, ms",
        "speed-up over it",
        "dense, ms",
        "speed-up over dense",
        "device",
    ]
    return table(head, rows)


def cookbook_table() -> str:
    """Return the table of the cookbook: one row per target, with a measured latency where there is one."""

    def cpu(name: str) -> str:
        row = next(row for row in frontier_rows(name, ["0.98"]) if row[1] != "fp32")
        return f"{row[2]} ms, dense {row[5]} ms ({row[1]}, cosine {row[0]})"

    result = read(STREAMS["vtest.avi, fixed camera, 518 px"])
    figures, ours, dense = stream_way(result, "stream at 0.98")
    stream = f"{ours} ms per frame, dense {dense} ms (fp32, mean cosine {figures['patches']:.2f}, one video)"
    names = list(FRONTIERS.values())
    rows = [
        ["CPU, 224 px", "[below](#cpu)", cpu(names[0]), device(read(names[0])), "[CPU](cpu.md)"],
        ["CPU, 518 px", "[below](#cpu)", cpu(names[1]), device(read(names[1])), "[optimize](optimize.md)"],
        ["fixed camera, 518 px", "[below](#camera)", stream, device(result), "[cameras](camera.md)"],
        ["your own model", "[below](#your-own-model)", "depends on the model", "-", "[models](models.md)"],
        ["NVIDIA GPU", "[below](#nvidia-gpu)", "never run on hardware", "-", "[NVIDIA](nvidia.md)"],
        ["Jetson", "[below](#jetson)", "never run on hardware", "-", "[Jetson](jetson.md)"],
        ["a program without Python", "[clients](pipelines.md)", "-", "-", "-"],
    ]
    return table(["target", "recipe", "best measured", "device", "more"], rows)


def frontier_section() -> str:
    """Return the comparison with token merging and the dense model."""
    head = [
        "patch cosine",
        "precision",
        "ours, ms",
        "ToMe, ms",
        "MAT, ms",
        "dense, ms",
        "speed-up over the faster rival",
        "speed-up over dense",
    ]
    parts = []
    for title, name in FRONTIERS.items():
        result = read(name)
        command = " ".join(["python", "benchmarks/frontier.py", *frontier_options(result)])
        method = result["method"]
        parts.append(
            f"### {title}\n\n{table(head, frontier_rows(name, ['0.98', '0.985', '0.99']))}\n\n"
            f"{method['photographs']} photographs, {method['rounds']} interleaved rounds, {device(result)}. "
            f"`{command}`, {link(name)}."
        )
    return "\n\n".join(parts)


def frontier_options(result: Result) -> list[str]:
    """Return the options of `benchmarks/frontier.py` that decide what a result measures."""
    method, command = result["method"], result["command"]
    base = ["--base", "profiles/results/frontier/frontier_224_int8.json"] if "--base" in command else []
    return ["--size", str(method["size"]), "--int8", "--rounds", str(method["rounds"]), *base]


def stream_section() -> str:
    """Return the figures of streams."""
    head = [
        "video",
        "way",
        "mean cosine",
        "worst frame",
        "frames with cosine >= .98",
        "ms",
        "dense, ms",
        "speed-up over dense",
    ]
    ways = {"stream at 0.98": "stream, at least .98", "stream 0.125": "stream, 1/8 of the patches"}
    ways |= {f"hold every {k}": f"dense on every {k} frames" for k in (2, 4, 8)}
    ways |= {"fewer pixels": "dense, fewer pixels"}
    rows = []
    for title, name in STREAMS.items():
        result = read(name)
        for way, label in ways.items():
            if way not in result["statistics"]["ways"] or (way != "stream at 0.98" and not title.endswith("518 px")):
                continue
            figures, ours, dense = stream_way(result, way)
            cosine, worst, share = figures["patches"], figures["worst_frame"], figures["frames_at_98"]
            rows.append(
                [title, label, f"{cosine:.4f}", f"{worst:.3f}", f"{share:.0%}", ours, dense, ratio(dense, ours)],
            )
    files = ", ".join(link(name) for name in STREAMS.values())
    return f"{table(head, rows)}\n\n`python benchmarks/stream.py`, {device(result)}: {files}."


def saliency_section() -> str:
    """Return the figures of the saliency model."""
    name = "saliency/saliency.json"
    result = read(name)
    statistics = result["statistics"]
    times = statistics["times"]["median_ms"]

    def fastest(label: str) -> str:
        return milliseconds(min(ms for key, ms in times.items() if key.rpartition(", ")[0] == label))

    dense, rows = fastest("dense"), []
    for label, budget in statistics["budgets"].items():
        photographs, ours = budget["photographs"], fastest(label)
        drop = budget.get("stamps", {}).get("drop_iou", {}).get("mean")
        interval = f"{drop['value']:.3f} ({drop['low']:.3f} to {drop['high']:.3f})" if drop else "-"
        rows.append(
            [
                label,
                f"{budget['macs'] / 1e9:.1f}",
                f"{photographs['iou']['mean']['value']:.3f}",
                f"{photographs['auroc']['mean']['value']:.4f}",
                interval,
                ours,
                ratio(dense, ours),
            ]
        )
    head = [
        "plan or rival",
        "GMACs",
        "IoU with the dense map",
        "AUROC",
        "drop of IoU with true masks",
        "ms",
        "speed-up over dense",
    ]
    return (
        f"{table(head, rows)}\n\nThe dense model takes {dense} ms. {result['method']['photographs']} photographs, true "
        f"masks of 200 pasted objects; fp32, each in its fastest backend, {device(result)}.\n"
        f"`python benchmarks/saliency.py --stamps S --time`, {link(name)}. A drop below 0 is a gain."
    )


def optimize_section() -> str:
    """Return what the command `optimize` reached."""
    rows, names = [], []
    for title, name in (
        ("518 px", "search/optimize_518_any.json"),
        ("518 px", "search/optimize_518_fp32.json"),
        ("224 px", "search/optimize_224_any.json"),
        ("224 px", "search/optimize_224_fp32.json"),
        ("518 px, one core busy", "search/optimize_518_any_loaded.json"),
    ):
        result = read(name)
        names.append(name)
        for case, found in result["statistics"].items():
            for minutes in (key for key in found if key.isdigit()):
                row = found[minutes]
                rows.append(
                    [
                        f"{title}, {'any precision' if case == 'any' else case}, {minutes} min",
                        row["engine"],
                        milliseconds(row["ms"]["value"]),
                        f"{row['times']['value']:.2f}",
                        f"{row['held_out_fidelity']:.4f}",
                        f"{row['publication']['value']:.4f}",
                        device(result),
                    ]
                )
    seeds = read("search/optimize_seeds.json")
    count, minutes = len(seeds["statistics"]["seeds"]), seeds["method"]["minutes"][0]
    lowest = min(row["rest"] for row in seeds["statistics"]["seeds"])
    head = ["case", "engine", "ms", "times dense", "cosine, held-out images", "cosine, other photographs", "device"]
    return (
        f"{table(head, rows)}\n\nRequested: a patch cosine of .98. `optimize` checks it on held-out images of the "
        "folder that it gets; on photographs of other kinds the cosine can be lower.\n"
        f"{count} seeds at 224 px, {minutes:g} minutes and 25 images each: the mean cosine on the other images "
        f"of the folder was {seeds['statistics']['mean']:.4f}, the lowest {lowest:.4f}.\n"
        f"`python benchmarks/optimize.py`, {', '.join(map(link, [*names, 'search/optimize_seeds.json']))}."
    )


def training_section() -> str:
    """Return fidelity and accuracy before and after training."""
    name = "accuracy/accuracy.json"
    result = read(name)["statistics"]
    fidelity = [
        [label, f"{row['patches']['value']:.4f}", f"{row['classes']['value']:.4f}"]
        for label, row in result["fidelity"].items()
        if "tile" not in label
    ]
    accuracy = [
        [
            metric,
            label,
            f"{row['subject_percent']:.1f}",
            f"{row['teacher_percent']:.1f}",
            f"{row['difference_points']['value']:+.1f}",
        ]
        for metric, rows in result["fashion"].items()
        for label, row in rows.items()
    ]
    return (
        f"{table(['model (preset, training, settings)', 'patch cosine', 'class cosine'], fidelity)}\n\n"
        f"Accuracy on Fashion-MNIST with frozen features, in percent:\n\n"
        f"{table(['metric', 'trained model', 'sparse', 'dense', 'difference, points'], accuracy)}\n\n"
        f"DINOv2 ViT-S/14 at 224 px; 33 photographs; training as [distillation](distillation.md) describes. "
        f"`python benchmarks/accuracy.py`, {link(name)}."
    )


def camera_section() -> str:
    """Return what a camera's pipeline costs around the model."""
    rows = []
    for title, name in (
        ("1080p file, 224 px", "camera/overhead_224.json"),
        ("1080p file, 518 px", "camera/overhead_518.json"),
        ("1080p file, 518 px, stream", "camera/overhead_518_stream.json"),
        ("4K file, 224 px", "camera/overhead_224_4k.json"),
    ):
        share = read(name)["statistics"]["rate_over_bare"]
        rows.append([title, f"{share['value']:.2f}", f"{share['low']:.2f} to {share['high']:.2f}", link(name)])
    ages = []
    for title, name in (
        ("4K RTSP, 224 px", "camera/rtsp_4k_224.json"),
        ("4K RTSP, 224 px, --threads 1", "camera/rtsp_4k_224_one_thread.json"),
        ("4K RTSP, 518 px", "camera/rtsp_4k_518.json"),
        ("4K RTSP, 518 px, --threads 1", "camera/rtsp_4k_518_one_thread.json"),
    ):
        figures = read(name)["statistics"]
        ages.append([title, f"{figures['age_p50_ms']:.0f}", f"{figures['age_p95_ms']:.0f}", link(name)])
    return (
        f"{table(['source and model', 'rate of `run` over the bare session', '95 % interval', 'result'], rows)}\n\n"
        f"Age of a frame when its answer is printed, 30 frames per second:\n\n"
        f"{table(['source and model', 'median, ms', '95 % below, ms', 'result'], ages)}\n\n"
        "`python benchmarks/camera_overhead.py`, `python benchmarks/camera_rtsp.py`; two cores of an AMD EPYC."
    )


def figures_page() -> str:
    """Return docs/figures.md."""
    return f"""# Measured figures

Every table on this page is written by `python benchmarks/figures.py` from the files in
[profiles/results](../profiles/results). Each section names the command that measures it. Images and videos were
used neither for tuning nor for calibration, unless a section says otherwise.

## Equal fidelity: sparsifiner-edge, token merging, dense

Milliseconds per image at the same mean cosine to the dense model's final patch tokens, interpolated along each
method's Pareto front. All methods run without fine-tuning and interleaved in one run, each in its fastest backend (ONNX
Runtime or OpenVINO). ToMe and MAT (arXiv 2512.22760) follow their published rules, with constant rates, falling rates
and our schedules. "int8 + bf16" is the fastest of fp32, bf16, and int8 with the rest in either. Ratios are ratios of
the printed times. At 224 and 518 px, the dense model at fewer pixels reaches none of these cosines. The result files
have the intervals of the ratios over rounds; at 518 px they are wide (fp32, .98: 1.32 to 1.54).

{frontier_section()}

![Error against time at 518 px](pareto.png)

## Streams

A stream recomputes only the patches that changed. Times are means per frame. The gain depends on the scene: a fixed
camera with little motion gains most, and a camera that moves fast gains nothing ([camera](camera.md)). In the slow
scenes `square` and `street`, running the dense model on every eighth frame is about as fast and as faithful; where more
moves (`vtest`, `garden`), it is not.

{stream_section()}

## Saliency: a dense task

The saliency model (DINOv2 ViT-S/14 with a trained decoder, 518 px), not fine-tuned after sparsification.

{saliency_section()}

## The command `optimize`

{optimize_section()}

## After training

{training_section()}

## Camera pipeline

{camera_section()}
"""


def replaced(text: str, marker: str, content: str) -> str:
    """Return a page with new content between `<!-- MARKER -->` and `<!-- end -->`.

    Raises:
        ValueError: The page has no such marker.
    """
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"The page has no marker <!-- {marker} -->.")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def pages() -> dict[Path, str]:
    """Return every generated page with the text that the results give it."""
    readme, cookbook = ROOT / "README.md", ROOT / "docs" / "cookbook.md"
    return {
        PAGE: figures_page(),
        readme: replaced(readme.read_text(encoding="utf-8"), "results", readme_table()),
        cookbook: replaced(cookbook.read_text(encoding="utf-8"), "targets", cookbook_table()),
    }


def draw_pareto_front(path: Path) -> None:
    """Draw error against time at 518 px for every method in its fastest backend."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    points = read(FRONTIERS["DINOv2 ViT-S/14, 518 px"])["statistics"]["points"].values()
    styles = {
        "ours": ("#0a7d4f", "o", "sparsifiner-edge"),
        "ToMe": ("#c4541a", "s", "ToMe"),
        "MAT": ("#8a5fbf", "^", "MAT"),
        "fewer": ("#7a7a7a", "v", "dense, fewer pixels"),
        "dense": ("#111111", "D", "dense"),
    }
    figure, both = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, constrained_layout=True)
    for axes, (title, wanted) in zip(both, (("fp32", ("fp32",)), ("int8 or bf16", ("int8", "bf16"))), strict=True):
        for family, (color, marker, label) in styles.items():
            chosen = [p for p in points if p["family"].startswith(family) and p["precision"] in wanted]
            best: dict[str, tuple[float, float]] = {}
            for point in chosen:
                error = max(1 - mean_of(point["patches_cosine"]), 1e-3)
                if point["budget"] not in best or point["median_ms"] < best[point["budget"]][0]:
                    best[point["budget"]] = (point["median_ms"], error)
            front = sorted(
                (ms, error) for ms, error in best.values() if not any(a < ms and b <= error for a, b in best.values())
            )
            if front:
                style = "-" if len(front) > 1 else ""
                axes.plot(*zip(*front, strict=True), style, color=color, marker=marker, markersize=6, label=label)
        axes.axhline(0.02, color="#999999", linewidth=1, linestyle="--")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("ms per image, fastest backend")
        axes.grid(visible=True, which="major", color="#e6e6e6")
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        ticks = {0.05: ".95", 0.03: ".97", 0.02: ".98", 0.01: ".99", 0.005: ".995", 0.002: ".998", 0.001: "1"}
        axes.yaxis.set_major_locator(FixedLocator(list(ticks)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(list(ticks), list(ticks.values()))
        axes.set_ylim(0.08, 0.0008)
    both[0].set_ylabel("patch cosine to the dense model")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=10)
    figure.suptitle(
        "DINOv2 ViT-S/14 at 518 px, not fine-tuned, two cores of an AMD EPYC (up and left is better)", fontsize=11
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def mean_of(figure: float | Result) -> float:
    """Return the value of a figure that may have an interval."""
    return float(figure["value"] if isinstance(figure, dict) else figure)


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if a page differs from the results.")
def main(check: bool) -> None:
    """Write the tables and charts of the documentation from profiles/results."""
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if check:
        for path in stale:
            click.echo(
                f"{path.relative_to(ROOT)} differs from profiles/results: run python benchmarks/figures.py", err=True
            )
        sys.exit(1 if stale else 0)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    draw_pareto_front(CHART)
    click.echo(f"written: {', '.join(str(path.relative_to(ROOT)) for path in (*pages(), CHART))}")


if __name__ == "__main__":
    main()
