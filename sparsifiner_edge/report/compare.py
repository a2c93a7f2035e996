"""What may be compared with what, and the sentences that say how it came out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sparsifiner_edge.report.read import SWEEP, Accuracy, Side
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import Interval, clean, get, interval, mapping, number, plain, reason, shown
from sparsifiner_edge.results import Result

Context = tuple[tuple[str, str], ...]
"""(field, value) pairs in which two sides must agree before their figures stand side by side."""


class Group(NamedTuple):
    """Sides measured in one context. `name`: what sets it apart from the page's other groups, "" for the only one."""

    name: str
    sides: list[Side]


def context(side: Side) -> Context:
    """Machine, power mode, device, threads, backend and precision of a side, as text."""
    machine, runtime = side.source.result.machine, side.runtime
    backend = [_said(runtime.get(name)) for name in ("backend", "version", "provider")]
    return (
        ("machine", board_of(side) if side.estimated else machine_of(side.source.result)),
        ("power_mode", _power_mode(side)),
        ("device", _said(runtime.get("device"))),
        # A sweep varies them.
        (
            "threads",
            "" if side.role == SWEEP else f"{_said(runtime.get('threads'))} / {_said(machine['affinity_cores'])}",
        ),
        ("backend", " ".join(part for part in backend if part != "?") or "?"),
        ("precision", _said(runtime.get("precision"))),
    )


def machine_of(result: Result) -> str:
    """Board, processor, cores and memory; gibibytes alone, since kernels take a little of it each their own way."""
    machine = result.machine
    memory = number(machine["memory_bytes"])
    size = "?" if memory is None else f"{memory / 2**30:.0f} GiB"
    parts = [_said(machine["board"]), _said(machine["cpu_model"]), f"{_said(machine['logical_cores'])} cores", size]
    return ", ".join(part for part in parts if part != "?")


def board_of(side: Side) -> str:
    """The board that an estimate is for."""
    board = get(side.source.result.method, "board")
    return _said(board.get("title", board.get("name")) if isinstance(board, Mapping) else board)


def _said(value: Any) -> str:
    return "?" if value is None or reason(value) is not None else clean(value, 120)


def _power_mode(side: Side) -> str:
    """Power mode, the GPU's power limit and the clock governor, as they were before the measurement."""
    before = mapping(side.source.result.method, "conditions", side.role, "before")
    mode, limit = before.get("power_mode"), number(before.get("power_limit_mw"))
    if isinstance(mode, Mapping) and reason(mode) is None:
        mode = mode["name"] if isinstance(mode.get("name"), str) else mode.get("id")
    parts = [
        _said(mode),
        "?" if limit is None else f"{limit / 1000:g} W",
        _said(side.source.result.machine["governor"]),
    ]
    return " / ".join(part for part in parts if part != "?") or "?"


def groups_of(sides: Sequence[Side]) -> list[Group]:
    """Measured sides by context, in the order in which they come."""
    found: dict[Context, list[Side]] = {}
    for side in sides:
        if not side.estimated and side.role != SWEEP:
            found.setdefault(context(side), []).append(side)
    differing = differences(sides)
    return [
        Group(" · ".join(value for field, value in shared if field in differing), members)
        for shared, members in found.items()
    ]


def differences(sides: Sequence[Side]) -> dict[str, list[str]]:
    """Fields of the context in which measured sides differ, each with its values."""
    found: dict[str, list[str]] = {}
    for side in sides:
        for field, value in context(side) if not side.estimated else ():
            values = found.setdefault(field, [])
            if value and value not in values:
                values.append(value)
    return {field: values for field, values in found.items() if len(values) > 1}


class Comparison(NamedTuple):
    """Two sides that one run measured in turn. `ratio`: above 1 the subject is faster. `verdict`: as recorded."""

    subject: Side
    against: Side
    ratio: Interval
    verdict: str


def comparisons_in(group: Group) -> list[Comparison]:
    """Comparisons whose two sides both belong to the group."""
    found = []
    for subject in (side for side in group.sides if side.role == "subject"):
        recorded = mapping(subject.source.result.statistics, "comparison")
        ratio, verdict = interval(recorded.get("ratio")), str(recorded.get("verdict"))
        for against in group.sides:
            if against.source is subject.source and against.role == "against" and ratio is not None and ratio.value > 0:
                found.append(Comparison(subject, against, ratio, verdict))
    return found


def lead(groups: Sequence[Group], sides: Sequence[Side], accuracies: Sequence[Accuracy], texts: Texts) -> list[str]:
    """The verdict: what the page shows, a sentence each, the most important first."""
    sentences = []
    if differences(sides):
        sentences.append(texts("verdict.refused", fields=fields_named(differences(sides), texts)))
    for group in groups:
        sentences += _verdicts(group, texts)
    if not groups:
        estimated = [side for side in sides if side.estimated]
        sentences += [_estimated(side, texts) for side in estimated]
    judged = [side for group in groups for side in group.sides if side.role != "against"]
    known = {found.sha for found in accuracies}
    sentences += [text for found in accuracies if (text := accuracy_sentence(found, texts))]
    if judged and not any(side.sha in known for side in judged):
        sentences.append(texts("verdict.no_accuracy"))
    return sentences or [texts("verdict.nothing")]


