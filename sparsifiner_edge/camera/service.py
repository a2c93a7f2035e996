"""Inference from a source to answers: `run` yields them to a program, `run_bundle` writes them as JSON lines.

Both continue until the source ends, the requested number of frames is answered, or a stop is requested.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path

import msgspec
from msgspec.structs import asdict

from sparsifiner_edge.camera.answers import Answered, FrameRecord, ImageRecord, Summary
from sparsifiner_edge.camera.capture import Capture
from sparsifiner_edge.camera.confine import confinement
from sparsifiner_edge.camera.decoder_protocol import Frame, Wanted
from sparsifiner_edge.camera.health import HealthServer
from sparsifiner_edge.camera.json_lines import LineWriter
from sparsifiner_edge.camera.model import Model
from sparsifiner_edge.camera.sources import KNOWN, Source, parse_source, require_decoder, require_other_file
from sparsifiner_edge.camera.status import Status, notify_systemd
from sparsifiner_edge.errors import ConfigError, ImageError, SparsifinerError
from sparsifiner_edge.execution import Execution, execution_of
from sparsifiner_edge.files import require_file_path
from sparsifiner_edge.fitting import Box, Fit, Fitting
from sparsifiner_edge.images import list_images, read_image
from sparsifiner_edge.process import stopping
from sparsifiner_edge.records import write_record

_TICK_S = 0.1
"""Longest wait for a frame in seconds, after which a stop request is noticed."""
_OVERLAY_SUFFIXES = (".mkv", ".mp4")
_NOT_CONFINED = {"missing": ["GStreamer decodes this source and is not confined."]}


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of `run` and `run_bundle`.

    Attributes:
        execution: Backend and its settings.
        top: Most classes of an answer, and most channels of each output that are summarised as maps.
        threshold: Least probability of a class (default: none), and threshold of a map's area (default: one half).
        fit: How frames are brought to the model's size, see `Framing`; None uses the bundle's own setting.
        region: Part of each frame that is read, see `Framing`; None for all of it.
        public_key: File of the key that must have signed the bundle; None requires no signature.
        output: File for the records; None for standard output. A live source appends to it.
        overlay: Video file to draw frames and answers into.
        frames: Stop after this many frames.
        metrics: Host and port to serve metrics on; see `HealthServer`.
        stall_s: Seconds without a frame after which the source is opened again.
        stream: Use streaming inference on videos and cameras if the bundle was exported with `--stream`.
        at_least: Target fidelity of streaming inference, .98 by default, see `Session.stream`. Setting it makes
            streaming inference a requirement.
        share: Fixed share of the patches to recompute instead, see `Session.stream`. Setting it makes streaming
            inference a requirement.
        stabilise: In a stream, align frames when the camera moves, so that content stays on its patches; see
            `camera.align`.

    Example:
        >>> RunOptions(execution=Execution(backend="openvino"), frames=100).top
        5
    """

    execution: Execution | str = Execution()
    top: int = 5
    threshold: float | None = None
    fit: Fit | None = None
    region: Box | None = None
    public_key: Path | None = None
    output: Path | None = None
    overlay: Path | None = None
    frames: int | None = None
    metrics: tuple[str, int] | None = None
    stall_s: float = 3.0
    stream: bool = True
    at_least: float | None = None
    share: float | None = None
    stabilise: bool = True


def run(bundle: str | Path, source: str, options: RunOptions | None = None) -> Iterator[Answered]:
    """Run a bundle on images, a video or a camera, and yield the answers one by one.

    All frames of a video are answered, but only the newest of a camera; a camera that is lost is opened again. Leaving
    the loop, by `break` or by an error, ends the decoding process. Images that cannot be read are left out, and raise
    an error after the last image.

    Args:
        bundle: Folder made by `sparsifiner-edge export`.
        source: Image, folder, video, camera or address; see `parse_source`.
        options: Options; `output`, `overlay` and `metrics` are only for `run_bundle`.

    Raises:
        SparsifinerError: As for `run_bundle`.

    Example:
        >>> for answered in run("bundle", "images"):
        ...     best = int(answered.outputs["logits"].argmax())
        >>> answered.index, answered.image.shape, best == answered.record.top[0].number
        (8, (160, 160, 3), True)
    """
    parsed, options = parse_source(source), options or RunOptions()
    for name in ("output", "overlay", "metrics"):
        if getattr(options, name) is not None:
            raise ConfigError(f"{name} is set, but run writes no output.", "Leave it out, or call run_bundle.")
    _require(Path(bundle), parsed, options)
    return _run(Path(bundle), parsed, options)


