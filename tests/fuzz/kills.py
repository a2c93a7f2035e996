"""Commands ended at random moments, and the processes, partial outputs and hidden files they leave."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from sparsifiner_edge.bundle.store import open_bundle
from sparsifiner_edge.results import read_result
from tests.commands import ended
from tests.fuzz.harness import strict_json, words
from tests.made import SHORT_OPTIONS

PROGRAM = str(Path(sys.executable).with_name("sparsifiner-edge"))
GONE_S = 2.0
"""Seconds that processes started by a command may outlive it."""
_MARK = "SPARSIFINER_KILLED"
_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
VERBS = {
    "sparsify": ("sparsify test_vit --weights {good}/weights.safetensors -o {work}/student", 4),
    "export": ("export {good}/student -o {work}/bundle", 7),
    "optimize": (
        "optimize test_vit --weights {good}/weights.safetensors --data {good}/data --at-least .9 --minutes 1 "
        "--backend onnxruntime --precision fp32 -o {work}/found",
        45,
    ),
    "distill": ("distill {good}/start --data {good}/data -o {work}/better " + SHORT_OPTIONS, 9),
    "evaluate": ("evaluate {good}/student --data {good}/images -o {work}/evaluation.json", 5),
    "profile": ("profile {good}/plain --seconds 1 -o {work}/profile.json", 3),
    "build": ("build {work}/built --backend tensorrt-rtx --compute-capability 8.6", 4),
    "run images": ("run {good}/plain --source {good}/images --output {work}/images.jsonl", 1),
    "run test": ("run {good}/plain --source test --output {work}/test.jsonl", 2),
    "report": ("report {good}/results/comparison.json -o {work}/page.html", 2),
    "estimate": ("estimate {good}/bundle --board jetson-orin-nano-8gb -o {work}/estimate.json", 1),
    "package": ("package {good}/plain --for triton -o {work}/package", 1.5),
    "sign": ("bundle sign {work}/signed --key {good}/keys/key.pem", 1),
    "keygen": ("bundle keygen -o {work}/k.pem", 0.8),
}
"""Commands, and their approximate run time in seconds."""
NEEDS = ("student", "bundle", "plain", "keys", "images", "results", "training")


def arguments(name: str, good: Path, work: Path) -> list[str]:
    """Return a command's arguments; a training resumes the previous one if that got far enough."""
    begun = name == "distill" and (work / "better.training" / "checkpoint.safetensors").exists()
    return [*words(VERBS[name][0], good, work), *["--resume"] * begun]


def require_whole(path: Path) -> None:
    """Raise if a command left incomplete output; missing output is accepted."""
    if not path.exists():
        return
    if path.is_dir() and path.name == "package":
        assert (path / "README.md").is_file()
        shutil.rmtree(path)
    elif path.is_dir() and path.name == "found":
        if (path / "bundle").exists():
            open_bundle(path / "bundle")
        shutil.rmtree(path)
    elif path.is_dir() and path.name in ("student", "better"):
        assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors"}
        strict_json((path / "config.json").read_text())
    elif path.is_dir():
        open_bundle(path)
    elif path.suffix == ".json":
        read_result(path)
    elif path.suffix == ".jsonl":  # all lines of images or none; complete lines of a live source
        content = path.read_text()
        assert not content or content.endswith("\n"), content[-80:]
        for line in content.splitlines():
            json.loads(line)
    else:
        end = {".html": "</html>", ".pem": "-----END PRIVATE KEY-----"}[path.suffix]
        assert path.read_text().rstrip().endswith(end)


def end_one(name: str, good: Path, work: Path, rng: random.Random) -> list[str]:
    """Start a command, end it at a random moment, and return what is wrong with the leftovers."""
    (line, seconds), mark = VERBS[name], f"{os.getpid()}-{rng.random()}"
    with subprocess.Popen(
        [PROGRAM, *arguments(name, good, work)],
        env=os.environ | {_MARK: mark, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.random() * seconds)
        chosen = rng.choice(_SIGNALS) if name != "optimize" else signal.SIGINT
        begun = (work / "found" / "bundle").exists()
        process.send_signal(chosen)
        try:
            _, said = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            return [f"did not end within 20 s of {chosen.name}"]
    # Python's own start answers Ctrl-C with a traceback before our first line runs.
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
    if name == "optimize" and begun and not (work / "found" / "front.json").is_file():
        wrong.append(f"no result after {chosen.name}, although a bundle was there: {said[-300:]}")
    try:
        for target in re.findall(r"\{work\}/(\S+)", line):
            require_whole(work / target)
    except Exception as error:
        wrong.append(f"torn after {chosen.name}: {type(error).__name__}: {str(error)[:200]}")
    for key in (work / "k.pem", work / "k.pub"):
        key.unlink(missing_ok=True)
    return wrong


def marked(mark: str) -> list[int]:
    """Return processes with our mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            pid = int(path.parent.name)
            if not ended(pid) and f"{_MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(pid)
    return found


def left_over(name: str, good: Path, work: Path) -> list[str]:
    """Run the command to its end; return the hidden and temporary files that remain."""
    line = [PROGRAM, *arguments(name, good, work), *["--frames", "2"] * (name == "run test")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        return [f"the next run fails: {done.stderr[-300:]}"]
    hidden = [path for path in work.rglob("*") if path.name.startswith(".") or path.name.endswith((".part", ".tmp"))]
    return [f"left: {path.relative_to(work)}" for path in hidden if path.name != "images.jsonl.part"]
