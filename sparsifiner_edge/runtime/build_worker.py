"""Engines are built in a process of their own, since a parser or compiler of native code may abort or hang.

`python -m sparsifiner_edge.runtime.build_worker` takes one `backend.Job` and sends `BuilderReport`s: as many as the
builder likes that say how far it is, and a last one with what came of it.
"""

from __future__ import annotations

import contextlib
import signal
import time

import msgspec

from sparsifiner_edge.bundle.engines import Details
from sparsifiner_edge.errors import (
    ArtifactError,
    BackendError,
    ConfigError,
    GateError,
    SparsifinerError,
    UnsupportedModelError,
)
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import read_record, write_record
from sparsifiner_edge.runtime.backend import EngineBackend, Job
from sparsifiner_edge.runtime.child import Child, Parent, start_child
from sparsifiner_edge.runtime.open import find_backend

_EVERY_S = 0.05
_REPORT = "Report this."
_KINDS = {kind.__name__: kind for kind in (ArtifactError, BackendError, ConfigError, GateError, UnsupportedModelError)}


class Failure(msgspec.Struct, frozen=True):
    """An error, as it goes from one process to the other; kind: its class."""

    kind: str
    what: str
    fix: str


class BuilderReport(msgspec.Struct, frozen=True):
    """How far a builder is (stage, done, total), or what came of the job: an engine, or why there is none."""

    step: tuple[str, float, float] | None = None
    details: Details | None = None
    failure: Failure | None = None


def run_job(job: Job, timeout_s: float, progress: Progress | None = None) -> Details:
    """Build one engine in a fresh process, which is killed when this returns or raises.

    Args:
        timeout_s: seconds after which the builder counts as hung.

    Returns:
        What the backend's `build` returned.

    Raises:
        SparsifinerError: what `build` raised.
        BackendError: the process died, was killed, or took too long; the end of its log is in the message.
    """
    deadline = time.monotonic() + timeout_s
    with start_child(__name__) as child:
        with contextlib.suppress(BrokenPipeError):  # It died at once; that it did is seen when it is read from.
            child.send(write_record(job))
        try:
            while (message := child.receive(deadline)) is not None:
                report = read_record(message, BuilderReport, "The builder", _REPORT)
                if report.details is not None:
                    return report.details
                if report.failure is not None:
                    raise _KINDS.get(report.failure.kind, BackendError)(report.failure.what, report.failure.fix)
                if progress and report.step:
                    progress(*report.step)
        except TimeoutError as error:
            raise BackendError(
                f"The builder of {job.engine.backend} took more than {timeout_s:g} s and was ended. "
                f"It wrote: {child.written()}",
                "The bundle is as it was. Give it longer with --timeout.",
            ) from error
        raise _lost(child, job)


def _lost(child: Child, job: Job) -> BackendError:
    code = child.wait()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit status {code}"
    fix = "The bundle is as it was. Report this with the model's name, or build with another version."
    if code == -signal.SIGKILL:
        fix = "The bundle is as it was. The system may have run out of memory: close other programs, or build smaller."
    return BackendError(f"The builder of {job.engine.backend} {how}. It wrote: {child.written()}", fix)


def main() -> None:
    """Carry out the job that the parent sends."""
    parent = Parent()
    job = read_record(next(parent.messages()), Job, "The job", _REPORT)
    last_stage, last_time = "", 0.0

    def tell(stage: str, done: float, total: float) -> None:
        nonlocal last_stage, last_time
        if stage != last_stage or time.monotonic() - last_time > _EVERY_S:  # Some phases have thousands of steps.
            last_stage, last_time = stage, time.monotonic()
            parent.send(write_record(BuilderReport(step=(stage, done, total))))

    backend = find_backend(job.engine.backend)
    assert isinstance(backend, EngineBackend)
    try:
        report = BuilderReport(details=backend.build(job, tell))
    except SparsifinerError as error:
        report = BuilderReport(failure=Failure(type(error).__name__, error.what, error.fix))
    parent.send(write_record(report))


if __name__ == "__main__":
    main()