def _run(bundle: Path, source: Source, options: RunOptions) -> Iterator[Answered]:
    """Open the bundle and yield its answers; images that cannot be read have none."""
    status, stop, closing = Status(source.shown, lambda _event: None), threading.Event(), contextlib.closing
    with (
        _open(bundle, source, options, True) as model,
        closing(_answers(model, source, options, status, stop)) as answers,
    ):
        yield from (answer for answer in answers if isinstance(answer, Answered))


def run_bundle(bundle: str | Path, source: str, options: RunOptions | None = None) -> Summary:
    r"""Run a bundle on images, a video or a camera, and write one JSON line per image or frame.

    The lines go to standard output or into a file. For videos and cameras, events go to standard error as JSON lines.
    SIGTERM and SIGINT end the run after the current image or frame; a second signal ends it at once.

    Args:
        bundle: Folder made by `sparsifiner-edge export`.
        source: Image, folder, video, camera or address; see `parse_source`.
        options: Options of the run.

    Returns:
        Figures of the run.

    Raises:
        ConfigError: An option for videos and cameras is set for images.
        ImageError: The source cannot be read or gave no frame, or some of its images cannot be read; their lines say
            why.
        ArtifactError: The output cannot be written; for a live source the run goes on and counts failures instead.
        BrokenPipeError: The reader of standard output is gone.
        SparsifinerError: The bundle, backend or options are unusable.

    Example:
        >>> run_bundle("bundle", "images", RunOptions(output=Path("answers.jsonl"), top=1)).processed
        9
        >>> Path("answers.jsonl").read_text().count("\n")
        9
    """
    parsed, options = parse_source(source), options or RunOptions()
    files = {name: Path(file) for name in ("output", "overlay") if (file := getattr(options, name)) is not None}
    options, folder = msgspec.structs.replace(options, **files), Path(bundle)
    _require(folder, parsed, options)
    with contextlib.ExitStack() as stack:
        model, is_video = stack.enter_context(_open(folder, parsed, options)), parsed.kind != "images"
        events = stack.enter_context(LineWriter(sys.stderr, live=True)).write if is_video else lambda _event: None
        status = Status(parsed.shown, events)
        if options.metrics is not None:
            server = stack.enter_context(HealthServer(options.metrics, status, max(2.0, 2 * options.stall_s)))
            status.event("metrics", address=server.url)
        # Report what actually runs: without the native library kernels are several times slower.
        status.event("model", **write_record(model.session.description))
        if model.stream is not None:
            status.event("stream", **write_record(model.stream.description))
        if model.why_whole is not None:
            status.event("warning", reason=model.why_whole)
        if model.why_fixed is not None:
            status.event("warning", reason=model.why_fixed)
        status.event("decoding", **(_NOT_CONFINED if parsed.kind == "gst" else write_record(confinement())))
        if not is_video and (chosen := model.session.description.chosen) is not None:
            _print_to_stderr(chosen)
        stop = stack.enter_context(stopping())
        if is_video:
            stack.enter_context(warnings.catch_warnings())
            warnings.showwarning = lambda message, *_, **__: status.event("warning", reason=str(message))
        try:
            _write(model, parsed, options, status, stop)
        finally:
            status.event("done", **status.counts | write_record(status.summary()))
    return status.summary()


def _write(model: Model, source: Source, options: RunOptions, status: Status, stop: threading.Event) -> None:
    """Write answers to the output and the overlay."""
    with contextlib.ExitStack() as stack:
        answers = stack.enter_context(contextlib.closing(_answers(model, source, options, status, stop)))
        # Answer the first image before the output is opened, so that an error leaves an existing file unchanged.
        first = [next(answers)] if source.kind == "images" else []
        # Videos report their geometry as an event.
        fitting = first[0].fitting if first and isinstance(first[0], Answered) else None
        if fitting is not None and (fitting.box[2:], fitting.inner[2:]) != (fitting.frame, fitting.size):
            _print_to_stderr(model.framing.describe(fitting))
        lines = stack.enter_context(LineWriter(options.output or sys.stdout, source.live, stop, status.count))
        overlay = None
        if options.overlay is not None:
            from sparsifiner_edge.camera.overlay import Overlay

            overlay = stack.enter_context(Overlay(options.overlay, model.map_threshold, source.live, status))
        stack.callback(notify_systemd, "STOPPING=1")
        notify_systemd("READY=1")
        for answer in itertools.chain(first, answers):
            lines.write(answer.record if isinstance(answer, Answered) else answer)
            if overlay is not None and isinstance(answer, Answered):
                overlay.write(answer, model.heats(answer.outputs, answer.fitting))


