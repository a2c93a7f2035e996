"""Extractors: a model in torch, or a bundle on a backend, that turns images into outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from msgspec.structs import replace

from sparsifiner_edge.arrays import Array
from sparsifiner_edge.artifacts import STUDENT_FILE, kind_of, require_kind, sha256
from sparsifiner_edge.bounds import ImageSize, size_text
from sparsifiner_edge.bundle.store import bundle_hash, open_bundle
from sparsifiner_edge.config import Budget
from sparsifiner_edge.errors import ConfigError
from sparsifiner_edge.execution import Execution
from sparsifiner_edge.fitting import Fit
from sparsifiner_edge.results import Subject
from sparsifiner_edge.runtime.open import session_on
from sparsifiner_edge.runtime.session import Runtime
from sparsifiner_edge.sparse.model_options import ModelOptions
from sparsifiner_edge.sparse.outputs import outputs_of
from sparsifiner_edge.sparse.source import load_source
from sparsifiner_edge.sparse.student import Student, dense_twin, load_student, refuse_normalisation
from sparsifiner_edge.sparse.student_file import Weights
from sparsifiner_edge.sparse.weights import normalise

TOKENS_TOGETHER = 2048
"""Number of tokens that torch computes at once. More is not faster on a CPU and takes memory."""
GPU_TOKENS_TOGETHER = 16 * TOKENS_TOGETHER


class Extractor(NamedTuple):
    """Something that turns images uint8 [B,H,W,3] into outputs.

    Attributes:
        extract: Function from images to outputs by name. A plain vision transformer gives "features" [B,C], "logits"
            [B,classes] if it is a classifier, "tokens" [B,N,C] with patches in raster order, and with pruned tokens
            "token_positions" [B,P], the raster places of the remaining patches. Other models give their own outputs.
        size: Size of the images.
        prefix: Number of tokens that are not patches.
        about: How a result names it.
        runtime: What ran it.
        labels: Class names of a classifier, in its order.
        together: Maximum number of images per call of `extract`.
        timm_name: timm's name of the model, if it has one.
        fit: How a bundle wants images fitted.
    """

    extract: Callable[[Array], dict[str, Array]]
    size: ImageSize
    prefix: int
    about: Subject
    runtime: Runtime
    labels: tuple[str, ...] = ()
    together: int = 1
    timm_name: str | None = None
    fit: Fit = "crop"

    def each(self, images: Array) -> Iterator[dict[str, Array]]:
        """Yield the outputs of each image [B,H,W,3], as for a batch of one."""
        for start in range(0, len(images), self.together):
            batch = images[start : start + self.together]
            outputs = self.extract(batch)
            for place in range(len(batch)):
                yield {name: value[place : place + 1] for name, value in outputs.items()}


class TeacherComparison(NamedTuple):
    """Subject, teacher, and what runs bundles: arguments of `evaluate_student`.

    Attributes:
        output: The only output that is needed of models in torch; None for all.
    """

    subject: Path
    against: str | Path | None
    model: ModelOptions
    budget: Budget
    execution: Execution
    output: str | None = None


def open_both(compared: TeacherComparison, stack: contextlib.ExitStack) -> tuple[Extractor, Extractor]:
    """Open the subject and its teacher until the stack is closed.

    Raises:
        ConfigError: They cannot be compared, or take images of different sizes.
    """
    subject = _subject(compared, stack)
    teacher = _teacher(compared, subject.size, stack)
    if teacher.size != subject.size:
        sizes = f"{size_text(subject.size)} px, the teacher {size_text(teacher.size)} px"
        raise ConfigError(f"The subject takes {sizes}.", "Use one size.")
    return subject, teacher


def _subject(compared: TeacherComparison, stack: contextlib.ExitStack) -> Extractor:
    """Open a sparse model or a bundle."""
    folder = compared.subject
    if require_kind(folder, "student", "bundle") == "student":
        student = load_student(folder, budget=compared.budget, trust=compared.model.trust)
        return _torch(student, str(folder), sha256(folder / STUDENT_FILE), compared)
    if not compared.budget.is_unchanged:
        raise ConfigError("The sparsity of a bundle cannot be changed.", "Give --keep and --merge to export.")
    return _bundle(folder, compared, stack)


def _teacher(compared: TeacherComparison, size: ImageSize, stack: contextlib.ExitStack) -> Extractor:
    """Open the dense model: a bundle, a model (see `load_source`), or the subject's own weights."""
    against, weights = compared.against, compared.model.file
    bundle = against is not None and Path(against).is_dir() and kind_of(Path(against)) is not None
    if weights is not None and (against is None or bundle):
        raise ConfigError("--weights requires the timm model that they belong to.", "Name it: --against MODEL.")
    if against is None or bundle:
        refuse_normalisation(compared.model.normalise)
    if against is not None:
        if bundle:
            return _bundle(Path(against), compared, stack)
        dense = load_source(str(against), weights, size, compared.model.normalisation)
        origin = dense.provenance.weights or Weights()
        return _torch(dense, str(against), origin.sha256 or origin.origin or "its own code", compared)
    if kind_of(compared.subject) != "student":
        raise ConfigError("A bundle does not contain its dense model.", "Name it: --against MODEL --weights FILE.")
    student = load_student(compared.subject, trust=compared.model.trust)
    if student.provenance.training is not None:
        raise ConfigError(
            "This sparse model was trained: its weights differ from the dense model's.",
            "Name the dense model: --against MODEL --weights FILE.",
        )
    path = f"{student.name} (the sparse model's weights, dense attention)"
    return _torch(dense_twin(student), path, "as the subject", compared)


