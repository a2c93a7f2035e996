"""Injects allocation failures into the native library, one after the other, and checks the outcome.

In each of many trials a new session of a new thread is made and run while one allocation fails, or all from one on.
ONNX Runtime must raise an error, or return the right answer if the memory was not needed. The next run must return the
right answer, bit by bit. A crash or a hang is a failure.

`python -m tests.native.allocation LIBRARY TRIALS SEED`, with failing.c preloaded, prints the outcomes as JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime

from sparsifiner_edge.ops import native
from tests.ops.matrix import Case, cases, feed, one_node

HERE = Path(__file__).parent
LIMIT_S = 0.5
"""Average limit of a trial in seconds; a good one takes some milliseconds."""
SUPPORTED = (
    tuple(map(int, (platform.libc_ver()[1] or "0.0").split("."))) >= (2, 35) and platform.libc_ver()[0] == "glibc"
)
"""True if failing.c can be built and used on this platform."""


SUBJECTS = {
    f"{case}, {width} channels": case
    for name in ("KeySelect", "SparseAttention", "DenseAttention", "MatchTokens")
    for width in (16, 20)
    for case in cases(name, width=width)
}
"""Operators by name; rows of 20 channels are packed. MergeTokens allocates nothing of its own."""


class Trial(NamedTuple):
    """Failing allocation: the n-th counted one, and with `always` all later ones."""

    subject: str
    n: int
    always: bool


def build_shim(folder: Path) -> Path:
    shim = folder / "failing.so"
    # In C, so that it does not load the C++ runtime earlier than Python would.
    command = ["g++", "-x", "c", "-O1", "-shared", "-fPIC", str(HERE / "failing.c"), "-o", str(shim)]
    subprocess.run(command, check=True)
    return shim


class Bench:
    """Runs trials in this process; without `shim`, plain sessions."""

    def __init__(self, library: str, subjects: Mapping[str, Case] = SUBJECTS, shim: bool = True) -> None:
        self.library = library
        if shim:
            self.shim = ctypes.CDLL(None)
            self.shim.failing_arm.argtypes = [ctypes.c_long, ctypes.c_int]
            self.shim.failing_counted.restype = self.shim.failing_failed.restype = ctypes.c_long
        self.models, self.expected = {}, {}
        for name, case in subjects.items():
            inputs = case.inputs()
            fed = feed(case.op.name, inputs)
            self.models[name] = one_node(case.op.name, case.attributes, inputs), fed
            self.expected[name] = self.session(name).run(None, fed)[0].tobytes()

    def session(self, subject: str) -> Any:
        return self.open(self.models[subject][0])

    def open(self, model: bytes) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        options.log_severity_level = 4
        options.register_custom_ops_library(self.library)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def counted(self, subject: str) -> int:
        """Return the allocations of a new session up to its first answer."""
        outcome = self.run(Trial(subject, 0, False))
        assert outcome == "right", f"{subject}: {outcome} though nothing failed"
        count = int(self.shim.failing_counted())
        assert count > 2, f"{subject}: not even the node's, the call's and the kernel's own were seen"
        return count

    def run(self, trial: Trial) -> str:
        """Run a trial in a new thread and return its outcome."""
        outcome = ["no outcome"]
        thread = threading.Thread(target=lambda: outcome.__setitem__(0, self._run(trial)))
        thread.start()
        thread.join()
        return outcome[0]

    def _run(self, trial: Trial) -> str:
        feed, expected = self.models[trial.subject][1], self.expected[trial.subject]
        session, answer, what = None, None, ""
        self.shim.failing_arm(trial.n, trial.always)
        try:
            session = self.session(trial.subject)
            answer = session.run(None, feed)[0]
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
        finally:
            self.shim.failing_disarm()
        if not what:
            what = "right" if answer is not None and answer.tobytes() == expected else "WRONG"
        session = session or self.session(trial.subject)
        if any(session.run(None, feed)[0].tobytes() != expected for _ in range(2)):
            what = f"WRONG afterwards ({what})"
        return what


def measure(library: str, count: int, seed: int) -> dict[str, Any]:
    """Run `count` trials in the process whose allocations fail."""
    bench, counts, wrong = Bench(library), Counter[str](), list[str]()
    every = [
        Trial(subject, n, always)
        for subject in SUBJECTS
        for n in range(1, bench.counted(subject) + 1)
        for always in (False, True)
    ]
    trials = random.Random(seed).choices(every, k=count)
    for trial in trials:
        print(trial, file=sys.stderr, flush=True)  # The last one is where it crashed or hung.
        outcome = bench.run(trial)
        counts["right" if outcome == "right" else "raised"] += 1
        if "WRONG" in outcome or (not bench.shim.failing_failed() and outcome != "right"):
            wrong.append(f"{trial}: {outcome}")
    return {"trials": len(trials), "failures": len(wrong), **counts, "first": wrong[:20]}


def measured(shim: Path, count: int, seed: int) -> dict[str, Any]:
    """Run trials in a separate process."""
    command = [sys.executable, "-m", "tests.native.allocation", str(native.library_path())]
    done = subprocess.run(
        [*command, str(count), str(seed)],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=60 + LIMIT_S * count,
    )
    assert done.returncode == 0, f"ended by {done.returncode}: {done.stderr[-1000:]}"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
