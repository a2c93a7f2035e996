"""Result files as the page reads them: typed, with labels, and with the conditions that forbid comparisons."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from sparsifiner_edge.artifacts import read_json, sha256
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.outcomes import RobustnessResult, ScoresResult, StreamResult
from sparsifiner_edge.pareto import SearchResult
from sparsifiner_edge.profiles.estimate import EstimateResult
from sparsifiner_edge.profiles.figures import Comparison, Figures, ProfileResult
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import clean
from sparsifiner_edge.results import MEASURE_AGAIN, RESULT_SCHEMA, Form, Result, Subject, check_result
from sparsifiner_edge.runtime.session import Runtime

PROGRAM = "sparsifiner-edge"
"""Name of the program in printed commands."""
FORMS: dict[str, type[Result]] = {
    "profile": ProfileResult,
    "comparison": ProfileResult,
    "evaluation": ScoresResult,
    "robustness": RobustnessResult,
    "search": SearchResult,
    "estimate": EstimateResult,
    "stream": StreamResult,
}
"""Kind of result -> its type."""
CHOSEN = ("backend", "precision", "device", "threads")
"""Conditions that may differ in a comparison: all between the two sides of one run, the first two between runs."""
GREATEST = 1e30
"""Maximum magnitude of a number: nothing measured comes near it, and computing beyond it would overflow."""
LEAST_MS = 1e-9
"""Minimum latency in milliseconds: nothing measured comes near it."""
LatencySamples = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class ResultFile(Generic[Form]):
    """One result file; `sha256` in hexadecimal."""

    path: Path
    sha256: str
    result: Form

    @property
    def name(self) -> str:
        """Name of the file, as the page shows it."""
        return clean(self.path.name)

    @property
    def command(self) -> str:
        """Command that made it, with this package's program name."""
        first, *rest = [clean(argument, 500) for argument in self.result.command] or [""]
        if Path(first).name in ("__main__.py", PROGRAM):
            first = PROGRAM
        return shlex.join(["python", first, *rest] if first.endswith(".py") else [first, *rest])

    def subject(self, role: str) -> Subject:
        """Return the subject of a role; raises ArtifactError if there is none."""
        return _of(self, "subjects", {subject.role or "": subject for subject in self.result.subjects}, role)


@dataclasses.dataclass(frozen=True)
class Side:
    """One bundle in one profile.

    Attributes:
        role: "subject" or "against".
        label: Unique name on the page; the part before " · " is the bundle's.
        samples: Latencies in ms.
    """

    file: ResultFile[ProfileResult]
    role: str
    label: str
    subject: Subject
    figures: Figures
    samples: LatencySamples
    runtime: Runtime

    @property
    def bundle_name(self) -> str:
        """Label without the part that tells measurements apart."""
        return self.label.partition(" · ")[0]


class ReportData(NamedTuple):
    """Data that the sections show.

    Attributes:
        differences: Conditions that forbid comparing sides, with their values.
    """

    files: Sequence[ResultFile[Any]]
    sides: Sequence[Side]
    differences: dict[str, list[str]]
    texts: Texts

    def of(self, form: type[Form]) -> list[ResultFile[Form]]:
        """Return the files of a type."""
        return [file for file in self.files if isinstance(file.result, form)]

    def label_of(self, subject: Subject) -> str:
        """Return the name of a subject, the same everywhere on the page."""
        names = {side.subject.sha256: side.bundle_name for side in self.sides}
        return names.get(subject.sha256, _name(subject))

    def comparisons(self) -> list[tuple[Side, Side, Comparison]]:
        """Return sides that one run measured in turn and that may be compared, the subject first."""
        return [
            (one, other, comparison)
            for one, other in pairwise(self.sides)
            if one.file is other.file
            and not forbids(one, other)
            and (comparison := one.file.result.statistics.comparison) is not None
        ]


def report_data(sources: Sequence[Path | Result], texts: Texts) -> ReportData:
    """Read files, or take results that were just made.

    Raises:
        ArtifactError: A file is no result that the page shows, is of another version, or holds impossible values.
        ConfigError: There is no file.
    """
    if not sources:
        raise ConfigError("There is no result to report.", "Give files that profile or evaluate wrote with -o.")
    files = list({file.sha256: file for file in map(_read, sources)}.values())
    sides = [side for file in files for side in _sides(file)]
    conditions = [conditions_of(side) for side in sides]
    values = {field: list(dict.fromkeys(each[field] for each in conditions)) for field in (conditions or [{}])[0]}
    forbidden = {field for one in sides for other in sides for field in forbids(one, other)}
    differences = {field: those for field, those in values.items() if field in forbidden}
    varied = {field for field, those in values.items() if len(those) > 1}
    return ReportData(files, _label(sides, varied), differences, texts)


def unlike(one: Side, other: Side) -> dict[str, list[str]]:
    """Return the conditions in which two sides differ, with both values."""
    here, there = conditions_of(one), conditions_of(other)
    return {field: [here[field], there[field]] for field in here if here[field] != there[field]}


