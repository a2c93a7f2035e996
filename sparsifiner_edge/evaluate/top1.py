"""Top-1 of a classifier beside its teacher's, at scale: images are prepared as timm validates the models, read by
worker processes, taken in batches, on a GPU where torch sees one, and split over the processes that accelerate
launched.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.bounds import MOST_BATCH, MOST_WORKERS
from sparsifiner_edge.errors import ConfigError, SparsifinerError
from sparsifiner_edge.evaluate.classes import (
    BY_FOLDERS,
    BY_LABELS,
    Answered,
    ClassMethod,
    ClassResult,
    accuracy_statistics,
    gallery_for,
    required_output,
    top_class,
)
from sparsifiner_edge.evaluate.extract import Extractor, TeacherComparison, open_subject, open_teacher, with_roles
from sparsifiner_edge.evaluate.labelled import Labelled, labelled
from sparsifiner_edge.evaluate.preparation import Preparation, preparation_of
from sparsifiner_edge.machine import available_cores
from sparsifiner_edge.progress import Progress

PIECE = 16
"""Images that a worker reads at once: several workers share the first batch, and models begin early."""


class Feeding(NamedTuple):
    """How images reach the models.

    Attributes:
        crop_pct: the share of a resized image's sides that is taken, above 0 and at most 1; see `preparation_of`.
        batch: images at once, of models that take any number; None: as suits them, and of bundles one.
        workers: processes that read images, for each process that runs the models; None: its share of the cores, as far
            as there are images for them; 0: itself.
    """

    crop_pct: float | None = None
    batch: int | None = None
    workers: int | None = None

    def require_sound(self) -> None:
        """Refuse what is out of range.

        Raises:
            ConfigError: names it.
        """
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ConfigError(f"crop_pct is {self.crop_pct:g}.", "Give a share above 0 and at most 1, such as 0.9.")
        for name, least, most in (("batch", 1, MOST_BATCH), ("workers", 0, MOST_WORKERS)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{name} is {value}.", f"Give a whole number from {least} to {most}.")


class _Images(NamedTuple):
    """A batch: the images' places, and their pixels uint8 [B,H,W,3] by preparation."""

    places: list[int]
    pixels: tuple[Tensor, ...]


def evaluate_top1(
    compared: TeacherComparison,
    data: Path,
    gallery: str | Path | None,
    queries: int | None,
    feeding: Feeding,
    progress: Progress | None,
) -> ClassResult:
    """Accuracy of a classifier beside its teacher's; see `evaluate_student`. Of several processes each returns the
    whole result.

    Raises:
        ConfigError: a setting out of range, no classifier, or other classes than its own.
        ImageError: an image cannot be read.
    """
    feeding.require_sound()  # before weights are read
    processes = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    compared = compared._replace(device=str(processes.device), batch=feeding.batch, output="logits")
    with contextlib.ExitStack() as stack:
        subject = open_subject(compared, stack)
        query_set = labelled(data, classifier=subject.labels).first(queries)
        gallery_for("top1", gallery, query_set)
        models = (subject, open_teacher(compared, subject.size, stack))
        prepared = [preparation_of(model.timm_name, model.size, feeding.crop_pct) for model in models]
        share = range(processes.process_index, len(query_set), processes.num_processes)
        workers = _workers(len(share)) if feeding.workers is None else feeding.workers
        begun = time.perf_counter()
        batch = max(model.together for model in models)
        batches = read_batches(query_set.files, share, list(dict.fromkeys(prepared)), batch, workers)
        found = _predicted(models, prepared, batches, query_set)
        counted = _counted(found, progress, len(query_set), processes.num_processes)
        right = _together(_gathered(counted), len(query_set))
        seconds = time.perf_counter() - begun
    method = _method(models, prepared, query_set, workers, processes.num_processes)
    answered = Answered(subject_right=right[:, 0].astype(int).tolist(), teacher_right=right[:, 1].astype(int).tolist())
    statistics = accuracy_statistics(right[:, 0], right[:, 1], len(query_set) / seconds)
    return ClassResult("evaluation", with_roles(*models), method, answered, statistics)


def _method(
    models: tuple[Extractor, Extractor],
    prepared: Sequence[Preparation],
    query_set: Labelled,
    workers: int,
    processes: int,
) -> ClassMethod:
    subject, teacher = models
    return ClassMethod(
        metric="top 1",
        queries=f"{len(query_set)} of {query_set.name}",
        gallery="none",
        classes=list(query_set.classes),
        classes_from=BY_LABELS if query_set.classes == subject.labels else BY_FOLDERS,
        preprocessing=prepared[0].text,
        teacher_preprocessing=prepared[1].text,
        runtime={"subject": subject.runtime, "teacher": teacher.runtime},
        batch={"subject": subject.together, "teacher": teacher.together},
        workers=workers,
        processes=processes,
    )


