"""A bundle whose score `novelty` is of other images: frames of the place where it runs."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import numpy_helper

from sparsifiner_edge.arrays import Array, Pixels
from sparsifiner_edge.artifacts import new_folder
from sparsifiner_edge.bounds import finite_number
from sparsifiner_edge.bundle.entries import NoveltyFit
from sparsifiner_edge.bundle.golden import read_golden
from sparsifiner_edge.bundle.manifest import AGAIN, MODEL_FILE
from sparsifiner_edge.bundle.store import GOLDEN_FILE, Bundle, open_bundle, seal_bundle
from sparsifiner_edge.camera.capture import Capture, Frame
from sparsifiner_edge.camera.model import NO_SCORE
from sparsifiner_edge.camera.prepare import Fit
from sparsifiner_edge.camera.service import STALL_S, stopping
from sparsifiner_edge.camera.sources import Source, parse_source, require_decoder
from sparsifiner_edge.camera.status import Status
from sparsifiner_edge.errors import ArtifactError, ConfigError, ImageError
from sparsifiner_edge.images import Item, evenly, list_images, load_image
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.novelty import FALSE_ALARMS, LEAST_IMAGES, NOVELTY, Density, fit_density
from sparsifiner_edge.ops.graph import drop_unused
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.onnxruntime.session import OrtSession

FRAMES = 1000
"""Frames at most that the score is fitted to, where nothing else is said."""
_SILENT_S = 30.0


class _SilentError(ImageError):
    """A camera gives no frame any more."""


def recalibrate_bundle(
    bundle: str | Path,
    source: str,
    output: str | Path,
    *,
    frames: int = FRAMES,
    every_s: float = 0.0,
    false_alarms: float = FALSE_ALARMS,
    progress: Progress | None = None,
) -> Path:
    """Fit the score `novelty` of a bundle anew, and write the bundle elsewhere, or in its own place.

    Engines are left out, for they hold the numbers of before, and so is a signature.

    Args:
        bundle: a folder. source: frames as it shall find usual, as `run --source` takes them: of images and videos
            evenly taken over the whole, of a live source the next; SIGINT or SIGTERM ends that, and so does a silence
            of half a minute: what it gave until then counts.
        output: folder to write. frames: most that it is fitted to. every_s: of a live source, seconds at least from one
            of them to the next. false_alarms: share of such that may score above 1.
        progress: see `Progress`; counts frames.

    Returns:
        The new folder.

    Raises:
        ConfigError: the bundle gives no such score, the frames are too few, or all the same; `every_s` of a source that
            is not live.
        SparsifinerError: an unusable bundle or source; nothing is written.
    """
    opened, frames_of = open_bundle(Path(bundle)), parse_source(source)
    every_s = finite_number(every_s, "every_s")
    if every_s and not frames_of.live:
        raise ConfigError(f"{frames_of.shown} is not live: its frames are evenly taken.", "Leave --every out.")
    model = opened.model()
    if all(value.name != NOVELTY for value in model.graph.output):
        raise ConfigError(f"{bundle} gives no score {NOVELTY!r}.", NO_SCORE)
    path, batch = opened.folder / MODEL_FILE, opened.manifest.batch or 1
    with OrtSession(path, _statistics_alone(model), available_cores(), "auto", opened.precision) as session:

        def row_of(image: Pixels) -> Array:
            (found,) = session.infer({"image": np.repeat(image[None], batch, 0)}).values()
            return np.asarray(found[0])

        rows, ended = _rows(_frames(opened, frames_of, frames, every_s), frames, row_of, progress)
    density = fit_density(np.stack(rows) if rows else np.zeros((0, 2)), false_alarms, video=True)
    fit = NoveltyFit(len(rows), false_alarms, "site", ended)
    with new_folder(Path(output), "bundle") as made:
        _write(opened, density, fit, made)
    return Path(output)


def _rows(
    images: Iterable[Item], most: int, row_of: Callable[[Item], Array], progress: Progress | None = None
) -> tuple[list[Array], str | None]:
    """Of at most `most` images, evenly taken however many come; and why none came any more, if not by itself.

    Every second is dropped whenever there are twice as many, and of those that follow so many fewer are looked at.
    """
    rows, step, ended = list[Array](), 1, None
    try:
        for number, image in enumerate(images):
            if number % step == 0:
                rows.append(row_of(image))
            if len(rows) == 2 * most:
                rows, step = rows[::2], 2 * step
            if progress:
                progress("frames", number + 1, max(number + 1, most))
    except _SilentError:
        if len(rows) < LEAST_IMAGES:
            raise
        ended = f"no frame came for {_SILENT_S:.0f} s"
    return evenly(rows, most), ended


def _frames(bundle: Bundle, source: Source, most: int, every_s: float) -> Iterator[Pixels]:
    """Of a folder evenly taken images, of a video all, of a live source at most so many."""
    size = bundle.image_size
    if source.kind == "images":
        yield from (load_image(path, size) for path in evenly(list_images(Path(source.location)), most))
        return
    require_decoder(source)
    status = Status(source.shown, lambda _: None)
    # Part of a video says nothing of the rest: a signal ends the command, not the video.
    asked = stopping() if source.live else contextlib.nullcontext(threading.Event())
    with asked as stop, Capture(source, Fit(size), 25.0, STALL_S, status) as capture:
        count, due_ns = 0, 0
        while (count < most or not source.live) and (frame := _next(capture, stop, source, status)) is not None:
            if source.live and frame.times.captured_ns < due_ns:
                continue
            count, due_ns = count + 1, frame.times.captured_ns + round(every_s * 1e9)
            yield frame.image


def _next(capture: Capture, stop: threading.Event, source: Source, status: Status) -> Frame | None:
    """None at the end, or once `stop` is set."""
    for _ in itertools.repeat(None, int(_SILENT_S * 10)):
        if stop.is_set():
            return None
        frame = capture.mailbox.take(0.1)
        if frame is not None:
            return frame
        if capture.failure is not None:
            raise ImageError(f"{source.shown} cannot be read as a video: {capture.failure}.", "Replace or repair it.")
        if capture.mailbox.closed:
            return None
    reason = f": {status.last_reason}" if status.last_reason else ""
    raise _SilentError(f"{source.shown} gave no frame for {_SILENT_S:.0f} s{reason}.", "Check that it is there.")


def _statistics_alone(model: Any) -> bytes:
    """The file with the statistics of an image as its only output."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    mean = f"{NOVELTY}.mean"
    read = [name for node in made.graph.node if mean in node.input for name in node.input if name != mean]
    if not read:
        raise ArtifactError(f"The output {NOVELTY!r} is not the score that exports write.", AGAIN)
    del made.graph.output[:]
    made.graph.output.append(onnx.helper.make_empty_tensor_value_info(read[0]))
    drop_unused(made)
    return bytes(made.SerializeToString())


