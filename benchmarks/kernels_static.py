"""Reports static properties of the CUDA kernels without a GPU: registers, spills, shared memory, occupancy.

    python benchmarks/kernels_static.py [--capability 87 ...] [--ptxas FILE] [--docs] [-o FOLDER]

Triton compiles the kernels ahead of time. `--docs` updates the table of docs/nvidia.md from the result.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import click
from summary import write_summary

from sparsifiner_edge.artifacts import sha256
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.machine import package_version
from sparsifiner_edge.ops.triton.compile import CAPABILITIES, Compiled, compile_schedule, resources
from sparsifiner_edge.ops.triton.schedule import Schedule
from sparsifiner_edge.ops.triton.schedule_layer import schedule_layer
from sparsifiner_edge.results import Result, Subject

ROOT = Path(__file__).parent.parent
PATCHES, HEADS, KEYS, CELL, CHANNELS = 1024, 6, 103, 41, 24
SHOWN = (("float16", 64, 64), ("float16", 64, 16), ("bfloat16", 64, 64))
"""Element type, head dimension and tile to compile."""

_KIB, PTX = 1024, 85
LIMITS = {
    80: (32, 64, 164),
    86: (16, 48, 100),
    87: (16, 48, 164),
    89: (24, 48, 100),
    90: (32, 64, 228),
    100: (32, 64, 228),
    110: (24, 48, 228),
    120: (24, 48, 100),
}
"""Blocks, warps and KiB of shared memory of a multiprocessor, by compute capability times ten.

Blocks and memory: `cuda_occupancy.h` of CUDA 13.5. Warps: CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability".
"""


class Occupancy(NamedTuple):
    """Occupancy of a multiprocessor.

    Attributes:
        blocks: Resident blocks.
        share: Share of its warps, 0 to 1.
        limit: Resource that limits the blocks.
    """

    blocks: int
    share: float
    limit: str


def occupancy(capability: int, warps: int, registers: int, shared: int) -> Occupancy:
    """Return the occupancy of a kernel, by warps per block, registers per thread, bytes per block."""
    blocks, most_warps, kib = LIMITS[capability]
    fit = {
        # 65536 in four parts, allocated to warps 256 at a time; a warp cannot straddle two.
        "registers": 16384 // _up(registers * 32, 256) * 4 // warps,
        "shared memory": kib * _KIB // _up(shared + _KIB, 128),  # of each block's the driver keeps 1 KiB
        "warps": most_warps // warps,
        "blocks": blocks,
    }
    limit = min(fit, key=lambda name: fit[name])
    return Occupancy(fit[limit], fit[limit] * warps / most_warps, limit)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def layer(dtype: str, width: int, tile: int) -> Schedule:
    """Return a layer of 1025 tokens and keep .10, one image."""
    a: dict[str, Any] = {
        "num_heads": HEADS,
        "num_prefix": 1,
        "tile": tile,
        "key_pool": CELL,
        "scale": width**-0.5,
        "query_pool": 8,
        "keys": KEYS,
        "value_power": 2.0,
    }
    return schedule_layer([(1, PATCHES + 1, 3 * HEADS * width), *[(HEADS, width, CHANNELS)] * 2], a, dtype)


def describe(dtype: str, width: int, tile: int, made: Compiled, ptxas: Path | None) -> dict[str, Any]:
    registers, spilled = resources(made, ptxas)
    resident = occupancy(made.capability, made.launch.warps, registers, made.shared)
    return {
        "capability": made.capability,
        "kernel": made.launch.kernel,
        "dtype": dtype,
        "head_dimension": width,
        "tile": tile,
        "warps": made.launch.warps,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": made.shared,
        "resident_blocks": resident.blocks,
        "occupancy": resident.share,
        "limited_by": resident.limit,
        "cubin_bytes": len(made.cubin),
    }


def measure(capabilities: tuple[int, ...], ptxas: Path | None) -> list[dict[str, Any]]:
    rows = []
    for capability in capabilities:
        for dtype, width, tile in SHOWN:
            err_console.print(f"sm_{capability}: {dtype}, d {width}, tile {tile}")
            made = compile_schedule(layer(dtype, width, tile), capability, ptxas and PTX)
            rows += [describe(dtype, width, tile, each, ptxas) for each in made]
    return rows


def resources_markdown(rows: list[dict[str, Any]]) -> str:
    """Return registers / KiB of shared memory / occupancy of each kernel, float16, d 64, by generation."""
    usual = [r for r in rows if (r["dtype"], r["head_dimension"]) == ("float16", 64)]
    columns = sorted({r["capability"] for r in usual})
    lines = [
        "| kernel, tile | " + " | ".join(f"sm_{c}" for c in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    cells: dict[str, dict[int, str]] = {}
    for r in usual:
        spill = f" ({r['spilled_bytes']} B spilled)" if r["spilled_bytes"] else ""
        text = f"{r['registers']} / {r['shared_bytes'] / 1024:.0f} / {r['occupancy']:.0%}{spill}"
        cells.setdefault(f"{r['kernel']}, {r['tile']}", {})[r["capability"]] = text
    lines += [f"| {name} | " + " | ".join(row.get(c, "") for c in columns) + " |" for name, row in cells.items()]
    return "\n".join(lines)


def renew_docs(tables: dict[str, str]) -> None:
    """Replace the tables between `<!-- NAME -->` and `<!-- end -->` of docs/nvidia.md."""
    path = ROOT / "docs" / "nvidia.md"
    text = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda m, table=table: f"{m[1]}{table}\n{m[2]}",
            text,
            flags=re.DOTALL,
        )
    path.write_text(text, encoding="utf-8")


@click.command()
@click.option("--capability", "capabilities", type=int, multiple=True, default=CAPABILITIES, help="Repeatable.")
@click.option("--ptxas", type=click.Path(path_type=Path, exists=True), help="Another assembler, of CUDA 12.6 or later.")
@click.option("--docs", is_flag=True, help="Renew the tables of docs/nvidia.md.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for kernels_static.json.")
def main(capabilities: tuple[int, ...], ptxas: Path | None, docs: bool, output: Path | None) -> None:
    rows = measure(capabilities, ptxas)
    names = ("capability", "kernel", "dtype", "head_dimension", "tile", "registers", "spilled_bytes", "shared_bytes")
    cells = [[*(str(r[n]) for n in names), f"{r['occupancy']:.0%}", r["limited_by"]] for r in rows]
    print_table("Compiled, not run", [*names, "occupancy", "limit"], cells)
    if docs:
        renew_docs({"resources": resources_markdown(rows)})
    if output:
        sources = sorted((ROOT / "sparsifiner_edge" / "ops" / "triton").glob("*.py"))
        subjects = [Subject(path=str(p.relative_to(ROOT)), sha256=sha256(p)) for p in sources]
        method = {
            "what": "static: compiled ahead of time, never run",
            "triton": package_version("triton"),
            "patches": PATCHES,
            "keys": KEYS,
        }
        result = Result("evaluation", subjects, method, {}, {"kernels": rows})
        write_summary(output / "kernels_static.json", result)


if __name__ == "__main__":
    main()
