"""Engines are built in a process of their own, since a parser or compiler of native code may abort or hang."""

from __future__ import annotations

from sparsifiner_edge.bundle.engines import Details
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import read_record, write_record
from sparsifiner_edge.runtime.backend import EngineBackend, Job
from sparsifiner_edge.runtime.child import serve, start_child
from sparsifiner_edge.runtime.open import find_backend

_FIX = (
    "The bundle is as it was. If it took too long, give it longer with --timeout; if the system ran out of memory, "
    "close other programs or build smaller; else report this with the model's name, or build with another version."
)


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
    with start_child(__name__, f"The builder of {job.engine.backend}", _FIX) as child:
        return child.ask("build", timeout_s, Details, progress, job=write_record(job))


def build(tell: Progress, job: object) -> Details:
    """Carry out a job in this process."""
    read = read_record(job, Job, "The job", "Report this.")
    backend = find_backend(Execution(backend=read.engine.backend))
    assert isinstance(backend, EngineBackend)
    return backend.build(read, tell)


if __name__ == "__main__":
    serve({"build": build})
