"""Verdict at the top of the page: the sentences that say the result."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

from sparsifiner_edge.outcomes import ALL, RobustnessResult, ScoresResult
from sparsifiner_edge.pareto import SearchResult
from sparsifiner_edge.profiles.estimate import EstimateResult
from sparsifiner_edge.profiles.figures import Comparison
from sparsifiner_edge.records import Unavailable
from sparsifiner_edge.report.reading import ReportData, ResultFile, Side, conditions_of, unlike
from sparsifiner_edge.report.texts import Texts
from sparsifiner_edge.report.values import clean, plain


def verdict_sentences(data: ReportData) -> list[str]:
    """Return the verdict, one sentence per finding, the most important first."""
    texts, comparisons = data.texts, data.comparisons()
    refused = [texts("verdict.refused", fields=_fields(data.differences, texts))] if data.differences else []
    sentences = refused + [sentence for each in comparisons for sentence in _measured(*each, data)]
    mentioned = [conditions_of(side) for *sides, _ in comparisons for side in sides]
    for side in (side for side in data.sides if conditions_of(side) not in mentioned):
        latency = texts.figure(side.figures.latency_ms.p50, "ms")
        sentences.append(texts("verdict.alone", subject=side.label, latency=latency))
    sentences += [sentence for file in data.of(ScoresResult) for sentence in _scores(file, data)]
    sentences += [sentence for file in data.of(SearchResult) for sentence in _search(file, texts)]
    sentences += [sentence for file in data.of(EstimateResult) for sentence in _estimated(file.result, texts)]
    sentences += [sentence for file in data.of(RobustnessResult) for sentence in _stability(file, texts)]
    subjects = [side for side in data.sides if side.role == "subject"]
    if subjects and not comparisons and not any(_is_evaluated(side, data) for side in subjects):
        sentences.append(texts("verdict.no_accuracy"))
    return sentences or [texts("verdict.nothing")]


def _fields(values: Mapping[str, Sequence[str]], texts: Texts) -> str:
    """Return conditions with their values: "precision (fp16 | fp32)"."""
    return texts.join([f"{texts(f'field.{name}')} ({' | '.join(each)})" for name, each in values.items()])


def _measured(subject: Side, against: Side, comparison: Comparison, data: ReportData) -> Iterator[str]:
    """Yield which side is faster, what else differs, and what is known about fidelity."""
    texts, others, names = data.texts, unlike(subject, against), (subject.bundle_name, against.bundle_name)
    how = texts("verdict.others", others=_fields(others, texts)) if others else ""
    names = (subject.label, against.label) if names[0] == names[1] else names
    yield _compared(comparison, *names, texts, how)
    sides = (subject, against) if others.keys() & {"backend", "precision"} else (subject,)
    if all(_is_evaluated(side, data) for side in sides):
        return
    for side, name in zip(sides, names, strict=False):
        if side.subject.to_float32 is not None:
            yield texts("verdict.to_float32", subject=name, value=f"{side.subject.to_float32:.4f}")
    same_model = subject.subject.sha256 == against.subject.sha256
    dense = "DENSE/" if same_model else shlex.quote(clean(against.subject.path, 500))
    commands = [_evaluate(side, dense) for side in sides if same_model and not _is_evaluated(side, data)]
    yield texts("verdict.unevaluated", how=" && ".join(commands or [_evaluate(subject, dense)]))


def _evaluate(side: Side, dense: str) -> str:
    """Return the command that evaluates a bundle as it ran here."""
    ran, path = side.runtime, shlex.quote(clean(side.subject.path, 500))
    computed = " ".join(re.findall("fp32|bf16|fp16", str(ran.precision))[-1:])
    cuda, tuned = ran.provider == "CUDAExecutionProvider", computed == "bf16" or ran.backend == "openvino"
    named = {"backend": ran.backend, "provider": cuda and "cuda", "compute-precision": tuned and computed}
    known = {name: value for name, value in named.items() if isinstance(value, str) and value}
    options = "".join(f" --{name} {shlex.quote(clean(value))}" for name, value in known.items())
    return f"sparsifiner-edge evaluate {path} --against {dense} --data IMAGES/{options}"


def _is_evaluated(side: Side, data: ReportData) -> bool:
    """Return True if the bundle was evaluated in its precision, or another was compared with it."""
    return any(
        subject.sha256 == side.subject.sha256 and runtime.precision == side.runtime.precision
        for file in data.of(ScoresResult)
        for subject in file.result.subjects
        if (runtime := file.result.method.runtime.get(str(subject.role))) is not None
    )


def _estimated(result: EstimateResult, texts: Texts) -> list[str]:
    statistics, method, other = result.statistics, result.method, result.method.against
    (name, *others), comparison = [clean(subject.path) for subject in result.subjects], statistics.comparison
    statement, dense = texts("verdict.takes", subject=name, ms=texts.figure(statistics.latency_ms, "ms")), list[str]()
    if comparison is not None and other is not None and others:
        faster, sure = method if comparison.ratio.value > 1 else other, comparison.verdict in ("faster", "slower")
        if faster.dense and not (method.dense and other.dense):
            dense.append(texts("verdict.dense" if sure else "verdict.dense_likely"))
        statement = _compared(comparison, name, others[0], texts, unsure="verdict.unsure")
    return [*dense, texts("verdict.estimate", board=clean(method.board.title), said=statement)]


def _compared(
    comparison: Comparison, subject: str, against: str, texts: Texts, how: str = "", unsure: str = "verdict.same"
) -> str:
    """Return the verdict on a ratio: a side wins only if the whole interval is on its side.

    Args:
        comparison: The ratio with its interval.
        subject: Name of the subject.
        against: Name of the other.
        texts: Words of the page.
        how: Further differences.
        unsure: Key of the text for an undecided ratio.
    """
    ratio, verdict = comparison.ratio, comparison.verdict
    value, low, high = (0.0 if isinstance(x, Unavailable) else x for x in (ratio.value, ratio.low, ratio.high))
    names, share = {"subject": subject, "against": against, "how": how}, f"{100 * ratio.confidence:g}"
    if verdict not in ("faster", "slower") or min(value, low, high) <= 0:
        return texts(unsure, **names, ratio=texts.figure(ratio))
    if verdict == "slower":
        value, low, high = 1 / value, 1 / high, 1 / low
    return texts(f"verdict.{verdict}", **names, ratio=plain(value), low=plain(low), high=plain(high), share=share)


def _scores(file: ResultFile[ScoresResult], data: ReportData) -> Iterator[str]:
    """Yield the accuracy, or the fidelity of features or maps; nothing for a user's own metric."""
    texts, statistics, subject = data.texts, file.result.statistics, data.label_of(file.subject("subject"))
    if {"subject_accuracy", "teacher_accuracy", "drop_accuracy"} <= statistics.keys():
        student, dense = (f"{100 * statistics[f'{role}_accuracy'].mean.value:.2f}" for role in ("subject", "teacher"))
        metric = texts.get(f"metric.{file.result.method.metric}", clean(file.result.method.metric))
        drop = texts.figure(statistics["drop_accuracy"].mean.times(100), digits=2)
        yield texts("verdict.accuracy", subject=subject, metric=metric, student=student, teacher=dense, lost=drop)
    if "features_cosine" in statistics:
        yield texts("verdict.cosine", subject=subject, value=texts.figure(statistics["features_cosine"].mean, digits=4))
    figures = [
        f"{texts(f'score.{name}')} {texts.figure(statistics[name].mean, digits=4)}"
        for name in ("error", "iou")
        if name in statistics
    ]
    if figures:
        yield texts("verdict.task", file=subject, figures=texts.join(figures))


