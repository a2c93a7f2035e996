"""Where sparse attention in our CUDA kernels beats dense attention, by a roofline: for GPUs that are not at hand.

    python benchmarks/gpu_bound.py [--board NAME ...] [--docs] [-o FOLDER] [--table]

Kernels are compiled for each GPU and counted (`gpu_work.py`); the model (`gpu_roofline.py`) is the one that gives
FlashAttention's published speed within 10 % (`gpu_published.py`). Dense attention is taken at the share of peak that
its fastest kernel reaches. Nothing here ran on a GPU. `--docs` renews docs/gpu.md, `--table` what `estimate` and
`export --board` go by.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import click
import numpy as np
from gpu_roofline import DENSE_SHARE, EFFICIENCY, STALL, Gpu, dense_seconds, gpu, resources, seconds
from gpu_work import ROUNDS, work_of
from kernels_static import renew_docs
from summary import write_summary

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.config import SparsityConfig
from sparsifiner_edge.machine import package_version
from sparsifiner_edge.ops.triton.compile import Compiled, compile_launch
from sparsifiner_edge.ops.triton.plan import Launch, Plan, fitted
from sparsifiner_edge.ops.triton.plan_layer import plan_layer
from sparsifiner_edge.profiles.boards.board import board_names, load_board
from sparsifiner_edge.results import Result, Subject

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "profiles" / "boards" / "gpu_attention.json"
HEADS, WIDTH, CHANNELS, CELLS, PROBE = 6, 64, 24, 25, 16
SHOWN = {
    "h100": (8, (1025, 2305, 4097, 9217)), "jetson-orin-nano-8gb-super": (1, (1025, 1370, 2305, 5477)),
    "jetson-agx-orin-64gb": (1, (1025, 1370, 2305, 5477)), "jetson-agx-thor": (1, (1025, 1370, 2305, 5477)),
    "rtx-4070": (1, (1025, 1370, 2305, 5477)),
}  # fmt: skip
"""Boards with the batch and tokens that are shown, at tiles of 64 and 128."""
UNSAID = (100, 110)
"""Where machine code does not say how large a product is."""
KEEPS = (0.25, 0.10)
REQUIRED = {("h100", 2305): (1.7, 2.1), ("h100", 4097): (2.4, 3.0), ("h100", 9217): (3.4, 4.9),
            ("jetson-orin-nano-8gb-super", 1370): (1.8, 2.2),
            ("jetson-orin-nano-8gb-super", 5477): (3.5, 4.5)}  # fmt: skip
"""Times faster than dense at keep .10: required, aimed at."""
GRID = {"tokens": (257, 577, 1025, 1370, 2305, 4097, 5477, 9217), "keep": (0.05, 0.10, 0.25, 0.50), "batch": (1, 8)}
"""Of the table that the package carries."""


def layer(tokens: int, keep: float, batch: int, tile: int) -> Plan:
    """Selection and attention of six heads of 64, one class token, 25 cells."""
    patches = tokens - 1
    sparsity = SparsityConfig(keep=keep, tile=tile, probe=min(PROBE, tile), cells=CELLS, channels=CHANNELS)
    layout = sparsity.layout(patches)
    attributes = {
        "num_heads": HEADS, "num_prefix": 1, "tile": tile, "cell": layout.cell, "scale": WIDTH**-0.5,
        "probe": sparsity.probe, "keys": layout.keys, "value_power": sparsity.value_power,
    }  # fmt: skip
    return plan_layer([(batch, tokens, 3 * HEADS * WIDTH), *[(HEADS, WIDTH, CHANNELS)] * 2], attributes, "float16")


@functools.cache
def compiled(tokens: int, batch: int, tile: int, capability: int) -> tuple[Compiled, ...]:
    """Kernels of a layer at keep .10: what they do per block is the same at other rates."""
    plan = layer(tokens, 0.10, batch, tile)
    return tuple(compile_launch(plan, step, capability) for step in plan.launches)


def _at(made: Compiled, step: Launch) -> Compiled:
    """What was compiled at another rate, with the constants of a step."""
    return dataclasses.replace(made, launch=fitted(step, made.capability))


def bound(on: Gpu, tokens: int, keep: float, batch: int, tile: int) -> dict[str, Any]:
    """Milliseconds of a layer's launches, and how often they fit into dense attention's."""
    plan = layer(tokens, keep, batch, tile)
    launches, busy = {}, {}
    own = compiled(tokens, batch, tile, on.board.sm)
    twins = compiled(tokens, batch, tile, 90) if on.board.sm in UNSAID else [None] * len(own)
    for made, twin, step in zip(own, twins, plan.launches, strict=True):
        work = work_of(_at(made, step), plan, twin and _at(twin, step))
        launches[made.kernel] = 1e3 * seconds(work, on)
        busy[made.kernel] = {name: 1e3 * value for name, value in resources(work, on).items()}
    dense = 1e3 * dense_seconds(batch, HEADS, tokens, WIDTH, on)
    return {
        "board": on.board.name, "tokens": tokens, "keep": keep, "batch": batch, "tile": tile, "dense_ms": dense,
        "launches_ms": launches, "times_faster": dense / sum(launches.values()), "resources_ms": busy,
    }  # fmt: skip


def shown(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows of the page."""
    rows = []
    for name in names:
        batch, sizes = SHOWN[name]
        for tokens in sizes:
            for tile in (64, 128):
                err_console.print(f"{name}: {tokens} tokens, tile {tile}")
                rows += [bound(gpu(name), tokens, keep, batch, tile) for keep in KEEPS]
    return rows


