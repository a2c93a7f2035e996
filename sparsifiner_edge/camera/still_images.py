"""A bundle on still images: one record per image."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import asdict

from sparsifiner_edge.camera.answers import ImageRecord
from sparsifiner_edge.camera.model import TOP, Model
from sparsifiner_edge.camera.prepare import fit_pillow
from sparsifiner_edge.errors import ImageError
from sparsifiner_edge.images import Pixels, list_images, load_image, open_image


def run_images(
    bundle: str | Path,
    source: str | Path,
    backend: str = "onnxruntime",
    threads: int | None = None,
    top: int = TOP,
    threshold: float = 0.0,
    public_key: Path | None = None,
    kernels: str = "auto",
) -> Iterator[ImageRecord]:
    """Run a bundle on an image, or on every image below a folder.

    Args:
        bundle: its folder.
        source: an image or a folder.
        backend, threads, kernels: see `open_session`.
        top, threshold, public_key: see `Model`.

    Yields:
        Per image its record; of one in a folder that cannot be read, why.

    Raises:
        ConfigError: the bundle takes a fixed batch above 1.
        ImageError: `source` itself is unusable.
        SparsifinerError: the bundle or backend is unusable.
    """
    folder, images = Path(bundle), list_images(Path(source))
    with Model(folder, backend, threads, top, threshold, public_key, kernels) as model:
        for path in images:
            try:
                yield _record(model, path)
            except ImageError as error:
                if len(images) == 1:
                    raise
                yield ImageRecord(str(path), error=error.what)


def _record(model: Model, path: Path) -> ImageRecord:
    start = time.perf_counter_ns()
    image = _image(model, path)
    ready = time.perf_counter_ns()
    outputs = model.infer(image)
    done = time.perf_counter_ns()
    answer = asdict(model.answer(outputs))
    return ImageRecord(str(path), (ready - start) / 1e6, (done - ready) / 1e6, **answer)


def _image(model: Model, path: Path) -> Pixels:
    if model.fit.letterbox:
        return fit_pillow(open_image(path), model.fit)
    return load_image(path, model.fit.size)
