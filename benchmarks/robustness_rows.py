"""Rows of `robustness.py`'s result: read, written, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from msgspec.structs import replace

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.cli.common import err_console, print_table
from sparsifiner_edge.corruptions import CAMERA
from sparsifiner_edge.evaluate.robustness import CLEAN, RobustnessResult
from sparsifiner_edge.profiles.stats import small_sample_mean
from sparsifiner_edge.records import write_record
from sparsifiner_edge.results import Result, Subject


class Row(NamedTuple):
    """One student's part of the result, as it is written."""

    subjects: list[Subject]
    method: dict[str, Any]
    samples: dict[str, Any]
    statistics: dict[str, Any]


def row_of(found: RobustnessResult, macs: float) -> Row:
    method = write_record(found.method) | {"images": len(found.method.images)}
    statistics = {"macs": macs, **write_record(found.statistics)}
    return Row(_named(found.subjects), method, found.samples, statistics)


def _named(subjects: Sequence[Subject]) -> list[Subject]:
    """Without the folders that they lay in."""
    return [replace(subject, path=Path(str(subject.path)).name) for subject in subjects]


def rows_of(result: Result) -> dict[str, Row]:
    """The rows of an earlier result."""
    subjects = _named(result.subjects)
    return {
        label: Row(subjects[2 * place : 2 * place + 2], result.method[label], samples, result.statistics[label])
        for place, (label, samples) in enumerate(result.samples.items())
    }


def kept_rows(earlier: dict[str, Row], rows: dict[str, Row]) -> dict[str, Row]:
    """Those of an earlier result that stand beside the new ones of their task; others are left out, and it is said."""
    images = {label.partition(":")[0]: row.method["images"] for label, row in rows.items()}
    kept = {}
    for label, row in earlier.items():
        if images.get(label.partition(":")[0], row.method["images"]) == row.method["images"]:
            kept[label] = row
        elif label not in rows:
            err_console.print(f"{label}: of {row.method['images']} images, left out")
    return kept


def differences(rows: dict[str, Row], rivals: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Extra loss of ours less that of each rival, image by image, over ImageNet-C's corruptions and over a camera's; of
    a rival that was not trained, untrained.
    """
    found: dict[str, dict[str, Any]] = {}
    for label, row in rows.items():
        task, name, _ = parts_of(label)
        for rival in rivals:
            names = [one for one in (f"{rival}, trained", f"{rival}, untrained") if f"{task}: {one}" in rows]
            if not name.startswith("ours") or not names:
                continue
            for score in row.samples:
                lost = [extra_lost(rows[one].samples[score]) for one in (label, f"{task}: {names[0]}")]
                pairs = {kind: small_sample_mean(lost[0][kind] - lost[1][kind]) for kind in lost[0]}
                found[f"{label} less {names[0]}: {score}"] = write_record(pairs)
    return found


def parts_of(label: str) -> tuple[str, str, str]:
    """Task, student and stage."""
    task, _, rest = label.partition(": ")
    name, _, stage = rest.rpartition(", ")
    return task, name, stage


def extra_lost(samples: dict[str, dict[str, list[float]]]) -> dict[str, Array]:
    """By kind of corruption one value per image: what was lost beyond the dense model."""
    values = {label: np.array(roles["subject"]) - np.array(roles["teacher"]) for label, roles in samples.items()}
    kinds: dict[str, list[Array]] = {}
    for label, x in values.items():
        if label != CLEAN:
            kinds.setdefault("camera" if label.rpartition(" ")[0] in CAMERA else "common", []).append(x)
    return {kind: values[CLEAN] - np.mean(found, 0) for kind, found in kinds.items()}


def as_result(rows: dict[str, Row], apart: dict[str, dict[str, Any]]) -> Result:
    """All of them as one result."""
    subjects = [subject for row in rows.values() for subject in row.subjects]
    method = {label: row.method for label, row in rows.items()}
    samples = {label: row.samples for label, row in rows.items()}
    statistics: dict[str, Any] = {label: row.statistics for label, row in rows.items()}
    statistics["differences"] = apart
    return Result("comparison", subjects, method, samples, statistics)


def short(rows: dict[str, Row]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Method and statistics for the summary: a line for each kind of corruption, and one for each alone, by its extra
    loss.
    """
    method = {label: {"images": row.method["images"], "metric": row.method["metric"]} for label, row in rows.items()}
    statistics = {}
    for label, row in rows.items():
        for score, groups in row.statistics["stability"].items():
            kinds = {kind: groups[kind] for kind in ("common", "camera")}
            each = {name: groups[name]["extra_lost"] for name in row.method["corruptions"]}
            clean = row.statistics["clean"][score]
            statistics[f"{label}: {score}"] = {"macs": row.statistics["macs"], "clean": clean, **kinds, "each": each}
    return method, statistics


def show(rows: dict[str, Row], apart: dict[str, dict[str, Any]], title: str) -> None:
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
                *map(in_points, extra),
            ])  # fmt: skip
    head = ["", "images", "G MACs", "dense, clean", "clean", "dense loses", "extra loss, ImageNet-C", "and a camera's"]
    print_table(title, head, table)
    table = [[label, *(in_points(x[kind]) for kind in ("common", "camera"))] for label, x in apart.items()]
    print_table("Extra loss of ours less a rival's, image by image", ["", "ImageNet-C", "a camera's"], table)


def in_points(x: dict[str, float]) -> str:
    """An estimate, of 100."""
    return f"{100 * x['value']:+.2f} ({100 * x['low']:+.2f} to {100 * x['high']:+.2f})"


def draw(rows: dict[str, Row], tasks: Sequence[str], required: float, path: Path) -> None:
    """The extra loss under each corruption, a panel per task, points per student, with intervals."""
    figure = Figure(figsize=(10, 4 * len(tasks)), layout="constrained")
    for axes, task in zip(figure.subplots(len(tasks), squeeze=False)[:, 0], tasks, strict=True):
        own = {label: row for label, row in rows.items() if parts_of(label)[0] == task}
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