def _write(bundle: Bundle, density: Density, fit: NoveltyFit, folder: Path) -> None:
    engines = {engine.file for engine in bundle.manifest.engines}
    bundle.copy(set(bundle.manifest.files) - engines, folder)
    for path in folder.rglob("*.onnx"):
        path.write_bytes(_with(path.read_bytes(), density))
    model = (folder / MODEL_FILE).read_bytes()
    inputs, outputs = read_golden(bundle)
    with OrtSession(folder / MODEL_FILE, model, available_cores(), "portable", bundle.precision) as session:
        outputs[NOVELTY] = session.infer(inputs)[NOVELTY]
    arrays: dict[str, Any] = {f"input.{name}": x for name, x in inputs.items()} | {
        f"output.{name}": x for name, x in outputs.items()
    }
    np.savez_compressed(folder / GOLDEN_FILE, **arrays)
    seal_bundle(folder, msgspec.structs.replace(bundle.manifest, engines=(), novelty=fit))


def _with(content: bytes, density: Density) -> bytes:
    """A file's content with other numbers under the same names."""
    model = onnx.load_from_string(content)
    values: dict[str, Array] = {f"{NOVELTY}.{name}": value for name, value in density._asdict().items()}
    for tensor in model.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return bytes(model.SerializeToString())
