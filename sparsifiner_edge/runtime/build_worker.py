"""Engines are built in a process of their own, since a parser or compiler of native code may abort or hang.

`python -m sparsifiner_edge.runtime.build_worker` reads one job (JSON, one line) and writes JSON lines:

    {"stage": ..., "done": ..., "total": ...}     as often as the builder likes
    {"ok": {...}}                                 what `build` of the backend's module returned
    {"error": {"kind": ..., "what": ..., "fix": ...}}

A job holds `backend` (a name in `open.BACKENDS`) and what that backend's `plan` put there.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsifiner_edge import errors
from sparsifiner_edge.bundle.manifest import BUNDLE_SCHEMA, Manifest
from sparsifiner_edge.bundle.store import read_listed
from sparsifiner_edge.errors import BackendError, SparsifinerError
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.runtime.child import Child, Parent, start_child

"""Called with (stage, done, total)."""
Job = Mapping[str, Any]
_EVERY_S = 0.05


def run_job(job: Job, timeout_s: float, progress: Progress | None = None) -> dict[str, Any]:
    """Build one engine in a fresh process, which is killed when this returns or raises.

    Args:
        job: JSON-ready; see the module.
        timeout_s: seconds after which the builder counts as hung.

    Returns:
        What `build` of the backend's module returned.

    Raises:
        SparsifinerError: what `build` raised.
        BackendError: the process died, was killed, or took too long; the end of its log is in the message.
    """
    deadline = time.monotonic() + timeout_s
    with start_child(__name__) as child:
        with contextlib.suppress(BrokenPipeError):  # It died at once; that it did is seen when it is read from.
            child.send(job)
        try:
            while (message := child.receive(deadline)) is not None:
                if "ok" in message:
                    return dict(message["ok"])
                if "error" in message:
                    raise _raised(message["error"])
                if progress:
                    progress(message["stage"], message["done"], message["total"])
        except TimeoutError as error:
            raise _too_long(job, timeout_s, child) from error
        raise _lost(child, job)


def job_model(job: Job) -> bytes:
    """Content of the ONNX file that a job is about: the bytes that the bundle's manifest vouches for.

    Raises:
        ArtifactError: it is missing, or was altered since the job was planned.
    """
    path = Path(job["model"])
    return read_listed(
        path.parent, Manifest(schema_version=BUNDLE_SCHEMA, files={path.name: job["model_sha256"]}), path.name
    )


def _raised(error: Mapping[str, str]) -> SparsifinerError:
    """The error of the worker, of the class that it had there where that takes the same arguments."""
    kind = getattr(errors, error["kind"], BackendError)
    fits = isinstance(kind, type) and issubclass(kind, SparsifinerError) and "__init__" not in vars(kind)
    made = (kind if fits else BackendError)(error["what"], error["fix"])
    assert isinstance(made, SparsifinerError)
    return made


def _lost(child: Child, job: Job) -> BackendError:
    code = child.wait()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit status {code}"
    fix = "The bundle is as it was. Report this with the model's name, or build with another version."
    if code == -signal.SIGKILL:
        fix = "The bundle is as it was. The system may have run out of memory: close other programs, or build smaller."
    return BackendError(f"The builder of {job['backend']} {how}. It wrote: {child.written()}", fix)


def _too_long(job: Job, timeout_s: float, child: Child) -> BackendError:
    return BackendError(
        f"The builder of {job['backend']} took more than {timeout_s:g} s and was ended. It wrote: {child.written()}",
        "The bundle is as it was. Give it longer with --timeout.",
    )


def main() -> None:
    """Carry out the job on standard input."""
    parent = Parent()
    job = next(parent.messages())
    told: list[tuple[str, float]] = [("", 0.0)]

    def tell(stage: str, done: float, total: float) -> None:
        before, when = told[0]
        if stage != before or time.monotonic() - when > _EVERY_S:  # Some phases have thousands of steps.
            told[0] = (stage, time.monotonic())
            parent.send({"stage": stage, "done": done, "total": total})

    from sparsifiner_edge.runtime.open import BACKENDS

    try:
        parent.send({"ok": importlib.import_module(BACKENDS[job["backend"]]).build(job, tell)})
    except SparsifinerError as error:
        parent.send({"error": {"kind": type(error).__name__, "what": error.what, "fix": error.fix}})


if __name__ == "__main__":
    main()
