"""A bundle on still images: one record per image."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import asdict

from sparsifiner_edge.camera.answers import ImageRecord
from sparsifiner_edge.camera.model import Model
from sparsifiner_edge.errors import ImageError
from sparsifiner_edge.images import list_images, load_image


def run_images(model: Model, source: Path) -> Iterator[ImageRecord]:
    """Run a bundle on an image, or on every image below a folder.

    Yields:
        Per image its record; of one in a folder that cannot be read, why.

    Raises:
        ImageError: `source` itself is unusable.
        SparsifinerError: so is what the model gives.
    """
    images = list_images(source)
    for path in images:
        try:
            yield _record(model, path)
        except ImageError as error:
            if len(images) == 1:
                raise
            yield ImageRecord(str(path), error=error.what)


def _record(model: Model, path: Path) -> ImageRecord:
    start = time.perf_counter_ns()
    image = load_image(path, model.size)
    ready = time.perf_counter_ns()
    outputs = model.infer(image)
    done = time.perf_counter_ns()
    return ImageRecord(str(path), (ready - start) / 1e6, (done - ready) / 1e6, **asdict(model.answer(outputs)))
