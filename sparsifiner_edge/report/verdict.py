"""The top of the page: the sentences that say how it came out, the few figures that stand large, and warnings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sparsifiner_edge.report.conditions import ComparedSides, ReportData, board_of
from sparsifiner_edge.report.result_files import SWEEP, Accuracy, ResultSide
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import Interval, clean, get, interval, plain, rows

PEAK_MEMORY = ("memory", "steady", "peak_rss_bytes")
OLD_FLAGS = {"not-settled": "not-warmed-up", "clock-varies": "clock-drift"}
"""What older files call a flag -> its name."""


def verdict_sentences(data: ReportData) -> list[str]:
    """The verdict: what the page shows, a sentence each, the most important first."""
    texts, sentences = data.texts, []
    if data.differences:
        sentences.append(texts("verdict.refused", fields=field_names(data.differences, texts)))
    for group in data.groups:
        compared = group.compared()
        sentences += [_compared(found, texts) for found in compared] or [_alone(side, texts) for side in group.sides]
    if not data.groups:
        sentences += [_estimated(side, texts) for side in data.sides if side.estimated]
    sentences += [text for found in data.accuracies if (text := _accuracy_sentence(found, texts))]
    judged = {side.sha for side in data.measured if side.role != "against"}
    if judged and judged.isdisjoint(found.sha for found in data.accuracies):
        sentences.append(texts("verdict.no_accuracy"))
    return sentences or [texts("verdict.nothing")]


def field_names(fields: Iterable[str], texts: Texts) -> str:
    """The names of fields of the conditions, in a row."""
    return texts.listed([texts(f"field.{name}") for name in fields])


def _compared(found: ComparedSides, texts: Texts) -> str:
    names = {"subject": found.subject.label, "against": found.against.label}
    ratio, verdict = found.ratio, found.verdict
    if verdict not in ("faster", "slower") or ratio.low is None or ratio.high is None:
        return texts("verdict.same", **names, ratio=texts.figure(ratio))
    if verdict == "slower" and ratio.low > 0 and ratio.high:
        ratio = Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    low, high = ratio.reach
    return texts(f"verdict.{verdict}", **names, ratio=plain(ratio.value), low=plain(low), high=plain(high))


def _alone(side: ResultSide, texts: Texts) -> str:
    median = side.figure("latency_ms", "p50")
    if median is None:
        return texts("verdict.no_latency", subject=side.label)
    return texts("verdict.alone", subject=side.label, latency=texts.figure(median, "ms"))


def _estimated(side: ResultSide, texts: Texts) -> str:
    latency = side.figure("latency_ms")
    if latency is None:
        return texts("verdict.no_latency", subject=side.label)
    return texts("verdict.estimate", subject=side.label, board=board_of(side), latency=texts.figure(latency, "ms"))


def _accuracy_sentence(found: Accuracy, texts: Texts) -> str:
    """What an evaluation says of its subject; "" for a teacher, which the subject's sentence names."""
    if found.role != "subject":
        return ""
    if found.metric == "cosine":
        value = found.value
        return texts("verdict.cosine", subject=found.label, value=texts.figure(value, digits=4)) if value else ""
    student, teacher = (interval(found.figures, f"{role}_percent") for role in ("subject", "teacher"))
    points = interval(found.figures, "difference_points")
    if student is None or teacher is None or points is None:
        return ""
    percent = {"student": f"{student.value:.2f}", "teacher": f"{teacher.value:.2f}", "points": texts.signed(points)}
    return texts("verdict.accuracy", subject=found.label, metric=metric_name(found.metric, texts), **percent)


def metric_name(metric: str, texts: Texts) -> str:
    """A metric in the page's language."""
    return texts.known(f"metric.{metric}", metric)


class Tile(NamedTuple):
    """A large figure, what it is, and what it stands beside."""

    name: str
    value: str
    beside: str


_TILES: tuple[tuple[str, str, float, tuple[str, ...]], ...] = (
    ("latency", "ms", 1.0, ("latency_ms", "p50")),
    ("energy", "mJ", 1e3, ("energy", "net_j_per_inference")),
    ("memory", "MB", 1e-6, PEAK_MEMORY),
)
"""Name, unit, factor to it, and path of the figure."""


def tiles_of(data: ReportData) -> list[Tile]:
    """Of the first comparison, else of the first side, where the page shows one set of conditions; none otherwise."""
    if len(data.groups) != 1 or data.differences:
        return []
    texts, (group,) = data.texts, data.groups
    compared = next(iter(group.compared()), None)
    side, tiles = group.sides[0], []
    if compared:
        side, ratio = compared.subject, compared.ratio
        low, high = map(plain, ratio.reach)
        beside = texts("tile.interval", low=low, high=high)
        tiles.append(Tile(texts("tile.speed"), f"{ratio.value:.2f}×", beside))
    for name, unit, factor, path in _TILES:
        found, other = side.figure(*path), compared and compared.against.figure(*path)
        if found:
            beside = texts("tile.beside", value=f"{plain(other.value * factor)} {unit}") if other else ""
            tiles.append(Tile(texts(f"tile.{name}"), f"{plain(found.value * factor)} {unit}", beside))
    evaluated = (
        found for found in data.accuracies if found.sha == side.sha and found.role == "subject" and found.value
    )
    return tiles + [_accuracy_tile(found, texts) for found in list(evaluated)[:1]]


def _accuracy_tile(found: Accuracy, texts: Texts) -> Tile:
    value, points = found.value or Interval(0.0), interval(found.figures, "difference_points")
    if found.metric == "cosine":
        return Tile(texts("tile.cosine"), f"{value.value:.4f}", texts("tile.cosine.beside"))
    beside = texts("tile.points", points=f"{points.value:+.2f}") if points else ""
    return Tile(texts("tile.accuracy"), f"{value.value:.1f} %", beside)


def flags_of(data: ReportData) -> list[dict[str, str]]:
    """Warnings of measurements: `side`, `name`, `what` as recorded, `do`; what a side records twice is one.

    A name and an advice that the page knows are in its language, others as recorded.
    """
    texts = data.texts
    found: dict[tuple[str, str, str], list[str]] = {}
    for side in (side for side in data.sides if side.role != SWEEP):
        for flag in rows(side.figures, "flags"):
            name = clean(get(flag, "flag") or "?")
            name = OLD_FLAGS.get(name, name)
            what, do = (clean(get(flag, part) or "", 400) for part in ("what", "do"))
            if texts.language != "en" or not do:
                do = texts.known(f"flag.{name}.do", do)
            reasons = found.setdefault((side.label, texts.known(f"flag.{name}", name), do), [])
            reasons += [what] if what else []
    return [
        {"side": side, "name": name, "what": "; ".join(reasons), "do": do}
        for (side, name, do), reasons in found.items()
    ]
