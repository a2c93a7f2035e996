"""A bundle on still pictures: one record per picture."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsifiner_edge.camera.model import TOP, Model
from sparsifiner_edge.camera.prepare import Picture, fit_pillow
from sparsifiner_edge.errors import PictureError
from sparsifiner_edge.pictures import list_pictures, load_picture, open_picture


def run_pictures(
    bundle: str | Path,
    source: str | Path,
    backend: str = "onnxruntime",
    threads: int | None = None,
    top: int = TOP,
    threshold: float = 0.0,
    public_key: Path | None = None,
    kernels: str = "auto",
) -> Iterator[dict[str, Any]]:
    """Run a bundle on a picture, or on every picture below a folder.

    Args:
        bundle: its folder.
        source: a picture or a folder.
        backend, threads, kernels: see `open_session`.
        top, threshold, public_key: see `Model`.

    Yields:
        Per picture: `source`, `preprocess_ms`, `infer_ms`, and `top` (label and probability of at most `top` classes)
        for a classifier, else `features`. A picture of a folder that cannot be read gives `source` and `error`.

    Raises:
        ConfigError: the bundle takes a fixed batch above 1.
        PictureError: `source` itself is unusable.
        SparsifinerError: the bundle or backend is unusable.
    """
    folder, pictures = Path(bundle), list_pictures(Path(source))
    with Model(folder, backend, threads, top, threshold, public_key, kernels) as model:
        for path in pictures:
            try:
                yield _record(model, path)
            except PictureError as error:
                if len(pictures) == 1:
                    raise
                yield {"source": str(path), "error": error.what}


def _record(model: Model, path: Path) -> dict[str, Any]:
    start = time.perf_counter_ns()
    image = _picture(model, path)
    ready = time.perf_counter_ns()
    outputs = model.infer(image)
    done = time.perf_counter_ns()
    times = {"preprocess_ms": (ready - start) / 1e6, "infer_ms": (done - ready) / 1e6}
    return {"source": str(path)} | times | model.answer(outputs)


def _picture(model: Model, path: Path) -> Picture:
    if model.fit.letterbox:
        return fit_pillow(open_picture(path), model.fit)
    return load_picture(path, model.fit.size)