def table() -> dict[str, Any]:
    """Times faster than dense of every board that has kernels, at tile 64, by batch, rate and tokens; `busy` without
    what launches cost by themselves, more work taken to need no less time than less.
    """
    found: dict[str, Any] = {"grid": {name: list(values) for name, values in GRID.items()}, "whole": {}, "busy": {}}
    for name in board_names():
        if load_board(name).sm not in DENSE_SHARE:
            continue
        err_console.print(name)
        on = gpu(name)
        rows = [
            [[bound(on, n, keep, batch, 64) for n in GRID["tokens"]] for keep in GRID["keep"]]
            for batch in GRID["batch"]
        ]
        dense, ours = (np.array([[[f(r) for r in x] for x in y] for y in rows]) for f in (_dense, _ours))
        gap = 1e3 * on.launch_s
        found["whole"][name] = np.round(dense / ours, 3).tolist()
        for axis in range(3):
            ours = np.maximum.accumulate(ours, axis)
        found["busy"][name] = np.round((dense - gap) / (ours - 3 * gap), 3).tolist()
    return found


def _a_line_each(found: dict[str, Any]) -> str:
    """JSON with a line for every entry of the second level."""
    parts = [
        f'"{name}": {{\n' + ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in entries.items()) + "\n}"
        for name, entries in found.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _dense(row: dict[str, Any]) -> float:
    return float(row["dense_ms"])


def _ours(row: dict[str, Any]) -> float:
    return float(sum(row["launches_ms"].values()))


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| board, batch | tokens | tile | dense, ms | keep .25: ms, times | keep .10: ms, times | summarise + select +"
        " attend at .10 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for quarter, tenth in zip(rows[::2], rows[1::2], strict=True):
        times = [f"{sum(r['launches_ms'].values()):.3f}, {r['times_faster']:.2f}" for r in (quarter, tenth)]
        parts = " + ".join(f"{ms:.3f}" for ms in tenth["launches_ms"].values())
        lines.append(
            f"| {tenth['board']}, {tenth['batch']} | {tenth['tokens']} | {tenth['tile']} | {tenth['dense_ms']:.3f} | "
            f"{times[0]} | {times[1]} | {parts} |"
        )
    return "\n".join(lines)


def show(rows: list[dict[str, Any]]) -> None:
    cells = []
    for r in rows:
        wanted = REQUIRED.get((r["board"], r["tokens"])) if math.isclose(r["keep"], 0.10) else None
        parts = " + ".join(f"{ms:.3f}" for ms in r["launches_ms"].values())
        need = f"{wanted[0]:g}, aim {wanted[1]:g}" if wanted else ""
        cells.append([r["board"], str(r["tokens"]), f"{r['keep']:g}", str(r["tile"]), f"{r['dense_ms']:.3f}", parts,
                      f"{r['times_faster']:.2f}", need])  # fmt: skip
    names = ["board", "tokens", "keep", "tile", "dense, ms", "launches, ms", "times faster", "required"]
    print_table("A roofline, not run", names, cells)


@click.command()
@click.option("--board", "boards", type=click.Choice(list(SHOWN)), multiple=True, default=tuple(SHOWN))
@click.option("--docs", is_flag=True, help="Renew the table of docs/gpu.md.")
@click.option("--table", "renew", is_flag=True, help="Renew the package's table: some twenty minutes.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for gpu_bound.json.")
def main(boards: tuple[str, ...], docs: bool, renew: bool, output: Path | None) -> None:
    rows = shown(boards)
    show(rows)
    if docs:
        renew_docs({"roofline": markdown(rows)})
    if renew:
        TABLE.write_text(_a_line_each(table()), encoding="utf-8")
    if output:
        sources = [
            *(ROOT / "sparsifiner_edge" / "ops" / "triton").glob("*.py"),
            *Path(__file__).parent.glob("gpu_*.py"),
        ]
        subjects = [Subject(path=str(p.relative_to(ROOT)), sha256=sha256(p)) for p in sorted(sources)]
        method = {
            "what": "a roofline over machine code; nothing ran", "triton": package_version("triton"),
            "efficiency": EFFICIENCY, "stall_clocks": STALL, "dense_share": DENSE_SHARE,
            "rounds": {str(together): mean for together, mean in ROUNDS.items()},
            "heads": HEADS, "width": WIDTH, "channels": CHANNELS, "cells": CELLS, "probe": PROBE,
        }  # fmt: skip
        short = [{k: x for k, x in row.items() if not isinstance(x, dict)} | row["launches_ms"] for row in rows]
        write_summary(
            output / "gpu_bound.json", Result("evaluation", subjects, method, {"rows": rows}, {"rows": short})
        )


if __name__ == "__main__":
    main()
