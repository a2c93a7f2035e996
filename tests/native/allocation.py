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
import select
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from sparsifiner_edge.ops import native
from sparsifiner_edge.ops.schema import OPERATORS
from tests.native.test_hostile_shapes import model

HERE = Path(__file__).parent
LIMIT_S = 10.0
"""Seconds that a trial may take before it counts as hung; a good one takes some milliseconds."""
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
        return model(self.op, attributes, list(inputs.values()), False)


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
    """In the process whose allocations fail: runs trials here; without `shim` just sessions."""

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
        return int(self.shim.failing_counted())

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


def _serve(library: str) -> None:
    """Trials from standard input, an outcome each to standard output."""
    bench = Bench(library)
    for line in sys.stdin:
        request = json.loads(line)
        if request["task"] == "count":
            answer: Any = bench.counted(*request["of"])
        else:
            answer = [bench.run(Trial(**request["of"])), int(bench.shim.failing_failed())]
        print(json.dumps(answer), flush=True)


class Lab:
    """In the process that looks on: one whose allocations can fail, and another in its place when it dies or hangs."""

    def __init__(self, shim: Path, library: Path) -> None:
        self._shim, self._library = shim, library
        self._process: subprocess.Popen[str] | None = None

    def ask(self, task: str, of: Any) -> Any:
        """The process's answer; a string says how it ended without one."""
        if self._process is None:
            command = [sys.executable, "-m", "tests.native.allocation", "--serve", str(self._library)]
            self._process = subprocess.Popen(
                command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**os.environ, "LD_PRELOAD": str(self._shim)}, cwd=HERE.parents[1],
            )  # fmt: skip
            assert self._receive(60) == "ready"
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"task": task, "of": of}) + "\n")
        self._process.stdin.flush()
        return self._receive(LIMIT_S)

    def _receive(self, seconds: float) -> Any:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        line = process.stdout.readline() if select.select([process.stdout], [], [], seconds)[0] else None
        if line:
            return json.loads(line)
        text = self.close()
        how = "hung" if line is None else f"ended by {process.returncode}"
        return f"{how}: {text.strip()[-300:]}"

    def close(self) -> str:
        """End the process; what it wrote to standard error."""
        process, self._process = self._process, None
        if process is None:
            return ""
        if process.poll() is None:
            process.kill()
        return process.communicate()[1]


def plan(lab: Lab, others: int) -> list[Trial]:
    """Every allocation of every subject, on one and two threads, failing alone and with all that follow."""
    made = []
    for subject, threads in itertools.product(SUBJECTS, (1, 2)):
        count = lab.ask("count", [subject, threads, others])
        assert isinstance(count, int), f"{subject}: {count}"
        assert count > 2, f"{subject}: not even the node's, the call's and the kernel's own were seen"
        made += [Trial(subject, threads, n, always, others) for n in range(1, count + 1) for always in (False, True)]
    return made


def outcomes(lab: Lab, trials: Sequence[Trial]) -> Iterator[tuple[Trial, str, bool]]:
    """Of each trial: what came of it, and whether that is as it should be."""
    for trial in trials:
        answer = lab.ask("run", dataclasses.asdict(trial))
        what, failed = (answer, 1) if isinstance(answer, str) else answer
        fine = isinstance(answer, list) and "WRONG" not in what and (failed > 0 or what == "right")
        yield trial, what, fine


def measure(shim: Path, library: Path, count: int, seed: int) -> dict[str, Any]:
    """`count` trials: three of four where the library itself asks for memory, the others where ONNX Runtime does so for
    it, which is mostly the same over and over.
    """
    lab = Lab(shim, library)
    draw, decks = random.Random(seed), []
    try:
        for others, share in ((0, count - count // 4), (1, count // 4)):
            all_of_them = plan(lab, others)
            draw.shuffle(all_of_them)
            decks += list(itertools.islice(itertools.cycle(all_of_them), share))
        draw.shuffle(decks)
        results = list(outcomes(lab, decks))
    finally:
        lab.close()
    kinds = Counter("right" if what == "right" else "raised" for _, what, fine in results if fine)
    failures = [f"{trial}: {what}" for trial, what, fine in results if not fine]
    return {"trials": len(results), "different": len(set(decks)), "failures": len(failures), **kinds,
            "first": failures[:20]}  # fmt: skip


def main(count: str, seed: str) -> None:
    """What came of so many trials, as JSON."""
    library = native.library_path()
    assert library is not None
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(build_shim(Path(folder)), library, int(count), int(seed))))


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        main(*sys.argv[1:])
        sys.exit()
    print(json.dumps("ready"), flush=True)
    _serve(sys.argv[2])
