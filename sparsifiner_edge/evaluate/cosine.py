"""Cosine of class and patch features between a student or bundle and its dense teacher, picture by picture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparsifiner_edge.artifacts import STUDENT_FILE, bundle_hash, field, kind_of, open_bundle, picture_size, sha256
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.metrics import cosine
from sparsifiner_edge.pictures import list_pictures, load_batch
from sparsifiner_edge.profiles import stats
from sparsifiner_edge.results import new_result
from sparsifiner_edge.runtime import open_session
from sparsifiner_edge.sparse.models import normalise, preprocessing
from sparsifiner_edge.sparse.student import Student, dense_twin, load_dense, load_student

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]
MIN_FOR_INTERVAL = 3


class Extractor(NamedTuple):
    """Something that turns pictures uint8 [1,S,S,3] into features.

    Attributes:
        extract: -> {"features": [1,C], and where the source has them "tokens": [1,N,C], patches in raster order}.
        size: S. prefix: tokens that are no patches. about: how a result names it. runtime: what ran it.
    """

    extract: Callable[[Array], dict[str, Array]]
    size: int
    prefix: int
    about: dict[str, Any]
    runtime: dict[str, Any]


def evaluate_student(
    subject: str | Path,
    data: str | Path | list[Path],
    *,
    against: str | Path | None = None,
    weights: str | Path | None = None,
    metric: str = "cosine",
    backend: str = "onnxruntime",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare a student or bundle with its dense teacher over pictures.

    Args:
        subject: student or bundle folder.
        data: a picture, a folder of pictures, or a list of pictures.
        against: the teacher: timm's name (with `weights`), or a bundle. None, for a student only: its own weights
            with dense attention everywhere.
        metric: "cosine".
        backend: what runs bundles.
        progress: called with (done, total) pictures.

    Returns:
        A result of kind "evaluation": `samples` hold one value per picture, `statistics` means with 95 % intervals
        (bootstrap over pictures) and least values. "features" is the class or pooled feature, "patches" the mean
        cosine over the patch tokens.

    Raises:
        ConfigError: no teacher for a bundle, sizes differ, or nothing to compare.
        SparsifinerError: subject, teacher or pictures are unusable.
    """
    if metric != "cosine":
        raise ConfigError(f"metric is {metric!r}.", "Choose cosine.")
    pictures = data if isinstance(data, list) else list_pictures(Path(data))
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(_subject(Path(subject), backend))
        teacher = stack.enter_context(_teacher(Path(subject), against, weights, ours.size, backend))
        if teacher.size != ours.size:
            raise ConfigError(f"The subject takes {ours.size} px, the teacher {teacher.size} px.", "Use one size.")
        samples = _compare(ours, teacher, pictures, progress)
    method = {
        "metric": "cosine similarity per picture, student or bundle against dense teacher",
        "pictures": [p.name for p in pictures],
        "preprocessing": f"centre square, bicubic to {ours.size} px",
        "runtime": {"subject": ours.runtime, "teacher": teacher.runtime},
    }
    statistics = {name: _summary(values) for name, values in samples.items()}
    return new_result(
        "evaluation",
        [{"role": "subject"} | ours.about, {"role": "teacher"} | teacher.about],
        method,
        samples,
        statistics,
    )


def _compare(
    ours: Extractor, teacher: Extractor, pictures: list[Path], progress: Progress | None
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {}
    for number, path in enumerate(pictures):
        image = load_batch([path], ours.size)
        got, expected = ours.extract(image), teacher.extract(image)
        values = {"features_cosine": float(cosine(got["features"], expected["features"]).mean())}
        if "tokens" in got and "tokens" in expected:
            patches = cosine(got["tokens"][:, ours.prefix :], expected["tokens"][:, teacher.prefix :])
            values["patches_cosine"] = float(patches.mean())
        for name, value in values.items():
            samples.setdefault(name, []).append(value)
        if progress:
            progress(number + 1, len(pictures))
    return samples


def _summary(values: list[float]) -> dict[str, Any]:
    array = np.array(values)
    low = high = None
    if len(values) >= MIN_FOR_INTERVAL:
        picks = np.random.default_rng(0).integers(0, len(array), size=(2000, len(array)))
        low, high = (float(x) for x in np.quantile(array[picks].mean(1), [0.025, 0.975]))
    return {
        "mean": stats.estimate(float(array.mean()), low, high, "bootstrap over pictures"),
        "least": float(array.min()),
        "pictures": len(values),
    }


@contextlib.contextmanager
def _subject(folder: Path, backend: str) -> Iterator[Extractor]:
    kind = kind_of(folder)
    if kind == "bundle":
        with _bundle(folder, backend) as extractor:
            yield extractor
    elif kind == "student":
        yield _torch(load_student(folder), {"path": str(folder), "sha256": sha256(folder / STUDENT_FILE)})
    else:
        raise ConfigError(f"{folder} is neither a student nor a bundle.", "Give a folder made by sparsify or export.")


@contextlib.contextmanager
def _teacher(
    subject: Path, against: str | Path | None, weights: str | Path | None, size: int, backend: str
) -> Iterator[Extractor]:
    if against is None:
        if kind_of(subject) != "student":
            raise ConfigError("A bundle does not hold its teacher.", "Name it: --against MODEL --weights FILE.")
        student = load_student(subject)
        about = {"path": f"{student.name} (the student's weights, dense attention)", "sha256": "as the subject"}
        yield _torch(dense_twin(student), about)
    elif Path(against).is_dir():
        with _bundle(Path(against), backend) as extractor:
            yield extractor
    else:
        path = Path(weights) if weights else None
        dense = load_dense(str(against), path, size)
        about = {"path": str(against), "sha256": sha256(path) if path else "timm hub"}
        yield _torch(dense, about)


def _torch(student: Student, about: dict[str, Any]) -> Extractor:
    model = student.model.eval()
    pre = preprocessing(model)

    @torch.no_grad()
    def extract(image: Array) -> dict[str, Array]:
        tokens = model.forward_features(normalise(torch.from_numpy(image), pre))
        features = model.forward_head(tokens, pre_logits=True)
        return {"features": features.numpy(), "tokens": tokens.numpy()}

    runtime = {"backend": f"torch {torch.__version__}", "precision": "fp32", "threads": torch.get_num_threads()}
    return Extractor(extract, student.img_size, int(model.num_prefix_tokens), {"name": student.name} | about, runtime)


@contextlib.contextmanager
def _bundle(folder: Path, backend: str) -> Iterator[Extractor]:
    manifest = open_bundle(folder)
    with open_session(folder, backend) as session:

        def extract(image: Array) -> dict[str, Array]:
            return session.infer({"image": image})

        about = {"path": str(folder), "sha256": bundle_hash(folder), "name": field(manifest, folder, "name", str)}
        size = picture_size(manifest, folder)
        prefix = field(manifest, folder, "tokens.prefix", int)
        yield Extractor(extract, size, prefix, about, session.description)
