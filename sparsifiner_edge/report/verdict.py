"""The top of the page: the sentences that say how it came out, and warnings."""

from __future__ import annotations

from collections.abc import Iterable

from sparsifiner_edge.report.conditions import ComparedSides, ReportData, board_of
from sparsifiner_edge.report.explain_section import explain_sentences
from sparsifiner_edge.report.result_files import Accuracy, ResultFile, ResultSide
from sparsifiner_edge.report.search_section import search_sentence
from sparsifiner_edge.report.stability_section import stability_sentences
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import Interval, clean, get, interval, plain, rows


def verdict_sentences(data: ReportData) -> list[str]:
    """The verdict: what the page shows, a sentence each, the most important first."""
    texts, sentences = data.texts, []
    if data.differences:
        sentences.append(texts("verdict.refused", fields=field_names(data.differences, texts)))
    for group in data.groups:
        compared = group.compared()
        sentences += [_compared(found, texts) for found in compared] or [_single(side, texts) for side in group.sides]
    if not data.groups:
        sentences += [_single(side, texts) for side in data.sides if side.estimated]
    sentences += [text for found in data.accuracies if (text := _accuracy_sentence(found, texts))]
    sentences += [told for file in data.search_files if (told := search_sentence(file, texts))]
    sentences += [text for file in data.task_files if (text := _task_sentence(file, data))]
    sentences += [told for file in data.robustness_files for told in stability_sentences(file, texts)]
    sentences += [told for file in data.explanation_files for told in explain_sentences(file, texts)]
    tried = {str(s.sha256) for file in data.task_files for s in file.result.subjects}
    judged = {side.sha for side in data.measured if side.role != "against"}
    if judged and judged.isdisjoint(tried.union(found.sha for found in data.accuracies)):
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


def _single(side: ResultSide, texts: Texts) -> str:
    """What a side says that nothing is compared with: a median, or an estimate."""
    latency = side.figure("latency_ms") if side.estimated else side.figure("latency_ms", "p50")
    if latency is None:
        return texts("verdict.no_latency", subject=side.label)
    key = "verdict.estimate" if side.estimated else "verdict.alone"
    return texts(key, subject=side.label, board=board_of(side), latency=texts.figure(latency, "ms"))


def _task_sentence(file: ResultFile, data: ReportData) -> str:
    """How near a map comes to the dense model's; "" where the task is a user's own."""
    texts, statistics = data.texts, file.result.statistics
    known = [(name, interval(statistics, name, "mean")) for name in ("error", "iou") if name in statistics]
    shas = {str(subject.sha256) for subject in file.result.subjects if subject.role == "subject"}
    label = next((side.bundle_name for side in data.sides if side.sha in shas), file.name)
    figures = [f"{texts(f'task.{name}')} {texts.figure(value, digits=4)}" for name, value in known]
    return texts("verdict.task", file=label, figures=texts.listed(figures)) if figures else ""


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


def flags_of(data: ReportData) -> list[dict[str, str]]:
    """Warnings of measurements: `side`, `name`, `what` as recorded, `do`; what a side records twice is one.

    A name and an advice that the page knows are in its language, others as recorded.
    """
    texts = data.texts
    found: dict[tuple[str, str, str], list[str]] = {}
    for side in data.sides:
        for flag in rows(side.figures, "flags"):
            name = clean(get(flag, "flag") or "?")
            what, do = (clean(get(flag, part) or "", 400) for part in ("what", "do"))
            if texts.language != "en" or not do:
                do = texts.known(f"flag.{name}.do", do)
            reasons = found.setdefault((side.label, texts.known(f"flag.{name}", name), do), [])
            reasons += [what] if what else []
    return [
        {"side": side, "name": name, "what": "; ".join(reasons), "do": do}
        for (side, name, do), reasons in found.items()
    ]
