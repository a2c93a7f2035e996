"""Students: sparse models as folders. `sparsify` makes one, `load_student` reads it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from sparsifiner_edge.artifacts import STUDENT_FILE, WEIGHTS_FILE, kind_of, new_folder, require_replaceable, sha256
from sparsifiner_edge.bounds import ImageSize, size_of
from sparsifiner_edge.config import Budget, Keep, SparsityConfig
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.images import Normalisation, Normalise, evenly, list_images, load_image
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import write_record
from sparsifiner_edge.sparse.calibrate import calibrate_from_weights, sparse_layers
from sparsifiner_edge.sparse.defaults import SparsityOptions, fit_to_model
from sparsifiner_edge.sparse.hosts import backbone_of, for_size, hugging_face
from sparsifiner_edge.sparse.hosts.timm import create, on_paper
from sparsifiner_edge.sparse.in_memory import arriving, calibration_size, learn
from sparsifiner_edge.sparse.patch import make_model_sparse, restore_model, set_budget
from sparsifiner_edge.sparse.source import Student as Student  # noqa: PLC0414
from sparsifiner_edge.sparse.source import call_factory, is_factory, is_hugging_face, load_source
from sparsifiner_edge.sparse.student_file import SPARSIFY_AGAIN, Calibration, StudentConfig, check_labels, read_config
from sparsifiner_edge.sparse.weights import StateDict, check_fit, load_exactly, normalise, read_weights
from sparsifiner_edge.text import dump_json

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAX_CALIBRATION_IMAGES = 32


def make_student(dense: Student, sparsity: SparsityConfig) -> Student:
    """Make a dense model sparse in place, with projections from its weights.

    Raises:
        UnsupportedModelError, ConfigError: see `make_model_sparse`.
    """
    make_model_sparse(dense.model, sparsity)
    calibrate_from_weights(dense.model)
    how = replace(dense.provenance, calibration=Calibration("weights"))
    return dataclasses.replace(dense, sparsity=sparsity, provenance=how)


def calibrate_student(student: Student, folder: Path, progress: Progress | None = None) -> Student:
    """Learn the predictor from at most 32 images below `folder`, evenly taken; see `in_memory.learn`.

    Raises:
        ImageError: no images, or one of those taken cannot be read.
    """
    taken = evenly(list_images(folder), MAX_CALIBRATION_IMAGES)
    model, backbone = student.model, student.backbone
    size = size_of(*calibration_size(backbone, student.sparsity.preset))
    # What is around a transformer takes images of its own size alone.
    loaded = size if backbone.module is model else student.img_size
    images = [normalise(torch.from_numpy(load_image(p, loaded))[None], student.normalisation) for p in taken]
    learn(backbone, images if backbone.module is model else arriving(model, backbone, images), progress)
    how = Calibration("images", len(taken), size, [p.name for p in taken])
    return dataclasses.replace(student, provenance=replace(student.provenance, calibration=how))


def sparsify(
    model: str,
    output: str | Path,
    *,
    weights: str | Path | None = None,
    img_size: ImageSize | None = None,
    calibrate: str | Path | None = None,
    normalise: Normalise = None,
    progress: Progress | None = None,
    **options: Unpack[SparsityOptions],
) -> Path:
    """Make a pretrained model sparse and write it as a student folder.

    Args:
        model: timm's name, a folder or name of Hugging Face's, or "package.module:factory" (see `load_source`).
        output: folder to write; an earlier student there is replaced.
        weights: for timm's names: .safetensors or .pth with its key names; None lets timm download them.
        img_size: pixels: a square's side, or height and width; None takes the model's own.
        calibrate: folder of images to learn the predictor from; None takes the weights alone.
        normalise: what the model expects of pixels / 255: (mean, std), three numbers each; False: nothing, it
            normalises inside; None: what is recorded for a model of timm's or transformers', or what your own declares
            as `image_mean` and `image_std`.
        progress: see `Progress`; counts images.
        options: what is sparse, such as `keep=0.25, merge=(160, 0)`; see `SparsityOptions`.

    Returns:
        The folder.

    Raises:
        SparsifinerError: see `errors.py`; nothing is written then.

    Example:
        >>> folder = sparsify("test_vit", "student", weights="weights.safetensors", keep=0.5, merge=(4, 0))
        >>> load_student(folder).sparsity.merge
        (4, 0)
    """
    target = Path(output)
    require_replaceable(target, "student")
    # Settings are checked before the weights are read: a typing mistake should not cost minutes.
    sparsity = SparsityConfig.for_preset(**options)
    if calibrate is not None:
        list_images(Path(calibrate))
    dense = load_source(model, Path(weights) if weights else None, img_size, Normalisation.parse(normalise))
    student = make_student(dense, fit_to_model(sparsity, dense.backbone, options))
    tools = {name: version(name) for name in ("sparsifiner-edge", student.backbone.library, "torch")}
    student = dataclasses.replace(student, provenance=replace(student.provenance, tools=tools))
    if calibrate is not None and sparse_layers(student.model):
        student = calibrate_student(student, Path(calibrate), progress)
    return save_student(student, target)


def save_student(student: Student, output: Path) -> Path:
    """Write a student folder, whole or not at all.

    Raises:
        ArtifactError: labels that no student takes (see `ClassNames`), or the disk refuses.
    """
    check_labels(student.labels, "The student")
    state: dict[str, Tensor] = {k: v.contiguous() for k, v in student.model.state_dict().items()}
    with new_folder(output, "student") as folder:
        # A file's own writes, not a memory map: a full disk is then an error and not a crash.
        (folder / WEIGHTS_FILE).write_bytes(safetensors.torch.save(state))
        if student.host == "transformers":
            hugging_face.write_configuration(student.model, folder)
        config = StudentConfig(
            host=student.host,
            model=student.name,
            img_size=student.img_size,
            labels=student.labels,
            num_classes=student.backbone.classes or len(student.labels),
            normalisation=student.normalisation,
            outputs=student.outputs,
            sparsity=student.sparsity.to_dict(),
            provenance=student.provenance,
            weights_sha256=sha256(folder / WEIGHTS_FILE),
        )
        (folder / STUDENT_FILE).write_text(dump_json(write_record(config)), encoding="utf-8")
    return output


def load_student(
    folder: str | Path, img_size: ImageSize | None = None, budget: Budget | None = None, trust: Sequence[str] = ()
) -> Student:
    """Read a student folder, optionally at another image size or with another budget than its own.

    Args:
        folder: written by `sparsify`. img_size: a square's side, or height and width; None: the student's own.
        budget: keep, merge or prune in place of its own.
        trust: modules whose functions may make the model: a student of a user's own factory names one.

    Returns:
        A `Student`: its `model` is a torch module; `sparsity`, `normalisation` and `img_size` say what it is.

    Raises:
        ArtifactError: no student, corrupt, altered, or of another version; it names a module that is not trusted.
        SparsifinerError: its settings do not fit.

    Example:
        >>> student = load_student("student", budget=Budget(keep=0.5))
        >>> student.sparsity.keep
        0.5
    """
    folder, budget = Path(folder), budget or Budget()
    config, weights = read_config(folder), folder / WEIGHTS_FILE
    sparsity = SparsityConfig.from_dict(config.sparsity)
    if config.labels and len(config.labels) != config.num_classes:
        raise ArtifactError(
            f"{folder / STUDENT_FILE} names {len(config.labels)} labels for {config.num_classes} classes.",
            SPARSIFY_AGAIN,
        )
    if sha256(weights) != config.weights_sha256:
        raise ArtifactError(f"{weights} does not match its SHA-256.", SPARSIFY_AGAIN)
    state = read_weights(weights)
    model = _dense(folder, config, {k: v for k, v in state.items() if not is_predictor(k)}, img_size, trust)
    # At another size the student's own rate may be too much: the one that is given counts.
    sparsity = sparsity if budget.merge is None else dataclasses.replace(sparsity, merge=budget.merge)
    another_size = size_of(*backbone_of(model).image_size) != config.img_size
    if another_size and sparsity.preset == "paper" and not sparsity.is_dense:
        raise ConfigError("The published predictor is tied to its tokens.", "Make a student of this size: sparsify.")
    make_model_sparse(model, sparsity)
    load_exactly(model, {k: v for k, v in state.items() if is_predictor(k)}, str(weights), is_predictor)
    student = Student(
        model,
        config.model,
        config.normalisation,
        sparsity,
        config.provenance,
        config.labels,
        config.outputs,
        config.host,
    )
    return with_budget(student, budget.keep, budget.token_keep)


def size_like(source: str | Path, frame: tuple[int, int], trust: Sequence[str] = ()) -> ImageSize:
    """The image size in the shape of frames (width, height) with about as many patches as a model has by itself.

    Args:
        source: a student's folder, or a model: see `sparsify`. trust: see `load_student`.

    Raises:
        SparsifinerError: there is no such model.

    Example:
        >>> size_like("vit_small_patch14_dinov2.lvd142m", (1920, 1080))
        (392, 700)
    """
    name, folder = str(source), Path(source)
    if kind_of(folder) == "student":
        config = read_config(folder)
        with contextlib.nullcontext() if config.host == "factory" else torch.device("meta"):
            model = _maker(folder, config, trust)(config.img_size)
    elif is_factory(name):
        model = call_factory(name)
    else:
        with torch.device("meta"):
            model = hugging_face.blank(name) if is_hugging_face(name) else on_paper(name)
    backbone = backbone_of(model)
    height, width = backbone.patch
    ratio = frame[0] * height / (frame[1] * width)  # Of columns to rows.
    rows = max(1, round(math.sqrt(backbone.patches / ratio)))
    return size_of(rows * height, max(1, round(rows * ratio)) * width)


def _dense(
    folder: Path, config: StudentConfig, state: StateDict, img_size: ImageSize | None, trust: Sequence[str]
) -> nn.Module:
    """The model that a student was made of, with its own weights, for images of a size."""
    source, make = str(folder / WEIGHTS_FILE), _maker(folder, config, trust)
    size = config.img_size if img_size is None else img_size
    if config.host != "factory":
        with torch.device("meta"):
            # Before memory is taken: a student may name the largest model there is.
            check_fit(make(config.img_size).state_dict(), state, source)
    model = make(config.img_size)
    load_exactly(model, state, source)
    resized = for_size(model, size)
    if config.host != "factory" or size == config.img_size:
        return resized
    # What is around a transformer may be of its images' size too.
    model = make(size)
    load_exactly(model, resized.state_dict(), source)
    return model


def _maker(folder: Path, config: StudentConfig, trust: Sequence[str]) -> Callable[[ImageSize], nn.Module]:
    """What makes a student's model for images of a size, without its weights.

    Raises:
        ArtifactError: code that is not trusted would.
    """
    if config.host == "timm":
        return lambda size: create(config.model, size, config.num_classes)
    if config.host == "transformers":
        return lambda size: hugging_face.blank(str(folder), size, folder)
    module = config.model.partition(":")[0]
    if module not in trust:
        raise ArtifactError(
            f"{folder} is made by the code of {module!r}, which is run to load it.",
            f"If you know that code, say so: --trust {module}.",
        )
    if Path.cwd().joinpath(*module.split(".")).resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder} would bring the code of {module!r} itself.", "Call this where your own code is.")
    return lambda size: call_factory(config.model, size)


def is_predictor(key: str) -> bool:
    """Whether a tensor of a student is its predictor's, by its name; a user's own module may be called `select`."""
    return re.search(r"\.select\.(proj_[qk]|bias_[qk]|down|up)$", key) is not None


def with_budget(
    student: Student, keep: Keep | None = None, token_keep: tuple[tuple[int, float], ...] | None = None
) -> Student:
    """The student, its model changed in place, with another share of keys and tokens; None leaves its own.

    Raises:
        ConfigError: a share is out of range, or the student is dense, or would be.
    """
    changes = {name: x for name, x in (("keep", keep), ("token_keep", token_keep)) if x is not None}
    if not changes:
        return student
    sparsity = dataclasses.replace(student.sparsity, **changes)  # type: ignore[arg-type]
    if (sparsity.keep != 1 and student.sparsity.keep == 1) or sparsity.is_dense != student.sparsity.is_dense:
        raise ConfigError(
            "A sparse student cannot be made dense, nor a dense one sparse.",
            "For a dense file export the model itself; for a sparse one use `sparsify`.",
        )
    if not student.sparsity.is_dense:
        set_budget(student.model, sparsity)
    return dataclasses.replace(student, sparsity=sparsity)


def dense_twin(student: Student) -> Student:
    """The student's own weights in its library's untouched model: its teacher, as long as nothing was trained."""
    dense = restore_model(copy.deepcopy(student.model))
    return dataclasses.replace(student, model=dense, sparsity=SparsityConfig(keep=1), labels=())


def teacher_of(student: Student, name: str | None, weights: Path | None) -> Student:
    """What a student is held against: a dense model by name, or its own weights where it was never trained.

    Raises:
        ConfigError: a trained student's teacher is not named, or weights of none are; another architecture.
        SparsifinerError: see `load_source`.
    """
    if name is None:
        if weights is not None:
            raise ConfigError("--weights are the teacher's, and none is named.", "Name it: --teacher MODEL.")
        if student.provenance.training is not None:
            raise ConfigError(
                "This student was trained: its weights are no longer its teacher's.",
                "Name the teacher: --teacher MODEL --weights FILE.",
            )
        return dense_twin(student)
    # A function's own module may leave to its student what both expect.
    pixels = student.normalisation if is_factory(name) else None
    teacher = load_source(name, weights, student.img_size, pixels)
    for (what, value), (_, ours) in zip(_traits(teacher), _traits(student), strict=True):
        if value != ours and not (what == "classes" and 0 in (value, ours)):
            raise ConfigError(
                f"The teacher {name} has {value} {what}, the student {ours}.",
                "Give a teacher of the student's architecture.",
            )
    return teacher


def _traits(student: Student) -> list[tuple[str, object]]:
    """What must agree for tokens to be compared; both see the same normalised images."""
    backbone = student.backbone
    return [
        ("mean and standard deviation of pixels", student.normalisation),
        ("channels", backbone.width),
        ("patches", backbone.patches),
        ("tokens before them", backbone.prefix),
        ("classes", backbone.classes),
    ]


def refuse_normalisation(normalise: object) -> None:
    """Of a student, or where there is no model.

    Raises:
        ConfigError: it is not None.
    """
    if normalise is not None:
        raise ConfigError(
            "--mean, --std and --no-normalise (in Python normalise) are of a model: a student or bundle has its own.",
            "Leave them out.",
        )