def _torch(student: Student, path: str, digest: str, compared: TeacherComparison) -> Extractor:
    """Open a model in torch, on a GPU if torch has one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, pre, backbone = student.model.eval().to(device), student.normalisation, student.backbone

    @torch.no_grad()
    def extract(image: Array) -> dict[str, Array]:
        outputs = outputs_of(model, normalise(torch.from_numpy(image).to(device), pre), student.outputs)
        return {name: value.cpu().numpy() for name, value in outputs.items() if compared.output in (None, name)}

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    runtime = Runtime(
        backend=f"torch {torch.__version__}", precision="fp32", threads=torch.get_num_threads(), device=where
    )
    tokens = GPU_TOKENS_TOGETHER if device.type == "cuda" else TOKENS_TOGETHER
    together = max(1, tokens // (backbone.prefix + backbone.patches))
    about = Subject(name=student.name, path=path, sha256=digest)
    named = student.name if student.host == "timm" else None
    return Extractor(extract, student.img_size, backbone.prefix, about, runtime, student.labels, together, named)


def _bundle(folder: Path, compared: TeacherComparison, stack: contextlib.ExitStack) -> Extractor:
    bundle = open_bundle(folder)
    session = stack.enter_context(session_on(bundle, compared.execution))
    fixed = bundle.manifest.batch

    def extract(image: Array) -> dict[str, Array]:
        missing = 0 if fixed is None else max(0, fixed - len(image))
        if not missing:
            return session.infer({"image": image})
        outputs = session.infer({"image": np.concatenate([image, np.repeat(image[-1:], missing, 0)])})
        return {name: value[: len(image)] for name, value in outputs.items()}

    name = bundle.require(bundle.manifest.name, "name")
    about = Subject(name=name, path=str(folder), sha256=bundle_hash(folder))
    prefix = bundle.require(bundle.manifest.shape, "shape").prefix
    labels, fit = tuple(bundle.labels()), bundle.require(bundle.manifest.preprocessing, "preprocessing").fit
    # With a dynamic batch, one image at a time: engines may accept only a few.
    return Extractor(extract, bundle.image_size, prefix, about, session.description, labels, fixed or 1, name, fit)


def with_roles(subject: Extractor, teacher: Extractor) -> list[Subject]:
    """Return how a result names the two."""
    return [replace(subject.about, role="subject"), replace(teacher.about, role="teacher")]
