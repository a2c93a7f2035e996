"""`evaluate_student`: how near a student or bundle comes to its dense teacher, by one of several metrics."""

from __future__ import annotations

from pathlib import Path

from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.evaluate.classes import METRICS, ClassResult, evaluate_classes
from sparsifiner_edge.evaluate.cosine import CosineResult, evaluate_cosine
from sparsifiner_edge.evaluate.extract import Runner
from sparsifiner_edge.images import list_images
from sparsifiner_edge.progress import Progress


def evaluate_student(
    subject: str | Path,
    data: str | Path | list[Path],
    *,
    against: str | Path | None = None,
    weights: str | Path | None = None,
    metric: str = "cosine",
    keep: float | None = None,
    token_keep: tuple[tuple[int, float], ...] | None = None,
    gallery: str | Path | None = None,
    queries: int | None = None,
    head: str | Path | None = None,
    backend: str = "onnxruntime",
    kernels: str = "auto",
    progress: Progress | None = None,
) -> CosineResult | ClassResult:
    """Compare a student or bundle with its dense teacher over images.

    Args:
        subject: student or bundle folder.
        data: an image, a folder of images, or a list of images; labelled ones for the other metrics.
        against: the teacher: timm's name (with `weights`), or a bundle. None, for a student only: its own weights
            with dense attention everywhere.
        metric: "cosine"; or "knn", "linear", "top1": see `evaluate_classes`.
        gallery, queries, head: for the other metrics.
        keep, token_keep: for a student: other shares of keys and tokens than its own.
        backend, kernels: what runs bundles; see `open_session`.
        progress: see `Progress`; counts images.

    Returns:
        A result of kind "evaluation".

    Raises:
        ConfigError: no teacher for a bundle, sizes differ, or nothing to compare.
        SparsifinerError: subject, teacher or images are unusable.
    """
    runner = Runner(backend, kernels)
    if metric in METRICS:
        if isinstance(data, list):
            raise ConfigError(f"{metric} needs a folder of labelled images.", "Give the folder.")
        return evaluate_classes(
            subject,
            data,
            metric=metric,
            gallery=gallery,
            queries=queries,
            against=against,
            weights=weights,
            keep=keep,
            token_keep=token_keep,
            head=head,
            runner=runner,
            progress=progress,
        )
    if metric != "cosine":
        raise ConfigError(f"metric is {metric!r}.", f"Choose one of: cosine, {', '.join(METRICS)}.")
    if any(given is not None for given in (gallery, queries, head)):
        raise ConfigError(
            "A gallery, a number of queries and a head require another metric.", f"Choose: {', '.join(METRICS)}."
        )
    return evaluate_cosine(
        Path(subject),
        data if isinstance(data, list) else list_images(Path(data)),
        against=against,
        weights=weights,
        keep=keep,
        token_keep=token_keep,
        runner=runner,
        progress=progress,
    )
