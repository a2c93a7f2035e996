"""Engines are built in a process of their own, since a parser or compiler of native code may abort or hang.

`python -m sparsifiner_edge.runtime.build_worker` reads one job (JSON, one line) and writes JSON lines:

    {"stage": ..., "done": ..., "total": ...}     as often as the builder likes
    {"ok": {...}}                                 what `build` of the backend's module returned
    {"error": {"kind": ..., "what": ..., "fix": ...}}

A job holds `backend` (a name in `open.BACKENDS`) and what that backend's `plan` put there.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from sparsifiner_edge import errors
from sparsifiner_edge.errors import BackendError, SparsifinerError

Progress = Callable[[str, float, float], None]
"""Called with (stage, done, total)."""
Job = Mapping[str, Any]
_SOURCE = Path(__file__).resolve().parents[2]
_TAIL_BYTES = 2000
_EVERY_S = 0.05
_PR_SET_PDEATHSIG = 1


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
    # A session of its own: Ctrl-C reaches the parent alone, which then ends the worker. The folder of this package as
    # working directory: the worker imports the same package, and no file of the user's folder in place of a library.
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=_SOURCE,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, job)
            for line in _lines(process.stdout, time.monotonic() + timeout_s):
                message = json.loads(line)
                if "ok" in message:
                    return dict(message["ok"])
                if "error" in message:
                    raise _raised(message["error"])
                if progress:
                    progress(message["stage"], message["done"], message["total"])
            raise _lost(process, log, job)
        except TimeoutError as error:
            raise _too_long(job, timeout_s, log) from error
        finally:
            process.kill()
            process.wait()


def _send(pipe: IO[bytes], job: Job) -> None:
    try:
        pipe.write(json.dumps(dict(job)).encode() + b"\n")
        pipe.close()
    except BrokenPipeError:
        pass  # It died at once; that it did is seen when it is read from.


def _lines(pipe: IO[bytes], deadline: float) -> Iterator[bytes]:
    """Lines until the pipe closes.

    Raises:
        TimeoutError: it is still open at the deadline.
    """
    rest = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            raise TimeoutError
        chunk = os.read(pipe.fileno(), 1 << 16)
        if not chunk:
            return
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole


def _raised(error: Mapping[str, str]) -> SparsifinerError:
    """The error of the worker, of the class that it had there where that takes the same arguments."""
    kind = getattr(errors, error["kind"], BackendError)
    fits = isinstance(kind, type) and issubclass(kind, SparsifinerError) and "__init__" not in vars(kind)
    made = (kind if fits else BackendError)(error["what"], error["fix"])
    assert isinstance(made, SparsifinerError)
    return made


def _tail(log: IO[bytes]) -> str:
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - _TAIL_BYTES))
    return " ".join(log.read().decode("utf-8", "replace").split()) or "nothing"


def _lost(process: subprocess.Popen[bytes], log: IO[bytes], job: Job) -> BackendError:
    code = process.wait()
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"left with exit status {code}"
    fix = "The bundle is as it was. Report this with the model's name, or build with another version."
    if code == -signal.SIGKILL:
        fix = "The bundle is as it was. The system may have run out of memory: close other programs, or build smaller."
    return BackendError(f"The builder of {job['backend']} {how}. It wrote: {_tail(log)}", fix)


def _too_long(job: Job, timeout_s: float, log: IO[bytes]) -> BackendError:
    return BackendError(
        f"The builder of {job['backend']} took more than {timeout_s:g} s and was ended. It wrote: {_tail(log)}",
        "The bundle is as it was. Give it longer with --timeout.",
    )


def _die_with_parent() -> None:
    """A parent that is killed cannot end us; Linux can."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def main() -> None:
    """Carry out the job on standard input."""
    _die_with_parent()
    job = json.loads(sys.stdin.readline())
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # From here on whatever a library prints goes to standard error.

    def say(message: Mapping[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    told: list[tuple[str, float]] = [("", 0.0)]

    def tell(stage: str, done: float, total: float) -> None:
        before, when = told[0]
        if stage != before or time.monotonic() - when > _EVERY_S:  # Some phases have thousands of steps.
            told[0] = (stage, time.monotonic())
            say({"stage": stage, "done": done, "total": total})

    from sparsifiner_edge.runtime.open import BACKENDS

    try:
        say({"ok": importlib.import_module(BACKENDS[job["backend"]]).build(job, tell)})
    except SparsifinerError as error:
        say({"error": {"kind": type(error).__name__, "what": error.what, "fix": error.fix}})


if __name__ == "__main__":
    main()