def forbids(one: Side, other: Side) -> set[str]:
    """Return the conditions in which two sides differ and that forbid comparing them."""
    return unlike(one, other).keys() - (CHOSEN if one.file is other.file else CHOSEN[:2])


def _read(path: Path | Result) -> ResultFile[Any]:
    if isinstance(path, Result):
        return ResultFile(Path(), "", path)
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder.", "Give the result files in it.")
    content = read_json(path, RESULT_SCHEMA, MEASURE_AGAIN)
    kind = check_result(content, path, Result).kind
    if kind not in FORMS:
        raise ArtifactError(f"{path} is of kind {kind}.", f"The page shows: {', '.join(FORMS)}.")
    if _largest(content) > GREATEST:
        raise ArtifactError(f"{path} holds a number beyond {GREATEST:g}, which cannot be a measurement.", MEASURE_AGAIN)
    return ResultFile(path, sha256(path), check_result(content, path, FORMS[kind]))


def _largest(content: Any) -> float:
    """Return the largest magnitude of a number in lists and objects."""
    if isinstance(content, (dict, list)):
        return max(map(_largest, content.values() if isinstance(content, dict) else content), default=0)
    return abs(content) if isinstance(content, (int, float)) else 0


def _sides(file: ResultFile[Any]) -> Iterator[Side]:
    if not isinstance(file.result, ProfileResult):
        return
    statistics, method = file.result.statistics, file.result.method
    for role, figures in (("subject", statistics.subject), ("against", statistics.against)):
        if figures is None:
            continue
        samples = file.result.samples.get(role, {}).get("latency_ms", [])
        latencies, latency = np.asarray(samples, np.float64), figures.latency_ms
        marks = [mark.value for mark in (latency.p50, latency.p90, latency.p99, latency.mean)]
        if not len(latencies) or min(latencies.min(), *marks) < LEAST_MS:
            raise ArtifactError(f"{file.path}: {role} has no latencies, or impossible ones.", MEASURE_AGAIN)
        _of(file, "method.conditions", method.conditions, role)
        subject, runtime = file.subject(role), _of(file, "method.runtime", method.runtime, role)
        yield Side(file, role, _name(subject), subject, figures, latencies, runtime)


Value = TypeVar("Value")


def _of(file: ResultFile[Any], name: str, by_role: dict[str, Value], role: str) -> Value:
    if role not in by_role:
        raise ArtifactError(f"{file.path}: {name} has no entry for {role}.", MEASURE_AGAIN)
    return by_role[role]


def _name(subject: Subject) -> str:
    return clean(subject.name or Path(str(subject.path)).name)


def _label(sides: Sequence[Side], differences: Container[str]) -> list[Side]:
    """Label the sides by folder, file, differing conditions, or a number, so that labels are unique."""
    shas: dict[str, set[object]] = {}
    for side in sides:
        for name in (side.label, _in_folder(side)):
            shas.setdefault(name, set()).add(side.subject.sha256)
    times, labels = Counter(sha for sha, _ in {(side.subject.sha256, side.file.sha256) for side in sides}), list[str]()
    for side in sides:
        folder = _in_folder(side)[len(side.label) :] if len(shas[side.label]) > 1 else ""
        folder += f" #{str(side.subject.sha256)[:6]}" if len(shas[_in_folder(side)]) > 1 else ""
        parts = [side.label + folder, *([side.file.name] if times[side.subject.sha256] > 1 else [])]
        parts += [value for field, value in conditions_of(side).items() if field in differences]
        labels.append(" · ".join(parts))
    numbers = [f" · ({labels[:at].count(label) + 1})" * (labels.count(label) > 1) for at, label in enumerate(labels)]
    each = zip(sides, labels, numbers, strict=True)
    return [dataclasses.replace(side, label=label + number) for side, label, number in each]


def _in_folder(side: Side) -> str:
    return f"{side.label}, {clean(Path(str(side.subject.path)).name)}"


def conditions_of(side: Side) -> dict[str, str]:
    """Return the conditions that decide a side's figures besides its bundle, as text."""
    runtime, machine = side.runtime, side.file.result.machine
    before = side.file.result.method.conditions[side.role].before
    memory = machine.memory_bytes
    # Whole gibibytes, since every kernel reserves a little.
    size = "?" if isinstance(memory, Unavailable) else f"{memory / 2**30:.0f} GiB"
    watts = "?" if before.power_limit_mw is None else f"{before.power_limit_mw / 1000:g} W"
    return {
        "machine": _join([machine.board, machine.cpu_model, f"{machine.logical_cores} cores", size], ", "),
        "power_mode": _join([before.power_mode, watts, machine.governor], " / "),
        "device": _join([runtime.device], ""),
        "threads": f"{_join([runtime.threads], '')} / {machine.affinity_cores}",
        "backend": _join([runtime.backend, runtime.version, runtime.provider], " "),
        "precision": _join([runtime.precision], ""),
    }


def _join(parts: Sequence[object], separator: str) -> str:
    """Join the known parts."""
    known = [clean(part, 120) for part in parts if part not in (None, "?") and not isinstance(part, Unavailable)]
    return separator.join(known) or "?"
