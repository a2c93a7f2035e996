"""Hostile input to every command, and commands ended at random moments.

    python -m tests.fuzz --seconds 20                    all classes in turn, as CI does
    python -m tests.fuzz --full --kills 500 -o profiles/results
    python -m tests.fuzz --only manifest --seed 17 --tries 1      one try again, by its seed

Every try is drawn from its class and its number alone (`--seed` is the first number). What fails is printed with them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparsifiner_edge.machine import environment, machine
from sparsifiner_edge.records import write_record
from tests.fuzz import bundles, kills, materials, others
from tests.fuzz.harness import Target, Try, attempt

SHOWN = 20
TARGETS = {
    "golden": Target(105, bundles.golden, ("plain",)),
    "model": Target(308, bundles.hostile_model, ("plain", "images", "keys")),
    "manifest": Target(5694, bundles.manifest, ("plain", "bundle", "images", "keys")),
    "injection": Target(195, bundles.injection, ("plain",)),
    "report": Target(2100, others.report, ("results",)),
    "student": Target(294, others.student, ("student",)),
    "checkpoint": Target(1399, others.checkpoint, ("training",)),
    "settings": Target(560, others.settings, ("bundle",)),
    "usage": Target(601, others.usage, ("plain", "student", "results", "images")),
    "http": Target(200, others.http),
}
"""Classes of tries, and how many of each make a full run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--full", action="store_true", help="as many tries of each class as make a full run")
    parser.add_argument("--only", choices=[*TARGETS, "kills"], action="append", help="these classes alone")
    parser.add_argument("--tries", type=int, help="so many of each class")
    parser.add_argument("--kills", type=int, default=0, help="commands to end at random moments")
    parser.add_argument("--seed", type=int, default=0, help="number of the first try")
    parser.add_argument("-o", "--output", type=Path, help="folder for fuzz.json")
    given = parser.parse_args()
    # A shell starts programs in the background deaf to Ctrl-C, nohup to SIGHUP, and what they start inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        good, work = Path(scratch) / "good", Path(scratch) / "work"
        names = [name for name in given.only or TARGETS if name in TARGETS]
        report = run_classes(names, good, work, given)
        if given.kills or given.only == ["kills"]:
            report["kills"] = run_kills(good, work / "kills", given.kills or given.tries or 50, given.seed)
    for name, entry in report.items():
        print(f"{name}: {entry['tries']} tries, {entry['failures']} failures, {entry['seconds']:.0f} s")
    tries, failures = (sum(entry[name] for entry in report.values()) for name in ("tries", "failures"))
    if given.output:
        content = {"tries": tries, "failures": failures, "classes": report, "machine": write_record(machine()),
                   "environment": write_record(environment())}  # fmt: skip
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "fuzz.json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"{tries} tries, {failures} failures")
    return 1 if failures else 0


def run_classes(names: list[str], good: Path, work: Path, given: argparse.Namespace) -> dict[str, Any]:
    """A try of each class in turn, until each has had its number or the time is over."""
    report = {name: new_entry() for name in names}
    for name in names:
        materials.make(good, TARGETS[name].needs)
        (work / name).mkdir(parents=True)
    deadline = time.monotonic() + given.seconds if given.seconds else float("inf")
    tries = given.tries or (None if given.full else 1 << 30 if given.seconds else 20)
    left, number = list(names), given.seed
    while left := [name for name in left if number - given.seed < (tries or TARGETS[name].tries)]:
        for name in left:
            if time.monotonic() >= deadline:
                return report
            start = time.monotonic()
            failure = attempt(TARGETS[name], Try(random.Random(f"{name}{number}"), number, good, work / name))
            report[name]["tries"] += 1
            report[name]["seconds"] = round(report[name]["seconds"] + time.monotonic() - start, 3)
            if failure is not None:
                record(report[name], name, number, failure)
        number += 1
    return report


def new_entry() -> dict[str, Any]:
    return {"tries": 0, "failures": 0, "seconds": 0.0, "found": []}


def record(entry: dict[str, Any], name: str, number: int, failure: str) -> None:
    entry["failures"] += 1
    if len(entry["found"]) < SHOWN:
        entry["found"].append({"number": number, "failure": failure})
    print(f"{name} {number}: {failure}", flush=True)


def run_kills(good: Path, work: Path, tries: int, seed: int) -> dict[str, Any]:
    """Each command in turn, ended; at last each runs to its end, and nothing hidden may be left."""
    materials.make(good, kills.NEEDS)
    kills.prepare(good, work)
    entry, start, names = new_entry(), time.monotonic(), list(kills.VERBS)
    temporary = work.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(temporary)
    for number in range(seed, seed + tries):
        name = names[number % len(names)]
        for failure in kills.end_one(name, good, work, random.Random(f"kill{number}")):
            record(entry, name, number, failure)
        entry["tries"] += 1
    for name in names:
        for failure in kills.left_over(name, good, work):
            record(entry, name, -1, failure)
    del os.environ["TMPDIR"]
    entry["seconds"] = round(time.monotonic() - start, 1)
    return entry


if __name__ == "__main__":
    sys.exit(main())
