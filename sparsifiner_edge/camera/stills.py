"""A bundle on still pictures: one record per picture."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import asdict

from sparsifiner_edge.camera.answers import PictureRecord
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
) -> Iterator[PictureRecord]:
    """Run a bundle on a picture, or on every picture below a folder.

    Args:
        bundle: its folder.
        source: a picture or a folder.
        backend, threads, kernels: see `open_session`.
        top, threshold, public_key: see `Model`.

    Yields:
        Per picture its record; of one in a folder that cannot be read, why.

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
                yield PictureRecord(str(path), error=error.what)


def _record(model: Model, path: Path) -> PictureRecord:
    start = time.perf_counter_ns()
    image = _picture(model, path)
    ready = time.perf_counter_ns()
    outputs = model.infer(image)
    done = time.perf_counter_ns()
    answer = asdict(model.answer(outputs))
    return PictureRecord(str(path), (ready - start) / 1e6, (done - ready) / 1e6, **answer)


def _picture(model: Model, path: Path) -> Picture:
    if model.fit.letterbox:
        return fit_pillow(open_picture(path), model.fit)
    return load_picture(path, model.fit.size)
