"""Fidelity of untrained students: cosine to dense DINOv2 ViT-S/14 over eight photographs.

    python benchmarks/fidelity.py [-o result.json]

Calibrated on other pictures (see `sparsifiner_edge.material`). Prints a table; writes one result JSON.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import safetensors.numpy

from sparsifiner_edge import material
from sparsifiner_edge.cli.common import err_console, output_option, print_table
from sparsifiner_edge.evaluate.cosine import evaluate_student
from sparsifiner_edge.results import new_result, write_result
from sparsifiner_edge.sparse.student import sparsify

SETTINGS = ((224, 0.25, 16), (224, 0.10, 16), (518, 0.25, 25), (518, 0.10, 25), (518, 0.05, 49))
REQUIRED = {(224, 0.25, 16): 0.988, (518, 0.10, 25): 0.978}
"""Least patch cosine that this project accepts of itself."""


@click.command()
@output_option("Result JSON to write.", required=False)
def main(output: Path | None) -> None:
    rows, statistics, samples, subjects, method = [], {}, {}, [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "dinov2.safetensors"
        safetensors.numpy.save_file(material.dinov2_state(), weights)
        pictures = folder / "calibration"
        pictures.mkdir()
        for path in material.calibration_pictures():
            (pictures / path.name).symlink_to(path)
        for setting in SETTINGS:
            key = f"{setting[0]} px, keep {setting[1]:.2f}, {setting[2]} cells"
            with err_console.status(key):
                result = _measure(folder, weights, pictures, *setting)
            found = result["statistics"]
            features, patches = (found[f"{kind}_cosine"]["mean"]["value"] for kind in ("features", "patches"))
            wanted = REQUIRED.get(setting)
            rows.append([key, f"{features:.4f}", f"{patches:.4f}", f"{wanted:.3f}" if wanted else ""])
            statistics[key], samples[key], method[key] = found, result["samples"], result["method"]
            subjects += result["subjects"]
    print_table(
        "Cosine to dense DINOv2 ViT-S/14, untrained, eight photographs", ["", "CLS", "patches", "required"], rows
    )
    if output:
        write_result(output, new_result("evaluation", subjects, method, samples, statistics))
    missed = [row[0] for row in rows if row[3] and float(row[2]) < float(row[3])]
    if missed:
        raise click.ClickException(f"below the required patch cosine: {'; '.join(missed)}")


def _measure(folder: Path, weights: Path, pictures: Path, size: int, keep: float, cells: int) -> dict[str, Any]:
    student = sparsify(
        material.DINOV2,
        folder / f"student_{size}_{keep}",
        weights=weights,
        img_size=size,
        keep=keep,
        cells=cells,
        calibrate=pictures,
    )
    return evaluate_student(student, material.photographs())


if __name__ == "__main__":
    main()
