"""The top of the page: the sentences that say how it came out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sparsifiner_edge.front import SearchResult
from sparsifiner_edge.outcomes import ALL, RobustnessResult, ScoresResult
from sparsifiner_edge.profiles.figures import Comparison
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report.reading import ReportData, ResultFile, Side, conditions_of
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import clean, plain


def verdict_sentences(data: ReportData) -> list[str]:
    """The verdict: what the page shows, a sentence each, the most important first."""
    texts = data.texts
    sentences = [texts("verdict.refused", fields=field_names(data.differences, texts))] if data.differences else []
    comparisons = data.comparisons()
    for subject, against, comparison in comparisons:
        sentences.append(_comparison(subject, against, comparison, texts))
    mentioned = [conditions_of(subject) for subject, _, _ in comparisons]
    for side in (side for side in data.sides if conditions_of(side) not in mentioned):
        latency = texts.figure(side.figures.latency_ms.p50, "ms")
        sentences.append(texts("verdict.alone", subject=side.label, latency=latency))
    sentences += [sentence for file in data.of(ScoresResult) for sentence in _scores(file, data)]
    sentences += [sentence for file in data.of(SearchResult) for sentence in _search(file, texts)]
    sentences += [sentence for file in data.of(RobustnessResult) for sentence in _stability(file, texts)]
    evaluated = {str(subject.sha256) for file in data.of(ScoresResult) for subject in file.result.subjects}
    judged = {side.sha for side in data.sides if side.role == "subject"}
    if judged and judged.isdisjoint(evaluated):
        sentences.append(texts("verdict.no_accuracy"))
    return sentences or [texts("verdict.nothing")]


def field_names(fields: Iterable[str], texts: Texts) -> str:
    """The names of fields of the conditions, in a row."""
    return texts.join([texts(f"field.{name}") for name in fields])


def _comparison(subject: Side, against: Side, comparison: Comparison, texts: Texts) -> str:
    names = {"subject": subject.label, "against": against.label}
    ratio, verdict = comparison.ratio, comparison.verdict
    value, low, high = (0.0 if isinstance(x, Unavailable) else x for x in (ratio.value, ratio.low, ratio.high))
    if verdict not in ("faster", "slower") or min(value, low, high) <= 0:
        return texts("verdict.same", **names, ratio=texts.figure(ratio))
    if verdict == "slower":
        value, low, high = 1 / value, 1 / high, 1 / low
    return texts(f"verdict.{verdict}", **names, ratio=plain(value), low=plain(low), high=plain(high))


def _scores(file: ResultFile[ScoresResult], data: ReportData) -> Iterator[str]:
    """How often classes are right, how near features come, or how near a map; nothing of a user's own metric."""
    texts, statistics, subject = data.texts, file.result.statistics, data.label_of(file.subject("subject"))
    if {"subject_accuracy", "teacher_accuracy", "lost_accuracy"} <= statistics.keys():
        student, dense = (f"{100 * statistics[f'{role}_accuracy'].mean.value:.2f}" for role in ("subject", "teacher"))
        metric = texts.get(f"metric.{file.result.method.metric}", clean(file.result.method.metric))
        lost = texts.figure(statistics["lost_accuracy"].mean.times(100), digits=2)
        yield texts("verdict.accuracy", subject=subject, metric=metric, student=student, teacher=dense, lost=lost)
    if "features_cosine" in statistics:
        yield texts("verdict.cosine", subject=subject, value=texts.figure(statistics["features_cosine"].mean, digits=4))
    figures = [
        f"{texts(f'score.{name}')} {texts.figure(statistics[name].mean, digits=4)}"
        for name in ("error", "iou") if name in statistics
    ]  # fmt: skip
    if figures:
        yield texts("verdict.task", file=subject, figures=texts.join(figures))


def _search(file: ResultFile[SearchResult], texts: Texts) -> Iterator[str]:
    answer, dense = file.result.statistics.answer, file.result.statistics.dense
    if not isinstance(answer, Unavailable) and dense:
        least = min((one.ms for one in dense), key=lambda ms: ms.value)
        yield texts(
            "verdict.search" if file.result.method.board is None else "verdict.search_board",
            ms=texts.figure(answer.ms, "ms"), engine=clean(answer.engine), dense=texts.figure(least, "ms"),
            fidelity=f"{answer.fidelity:.4f}",
        )  # fmt: skip


def _stability(file: ResultFile[RobustnessResult], texts: Texts) -> Iterator[str]:
    """What sparsity adds to the loss, by score; a dense model that others are held against loses nothing."""
    for score, losses in file.result.statistics.items():
        if ALL in losses and losses[ALL].teacher_lost.value:
            lost = (losses[ALL].teacher_lost, losses[ALL].extra_lost)
            dense, extra = (texts.figure(each.times(100), digits=2) for each in lost)
            named = texts.get(f"score.{score}", clean(score, 40))
            yield texts("verdict.stability", score=named, dense=dense, extra=extra)
