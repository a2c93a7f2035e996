"""Builds TensorRT-RTX engines of DINOv2 ViT-S/14 ahead of time without a GPU: success and build time.

    python benchmarks/engines_rtx.py [--bundles DIR] [-o profiles/results]

Models: dense; sparse with keep .25 at 224 px and .10 at 518 px; merged, with dense attention; merged, and sparse in
some layers. They are built in float16 and int8 (QDQ, target tensorrt) for compute capabilities 8.6, 8.9 and 12.0.
Bundles missing in DIR are exported first, which is not timed. Build time on a busy machine is unreliable, so processor
time is reported as well.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
from accuracy_images import linked
from fidelity_subject import weights_file
from msgspec.structs import replace
from summary import write_summary

from sparsifiner_edge import ExportOptions, ModelOptions
from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.cli.common import print_table
from sparsifiner_edge.demo import material, split
from sparsifiner_edge.errors import SparsifinerError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.results import Result, Subject
from sparsifiner_edge.runtime.build import build_engine
from sparsifiner_edge.runtime.open import find_backend
from sparsifiner_edge.sparse.student import sparsify

SETTINGS: dict[int, dict[str, dict[str, Any]]] = {
    224: {
        "dense": {},
        "sparse": {"keep": 0.25, "background_tokens": 16},
        "merged": {"keep": 1.0, "background_tokens": 16, "merge": (20, 0)},
        "mixed": {"keep": (0.25, 0.25, 0.5, 1.0), "background_tokens": 16, "merge": (20, 0)},
    },
    518: {
        "dense": {},
        "sparse": {"keep": 0.10, "background_tokens": 25},
        "merged": {"keep": 1.0, "background_tokens": 49, "merge": (160, 0)},
        "mixed": {"keep": (0.1, 0.1, 0.2, 1.0), "background_tokens": 49, "merge": (160, 0)},
    },
}
"""Pixels -> kind -> settings of the sparse model, or none. Those that merge are budgets of `merging.py`."""
CAPABILITIES = ("8.6", "8.9", "12.0")
LIMIT_S = 60.0
IMAGES = 3
"""Number of int8 calibration images: enough for a file whose build is timed, not for use."""
KEPT = ("build_seconds", "cpu_seconds", "bytes")


def compiled_kernels(engine: bytes) -> dict[str, int]:
    """Return the kernel names in an engine file of TensorRT-RTX 1.7, and the number of fused attention kernels."""
    fused = engine.count(b"struct _gemm_mha_v2_callback {")
    return {"kernels": len(re.findall(rb"__myl_[A-Za-z]+(?![A-Za-z_])", engine)) + fused, "fused_attention": fused}


def bundle(root: Path, kind: str, size: int, precision: str) -> Path:
    """Return the bundle of that name in `root`, exported if it is missing."""
    target = root / f"{kind}{size}_{precision}"
    if target.exists():
        return target
    options: dict[str, Any] = {"precision": precision}
    if precision == "int8":
        options |= {
            "calibrate": linked(root / "calibration", split.images("calibration")[:IMAGES]),
            "int8_target": "tensorrt",
        }
    settings = SETTINGS[size][kind]
    if not settings:
        model = ModelOptions(weights=weights_file(), img_size=size)
        return export_bundle(material.DINOV2, target, model=model, options=ExportOptions(**options))
    student = root / f"student_{kind}{size}"
    if not student.exists():
        sparsify(material.DINOV2, student, weights=weights_file(), img_size=size, **settings)
    return export_bundle(student, target, options=ExportOptions(**options))


def measure(source: Path) -> list[dict[str, Any]]:
    """Measure one row per compute capability; the bundle itself is not changed."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(source, Path(folder) / source.name)
        for capability in CAPABILITIES:
            row: dict[str, Any] = {"bundle": source.name, "compute_capability": capability}
            try:
                (engine,) = build_engine(copy, "tensorrt-rtx", compute_capabilities=[capability]).engines
            except SparsifinerError as error:
                rows.append(row | {"built": False, "error": error.what})
            else:
                row |= {"built": True} | {name: getattr(engine.details, name) for name in KEPT}
                rows.append(row | compiled_kernels((copy / engine.file).read_bytes()))
            click.echo(rows[-1], err=True)
    return rows


def subject(folder: Path) -> Subject:
    return replace(open_bundle(folder).subject(), path=folder.name)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    built = [row for row in rows if row["built"]]
    return {
        "engines": len(rows),
        "built": len(built),
        "limit_seconds": LIMIT_S,
        "within_limit": sum(row["build_seconds"] <= LIMIT_S for row in built),
        "within_limit_of_processor_time": sum(row["cpu_seconds"] <= LIMIT_S for row in built),
        "greatest_build_seconds": max((row["build_seconds"] for row in built), default=0.0),
        "greatest_cpu_seconds": max((row["cpu_seconds"] for row in built), default=0.0),
    }


@click.command(help=__doc__)
@click.option(
    "--bundles", type=click.Path(path_type=Path), help="Where bundles are, or are put; by default a new place."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("profiles/results"), show_default=True)
def main(*, bundles: Path | None, output: Path) -> None:
    subjects, rows = list[Subject](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as fresh:
        root = bundles or Path(fresh)
        root.mkdir(parents=True, exist_ok=True)
        for size, kinds in SETTINGS.items():
            for precision in ("fp16", "int8"):
                for kind in kinds:
                    folder = bundle(root, kind, size, precision)
                    subjects.append(subject(folder))
                    rows += measure(folder)
                    save(output, subjects, rows)
    cells = [
        [
            row["bundle"],
            row["compute_capability"],
            *(f"{row[name]:.1f}" for name in KEPT[:2]),
            f"{row['bytes'] / 1e6:.1f}",
            str(row.get("kernels", "")),
        ]
        for row in rows
        if row["built"]
    ]
    print_table("Built ahead of time", ["bundle", "compute capability", *KEPT[:2], "MB", "kernels"], cells)


def save(output: Path, subjects: list[Subject], rows: list[dict[str, Any]]) -> None:
    method = {
        "backend": "tensorrt-rtx",
        "version": str(find_backend(Execution(backend="tensorrt-rtx")).load().__version__),
        "what": "built ahead of time, in a process each, without a GPU; none of the engines was run",
        "settings": {str(size): kinds for size, kinds in SETTINGS.items()},
    }
    write_summary(
        output / "engines_rtx.json", Result("evaluation", subjects, method, {}, summary(rows) | {"rows": rows})
    )


if __name__ == "__main__":
    main()
