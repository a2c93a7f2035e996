"""From a source to records, until the source ends, enough is done, or someone asks to stop."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec.structs import asdict

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.camera.answers import FrameRecord, ImageRecord
from sparsifiner_edge.camera.capture import Capture
from sparsifiner_edge.camera.confine import confinement
from sparsifiner_edge.camera.decoder_protocol import Frame
from sparsifiner_edge.camera.health import HealthServer
from sparsifiner_edge.camera.json_lines import LineWriter
from sparsifiner_edge.camera.model import Model
from sparsifiner_edge.camera.sources import KNOWN, Source, parse_source, require_decoder, require_other_file
from sparsifiner_edge.camera.status import Status, notify_systemd
from sparsifiner_edge.errors import ConfigError, ImageError
from sparsifiner_edge.execution import Execution, execution_of
from sparsifiner_edge.files import require_file_path
from sparsifiner_edge.images import list_images, load_image
from sparsifiner_edge.process import stopping
from sparsifiner_edge.records import write_record

_TICK_S = 0.1
_OVERLAY_SUFFIXES = (".mkv", ".mp4")
_NOT_CONFINED = {"missing": ["GStreamer decodes this source, and is not confined."]}


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to run.

    Attributes:
        execution: how it is run. top: most classes of an answer. threshold: less probable ones are left out.
        public_key: file of the key that must have signed the bundle; None: no signature is required.
        output: file for the records, added to by a live source; None is standard output.
        overlay: video file to draw into.
        frames: where to stop.
        metrics: host and port of the metrics, see `HealthServer`.
        stall_s: a source that gives nothing for so long is taken for dead.

    Example:
        >>> RunOptions(execution=Execution(backend="openvino"), frames=100).top
        5
    """

    execution: Execution | str = Execution()
    top: int = 5
    threshold: float = 0.0
    public_key: Path | None = None
    output: Path | None = None
    overlay: Path | None = None
    frames: int | None = None
    metrics: tuple[str, int] | None = None
    stall_s: float = 3.0


def run_bundle(bundle: str | Path, source: str, options: RunOptions | None = None) -> None:
    """Run a bundle on images, a video or a camera: one JSON line per image or frame, on standard output or into a file.

    SIGTERM and SIGINT end it after the image or frame at hand.

    Args:
        bundle: a folder made by `sparsifiner-edge export`.
        source: an image, a folder, a video, a camera, or an address; see `parse_source`.
        options: how.

    Raises:
        SparsifinerError: see `run_stills` and `run_service`.

    Example:
        >>> run_bundle("bundle", "images", RunOptions(output=Path("answers.jsonl"), top=1))
        >>> Path("answers.jsonl").read_text().count("\\n")
        6
    """
    parsed = parse_source(source)
    run = run_stills if parsed.kind == "images" else run_service
    options = options or RunOptions()
    files = {name: Path(file) for name in ("output", "overlay") if (file := getattr(options, name)) is not None}
    run(Path(bundle), parsed, msgspec.structs.replace(options, **files))


def run_stills(bundle: Path, source: Source, options: RunOptions) -> None:
    """Run a bundle on an image or a folder of images: one JSON line per image.

    SIGTERM and SIGINT end it after the image at hand.

    Raises:
        ConfigError: options that are for videos and cameras.
        ImageError: the source cannot be read, or some of its images, which have lines that say why.
        ArtifactError: the output cannot be written.
        SparsifinerError: the bundle, backend or options are unusable.
    """
    if not os.path.exists(source.location):  # noqa: PTH110  (of a name that is too long, too)
        raise ImageError(f"{source.shown} does not exist.", f"Give {KNOWN}.")
    for name in ("overlay", "metrics", "frames"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} cannot be combined with images.", "Give a video or a camera, or leave it out.")
    _require_outputs(bundle, source, options)
    count = failed = 0
    with _open(bundle, options) as model, stopping() as stop:
        if (chosen := model.session.description.chosen) is not None:
            print(chosen, file=sys.stderr)
        records = run_images(model, Path(source.location))
        first = next(records)  # Before the file: a bad bundle is an error before anything is written.
        with LineWriter(options.output or sys.stdout, live=False, stop=stop) as lines:
            for record in itertools.chain([first], records):
                lines.write(record)
                count, failed = count + 1, failed + (record.error is not None)
                if stop.is_set():
                    break
    if failed and not stop.is_set():
        raise ImageError(f"{failed} of {count} images could not be read; their lines say why.")


def _open(bundle: Path, options: RunOptions) -> Model:
    return Model(bundle, execution_of(options.execution), options.top, options.threshold, options.public_key)


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
        start = time.monotonic_ns()
        try:
            image = load_image(path, model.size)
        except ImageError as error:
            if len(images) == 1:
                raise
            yield ImageRecord(str(path), error=error.what)
            continue
        ready = time.monotonic_ns()
        outputs = model.infer(image)
        done = time.monotonic_ns()
        answer = asdict(model.answer(outputs))
        yield ImageRecord(str(path), preprocess_ms=_ms(start, ready), infer_ms=_ms(ready, done), **answer)


