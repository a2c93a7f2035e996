"""Fuzzing of every command, and commands ended at random moments.

    python -m tests.fuzz --seconds 20                    all classes in turn, as in CI
    python -m tests.fuzz --full --kills 500 -o profiles/results
    python -m tests.fuzz --only manifest --seed 17 --tries 1      repeat one try by its seed
    python -m tests.fuzz --only kills --kills 100 --command optimize      Ctrl-C during a search

Every try depends only on its class and its number (`--seed` is the first number). Failures are printed with both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparsifiner_edge.machine import environment, machine
from sparsifiner_edge.records import write_record
from tests import made
from tests.fuzz import kills
from tests.fuzz.harness import Try, attempt
from tests.fuzz.targets import TARGETS

SHOWN = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--full", action="store_true", help="as many tries of each class as make a full run")
    parser.add_argument("--only", choices=[*TARGETS, "kills"], action="append", help="these classes alone")
    parser.add_argument("--tries", type=int, help="so many of each class")
    parser.add_argument("--kills", type=int, default=0, help="commands to end at random moments")
    parser.add_argument("--command", choices=list(kills.VERBS), help="end this command only")
    parser.add_argument("--seed", type=int, default=0, help="number of the first try")
    parser.add_argument("-o", "--output", type=Path, help="folder for fuzz.json")
    given = parser.parse_args()
    # A shell starts background programs with SIGINT ignored, nohup with SIGHUP, and child processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    report: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        good, work = Path(scratch) / "good", Path(scratch) / "work"
        run_classes(report, [name for name in given.only or TARGETS if name in TARGETS], good, work, given)
        if given.kills or given.only == ["kills"]:
            run_kills(report, good, work / "kills", given)
    for name, entry in report.items():
        print(f"{name}: {entry['tries']} tries, {entry['failures']} failures, {entry['seconds']:.0f} s")
    tries, failures = (sum(entry[name] for entry in report.values()) for name in ("tries", "failures"))
    if given.output:
        content = {
            "tries": tries,
            "failures": failures,
            "classes": report,
            "machine": write_record(machine()),
            "environment": write_record(environment()),
        }
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "fuzz.json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"{tries} tries, {failures} failures")
    return 1 if failures else 0


def count(entry: dict[str, Any], name: str, number: int, since: float, failures: list[str], tries: int = 1) -> None:
    """Add tries and failures to a class's entry in the report."""
    entry["tries"] += tries
    entry["failures"] += len(failures)
    entry["seconds"] = round(entry["seconds"] + time.monotonic() - since, 3)
    for failure in failures:
        if len(entry["found"]) < SHOWN:
            entry["found"].append({"number": number, "failure": failure})
        print(f"{name} {number}: {failure}", flush=True)


def run_classes(report: dict[str, Any], names: list[str], good: Path, work: Path, given: argparse.Namespace) -> None:
    """Run a try of each class in turn, until each has reached its number or the time is over."""
    for name in names:
        report[name] = {"tries": 0, "failures": 0, "seconds": 0.0, "found": []}
        made.make(good, TARGETS[name].needs)
        (work / name).mkdir(parents=True)
    deadline = time.monotonic() + given.seconds
    tries = given.tries or (None if given.full else 20 if given.seconds == float("inf") else 1 << 30)
    for number in itertools.count():
        left = [name for name in names if number < (tries or TARGETS[name].tries)]
        for name in left:
            if (start := time.monotonic()) >= deadline:
                return
            one = Try(random.Random(f"{name}{given.seed + number}"), given.seed + number, good, work / name)
            failure = attempt(TARGETS[name], one)
            count(report[name], name, one.number, start, [failure] if failure else [])
        if not left:
            return


def run_kills(report: dict[str, Any], good: Path, work: Path, given: argparse.Namespace) -> None:
    """End each command in turn; finally, each runs to its end, and no hidden file may be left."""
    made.make(good, kills.NEEDS)
    for name in ("built", "signed"):  # Bundles that two of the commands write into.
        shutil.copytree(good / "plain", work / name)
    entry = report["kills"] = {"tries": 0, "failures": 0, "seconds": 0.0, "found": []}
    names, temporary = [given.command] if given.command else list(kills.VERBS), work.parent / "tmp"
    tries, seed = given.kills or given.tries or 50, given.seed
    temporary.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(temporary)
    for number in range(seed, seed + tries):
        name, start = names[number % len(names)], time.monotonic()
        count(entry, name, number, start, kills.end_one(name, good, work, random.Random(f"kill{number}")))
    for name in names:
        start = time.monotonic()
        count(entry, name, -1, start, kills.left_over(name, good, work), tries=0)
    del os.environ["TMPDIR"]


if __name__ == "__main__":
    sys.exit(main())