def _print_to_stderr(text: str) -> None:
    """Print a line to standard error."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # The reader of standard error may be gone; see `Status.event`.
            print(text, file=sys.stderr)


def open_model(bundle: Path, options: RunOptions, any_outputs: bool = True) -> Model:
    """Open a bundle with these options; see `Model`."""
    return Model(
        bundle,
        execution_of(options.execution),
        options.top,
        options.threshold,
        options.public_key,
        options.fit,
        options.region,
        any_outputs,
    )


def _open(bundle: Path, source: Source, options: RunOptions, any_outputs: bool = False) -> Model:
    """Open a bundle, and start streaming inference on videos and cameras."""
    model = open_model(bundle, options, any_outputs)
    if options.stream and source.kind != "images":
        try:
            model.follow(options.at_least, options.share, options.stabilise)
        except SparsifinerError:
            model.session.close()
            raise
    return model


def _answers(
    model: Model, source: Source, options: RunOptions, status: Status, stop: threading.Event
) -> Generator[Answered | ImageRecord, None, None]:
    """Yield answers until the source ends, enough frames are answered, or a stop is requested.

    An image that cannot be read gives its record only.

    Raises:
        ImageError: A single image cannot be read; or, at the end, some images could not be read, or the source failed
            or gave no frame.
        SparsifinerError: The outputs of the model are unusable.
    """
    if source.kind == "images":
        yield from _of_images(model, Path(source.location), status, stop)
        return
    previous, reconnects, moves = None, 0, "still"
    with Capture(source, Wanted(model.framing, options.overlay is not None), options.stall_s, status) as capture:
        for frame in frames_of(capture, stop):
            now = status.counts["reconnects"]
            fitting = model.framing.of(frame.width, frame.height)
            follows, reconnects = now == reconnects and fitting == previous, now
            answered, motion = _answer(model, source, frame, fitting, status, follows)
            if fitting != previous:
                status.event("frames", size=fitting.frame, box=fitting.box, says=model.framing.describe(fitting))
            if motion != moves:
                status.event("camera", motion=motion)
            previous, moves = fitting, motion
            status.count_answer(answered.record)
            yield answered
            if status.counts["processed"] == options.frames:
                break
    if stop.is_set():
        return
    if capture.failure is not None:
        what = f"{source.shown} cannot be read as a video: {capture.failure.rstrip('.')}."
        raise ImageError(what, "Replace or repair it" + (", or give another region." if options.region else "."))
    if status.counts["processed"] == 0:
        reason = f": {status.last_reason}" if status.last_reason else ""
        raise ImageError(f"{source.shown} gave no frame{reason}.", "Check that the source exists, and its address.")


def _of_images(model: Model, source: Path, status: Status, stop: threading.Event) -> Iterator[Answered | ImageRecord]:
    """Yield the answers for images."""
    images, failed = list_images(source), list[str]()
    for path in images:
        start = time.monotonic_ns()
        try:
            image, fitting = read_image(path, model.framing)
        except ImageError as error:
            if len(images) == 1:
                raise
            failed.append(error.what)
            yield ImageRecord(str(path), error=error.what)
        else:
            ready = time.monotonic_ns()
            outputs = model.infer(image)
            inferred = time.monotonic_ns()
            answer = asdict(model.answer(outputs, fitting))
            times = _ms(start, ready), _ms(ready, inferred), _ms(start, time.monotonic_ns())
            record = ImageRecord(str(path), fitting.box, *times, **answer)
            status.count_answer(record)
            yield Answered(status.counts["processed"] - 1, times[-1], image, outputs, record, fitting)
        if stop.is_set():
            return
    if failed:
        raise ImageError(
            f"{len(failed)} of {len(images)} images could not be read: {failed[0]}",
            "Repair or remove them; the output has a line with the reason for each.",
        )


def frames_of(capture: Capture, stop: threading.Event) -> Iterator[Frame]:
    """Yield frames until there are no more or a stop is requested. Notifies systemd's watchdog once a second."""
    notified_at = 0.0
    while not stop.is_set() and not capture.is_over:
        if time.monotonic() >= notified_at + 1:
            notified_at = time.monotonic()
            notify_systemd("WATCHDOG=1")
        if (frame := capture.take(_TICK_S)) is not None:
            yield frame


