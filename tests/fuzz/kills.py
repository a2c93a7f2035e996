"""Commands ended at random moments: which processes, half-written outputs and hidden files that leaves."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.results import read_result
from tests.fuzz.harness import strict_json
from tests.fuzz.materials import SHORT

PROGRAM = str(Path(sys.executable).with_name("sparsifiner-edge"))
GONE_S = 2.0
"""How long what a command started may outlive it."""
_MARK = "SPARSIFINER_KILLED"
_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Verb(NamedTuple):
    """A command to end.

    Attributes:
        line: its arguments, given the folder of good examples and its own.
        whole: raises where what it left is torn.
        seconds: about how long it runs.
    """

    line: Callable[[Path, Path], list[Any]]
    whole: Callable[[Path], object]
    seconds: float


def _bundle(name: str) -> Callable[[Path], object]:
    return lambda work: (work / name).exists() and open_bundle(work / name)


def _student(name: str) -> Callable[[Path], object]:
    def whole(work: Path) -> None:
        if (work / name).exists():
            assert {path.name for path in (work / name).iterdir()} == {"config.json", "model.safetensors"}
            strict_json((work / name / "config.json").read_text())

    return whole


def _result(name: str) -> Callable[[Path], object]:
    return lambda work: (work / name).exists() and read_result(work / name)


def _page(work: Path) -> None:
    if (work / "page.html").exists():
        assert (work / "page.html").read_text().rstrip().endswith("</html>")


def _lines(work: Path) -> None:
    """Of images all lines or none; of a live source whole lines."""
    for name in ("images.jsonl", "test.jsonl"):
        if (work / name).exists():
            content = (work / name).read_text()
            assert not content or content.endswith("\n"), content[-80:]
            for line in content.splitlines():
                json.loads(line)


def _package(work: Path) -> None:
    if (work / "package").exists():
        assert (work / "package" / "README.md").is_file()
        shutil.rmtree(work / "package")


def _keys(work: Path) -> None:
    if (work / "k.pem").exists():
        assert (work / "k.pem").read_text().rstrip().endswith("-----END PRIVATE KEY-----")


def _distill(good: Path, work: Path) -> list[Any]:
    """Goes on where the one before was ended, if that had got so far."""
    overrides = [part for override in SHORT for part in ("--set", override)]
    resume = ["--resume"] if (work / "better.training" / "checkpoint.safetensors").exists() else []
    return ["distill", good / "start", "--data", good / "data", "-o", work / "better", *resume, *overrides]


VERBS: dict[str, Verb] = {
    "sparsify": Verb(
        lambda g, w: ["sparsify", "test_vit", "--weights", g / "weights.safetensors", "-o", w / "student"],
        _student("student"),
        4,
    ),
    "export": Verb(lambda g, w: ["export", g / "student", "-o", w / "bundle"], _bundle("bundle"), 7),
    "distill": Verb(_distill, _student("better"), 9),
    "evaluate": Verb(
        lambda g, w: ["evaluate", g / "student", "--data", g / "images", "-o", w / "evaluation.json"],
        _result("evaluation.json"),
        5,
    ),
    "profile": Verb(
        lambda g, w: ["profile", g / "plain", "--seconds", "1", "-o", w / "profile.json"], _result("profile.json"), 3
    ),
    "build": Verb(
        lambda g, w: ["build", w / "built", "--backend", "tensorrt-rtx", "--compute-capability", "8.6"],
        _bundle("built"),
        4,
    ),
    "run images": Verb(
        lambda g, w: ["run", g / "plain", "--source", g / "images", "--output", w / "images.jsonl"], _lines, 1
    ),
    "run test": Verb(lambda g, w: ["run", g / "plain", "--source", "test", "--output", w / "test.jsonl"], _lines, 2),
    "report": Verb(lambda g, w: ["report", g / "results" / "comparison.json", "-o", w / "page.html"], _page, 2),
    "estimate": Verb(
        lambda g, w: ["estimate", g / "bundle", "--board", "jetson-orin-nano-8gb", "-o", w / "estimate.json"],
        _result("estimate.json"),
        1,
    ),
    "package": Verb(lambda g, w: ["package", g / "plain", "--for", "triton", "-o", w / "package"], _package, 1.5),
    "sign": Verb(lambda g, w: ["bundle", "sign", w / "signed", "--key", g / "keys" / "key.pem"], _bundle("signed"), 1),
    "keygen": Verb(lambda g, w: ["bundle", "keygen", "-o", w / "k.pem"], _keys, 0.8),
}
NEEDS = ("student", "bundle", "plain", "keys", "images", "results", "training")


def prepare(good: Path, work: Path) -> None:
    """Bundles that two of the commands write into."""
    work.mkdir(parents=True, exist_ok=True)
    for name in ("built", "signed"):
        shutil.copytree(good / "plain", work / name)


def end_one(verb: Verb, good: Path, work: Path, rng: random.Random) -> list[str]:
    """Start a command, end it at some moment, and look at what is left; what is wrong with that."""
    mark = f"{os.getpid()}-{rng.random()}"
    line = [PROGRAM, *map(str, verb.line(good, work))]
    environment = os.environ | {_MARK: mark, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.random() * verb.seconds)
        chosen = rng.choice(_SIGNALS)
        process.send_signal(chosen)
        try:
            _, said = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            return [f"did not end within 20 s of {chosen.name}"]
    # Python's own start, before the first line of ours, answers Ctrl-C with a traceback of its own.
    ours = "Traceback" in said and "/sparsifiner_edge/" in said
    wrong = [f"traceback after {chosen.name}: {said[-300:]}"] if ours else []
    deadline = time.monotonic() + GONE_S
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        wrong.append(f"{len(left)} processes {GONE_S:g} s after {chosen.name}")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    try:
        verb.whole(work)
    except Exception as error:
        wrong.append(f"torn after {chosen.name}: {type(error).__name__}: {str(error)[:200]}")
    return wrong


def marked(mark: str) -> list[int]:
    """Processes with our mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and f"{_MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def left_over(verb: Verb, good: Path, work: Path, temporary: Path) -> list[str]:
    """Run the command to its end: hidden and temporary files that still lie there."""
    (work / "k.pem").unlink(missing_ok=True)
    (work / "k.pub").unlink(missing_ok=True)
    line = [PROGRAM, *map(str, verb.line(good, work))]
    if "test" in line:
        line += ["--frames", "2"]
    done = subprocess.run(
        line, capture_output=True, text=True, check=False, env=os.environ | {"TMPDIR": str(temporary)}
    )
    if done.returncode:
        return [f"the next run fails: {done.stderr[-300:]}"]
    hidden = [path for path in work.rglob("*") if path.name.startswith(".") or path.name.endswith((".part", ".tmp"))]
    return [f"left: {path.relative_to(work)}" for path in hidden if path.name != "images.jsonl.part"]