def _search(file: ResultFile[SearchResult], texts: Texts) -> Iterator[str]:
    front, method = file.result.statistics, file.result.method
    for reason in front.unverified:
        yield texts("verdict.unverified", reason=clean(reason, 200))
    answer = front.answer
    if not isinstance(answer, Unavailable) and front.speed_up is not None:
        least = min((one.ms for one in front.dense), key=lambda ms: ms.value)
        yield texts(
            "verdict.search" if method.board is None else "verdict.search_board",
            times=f"{front.speed_up:.2f}",
            metric=texts.get(f"metric.{method.metric}", clean(method.metric, 40)),
            fidelity=f"{answer.held_out_fidelity:.3f}",
            engine=clean(answer.deployment),
            ms=texts.figure(answer.ms, "ms"),
            dense=texts.figure(least, "ms"),
        )


def _stability(file: ResultFile[RobustnessResult], texts: Texts) -> Iterator[str]:
    """Yield what sparsity adds to the drop under corruptions, by score."""
    for score, stabilities in file.result.statistics.items():
        if ALL in stabilities and stabilities[ALL].teacher_drop.value:
            drops = (stabilities[ALL].teacher_drop, stabilities[ALL].extra_drop)
            dense, extra = (texts.figure(each.times(100), digits=2) for each in drops)
            named = texts.get(f"score.{score}", clean(score, 40))
            yield texts("verdict.stability", score=named, dense=dense, extra=extra)
