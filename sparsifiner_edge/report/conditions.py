"""Under which conditions each side was measured, and so what may be compared with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sparsifiner_edge.report.result_files import Accuracy, ResultFile, ResultSide, accuracies_of, sides_of
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import Interval, clean, get, interval, mapping, number, reason
from sparsifiner_edge.results import Result

SharedConditions = tuple[tuple[str, str], ...]
"""(field, value) pairs in which two sides must agree before their figures stand side by side."""


class ComparedSides(NamedTuple):
    """Two sides that one run measured in turn. `ratio`: above 1 the subject is faster. `verdict`: as recorded."""

    subject: ResultSide
    against: ResultSide
    ratio: Interval
    verdict: str


class SideGroup(NamedTuple):
    """Sides measured under the same conditions. `name`: what sets it apart from other groups, "" for the only one."""

    name: str
    sides: list[ResultSide]

    def compared(self) -> list[ComparedSides]:
        """The comparisons whose two sides both belong to the group."""
        found = []
        for subject in (side for side in self.sides if side.role == "subject"):
            recorded = mapping(subject.file.result.statistics, "comparison")
            ratio = interval(recorded, "ratio")
            others = [side for side in self.sides if side.file is subject.file and side.role == "against"]
            if others and ratio is not None and ratio.value > 0:
                found.append(ComparedSides(subject, others[0], ratio, str(recorded.get("verdict"))))
        return found


class ReportData(NamedTuple):
    """What sections draw from. `differences`: fields of the conditions in which measured sides differ, with values."""

    files: Sequence[ResultFile]
    sides: Sequence[ResultSide]
    groups: Sequence[SideGroup]
    accuracies: Sequence[Accuracy]
    differences: dict[str, list[str]]
    texts: Texts

    @property
    def measured(self) -> list[ResultSide]:
        """The sides of all groups."""
        return [side for group in self.groups for side in group.sides]

    @property
    def task_files(self) -> list[ResultFile]:
        """Evaluations of models by their own task."""
        return [file for file in self.files if file.result.kind == "evaluation" and "task" in file.result.method]

    @property
    def search_files(self) -> list[ResultFile]:
        """What searches found."""
        return [file for file in self.files if file.result.kind == "search"]

    @property
    def robustness_files(self) -> list[ResultFile]:
        """What evaluations under corruptions found."""
        return [file for file in self.files if file.result.kind == "robustness"]

    @property
    def explanation_files(self) -> list[ResultFile]:
        """What students read on images."""
        return [file for file in self.files if file.result.kind == "explanation"]

    def title(self, key: str, group: SideGroup) -> str:
        """A chart's title, with what sets its group apart."""
        return self.texts(key) + (f" — {group.name}" if group.name else "")

    def chart_name(self, name: str, group: SideGroup) -> str:
        """A chart's name; charts of several groups have a number each."""
        return f"{name}-{list(self.groups).index(group) + 1}" if len(self.groups) > 1 else name


def conditions_of(side: ResultSide) -> SharedConditions:
    """Machine, power mode, device, threads, backend and precision of a side, as text."""
    runtime = side.runtime
    backend = [_said(runtime.get(name)) for name in ("backend", "version", "provider")]
    threads = f"{_said(runtime.get('threads'))} / {_said(side.file.result.machine['affinity_cores'])}"
    return (
        ("machine", board_of(side) if side.estimated else machine_of(side.file.result)),
        ("power_mode", _power_mode(side)),
        ("device", _said(runtime.get("device"))),
        ("threads", threads),
        ("backend", _joined(backend, " ")),
        ("precision", _said(runtime.get("precision"))),
    )


def machine_of(result: Result) -> str:
    """Board, processor, cores and memory; whole gibibytes, since every kernel takes a little of it for itself."""
    machine = result.machine
    memory = number(machine["memory_bytes"])
    size = "?" if memory is None else f"{memory / 2**30:.0f} GiB"
    cores = f"{_said(machine['logical_cores'])} cores"
    return _joined([_said(machine["board"]), _said(machine["cpu_model"]), cores, size], ", ")


def board_of(side: ResultSide) -> str:
    """The board that an estimate is for."""
    board = get(side.file.result.method, "board")
    return _said(board.get("title", board.get("name")) if isinstance(board, Mapping) else board)


def _said(value: Any) -> str:
    return "?" if value is None or reason(value) is not None else clean(value, 120)


def _joined(parts: Sequence[str], separator: str) -> str:
    return separator.join(part for part in parts if part != "?") or "?"


def _power_mode(side: ResultSide) -> str:
    """Power mode, the GPU's power limit and the clock governor, as they were before the measurement."""
    before = mapping(side.file.result.method, "conditions", side.role, "before")
    mode, limit = before.get("power_mode"), number(before.get("power_limit_mw"))
    if isinstance(mode, Mapping) and reason(mode) is None:
        mode = mode["name"] if isinstance(mode.get("name"), str) else mode.get("id")
    watts = "?" if limit is None else f"{limit / 1000:g} W"
    return _joined([_said(mode), watts, _said(side.file.result.machine["governor"])], " / ")


def report_data(files: Sequence[ResultFile], texts: Texts) -> ReportData:
    """What the files hold: measured sides are grouped by their conditions, in the order in which they come."""
    sides = sides_of(files)
    found: dict[SharedConditions, list[ResultSide]] = {}
    for side in sides:
        if not side.estimated:
            found.setdefault(conditions_of(side), []).append(side)
    differences = _differences(sides)
    groups = [
        SideGroup(" · ".join(value for field, value in conditions if field in differences), members)
        for conditions, members in found.items()
    ]
    return ReportData(files, sides, groups, accuracies_of(files, sides), differences, texts)


def _differences(sides: Sequence[ResultSide]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for side in (side for side in sides if not side.estimated):
        for field, value in conditions_of(side):
            values = found.setdefault(field, [])
            if value and value not in values:
                values.append(value)
    return {field: values for field, values in found.items() if len(values) > 1}