def run_service(bundle: Path, source: Source, options: RunOptions) -> None:
    """Run a bundle on a video, a camera or the test pattern: one JSON line per frame, one per event on standard error.

    SIGTERM and SIGINT end it after the frame at hand; a second one ends it at once.

    Raises:
        ImageError: a file that is no video, or a source that gave no frame.
        ArtifactError: the output of a file's run cannot be written; a live source's run goes on and counts.
        BrokenPipeError: the reader of standard output has gone.
        SparsifinerError: the bundle, backend or options are unusable.
    """
    require_decoder(source, options.overlay is not None)
    _require_outputs(bundle, source, options)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(_open(bundle, options))
        status = Status(source.shown, stack.enter_context(LineWriter(sys.stderr, live=True)).write)
        if options.metrics is not None:
            server = stack.enter_context(HealthServer(options.metrics, status, max(2.0, 2 * options.stall_s)))
            status.event("metrics", address=server.url)
        # What really runs, once: a library that could not be loaded means kernels several times slower.
        status.event("model", **write_record(model.session.description))
        status.event("decoding", **(_NOT_CONFINED if source.kind == "gst" else write_record(confinement())))
        stop = stack.enter_context(stopping())
        failure = _run(model, source, options, status, stop)
        status.event("done", **status.counts)
    if failure is not None and not stop.is_set():
        raise ImageError(f"{source.shown} cannot be read as a video: {failure}.", "Replace or repair it.")
    if status.counts["processed"] == 0 and not stop.is_set():
        reason = f": {status.last_reason}" if status.last_reason else ""
        raise ImageError(f"{source.shown} gave no frame{reason}.", "Check that it is there, and its address.")


def _run(model: Model, source: Source, options: RunOptions, status: Status, stop: threading.Event) -> str | None:
    """Frames through the model, until the source ends, enough is done, or someone asks to stop; what failed of a source
    that is not live.
    """
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(LineWriter(options.output or sys.stdout, source.live, stop, status.count))
        overlay = None
        if options.overlay is not None:
            from sparsifiner_edge.camera.overlay import Overlay

            overlay = stack.enter_context(Overlay(options.overlay, model.size, source.live, status))
        capture = stack.enter_context(Capture(source, model.size, options.stall_s, status))
        stack.callback(notify_systemd, "STOPPING=1")
        notify_systemd("READY=1")
        for frame in _frames(capture, stop):
            record, outputs = _answer(model, source, frame, status)
            status.count_answer(record)
            lines.write(record)
            if overlay is not None:
                at_s = frame.captured_ns / 1e9 if source.live else frame.pts_s or 0.0
                overlay.write(frame.image(model.size), record, model.heat(outputs), at_s)
            if status.counts["processed"] == options.frames:
                break
    return capture.failure


def _frames(capture: Capture, stop: threading.Event) -> Iterator[Frame]:
    """Frames until there are no more, or a stop is requested; notifies systemd's watchdog once a second."""
    notified_at = 0.0
    while not stop.is_set() and not capture.is_over:
        if time.monotonic() >= notified_at + 1:
            notified_at = time.monotonic()
            notify_systemd("WATCHDOG=1")
        if (frame := capture.take(_TICK_S)) is not None:
            yield frame


def _answer(model: Model, source: Source, frame: Frame, status: Status) -> tuple[FrameRecord, dict[str, Array]]:
    """What the model says of a frame, and its outputs."""
    began = time.monotonic_ns()
    outputs = model.infer(frame.image(model.size))
    inferred = time.monotonic_ns()
    answer = model.frame_answer(outputs)
    status.count("not_finite", answer.not_finite or 0)
    done = time.monotonic_ns()
    record = FrameRecord(
        source=source.shown,
        frame=status.counts["processed"],
        skipped=frame.skipped,
        pts_s=frame.pts_s,
        monotonic_s=round(done / 1e9, 6),
        capture_ms=_ms(frame.captured_ns, frame.decoded_ns),
        preprocess_ms=_ms(frame.decoded_ns, frame.ready_ns),
        wait_ms=_ms(frame.ready_ns, began),
        infer_ms=_ms(began, inferred),
        postprocess_ms=_ms(inferred, done),
        end_to_end_ms=_ms(frame.arrived_ns, done),
        frame_age_ms=_ms(frame.captured_ns, done) if source.live else None,
        **asdict(answer),
    )
    return record, outputs


def _ms(began_ns: int, ended_ns: int) -> float:
    return round((ended_ns - began_ns) / 1e6, 3)


def _require_outputs(bundle: Path, source: Source, options: RunOptions) -> None:
    if options.overlay is not None and options.overlay.suffix.lower() not in _OVERLAY_SUFFIXES:
        fix = f"Let it end with {' or '.join(_OVERLAY_SUFFIXES)}."
        raise ConfigError(f"The overlay {options.overlay} is no video's name.", fix)
    for path in filter(None, (options.output, options.overlay)):
        require_file_path(path)
        require_other_file(path, source, bundle)
    if options.overlay and options.output and os.path.realpath(options.output) == os.path.realpath(options.overlay):
        raise ConfigError(f"{options.output} cannot hold records and overlay.", "Give two names.")
