"""Engines are built in a process of their own, since a parser or compiler of native code may abort or hang.

`python -m sparsifiner_edge.runtime.build_worker` reads one `backend.Job` (JSON, one line) and writes JSON lines, each a
`Reply`: as many as the builder likes that tell how far it is, and a last one that tells what came of it.
"""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import msgspec

from sparsifiner_edge import errors
from sparsifiner_edge.bundle.engines import Details
from sparsifiner_edge.bundle.manifest import BUNDLE_SCHEMA, Manifest
from sparsifiner_edge.bundle.store import Bundle
from sparsifiner_edge.errors import BackendError, SparsifinerError
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import read_record, write_record
from sparsifiner_edge.runtime.backend import EngineBackend, Job
from sparsifiner_edge.runtime.child import Child, Parent, start_child
from sparsifiner_edge.runtime.open import find_backend

_EVERY_S = 0.05
_REPORT = "Report this."


class Failure(msgspec.Struct, frozen=True):
    """An error, as it goes from one process to the other; kind: its class in `errors`."""

    kind: str
    what: str
    fix: str


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """How far a builder is, or what came of the job: `ok`, or why nothing did."""

    stage: str | None = None
    done: float | None = None
    total: float | None = None
    ok: Details | None = None
    error: Failure | None = None


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
                reply = read_record(message, Reply, "The builder", _REPORT)
                if reply.ok is not None:
                    return reply.ok
                if reply.error is not None:
                    raise _raised(reply.error)
                if progress:
                    progress(reply.stage or "", reply.done or 0, reply.total or 0)
        except TimeoutError as error:
            raise _too_long(job, timeout_s, child) from error
        raise _lost(child, job)


def job_model(job: Job) -> bytes:
    """Content of the ONNX file that a job is about: the bytes that the bundle's manifest vouches for.

    Raises:
        ArtifactError: it is missing, or was altered since the job was planned.
    """
    path = Path(job.model)
    manifest = Manifest(schema_version=BUNDLE_SCHEMA, files={path.name: job.model_sha256})
    return Bundle(path.parent, manifest).read(path.name)


def _raised(error: Failure) -> SparsifinerError:
    """The error of the worker, of the class that it had there where that takes the same arguments."""
    kind = getattr(errors, error.kind, BackendError)
    fits = isinstance(kind, type) and issubclass(kind, SparsifinerError) and "__init__" not in vars(kind)
    made = (kind if fits else BackendError)(error.what, error.fix)
    assert isinstance(made, SparsifinerError)
    return made


def _lost(child: Child, job: Job) -> BackendError:
    code = child.wait()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit status {code}"
    fix = "The bundle is as it was. Report this with the model's name, or build with another version."
    if code == -signal.SIGKILL:
        fix = "The bundle is as it was. The system may have run out of memory: close other programs, or build smaller."
    return BackendError(f"The builder of {job.backend} {how}. It wrote: {child.written()}", fix)


def _too_long(job: Job, timeout_s: float, child: Child) -> BackendError:
    return BackendError(
        f"The builder of {job.backend} took more than {timeout_s:g} s and was ended. It wrote: {child.written()}",
        "The bundle is as it was. Give it longer with --timeout.",
    )


def main() -> None:
    """Carry out the job on standard input."""
    parent = Parent()
    job = read_record(next(parent.messages()), Job, "The job", _REPORT)
    told: list[tuple[str, float]] = [("", 0.0)]

    def tell(stage: str, done: float, total: float) -> None:
        before, when = told[0]
        if stage != before or time.monotonic() - when > _EVERY_S:  # Some phases have thousands of steps.
            told[0] = (stage, time.monotonic())
            parent.send(write_record(Reply(stage=stage, done=done, total=total)))

    backend = find_backend(job.backend)
    assert isinstance(backend, EngineBackend)
    try:
        reply = Reply(ok=backend.build(job, tell))
    except SparsifinerError as error:
        reply = Reply(error=Failure(type(error).__name__, error.what, error.fix))
    parent.send(write_record(reply))


if __name__ == "__main__":
    main()