def _answer(
    model: Model, source: Source, frame: Frame, fitting: Fitting, status: Status, follows: bool
) -> tuple[Answered, str]:
    """Return the answer for a frame, and what the camera does.

    Args:
        model: Model to run.
        source: Source of the frame.
        frame: The frame.
        fitting: Its geometry.
        status: Counts values that are NaN or infinite.
        follows: Whether the frame follows the previous one of the same camera.
    """
    image = frame.image(model.framing)
    began = time.monotonic_ns()
    outputs, image, found, computed, motion = model.infer_frame(image, follows, fitting)
    inferred = time.monotonic_ns()
    fitting = found or fitting
    answer = model.frame_answer(outputs, fitting)
    status.count("not_finite", answer.not_finite or 0)
    done = time.monotonic_ns()
    record = FrameRecord(
        source=source.shown,
        box=fitting.read,
        corners=[(round(x, 2), round(y, 2)) for x, y in fitting.corners] if fitting.is_turned else None,
        frame=status.counts["processed"],
        skipped=frame.skipped,
        pts_s=frame.pts_s,
        monotonic_s=round(done / 1e9, 6),
        capture_ms=_ms(frame.captured_ns, frame.decoded_ns),
        preprocess_ms=_ms(frame.decoded_ns, frame.ready_ns),
        queued_ms=_ms(frame.ready_ns, began),
        infer_ms=_ms(began, inferred),
        postprocess_ms=_ms(inferred, done),
        end_to_end_ms=_ms(frame.arrived_ns + began - frame.ready_ns, done),
        frame_age_ms=_ms(frame.captured_ns, done) if source.live else None,
        computed=computed,
        **asdict(answer),
    )
    fresh = (
        model.stream.fresh
        if model.stream is not None and computed is not None and computed.by == "incremental"
        else None
    )
    answered = Answered(record.frame, record.end_to_end_ms, image, outputs, record, fitting, frame.whole(), fresh)
    return answered, motion or "still"


def _ms(began_ns: int, ended_ns: int) -> float:
    """Return the milliseconds between two times."""
    return round((ended_ns - began_ns) / 1e6, 3)


def _require(bundle: Path, source: Source, options: RunOptions) -> None:
    """Refuse a source that cannot be read or decoded and outputs that cannot be written, before anything is opened."""
    required = options.at_least is not None or options.share is not None
    if options.at_least is not None and options.share is not None:
        raise ConfigError("at_least and share are both given.", "Give one of them.")
    if required and (source.kind == "images" or not options.stream):
        what = "at_least and share apply only to streaming inference on videos and cameras."
        raise ConfigError(what, "Leave them out, or remove --no-stream.")
    if source.kind == "images":
        if not os.path.exists(source.location):  # noqa: PTH110  (pathlib raises if the name is too long)
            raise ImageError(f"{source.shown} does not exist.", f"Give {KNOWN}.")
        for name in ("overlay", "metrics", "frames"):
            if getattr(options, name) is not None:
                what = f"--{name} (option {name!r}) applies only to videos and cameras."
                raise ConfigError(what, "Give a video or a camera, or leave it out.")
    else:
        require_decoder(source, options.overlay is not None)
    if options.overlay is not None and options.overlay.suffix.lower() not in _OVERLAY_SUFFIXES:
        fix = f"Give a name that ends with {' or '.join(_OVERLAY_SUFFIXES)}."
        raise ConfigError(f"The overlay {options.overlay} is not a supported video file.", fix)
    for path in filter(None, (options.output, options.overlay)):
        require_file_path(path)
        require_other_file(path, source, bundle)
    if options.overlay and options.output and os.path.realpath(options.output) == os.path.realpath(options.overlay):
        raise ConfigError(f"{options.output} is given for both records and overlay.", "Give two different files.")
