"""What to expect of a board before buying it: DINOv2 ViT-S/14, dense, merged, merged and sparse, by `estimate`.

    python benchmarks/boards_expected.py [--docs] [-o profiles/results]

Nothing is measured here or was measured on these boards. Latency, memory and energy are computed by
`sparsifiner_edge.profiles.estimate`; what each budget costs in fidelity is read from recorded results, whose
multiply-accumulates must be those that are estimated here. `--docs` renews the tables of docs/boards.md.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from summary import RESULTS, write_summary

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import print_table
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.costs import ModelShape, summary
from sparsifiner_edge.profiles.boards.board import Board, load_board
from sparsifiner_edge.profiles.estimate import EstimateStatistics, estimate_model
from sparsifiner_edge.profiles.roofline import GPU_FIT
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "boards.md"
BOARDS = ("jetson-orin-nano-8gb-super", "jetson-agx-orin-64gb", "jetson-agx-thor")
ORINS = BOARDS[:2]
"""That JetPack 6 is for."""
PRECISIONS = ("fp16", "int8")
DEPTH = 12
SPARSE = {224: "0.25,0.25,0.5,1", 518: "0.1,0.1,0.2,1", 1036: "0.05,0.05,0.1,0.35,0.35,0.35,1"}
"""Pixels -> shares of keys by layer, as of the recorded front, at 224 px as of `merging.py`."""
CELLS = {224: 16, 518: 49, 1036: 49}
TILE = {"native": 64, "portable": 16}
"""What `export --board` takes where its gate lets it, and what a student has; it changes no arithmetic."""
SCHEDULES = {224: ("8", "20..0"), 518: ("160..0", "240..0 ^ 2"), 1036: ("700..0", "900..0 ^ 1.5")}
"""Pixels -> what merges, a mild budget and a strong one."""


class Budget(NamedTuple):
    """A model: its name, what it does, how merging and sparse layers run, its recorded patch cosine, and on what."""

    name: str
    sparsity: SparsityConfig
    kernels: str
    cosine: float | None
    judged_on: str


def shape_at(size: int) -> ModelShape:
    return ModelShape(DEPTH, 6, 384, 1536, 1, (size // 14) ** 2, 14)


def rates(schedule: str) -> tuple[int, ...]:
    """Pairs that each layer merges, from a name such as "8", "160..0" or "240..0 ^ 2"."""
    found = re.fullmatch(r"(\d+)(\.\.0)?(?: \^ ([\d.]+))?", schedule)
    assert found is not None, schedule
    first, falls, power = found.groups()
    shares = [(1 - layer / (DEPTH - 1)) ** float(power or 1) if falls else 1.0 for layer in range(DEPTH)]
    return tuple(round(int(first) * share) for share in shares)


def recorded(size: int, schedule: str, keep: str) -> tuple[float, float, str] | None:
    """Multiply-accumulates of all layers and patch cosine of a budget, where a result has it, and on what."""
    points = json.loads((RESULTS / f"frontier/frontier_{size}.json").read_text("utf-8"))
    point = points["statistics"]["points"].get(f"ours fp32 | merge {schedule}, keep {keep}")
    if point:
        return point["macs"], point["patches_cosine"]["value"], f"{points['method']['photographs']} photographs"
    found = json.loads((RESULTS / f"merging/merging_{size}.json").read_text("utf-8"))
    for row in found["statistics"]["rows"]:
        if (row["merge"], row["keep"], row["cells"]) == (schedule, keep, CELLS[size]) and "default" in row["name"]:
            return row["macs"], row["development"], f"{found['method']['development']} photographs"
    return None


def budgets(size: int) -> Iterator[Budget]:
    """Dense first.

    Raises:
        ValueError: a recorded budget is of another model than what is estimated here.
    """
    yield Budget("dense", SparsityConfig(keep=1), "native", None, "")
    for keep in ("1", SPARSE[size]):
        for schedule in SCHEDULES[size]:
            shares = tuple(map(float, keep.split(",")))
            sparsity = SparsityConfig(keep=shares, merge=rates(schedule), cells=CELLS[size])
            found = recorded(size, schedule, keep)
            if found is None:
                continue
            macs, cosine, judged_on = found
            costs = summary(shape_at(size), sparsity)
            if costs["total_macs"] - costs["embedding_macs"] != macs:
                raise ValueError(f"{size} px, merge {schedule}, keep {keep}: {costs['total_macs']} is not {macs}")
            name = f"merge {schedule}" if keep == "1" else f"merge {schedule}, sparse"
            for kernels in ("native", "portable"):
                tiled = dataclasses.replace(sparsity, tile=TILE[kernels])
                yield Budget(name, tiled, kernels, cosine, judged_on)


def row_of(size: int, budget: Budget, board: Board, precision: str, fastest: float) -> dict[str, Any]:
    """fastest: milliseconds of the dense model at the precision that is faster on that board."""
    found = estimate_model(shape_at(size), budget.sparsity, board, precision, kernels=budget.kernels)
    return {
        "pixels": size, "model": budget.name, "patch_cosine": budget.cosine, "judged_on": budget.judged_on,
        "merge": list(budget.sparsity.merge), "keep": budget.sparsity.keep, "tile": budget.sparsity.tile,
        "kernels": budget.kernels,
        "board": board.name, "precision": precision, "speed_up": speed_up(found, fastest), **write_record(found),
    }  # fmt: skip


def speed_up(found: EstimateStatistics, fastest: float) -> dict[str, float]:
    """Times the dense model. Both share what the board is off by, so the bounds are of what was judged alone."""
    latency, spread = found.latency_ms, GPU_FIT.spread
    low, high = fastest / max(latency.value, latency.high / spread), fastest / min(latency.value, latency.low * spread)
    return {"value": fastest / latency.value, "low": low, "high": high}


def all_rows() -> list[dict[str, Any]]:
    rows = []
    for board in map(load_board, BOARDS):
        for size in SCHEDULES:
            dense, *others = budgets(size)
            plain = [estimate_model(shape_at(size), dense.sparsity, board, p, kernels="native") for p in PRECISIONS]
            fastest = min(found.latency_ms.value for found in plain)
            rows += [row_of(size, b, board, p, fastest) for b in (dense, *others) for p in PRECISIONS]
    return rows


def short(row: dict[str, Any]) -> dict[str, Any]:
    """What docs/boards.md says of a row, and what its budget is."""
    names = ("pixels", "model", "patch_cosine", "board", "precision", "kernels", "speed_up")
    bounds = {
        name: {at: row[name][at] for at in ("value", "low", "high")}
        for name in ("latency_ms", "energy_j", "memory_bytes")
    }
    return {name: row[name] for name in names if name in row} | bounds


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def _latency(row: dict[str, Any]) -> str:
    value, low, high = (_number(row["latency_ms"][name]) for name in ("value", "low", "high"))
    gain, least, most = (f"{row['speed_up'][name]:.2g}" for name in ("value", "low", "high"))
    times = f"{gain} x" if row["model"] == "dense" else f"{gain} x ({least} to {most})"
    return f"{value} ({low} to {high}), {times}"


def _energy(row: dict[str, Any]) -> str:
    value, low, high = (_number(row["energy_j"][name] * 1e3) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high}) mJ, {_number(row['memory_bytes']['value'] / 1e6)} MB"


def _described(row: dict[str, Any]) -> str:
    return "dense" if row["model"] == "dense" else f"{row['model']}, {row['patch_cosine']:.3f}"


def table(rows: list[dict[str, Any]], cell: Any, kernels: str, boards: Sequence[str] = BOARDS) -> str:
    """Markdown: a line for a dense model, or one that runs by `kernels`, a column for a board at a precision."""
    rows = [r for r in rows if r["board"] in boards and (r["model"] == "dense" or r["kernels"] == kernels)]
    columns = [(board, precision) for board in boards for precision in PRECISIONS]
    lines = ["| pixels, model | " + " | ".join(f"{b.removeprefix('jetson-')}, {p}" for b, p in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    found = {((r["pixels"], _described(r)), (r["board"], r["precision"])): cell(r) for r in rows}
    for line in dict.fromkeys(key for key, _ in found):
        lines.append(f"| {line[0]}, {line[1]} | " + " | ".join(found[line, column] for column in columns) + " |")
    return "\n".join(lines) + "\n"


def markdown(rows: list[dict[str, Any]]) -> str:
    return (
        "Latency in ms with its bounds, and times the dense model at its faster precision on that board.\n\n"
        "**JetPack 7, with this project's CUDA kernels** (TensorRT 10.9 or newer; sparse layers with tile 64):\n\n"
        + table(rows, _latency, "native")
        + "\n**JetPack 6, function bodies** (TensorRT 10.3; sparse layers with tile 16):\n\n"
        + table(rows, _latency, "portable", ORINS)
        + "\nEnergy of an image with its bounds, and memory of the process (bounds, and as bodies: in the result), "
        "JetPack 7:\n\n" + table(rows, _energy, "native")
    )


def renew_page(text: str, page: Path = PAGE) -> None:
    """Put the tables between `<!-- expected -->` and `<!-- end -->`.

    Raises:
        ValueError: the page has not both marks, once.
    """
    before = page.read_text(encoding="utf-8")
    after, count = re.subn(
        r"(<!-- expected -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}\n{text}\n{m[2]}", before, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{page} has the marks {count} times")
    page.write_text(after, encoding="utf-8")


@click.command(help=__doc__)
@click.option("--docs", is_flag=True, help="Renew the tables of docs/boards.md.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for boards_expected.json.")
def main(*, docs: bool, output: Path | None) -> None:
    rows = all_rows()
    for board in BOARDS:
        cells = [[f"{r['pixels']}, {_described(r)}, {r['kernels']}, {r['precision']}", _latency(r), _energy(r)]
                 for r in rows if r["board"] == board]  # fmt: skip
        print_table(f"ESTIMATES, {board}", ["", "ms (bounds), times dense", "mJ (bounds), memory"], cells)
    if docs:
        renew_page(markdown(rows))
    if output:
        sources = [RESULTS / f"{kind}/{kind}_{size}.json" for kind in ("frontier", "merging") for size in SCHEDULES]
        subjects = [Subject(path=str(f.relative_to(ROOT)), sha256=sha256(f)) for f in sources]
        method = {
            "what": "computed by sparsifiner_edge.profiles.estimate; nothing was measured on these boards",
            "model": dataclasses.asdict(shape_at(224)) | {"patches": "of each row's pixels"},
            "fit": dataclasses.asdict(GPU_FIT),
        }
        result = Result("evaluation", subjects, method, {"rows": rows}, {"rows": [short(row) for row in rows]})
        write_summary(output / "boards_expected.json", result)


if __name__ == "__main__":
    main()
