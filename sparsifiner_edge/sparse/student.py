"""Student folders, which store sparse models: `sparsify` writes one, `load_student` reads it."""

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
"""Most images that are used for calibration; more bring no further gain."""


def make_student(dense: Student, sparsity: SparsityConfig) -> Student:
    """Make a dense model sparse in place, with projections calibrated from its weights.

    Raises:
        UnsupportedModelError: If the model cannot be made sparse; see `make_model_sparse`.
        ConfigError: If the settings do not fit the model; see `make_model_sparse`.
    """
    make_model_sparse(dense.model, sparsity)
    calibrate_from_weights(dense.model)
    provenance = replace(dense.provenance, calibration=Calibration("weights"))
    return dataclasses.replace(dense, sparsity=sparsity, provenance=provenance)


def calibrate_student(student: Student, folder: Path, progress: Progress | None = None) -> Student:
    """Calibrate the predictor from at most 32 images below `folder`, evenly sampled; see `in_memory.learn`.

    Raises:
        ImageError: If there are no images, or a sampled one cannot be read.
    """
    paths = evenly(list_images(folder), MAX_CALIBRATION_IMAGES)
    model, backbone = student.model, student.backbone
    size = size_of(*calibration_size(backbone, student.sparsity.preset))
    # A module around the transformer accepts images of its own size only.
    loaded = size if backbone.module is model else student.img_size
    images = [normalise(torch.from_numpy(load_image(p, loaded))[None], student.normalisation) for p in paths]
    learn(backbone, images if backbone.module is model else arriving(model, backbone, images), progress)
    calibration = Calibration("images", len(paths), size, [p.name for p in paths])
    return dataclasses.replace(student, provenance=replace(student.provenance, calibration=calibration))


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
        model: timm name, Hugging Face folder or name, or "package.module:factory" (see `load_source`).
        output: Folder to write. An earlier student there is replaced.
        weights: For timm names: .safetensors or .pth file with timm's key names. None lets timm download the weights.
        img_size: Image size in pixels: the side of a square, or (height, width). None takes the model's own.
        calibrate: Folder of images to calibrate the predictor. None uses the weights only.
        normalise: Normalisation of pixels / 255 that the model expects: (mean, std) of three numbers each, or False if
            the model normalises inside. None takes the normalisation recorded by timm or transformers, or the one that
            your own module declares as `image_mean` and `image_std`.
        progress: Callback that counts images; see `Progress`.
        options: Sparsity settings, such as `keep=0.25, merge=(160, 0)`; see `SparsityOptions`.

    Returns:
        The folder.

    Raises:
        SparsifinerError: If the model or a setting is unsuitable; see `errors.py`. Nothing is written in this case.

    Example:
        >>> folder = sparsify("test_vit", "student", weights="weights.safetensors", keep=0.5, merge=(4, 0))
        >>> load_student(folder).sparsity.merge
        (4, 0)
    """
    target = Path(output)
    require_replaceable(target, "student")
    # Check the settings before the weights are read, so that a typing error does not cost minutes.
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
    """Write a student folder, completely or not at all.

    Raises:
        ArtifactError: If the labels are not valid (see `ClassNames`), or the folder cannot be written.
    """
    check_labels(student.labels, "The student")
    state: dict[str, Tensor] = {k: v.contiguous() for k, v in student.model.state_dict().items()}
    with new_folder(output, "student") as folder:
        # Plain writes instead of a memory map: a full disk then raises an error instead of crashing the process.
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
    """Read a student folder, optionally with another image size or budget than its own.

    Args:
        folder: Folder written by `sparsify`.
        img_size: Image size in pixels: the side of a square, or (height, width). None takes the student's own.
        budget: Values of keep, merge or token_keep that replace the student's own.
        trust: Modules whose functions may be called to create the model. A student made from a user's factory needs
            one.

    Returns:
        A `Student`. Its `model` is a torch module; `sparsity`, `normalisation` and `img_size` describe it.

    Raises:
        ArtifactError: If the folder is not a student, is corrupt, was altered, has another version, or requires a
            module that is not trusted.
        SparsifinerError: If the settings do not fit the model.

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
            f"{folder / STUDENT_FILE} has {len(config.labels)} labels for {config.num_classes} classes.",
            SPARSIFY_AGAIN,
        )
    if sha256(weights) != config.weights_sha256:
        raise ArtifactError(f"{weights} does not match its SHA-256.", SPARSIFY_AGAIN)
    state = read_weights(weights)
    model = _dense(folder, config, {k: v for k, v in state.items() if not is_predictor(k)}, img_size, trust)
    # The student's own merge rate may be too high at another size, so a given rate replaces it first.
    sparsity = sparsity if budget.merge is None else dataclasses.replace(sparsity, merge=budget.merge)
    another_size = size_of(*backbone_of(model).image_size) != config.img_size
    if another_size and sparsity.preset == "paper" and not sparsity.is_dense:
        raise ConfigError(
            "The predictor of preset 'paper' is tied to its image size.", "Make a student of this size with sparsify."
        )
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
    """Return an image size with the aspect ratio of frames and about as many patches as the model has by default.

    Args:
        source: Student folder, or a model as in `sparsify`.
        frame: Size of the frames (width, height) in pixels.
        trust: Modules whose functions may be called; see `load_student`.

    Raises:
        SparsifinerError: If the model does not exist.

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
    ratio = frame[0] * height / (frame[1] * width)  # Ratio of patch columns to patch rows.
    rows = max(1, round(math.sqrt(backbone.patches / ratio)))
    return size_of(rows * height, max(1, round(rows * ratio)) * width)


def _dense(
    folder: Path, config: StudentConfig, state: StateDict, img_size: ImageSize | None, trust: Sequence[str]
) -> nn.Module:
    """Return the dense model of a student with its own weights, for images of a given size."""
    source, make = str(folder / WEIGHTS_FILE), _maker(folder, config, trust)
    size = config.img_size if img_size is None else img_size
    if config.host != "factory":
        with torch.device("meta"):
            # Check before memory is allocated: the file may name a very large model.
            check_fit(make(config.img_size).state_dict(), state, source)
    model = make(config.img_size)
    load_exactly(model, state, source)
    resized = for_size(model, size)
    if config.host != "factory" or size == config.img_size:
        return resized
    # A module around the transformer may depend on the image size, too.
    model = make(size)
    load_exactly(model, resized.state_dict(), source)
    return model


def _maker(folder: Path, config: StudentConfig, trust: Sequence[str]) -> Callable[[ImageSize], nn.Module]:
    """Return a function that creates a student's model for a given image size, without its weights.

    Raises:
        ArtifactError: If it would run code that is not trusted.
    """
    if config.host == "timm":
        return lambda size: create(config.model, size, config.num_classes)
    if config.host == "transformers":
        return lambda size: hugging_face.blank(str(folder), size, folder)
    module = config.model.partition(":")[0]
    if module not in trust:
        raise ArtifactError(
            f"Loading {folder} runs the code of module {module!r}, which is not trusted.",
            f"If you trust that code, give --trust {module}.",
        )
    if Path.cwd().joinpath(*module.split(".")).resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"The code of module {module!r} would be imported from {folder} itself.",
            "Run the command in the folder of your own code.",
        )
    return lambda size: call_factory(config.model, size)


def is_predictor(key: str) -> bool:
    """Return True if a tensor of a student belongs to a predictor, by its name.

    The pattern is strict because a user's own module may be named `select`.
    """
    return re.search(r"\.select\.(proj_[qk]|bias_[qk]|down|up)$", key) is not None


def with_budget(
    student: Student, keep: Keep | None = None, token_keep: tuple[tuple[int, float], ...] | None = None
) -> Student:
    """Change the shares of keys and tokens of a student's model in place; None leaves its own.

    Returns:
        The student with its new settings.

    Raises:
        ConfigError: If a share is out of range, or if a dense student would become sparse or a sparse one dense.
    """
    changes = {name: x for name, x in (("keep", keep), ("token_keep", token_keep)) if x is not None}
    if not changes:
        return student
    sparsity = dataclasses.replace(student.sparsity, **changes)  # type: ignore[arg-type]
    if (sparsity.keep != 1 and student.sparsity.keep == 1) or sparsity.is_dense != student.sparsity.is_dense:
        raise ConfigError(
            "A sparse student cannot be made dense, nor a dense one sparse.",
            "Export the model itself for a dense file; use `sparsify` for a sparse one.",
        )
    if not student.sparsity.is_dense:
        set_budget(student.model, sparsity)
    return dataclasses.replace(student, sparsity=sparsity)


def dense_twin(student: Student) -> Student:
    """Return the dense model with a student's weights. It is the student's teacher as long as nothing was trained."""
    dense = restore_model(copy.deepcopy(student.model))
    return dataclasses.replace(student, model=dense, sparsity=SparsityConfig(keep=1), labels=())


def teacher_of(student: Student, name: str | None, weights: Path | None) -> Student:
    """Return the dense model with which a student is compared.

    Args:
        student: Student to compare.
        name: Source of the teacher. None takes the student's own weights, which requires that it was never trained.
        weights: Weight file of the teacher.

    Raises:
        ConfigError: If the teacher of a trained student is not named, if weights are given without a name, or if the
            teacher has another architecture.
        SparsifinerError: If the teacher cannot be loaded; see `load_source`.
    """
    if name is None:
        if weights is not None:
            raise ConfigError(
                "--weights applies to the teacher, but no teacher is named.", "Name it with --teacher MODEL."
            )
        if student.provenance.training is not None:
            raise ConfigError(
                "This student was trained, so its weights are no longer those of its teacher.",
                "Name the teacher with --teacher MODEL --weights FILE.",
            )
        return dense_twin(student)
    # The module of a factory may not declare a normalisation. It then expects the same as its student.
    pixels = student.normalisation if is_factory(name) else None
    teacher = load_source(name, weights, student.img_size, pixels)
    for (trait, value), (_, ours) in zip(_traits(teacher), _traits(student), strict=True):
        if value != ours and not (trait == "classes" and 0 in (value, ours)):
            raise ConfigError(
                f"The teacher {name} and the student differ in {trait}: {value} and {ours}.",
                "Give a teacher of the student's architecture.",
            )
    return teacher


def _traits(student: Student) -> list[tuple[str, object]]:
    """Return the properties that must agree for tokens to be comparable."""
    backbone = student.backbone
    return [
        ("normalisation", student.normalisation),
        ("channels", backbone.width),
        ("patches", backbone.patches),
        ("prefix tokens", backbone.prefix),
        ("classes", backbone.classes),
    ]


def refuse_normalisation(normalise: object) -> None:
    """Refuse a normalisation where a student or bundle brings its own, or where there is no model.

    Raises:
        ConfigError: If `normalise` is not None.
    """
    if normalise is not None:
        raise ConfigError(
            "--mean, --std and --no-normalise (in Python: normalise) apply to models; a student or bundle has its own.",
            "Leave them out.",
        )
