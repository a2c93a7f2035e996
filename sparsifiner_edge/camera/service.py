"""From a source of frames to records, until the source ends, enough is done, or someone asks to stop."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import asdict, replace

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.camera.answers import Answer, FrameRecord
from sparsifiner_edge.camera.capture import Capture, Frame
from sparsifiner_edge.camera.confine import confinement
from sparsifiner_edge.camera.health import HealthServer
from sparsifiner_edge.camera.json_lines import LineWriter, open_output
from sparsifiner_edge.camera.model import TOP, Model
from sparsifiner_edge.camera.overlay import SHOWN, Overlay, require_overlay_path, text_lines
from sparsifiner_edge.camera.sources import Source, require_decoder, require_other_file
from sparsifiner_edge.camera.status import Status, notify_systemd
from sparsifiner_edge.errors import ArtifactError, ConfigError, ImageError, MissingExtraError
from sparsifiner_edge.files import io_errors
from sparsifiner_edge.process import stopping
from sparsifiner_edge.records import write_record
from sparsifiner_edge.runtime import Execution

_TICK_S = 0.1
STALL_S = 3.0
_PIPELINE = {"missing": ["A GStreamer pipeline is your own command line, and is not confined."]}


class RunOptions(NamedTuple):
    """How to run.

    Attributes:
        backend, precision, provider, kernels, threads: see `open_session`.
        output: file for the records, added to by a live source; None is standard output.
        overlay: video file to draw into.
        top, threshold, public_key: see `Model`.
        fps: of the test pattern.
        duration_s, frames: where to stop.
        metrics: host and port of the metrics, see `HealthServer`.
        stall_s: a source that gives nothing for so long is taken for dead.
        allow_redirect: of an RTSP server to another host; see `Relay`.
    """

    backend: str = "onnxruntime"
    threads: int | None = None
    output: Path | None = None
    overlay: Path | None = None
    top: int = TOP
    threshold: float = 0.0
    fps: float = 25.0
    duration_s: float | None = None
    frames: int | None = None
    metrics: tuple[str, int] | None = None
    stall_s: float = STALL_S
    public_key: Path | None = None
    precision: str = "auto"
    provider: str = "cpu"
    kernels: str = "auto"
    allow_redirect: bool = False

    def model(self) -> tuple[Execution, int, float, Path | None]:
        """Those of `Model`, in its order."""
        execution = Execution(
            backend=self.backend, precision=self.precision, provider=self.provider, kernels=self.kernels,
            threads=self.threads,
        )  # fmt: skip
        return execution, self.top, self.threshold, self.public_key


def run_service(bundle: Path, source: Source, options: RunOptions) -> None:
    """Run a bundle on a video, a camera or the test pattern: one JSON line per frame, one per event on standard error.

    SIGTERM and SIGINT end it after the frame at hand; a second one ends it at once.

    Raises:
        ImageError: a file that is no video, or a source that gave no frame in all the time allowed.
        ArtifactError: the output of a file's run cannot be written; a live source's run goes on and counts.
        BrokenPipeError: the reader of standard output has gone.
        SparsifinerError: the bundle, backend or options are unusable.
    """
    require_decoder(source)
    _require_outputs(bundle, source, options.output, options.overlay)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(Model(bundle, *options.model()))
        events = LineWriter(_duplicate(sys.stderr), patient=False)
        stack.callback(_close_quietly, events)
        status = Status(source.shown, events.write)
        if options.metrics is not None:
            server = stack.enter_context(HealthServer(options.metrics, status, max(2.0, 2 * options.stall_s)))
            status.event("metrics", address=server.url)
        # What really runs, once: a library that could not be loaded means kernels several times slower.
        status.event("model", **write_record(model.session.description))
        status.event("decoding", **(_PIPELINE if source.kind == "gst" else write_record(confinement())))
        stop = stack.enter_context(stopping())
        with _Run(model, source, options, status, stop) as run:
            run.loop()
        status.event("done", **status.counts)
    if not stop.is_set():
        _require_frames(source, status, run.failure)


def _require_outputs(bundle: Path, source: Source, output: Path | None, overlay: Path | None) -> None:
    if output is not None:
        require_other_file(output, source, bundle)
    if overlay is None:
        return
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("av", "camera") from error
    require_overlay_path(overlay)
    require_other_file(overlay, source, bundle)
    if output is not None and os.path.realpath(output) == os.path.realpath(overlay):
        raise ConfigError(f"{output} cannot hold records and overlay.", "Give two names.")


def _require_frames(source: Source, status: Status, failure: str | None) -> None:
    if failure is not None:
        raise ImageError(f"{source.shown} cannot be read as a video: {failure}.", "Replace or repair it.")
    if status.counts["processed"] == 0:
        reason = f": {status.last_reason}" if status.last_reason else ""
        raise ImageError(f"{source.shown} gave no frame{reason}.", "Check that it is there, and its address.")


def _duplicate(stream: Any) -> int | None:
    """A file descriptor of our own for a standard stream; None where that was closed from the start."""
    if stream is None:
        return None
    stream.flush()
    return os.dup(stream.fileno())


def _close_quietly(events: LineWriter) -> None:
    """Who read the events may have gone; that is no failure of the run."""
    with contextlib.suppress(OSError):
        events.close()


def _ms(began_ns: int, ended_ns: int) -> float:
    return round((ended_ns - began_ns) / 1e6, 3)


class _Run:
    """One run's capture, sinks and loop."""

    def __init__(
        self, model: Model, source: Source, options: RunOptions, status: Status, stop: threading.Event
    ) -> None:
        self._stop = stop
        self._model, self._source, self._options, self._status = model, source, options, status
        self._done_at: deque[float] = deque(maxlen=26)
        self._overlay: Overlay | None = None
        self.failure: str | None = None

    def __enter__(self) -> _Run:
        options = self._options
        live, output = self._source.live, options.output
        # A service that is started again goes on in its file.
        handle = _duplicate(sys.stdout) if output is None else open_output(output, append=live)
        self._lines = LineWriter(handle, not live, self._stop)
        if options.overlay is not None:
            self._overlay = Overlay(options.overlay, self._model.fit.size)
        fit = self._model.fit._replace(display=SHOWN if self._overlay else 0)
        self._capture = Capture(self._source, fit, options.fps, options.stall_s, self._status, options.allow_redirect)
        self._capture.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        notify_systemd("STOPPING=1")
        self._capture.__exit__()
        self.failure = self._capture.failure
        try:
            self._close_overlay()
        finally:
            with self._disk_errors() if kind is None else contextlib.suppress(OSError):
                self._lines.close()
            self._sync_counts()

    def loop(self) -> None:
        """Frames through the model until the source ends, enough is done, or someone asks to stop."""
        deadline = None if self._options.duration_s is None else time.monotonic() + self._options.duration_s
        notify_systemd("READY=1")
        alive_at = 0.0
        while not self._stop.is_set() and (deadline is None or time.monotonic() < deadline):
            if time.monotonic() >= alive_at + 1:
                alive_at = time.monotonic()
                notify_systemd("WATCHDOG=1")
            frame = self._capture.mailbox.take(_TICK_S)
            if frame is None:
                if self._capture.mailbox.closed:
                    break
                continue
            self._one(frame)
            if self._options.frames is not None and self._status.counts["processed"] >= self._options.frames:
                break

    def _one(self, frame: Frame) -> None:
        model, began = self._model, time.monotonic_ns()
        outputs = model.infer(frame.image)
        inferred = time.monotonic_ns()
        answer = model.answer(outputs)
        self._status.count("not_finite", answer.not_finite or 0)
        change = model.change(outputs) if answer.features is not None else None
        if change is not None:
            answer = replace(answer, change=round(change, 6))
        record = self._record(frame, began, inferred, answer)
        with self._disk_errors():
            self._lines.write(record)
        self._sync_counts()
        self._status.processed(record)
        self._draw(frame, record, outputs)

    def _record(self, frame: Frame, began: int, inferred: int, answer: Answer) -> FrameRecord:
        times, done = frame.times, time.monotonic_ns()
        return FrameRecord(
            source=self._source.shown,
            frame=self._status.counts["processed"],
            skipped=frame.skipped,
            pts_s=times.pts_s,
            monotonic_s=round(done / 1e9, 6),
            capture_ms=_ms(times.captured_ns, times.decoded_ns),
            preprocess_ms=_ms(times.decoded_ns, times.ready_ns),
            wait_ms=_ms(times.ready_ns, began),
            infer_ms=_ms(began, inferred),
            postprocess_ms=_ms(inferred, done),
            end_to_end_ms=_ms(times.arrived_ns, done),
            frame_age_ms=_ms(times.captured_ns, done) if self._source.live else None,
            **asdict(answer),
        )

    def _draw(self, frame: Frame, record: FrameRecord, outputs: dict[str, Array]) -> None:
        self._done_at.append(time.monotonic())
        span_s = self._done_at[-1] - self._done_at[0]
        rate = (len(self._done_at) - 1) / span_s if span_s else 0.0
        if self._overlay is None or frame.shown is None:
            return
        lines, heat = text_lines(record, rate), self._model.heat(outputs)
        at_s = frame.times.captured_ns / 1e9 if self._source.live else record.pts_s
        try:
            self._overlay.write(frame.shown, lines, heat, at_s or 0.0)
        except OSError as error:
            self._overlay_failed(error)

    def _overlay_failed(self, error: OSError) -> None:
        """A service goes on without; the overlay of a file is what was asked for."""
        overlay, self._overlay = self._overlay, None
        assert overlay is not None
        overlay.abandon()
        reason = error.strerror or str(error)
        if not self._source.live:
            raise ArtifactError(f"{overlay.path} cannot be written: {reason}.", "Free space or choose another place.")
        self._status.count("overlay_errors")
        self._status.event("overlay_lost", path=str(overlay.path), reason=reason)

    def _close_overlay(self) -> None:
        if self._overlay is not None:
            try:
                self._overlay.close()
            except OSError as error:
                self._overlay_failed(error)

    def _disk_errors(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._options.output is None else io_errors(self._options.output)

    def _sync_counts(self) -> None:
        """And tell when the output fails for the first time."""
        counts, lines = self._status.counts, self._lines
        if lines.errors and not counts["output_errors"]:
            self._status.event("output_failing", errors=lines.errors)
        counts["lines_dropped"], counts["output_errors"] = lines.dropped, lines.errors
