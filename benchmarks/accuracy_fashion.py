"""What `accuracy.py` measures on Fashion-MNIST: neighbours and a linear probe on frozen features of what it trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_images import GALLERY, SIZE
from fashion import Clothes, fashion_mnist
from fidelity_subject import weights_file

from sparsifiner_edge.demo import material
from sparsifiner_edge.evaluate.classes import fit_neighbours, fit_probe
from sparsifiner_edge.export.export import export_bundle
from sparsifiner_edge.profiles.stats import small_sample_mean
from sparsifiner_edge.records import write_record
from sparsifiner_edge.runtime import open_session

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "keep .10": ("edge", {"keep": 0.1}), "keep .25, merge 8": ("merge", {"keep": 0.25, "merge": (8,)}),
}  # fmt: skip
"""Row to the training that it measures, and its budget."""


def fashion_bundle(work: Path, label: str) -> Path:
    """What Fashion-MNIST is measured with; names hold the trained weights' hash, so that none outlives its student."""
    if label == "teacher":
        source, name, options = material.DINOV2, "teacher", {"weights": weights_file(), "img_size": SIZE}
    else:
        student, options = ROWS[label]
        source = work / student
        digest = json.loads((source / "config.json").read_text())["weights_sha256"]
        name = f"{label.replace(' ', '-').replace(',', '')}-{digest[:8]}"
    made = work / f"bundle-{name}"
    return made if made.exists() else export_bundle(source, made, **options)


def features(bundle: Path, pictures: Clothes, tell: Any) -> Any:
    """Class features of labelled images, kept on disk."""
    path = bundle.with_name(f"features-{bundle.name}-{pictures.name.split()[-1]}.npy")
    if path.exists():
        return np.load(path)
    rows = []
    with open_session(bundle) as session:
        for number in range(len(pictures)):
            rows.append(session.infer({"image": pictures.load(number, SIZE)[None]})["features"][0])
            if number % 100 == 0:
                tell(f"{bundle.name}: {number} of {len(pictures)}")
    np.save(path.with_suffix(".part.npy"), np.stack(rows))
    path.with_suffix(".part.npy").rename(path)
    return np.stack(rows)


def fashion(work: Path, tell: Any) -> dict[str, Any]:
    """Neighbours and linear probe on frozen features: the teacher, and what of `ROWS` is trained."""
    gallery, queries = fashion_mnist("train").first(GALLERY), fashion_mnist("test")
    right: dict[str, dict[str, Any]] = {"knn": {}, "linear": {}}
    for label in ("teacher", *(label for label, (student, _) in ROWS.items() if (work / student).exists())):
        bundle = fashion_bundle(work, label)
        known, asked = (features(bundle, pictures, tell) for pictures in (gallery, queries))
        for metric, fit in (("knn", fit_neighbours), ("linear", fit_probe)):
            tell(f"{label}: {metric}")
            right[metric][label] = fit(known, gallery.labels).predict(asked) == queries.labels
    return {
        metric: {
            label: {
                "subject_percent": 100 * float(ours.mean()),
                "teacher_percent": 100 * float(found["teacher"].mean()),
                "difference_points": write_record(small_sample_mean(100.0 * ours - 100.0 * found["teacher"])),
            }
            for label, ours in found.items()
            if label != "teacher"
        }
        for metric, found in right.items()
    }
