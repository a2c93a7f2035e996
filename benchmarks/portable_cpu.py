"""The portable file against the dense export in ONNX Runtime on this CPU.

    python benchmarks/portable_cpu.py [--img-size 518 --keep 0.1 --cells 25] [-o result.json]

DINOv2 ViT-S/14 with its real weights. The two run interleaved in one session of measurement (`sparsifiner-edge
profile --against`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from fidelity_subject import weights_file
from msgspec.structs import replace
from summary import brief, write_summary

from sparsifiner_edge.cli.common import err_console
from sparsifiner_edge.demo import material
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.profiles.profile import profile_bundle
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result
from sparsifiner_edge.sparse.student import sparsify


@click.command()
@click.option("--img-size", default=518, show_default=True)
@click.option("--keep", default=0.10, show_default=True)
@click.option("--cells", default=25, show_default=True)
@click.option("--seconds", default=20.0, show_default=True, help="Least time measured per bundle.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Result JSON to write.")
def main(img_size: int, keep: float, cells: int, seconds: float, output: Path | None) -> None:
    with tempfile.TemporaryDirectory() as name, err_console.status("exporting and measuring"):
        folder = Path(name)
        options = {"weights": weights_file(), "img_size": img_size}
        student = sparsify(material.DINOV2, folder / "student", keep=keep, cells=cells, **options)
        sparse = export_bundle(student, folder / "sparse")
        dense = export_bundle(material.DINOV2, folder / "dense", **options)
        result = profile_bundle(sparse, against=dense, seconds=seconds, kernels="portable")
        # The folder is gone when this is read.
        subjects = [replace(subject, path=Path(str(subject.path)).name) for subject in result.subjects]
    statistics = write_record(result.statistics)
    click.echo(statistics["comparison"]["sentence"])
    if output:
        found = Result("comparison", subjects, result.method, result.samples, statistics)
        write_summary(output, found, method=brief(write_record(result.method)))


if __name__ == "__main__":
    main()
