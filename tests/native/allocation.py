"""Makes allocations of the native library fail, one after the other, and looks at what comes of it.

In each of many trials a new session of a new thread is made and run while one allocation fails, or all from one on.
ONNX Runtime must raise an error, or give the right answer where the memory was not needed after all. The next run must
give the right answer, to the bit. A crash or a hang is a failure.

`python -m tests.native.allocation TRIALS SEED` prints what came of so many as JSON.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.schema import OPERATORS
from tests.native.hostile import bare_model

HERE = Path(__file__).parent
LIMIT_S = 0.5
"""Seconds that a trial may take, on average; a good one takes some milliseconds."""
CHANNELS = 5
SUPPORTED = (
    tuple(map(int, (platform.libc_ver()[1] or "0.0").split("."))) >= (2, 35) and platform.libc_ver()[0] == "glibc"
)
"""Whether failing.c can be built and used here."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """One node, with all that decides which way the kernel takes."""

    op: str
    tokens: int
    heads: int
    width: int
    attributes: dict[str, Any]
    keys: int = 0
    merged: bool = False

    def inputs(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        made = {"qkv": rng.normal(size=(1, self.tokens, 3 * self.heads * self.width)).astype(np.float32)}
        made["sizes"] = rng.integers(1, 9 if self.merged else 2, (1, self.tokens)).astype(np.float32)
        if self.op == "KeySelect":
            for name in ("proj_q", "proj_k"):
                made[name] = rng.normal(size=(self.heads, self.width, CHANNELS)).astype(np.float32)
        if self.op == "SparseAttention":
            patches = self.tokens - self.attributes["num_prefix"]
            tiles = -(-patches // self.attributes["tile"])
            lists = [np.sort(rng.permutation(patches)[: self.keys]) for _ in range(self.heads * tiles)]
            made["indices"] = np.stack(lists).reshape(1, self.heads, tiles, self.keys).astype(np.int32)
        return made

    def model(self, inputs: dict[str, np.ndarray]) -> bytes:
        """The node alone: without a function body only the library can run it."""
        known = {attribute.name for attribute in OPERATORS[self.op].attributes}
        settings = {"num_heads": self.heads, "scale": 0.2, **self.attributes}
        attributes = {name: value for name, value in settings.items() if name in known}
        return bare_model(self.op, attributes, list(inputs.values()), False)


def _select(tile: int, probe: int, cell: int, power: float) -> dict[str, Any]:
    return {"num_prefix": 1, "tile": tile, "probe": probe, "cell": cell, "keys": 7, "value_power": power}


def _attend(tile: int, cell: int, prefix_keys: int = 1) -> dict[str, Any]:
    return {"num_prefix": 1, "tile": tile, "cell": cell, "prefix_keys": prefix_keys}


# MergeTokens takes no memory of its own.
SUBJECTS = {
    "select": Subject("KeySelect", 301, 2, 16, _select(16, 8, 0, 0.0)),
    "select, cells": Subject("KeySelect", 301, 2, 16, _select(16, 8, 20, 2.0)),
    "select, many probes": Subject("KeySelect", 301, 2, 16, _select(64, 1, 20, 2.0)),
    "attend, cells": Subject("SparseAttention", 301, 2, 16, _attend(16, 20), 50),
    "attend, no cells": Subject("SparseAttention", 301, 2, 16, _attend(16, 0), 50),
    "attend, tile 1": Subject("SparseAttention", 301, 2, 16, _attend(1, 0, 0), 50),
    "attend, odd width": Subject("SparseAttention", 301, 2, 20, _attend(16, 20), 50),
    "attend, packed": Subject("SparseAttention", 2050, 1, 16, _attend(64, 100), 50),
    "dense": Subject("DenseAttention", 301, 2, 16, {}),
    "select, merged": Subject("KeySelect", 301, 2, 16, _select(16, 8, 20, 2.0), merged=True),
    "attend, merged": Subject("SparseAttention", 301, 2, 16, _attend(16, 20), 50, merged=True),
    "dense, merged": Subject("DenseAttention", 301, 2, 16, {}, merged=True),
    "match": Subject("MatchTokens", 301, 2, 16, {"num_prefix": 1, "window": 16, "merged": 40}),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """Which allocation fails: the n-th of those counted, and with `always` all later ones.

    Attributes:
        others: see `failing_arm`.
    """

    subject: str
    threads: int
    n: int
    always: bool
    others: int


def build_shim(folder: Path) -> Path:
    shim = folder / "failing.so"
    # In C, so that it does not bring the C++ runtime in earlier than Python would.
    command = ["g++", "-x", "c", "-O1", "-shared", "-fPIC", str(HERE / "failing.c"), "-o", str(shim)]
    subprocess.run(command, check=True)
    return shim


class Bench:
    """Runs trials in this process; without `shim` just sessions."""

    def __init__(self, library: str, subjects: Mapping[str, Subject] = SUBJECTS, shim: bool = True) -> None:
        self.library = library
        if shim:
            self.shim = ctypes.CDLL(None)
            self.shim.failing_arm.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
            self.shim.failing_counted.restype = self.shim.failing_failed.restype = ctypes.c_long
        feeds = {name: subject.inputs() for name, subject in subjects.items()}
        self.models = {name: (subjects[name].model(feed), feed) for name, feed in feeds.items()}
        self.expected = {name: self.session(name, 1).run(None, feed)[0].tobytes() for name, feed in feeds.items()}

    def session(self, subject: str, threads: int) -> Any:
        return self.open(self.models[subject][0], threads)

    def open(self, model: bytes, threads: int) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.register_custom_ops_library(self.library)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def counted(self, subject: str, threads: int, others: int) -> int:
        """Allocations of a new session, until its first answer."""
        outcome = self.run(Trial(subject, threads, 0, False, others))
        assert outcome == "right", f"{subject}: {outcome} though nothing failed"
        count = int(self.shim.failing_counted())
        assert count > 2, f"{subject}: not even the node's, the call's and the kernel's own were seen"
        return count

    def run(self, trial: Trial) -> str:
        """What came of it, in a thread of its own."""
        outcome = ["no outcome"]
        thread = threading.Thread(target=lambda: outcome.__setitem__(0, self._run(trial)))
        thread.start()
        thread.join()
        return outcome[0]

    def _run(self, trial: Trial) -> str:
        feed, expected = self.models[trial.subject][1], self.expected[trial.subject]
        session, answer, what = None, None, ""
        self.shim.failing_arm(trial.n, trial.always, trial.others)
        try:
            session = self.session(trial.subject, trial.threads)
            answer = session.run(None, feed)[0]
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
        finally:
            self.shim.failing_disarm()
        if not what:
            what = "right" if answer is not None and answer.tobytes() == expected else "WRONG"
        session = session or self.session(trial.subject, trial.threads)
        if any(session.run(None, feed)[0].tobytes() != expected for _ in range(2)):
            what = f"WRONG afterwards ({what})"
        return what


def measure(library: str, count: int, seed: int) -> dict[str, Any]:
    """In the process whose allocations fail: `count` trials, three of four where the library itself asks for memory,
    the others where ONNX Runtime does so for it, which is mostly the same over and over.
    """
    bench, draw, trials = Bench(library), random.Random(seed), list[Trial]()
    for others, share in ((0, count - count // 4), (1, count // 4)):
        every = [
            Trial(subject, threads, n, always, others)
            for subject, threads in itertools.product(SUBJECTS, (1, 2))
            for n in range(1, bench.counted(subject, threads, others) + 1)
            for always in (False, True)
        ]
        trials += draw.choices(every, k=share)
    counts, wrong = Counter[str](), list[str]()
    for trial in draw.sample(trials, len(trials)):
        print(trial, file=sys.stderr, flush=True)  # The last one is where it crashed or hung.
        outcome = bench.run(trial)
        counts["right" if outcome == "right" else "raised"] += 1
        if "WRONG" in outcome or (not bench.shim.failing_failed() and outcome != "right"):
            wrong.append(f"{trial}: {outcome}")
    return {"trials": len(trials), "failures": len(wrong), **counts, "first": wrong[:20]}


def measured(shim: Path, count: int, seed: int) -> dict[str, Any]:
    """The same, of a process of its own."""
    command = [sys.executable, "-m", "tests.native.allocation", "--within", str(native.library_path())]
    done = subprocess.run(
        [*command, str(count), str(seed)], env={**os.environ, "LD_PRELOAD": str(shim)}, cwd=HERE.parents[1],
        capture_output=True, text=True, check=False, timeout=60 + LIMIT_S * count,
    )  # fmt: skip
    assert done.returncode == 0, f"ended by {done.returncode}: {done.stderr[-1000:]}"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    if sys.argv[1] == "--within":
        print(json.dumps(measure(sys.argv[2], *map(int, sys.argv[3:]))))
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measured(build_shim(Path(folder)), *map(int, sys.argv[1:]))))
