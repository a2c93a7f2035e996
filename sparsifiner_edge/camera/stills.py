"""A bundle on still pictures: one record per picture."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsifiner_edge.artifacts import open_bundle, picture_size
from sparsifiner_edge.errors import ArtifactError, ConfigError, PictureError
from sparsifiner_edge.pictures import list_pictures, load_picture
from sparsifiner_edge.runtime import Session, open_session

Array = npt.NDArray[Any]
TOP = 5


def run_pictures(
    bundle: str | Path, source: str | Path, backend: str = "onnxruntime", threads: int | None = None
) -> Iterator[dict[str, Any]]:
    """Run a bundle on a picture, or on every picture below a folder.

    Yields:
        Per picture: `source`, `preprocess_ms`, `infer_ms`, and `top` (label and probability of at most five classes)
        for a classifier, else `features`. A picture of a folder that cannot be read gives `source` and `error`.

    Raises:
        ConfigError: the bundle takes a fixed batch above 1.
        PictureError: `source` itself is unusable.
        SparsifinerError: the bundle or backend is unusable.
    """
    folder, pictures = Path(bundle), list_pictures(Path(source))
    manifest = open_bundle(folder)
    size = picture_size(manifest, folder)
    labels = _labels(folder, manifest)
    with open_session(folder, backend, threads) as session:
        if session.inputs[0].shape[0] not in (1, "batch"):
            raise ConfigError(
                f"{folder} takes batches of {session.inputs[0].shape[0]}.", "Export it with --batch 1 or dynamic."
            )
        for path in pictures:
            try:
                yield _record(session, path, size, labels)
            except PictureError as error:
                if len(pictures) == 1:
                    raise
                yield {"source": str(path), "error": error.what}


def _labels(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """Labels of a bundle that has them; a file that its manifest does not name is none of the bundle's."""
    if "labels.txt" not in manifest["files"]:
        return []
    return (folder / "labels.txt").read_text(encoding="utf-8", errors="replace").splitlines()


def _record(session: Session, path: Path, size: int, labels: list[str]) -> dict[str, Any]:
    start = time.perf_counter_ns()
    image = load_picture(path, size)[None]
    ready = time.perf_counter_ns()
    outputs = session.infer({"image": image})
    done = time.perf_counter_ns()
    record = {"source": str(path), "preprocess_ms": (ready - start) / 1e6, "infer_ms": (done - ready) / 1e6}
    if "logits" in outputs:
        return record | {"top": _top(outputs["logits"][0], labels)}
    if "features" in outputs:
        return record | {"features": [round(float(x), 6) for x in outputs["features"][0]]}
    raise ArtifactError(f"The bundle gives {', '.join(outputs)}; needed are logits or features.", "Export it again.")


def _top(logits: Array, labels: list[str]) -> list[dict[str, Any]]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = weights / weights.sum()
    best = np.argsort(-probabilities, kind="stable")[:TOP]
    names = labels if len(labels) == len(logits) else [f"class_{i}" for i in range(len(logits))]
    return [{"class": int(i), "label": names[i], "probability": float(probabilities[i])} for i in best]
