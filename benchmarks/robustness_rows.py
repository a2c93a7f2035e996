"""Rows of `robustness.py`'s result: read, written, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from sparsifiner_edge.cli.common import print_table
from sparsifiner_edge.evaluate.robustness import RobustnessResult
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result


class Row(NamedTuple):
    """One student's part of the result, as it is written."""

    subjects: list[Any]
    method: dict[str, Any]
    samples: dict[str, Any]
    statistics: dict[str, Any]


def row_of(found: RobustnessResult, macs: float) -> Row:
    method = write_record(found.method) | {"images": len(found.method.images)}
    statistics = {"macs": macs, **write_record(found.statistics)}
    return Row(found.subjects, method, found.samples, statistics)


def rows_of(result: Result) -> dict[str, Row]:
    """The rows of an earlier result."""
    return {
        label: Row(result.subjects[2 * place : 2 * place + 2], result.method[label], samples, result.statistics[label])
        for place, (label, samples) in enumerate(result.samples.items())
    }


def as_result(rows: dict[str, Row]) -> Result:
    """All of them as one result."""
    subjects = [subject for row in rows.values() for subject in row.subjects]
    method = {label: row.method for label, row in rows.items()}
    samples = {label: row.samples for label, row in rows.items()}
    statistics = {label: row.statistics for label, row in rows.items()}
    return Result("comparison", subjects, method, samples, statistics)


def show(rows: dict[str, Row], title: str) -> None:
    """Clean, and what is lost to the fifteen and to a camera's own."""
    table = []
    for label, row in rows.items():
        for score, groups in row.statistics["stability"].items():
            clean = row.statistics["clean"][score]
            extra = [groups[group]["extra_lost"] for group in ("common", "camera")]
            table.append([
                f"{label}: {score}", row.method["images"], f"{row.statistics['macs'] / 1e9:.1f}",
                f"{100 * clean['teacher']:.1f}", f"{100 * clean['subject']:.1f}",
                f"{100 * groups['common']['teacher_lost']['value']:.1f}",
                *(f"{100 * x['value']:+.2f} ({100 * x['low']:+.2f} to {100 * x['high']:+.2f})" for x in extra),
            ])  # fmt: skip
    head = ["", "images", "G MACs", "dense, clean", "clean", "dense loses", "extra loss, ImageNet-C", "and a camera's"]
    print_table(title, head, table)


def draw(rows: dict[str, Row], tasks: Sequence[str], required: float, path: Path) -> None:
    """The extra loss under each corruption, a panel per task, points per trained student, with intervals."""
    figure = Figure(figsize=(10, 4 * len(tasks)), layout="constrained")
    for axes, task in zip(figure.subplots(len(tasks), squeeze=False)[:, 0], tasks, strict=True):
        own = {
            label: row for label, row in rows.items() if label.startswith(f"{task}: ") and label.endswith(", trained")
        }
        for number, (label, row) in enumerate(own.items()):
            (groups,) = row.statistics["stability"].values()
            names = [*row.method["corruptions"], "common", "camera"]
            points = [{at: 100 * groups[one]["extra_lost"][at] for at in ("value", "low", "high")} for one in names]
            spread = [[x["value"] - x["low"] for x in points], [x["high"] - x["value"] for x in points]]
            places = np.arange(len(names)) + 0.15 * (number - (len(own) - 1) / 2)
            name = label.removeprefix(f"{task}: ").removesuffix(", trained")
            axes.errorbar(places, [x["value"] for x in points], spread, fmt="o", markersize=3, linewidth=1, label=name)
            axes.set_xticks(range(len(names)), [one.replace("_", " ") for one in names], rotation=60, ha="right")
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.axhline(required, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(f"{task}: points lost beyond the dense model", fontsize=10)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=80)