def fields_named(found: Iterable[str], texts: Texts) -> str:
    """The names of context fields, in a row."""
    return texts.listed([texts(f"field.{name}") for name in found])


def _verdicts(group: Group, texts: Texts) -> list[str]:
    comparisons = comparisons_in(group)
    if comparisons:
        return [_compared(found, texts) for found in comparisons]
    return [_alone(side, texts) for side in group.sides]


def _compared(found: Comparison, texts: Texts) -> str:
    names = {"subject": found.subject.label, "against": found.against.label}
    ratio, verdict = found.ratio, found.verdict
    bounded = ratio.low is not None and ratio.high is not None
    if verdict not in ("faster", "slower") or not bounded:
        return texts("verdict.same", **names, ratio=shown(ratio, texts("interval")))
    if verdict == "slower":
        low, high = ratio.low or 0.0, ratio.high or 0.0
        ratio = Interval(1 / ratio.value, 1 / high, 1 / low) if low > 0 else ratio
    low, high = ratio.reach
    return texts(f"verdict.{verdict}", **names, ratio=plain(ratio.value), low=plain(low), high=plain(high))


def _alone(side: Side, texts: Texts) -> str:
    median = interval(get(side.figures, "latency_ms", "p50"))
    if median is None:
        return texts("verdict.no_latency", subject=side.label)
    return texts("verdict.alone", subject=side.label, latency=shown(median, texts("interval"), "ms"))


def _estimated(side: Side, texts: Texts) -> str:
    latency = interval(side.figures.get("latency_ms"))
    if latency is None:
        return texts("verdict.no_latency", subject=side.label)
    values = {"subject": side.label, "board": board_of(side), "latency": shown(latency, texts("interval"), "ms")}
    return texts("verdict.estimate", **values)


def accuracy_sentence(found: Accuracy, texts: Texts) -> str:
    """What an evaluation says of its subject; "" for a teacher, which the subject's sentence names."""
    if found.role != "subject":
        return ""
    if found.metric == "cosine":
        features = interval(get(found.figures, "features_cosine", "mean"))
        return (
            ""
            if features is None
            else texts("verdict.cosine", subject=found.label, value=shown(features, texts("interval"), digits=4))
        )
    ours, teacher = (interval(found.figures.get(f"{role}_percent")) for role in ("subject", "teacher"))
    points = interval(found.figures.get("difference_points"))
    if ours is None or teacher is None or points is None:
        return ""
    values = {"ours": f"{ours.value:.2f}", "teacher": f"{teacher.value:.2f}", "points": signed(points, texts)}
    return texts("verdict.accuracy", subject=found.label, metric=metric_name(found.metric, texts), **values)


def metric_name(metric: str, texts: Texts) -> str:
    """A metric in the page's language."""
    return texts.known(f"metric.{metric}", metric)


def signed(points: Interval, texts: Texts) -> str:
    """Percentage points with their sign: "-0.30 (-0.60 to 0.00)"."""
    low, high = ("?" if bound is None else f"{bound:+.2f}" for bound in points[1:])
    return f"{points.value:+.2f} ({texts('interval.signed', low=low, high=high)})"


FLAGS_BEFORE = {"not-settled": "not-warmed-up", "clock-varies": "clock-drift"}
"""What files of before call a flag -> its name."""


def flags_of(sides: Sequence[Side], texts: Texts) -> list[dict[str, str]]:
    """Warnings of measurements: `side`, `name`, `what` as recorded, `do`; those of files that record none, from theirs.

    A name and an advice that the page knows are in its language, others as recorded.
    """
    found: list[dict[str, str]] = []
    for side in (side for side in sides if side.role != SWEEP):
        recorded = side.figures.get("flags")
        for flag in recorded if isinstance(recorded, list) else _implied(side):
            name = clean(get(flag, "flag") or "?")
            name = FLAGS_BEFORE.get(name, name)
            what, do = (clean(get(flag, part) or "", 400) for part in ("what", "do"))
            if texts.language != "en" or not do:
                do = texts.known(f"flag.{name}.do", do)
            flag_of = {"side": side.label, "name": texts.known(f"flag.{name}", name), "what": what, "do": do}
            alike = next((f for f in found if all(f[key] == flag_of[key] for key in ("side", "name", "do"))), None)
            if alike is None:
                found.append(flag_of)
            else:
                alike["what"] = "; ".join(part for part in (alike["what"], what) if part)
    return found


def _implied(side: Side) -> list[dict[str, str]]:
    """What the method shows without saying so."""
    method = side.source.result.method
    unsettled = get(method, "warm_up", side.role, "settled") is False
    short = method.get("cut_short")
    found = [{"flag": "not-warmed-up"}] if unsettled else []
    return found + ([{"flag": "too-short", "what": str(short)}] if short else [])


def missing(found: Any, texts: Texts, how: str) -> str:
    """What stands for a figure that is not there: the reason in the result, else how to measure it."""
    why = reason(found)
    return texts("reason", why=why) if why else texts("not_measured", how=how)
