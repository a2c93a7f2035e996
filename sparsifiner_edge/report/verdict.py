"""The top of the page: the sentences that say how it came out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sparsifiner_edge.profiles.figures import Comparison
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report.measured import Evaluation, cosine_files, metric_name
from sparsifiner_edge.report.others import ALL, task_files
from sparsifiner_edge.report.reading import ReportData, ResultFile, Side, conditions_of
from sparsifiner_edge.report.records import ClassEvaluation, Robustness, ScoreEvaluation, SearchRecord
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import Interval, clean, exact, interval, plain


def verdict_sentences(data: ReportData) -> list[str]:
    """The verdict: what the page shows, a sentence each, the most important first."""
    texts = data.texts
    sentences = [texts("verdict.refused", fields=field_names(data.differences, texts))] if data.differences else []
    compared = data.compared()
    for subject, against, comparison in compared:
        sentences.append(_compared(subject, against, comparison, texts))
    told = [conditions_of(subject) for subject, _, _ in compared]
    for side in (side for side in data.sides if conditions_of(side) not in told):
        latency = texts.figure(exact(side.figures.latency_ms.p50), "ms")
        sentences.append(texts("verdict.alone", subject=side.label, latency=latency))
    accuracies: list[Evaluation] = [*data.of(ClassEvaluation), *cosine_files(data)]
    sentences += [_accuracy(file, data) for file in accuracies]
    sentences += [sentence for file in data.of(SearchRecord) for sentence in _search(file, texts)]
    sentences += [sentence for file in task_files(data) for sentence in _task(file, data)]
    sentences += [sentence for file in data.of(Robustness) for sentence in _stability(file, texts)]
    evaluated = {str(subject.sha256) for file in (*accuracies, *task_files(data)) for subject in file.result.subjects}
    judged = {side.sha for side in data.sides if side.role == "subject"}
    if judged and judged.isdisjoint(evaluated):
        sentences.append(texts("verdict.no_accuracy"))
    return sentences or [texts("verdict.nothing")]


def field_names(fields: Iterable[str], texts: Texts) -> str:
    """The names of fields of the conditions, in a row."""
    return texts.listed([texts(f"field.{name}") for name in fields])


def _compared(subject: Side, against: Side, comparison: Comparison, texts: Texts) -> str:
    names = {"subject": subject.label, "against": against.label}
    ratio, verdict = exact(comparison.ratio), comparison.verdict
    if verdict not in ("faster", "slower") or not ratio.low or not ratio.high or min(ratio.reach) <= 0:
        return texts("verdict.same", **names, ratio=texts.figure(ratio))
    if verdict == "slower":
        ratio = Interval(1 / ratio.value, 1 / ratio.high, 1 / ratio.low)
    low, high = ratio.reach
    return texts(f"verdict.{verdict}", **names, ratio=plain(ratio.value), low=plain(low), high=plain(high))


def _accuracy(file: Evaluation, data: ReportData) -> str:
    texts, subject = data.texts, data.label_of(file.subject("subject"))
    if isinstance(file.result, ScoreEvaluation):
        score = file.result.statistics.get("features_cosine")
        value = texts.figure(interval(score.mean if score else None), digits=4)
        return texts("verdict.cosine", subject=subject, value=value)
    shares = file.result.statistics
    points = exact(shares.difference_points)
    return texts(
        "verdict.accuracy", subject=subject, metric=metric_name(file.result.method.metric, texts),
        student=f"{shares.subject_percent:.2f}", teacher=f"{shares.teacher_percent:.2f}", points=texts.signed(points),
    )  # fmt: skip


def _task(file: ResultFile[ScoreEvaluation], data: ReportData) -> Iterator[str]:
    """How near a map comes to the dense model's; nothing where the task is a user's own."""
    texts, statistics = data.texts, file.result.statistics
    figures = [
        f"{texts(f'task.{name}')} {texts.figure(exact(statistics[name].mean), digits=4)}"
        for name in ("error", "iou") if name in statistics
    ]  # fmt: skip
    if figures:
        yield texts("verdict.task", file=data.label_of(file.subject("subject")), figures=texts.listed(figures))


def _search(file: ResultFile[SearchRecord], texts: Texts) -> Iterator[str]:
    answer, dense = file.result.statistics.answer, file.result.statistics.dense
    if not isinstance(answer, Unavailable) and dense:
        least = min((one.ms for one in dense), key=lambda ms: ms.value)
        yield texts(
            "verdict.search" if file.result.method.board is None else "verdict.search_board",
            ms=texts.figure(exact(answer.ms), "ms"), engine=clean(answer.engine),
            dense=texts.figure(exact(least), "ms"), fidelity=f"{answer.fidelity:.4f}",
        )  # fmt: skip


def _stability(file: ResultFile[Robustness], texts: Texts) -> Iterator[str]:
    """What sparsity adds to the loss, by score; a dense model that others are held against loses nothing."""
    for score, losses in file.result.statistics.stability.items():
        if ALL in losses and losses[ALL].teacher_lost.value:
            points = [exact(each.times(100)) for each in (losses[ALL].teacher_lost, losses[ALL].extra_lost)]
            dense, extra = (texts.figure(each, digits=2) for each in points)
            named = texts.known(f"task.{score}", clean(score, 40))
            yield texts("verdict.stability", score=named, dense=dense, extra=extra)