def _workers(images: int) -> int:
    """This process's share of the cores, and no more than there are pieces; one piece needs none."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if images <= PIECE else min(max(1, available_cores() // beside), -(-images // PIECE), MOST_WORKERS)


class _Files(Dataset[tuple[int, list[Tensor]] | SparsifinerError]):
    """Images by place. What cannot be read is returned: a worker that raised it would show its traceback instead."""

    def __init__(self, files: Sequence[Path], preparations: Sequence[Preparation]) -> None:
        self.files, self.preparations = files, preparations

    def __getitem__(self, place: int) -> tuple[int, list[Tensor]] | SparsifinerError:
        try:
            return place, [torch.from_numpy(made.load(self.files[place])) for made in self.preparations]
        except SparsifinerError as error:
            return error


def _collated(samples: list[tuple[int, list[Tensor]] | SparsifinerError]) -> _Images | SparsifinerError:
    good = []
    for sample in samples:
        if isinstance(sample, SparsifinerError):
            return sample
        good.append(sample)
    places, pixels = zip(*good, strict=True)
    return _Images(list(places), tuple(torch.stack(same) for same in zip(*pixels, strict=True)))


def _deaf(_: int) -> None:
    """Ctrl-C reaches the whole group of processes: the one that has workers ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_batches(
    files: Sequence[Path], places: Sequence[int], preparations: Sequence[Preparation], batch: int, workers: int
) -> Iterator[_Images]:
    """Images at `places` of the files, in order, read ahead by `workers` processes; the last batch may be smaller.

    Raises:
        ImageError: by the iterator: one cannot be read.
        ConfigError: by the iterator: a worker failed, as where shared memory is short.
    """
    batches = [places[first : first + batch] for first in range(0, len(places), batch)]
    pieces = [list(some[first : first + PIECE]) for some in batches for first in range(0, len(some), PIECE)]
    loader = DataLoader(
        _Files(files, preparations),
        batch_sampler=pieces,
        num_workers=workers,
        collate_fn=_collated,
        worker_init_fn=_deaf,
    )
    try:
        read = iter(loader)
        for some in batches:
            yield _joined([_sound(next(read)) for _ in range(0, len(some), PIECE)])
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        why = str(error).strip().splitlines()[-1]
        raise ConfigError(f"A process that reads images failed: {why}", "Use fewer, or none: --workers 0.") from error


def _sound(found: _Images | SparsifinerError) -> _Images:
    if isinstance(found, SparsifinerError):
        raise found
    return found


def _joined(pieces: Sequence[_Images]) -> _Images:
    if len(pieces) == 1:
        return pieces[0]
    places, pixels = zip(*pieces, strict=True)
    return _Images(list(itertools.chain(*places)), tuple(torch.cat(same) for same in zip(*pixels, strict=True)))


def _logits(model: Extractor, images: Array) -> Array:
    """Of images [B,H,W,3], as many at once as the model takes: [B,classes]."""
    parts = [images[first : first + model.together] for first in range(0, len(images), model.together)]
    return np.concatenate([required_output(model, model.extract(part), "logits") for part in parts])


def _predicted(
    models: Sequence[Extractor], prepared: Sequence[Preparation], batches: Iterable[_Images], queries: Labelled
) -> Iterator[list[tuple[int, bool, bool]]]:
    """Batch by batch: each image's place, and whether the subject and the teacher were right."""
    kinds = list(dict.fromkeys(prepared))
    for places, pixels in batches:
        right = []
        for model, preparation in zip(models, prepared, strict=True):
            images: Array = pixels[kinds.index(preparation)].numpy()
            right.append(top_class(_logits(model, images), queries.classes) == queries.labels[places])
        yield list(zip(places, *(x.tolist() for x in right), strict=True))


def _counted(
    found: Iterable[list[tuple[int, bool, bool]]], progress: Progress | None, total: int, processes: int
) -> list[tuple[int, bool, bool]]:
    """All of this process's answers; progress counts those of the others as if they were as far."""
    done: list[tuple[int, bool, bool]] = []
    for answers in found:
        done += answers
        if progress:
            progress("images", min(total, processes * len(done)), total)
    return done


def _gathered(answers: list[tuple[int, bool, bool]]) -> list[tuple[int, bool, bool]]:
    """Those of all processes."""
    try:
        return list(gather_object(answers))
    except RuntimeError as error:  # The others lose the connection to one that has ended.
        raise ConfigError("Another of the processes has ended.", "See what it says.") from error


def _together(answers: Sequence[tuple[int, bool, bool]], count: int) -> Array:
    """The answers of all processes: bool [count, 2]; each image was seen once."""
    rows = sorted(answers)
    assert [row[0] for row in rows] == list(range(count))
    return np.array([row[1:] for row in rows], dtype=bool)
