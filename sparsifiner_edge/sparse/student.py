"""Students: sparse models as folders. `sparsify` makes one, `load_student` reads it."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import safetensors.torch
import torch
from msgspec import Meta
from msgspec.structs import replace
from torch import Tensor

from sparsifiner_edge.artifacts import (
    STUDENT_FILE,
    STUDENT_SCHEMA,
    WEIGHTS_FILE,
    new_folder,
    read_json,
    require_replaceable,
    sha256,
)
from sparsifiner_edge.bounds import ImageSize, flaw, height_width, size_of
from sparsifiner_edge.config import Keep, SparsityConfig
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.images import evenly, list_images, load_image
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import read_record, write_record
from sparsifiner_edge.sparse.calibrate import calibrate_from_weights, sparse_layers
from sparsifiner_edge.sparse.defaults import fit_to_model
from sparsifiner_edge.sparse.hosts import Backbone, backbone_of
from sparsifiner_edge.sparse.hosts.timm import Model, create, load_model, load_state, on_paper, preprocessing
from sparsifiner_edge.sparse.in_memory import calibration_size, learn
from sparsifiner_edge.sparse.patch import make_model_sparse, require_supported, set_budget
from sparsifiner_edge.sparse.weights import Normalisation, StateDict, check_fit, normalise, read_weights
from sparsifiner_edge.text import dump_json

MAX_CALIBRATION_IMAGES = 32
_AGAIN = "Make the student again."


ClassNames = tuple[Annotated[str, Meta(pattern=r"^[^\ud800-\udfff]{1,1000}$")], ...]
"""ImageNet's longest has 130 characters. Surrogates stand for bytes in a folder's name that are not UTF-8."""


class Labels(msgspec.Struct):
    """Names of a classifier's classes, alone."""

    labels: ClassNames


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """A file by name and SHA-256, or where else they are from."""

    file: str | None = None
    sha256: str | None = None
    origin: str | None = msgspec.field(default=None, name="from")


class Calibration(msgspec.Struct, frozen=True):
    """What the predictor was learnt from.

    Attributes:
        origin: "weights" alone, or "pictures".
        images: how many. img_size: pixels at which it learnt. files: their names.
    """

    origin: str = msgspec.field(name="from")
    images: int | None = msgspec.field(default=None, name="pictures")
    img_size: ImageSize | None = None
    files: list[str] | None = None


class Provenance(msgspec.Struct, frozen=True):
    """What is known of a student's making.

    Attributes:
        tools: package -> version.
        training: JSON of `distill.distill.TrainingSummary`, as the version that trained wrote it; None: never trained.
    """

    weights: Weights | None = None
    calibration: Calibration | None = None
    tools: dict[str, str] | None = None
    training: Any = None


class StudentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A student's file.

    Attributes:
        img_size: pixels, one number for a square. sparsity: see `SparsityConfig.from_dict`.
        weights_sha256: of the file beside it.
    """

    schema_version: int = STUDENT_SCHEMA
    kind: str = "student"
    model: str
    img_size: ImageSize
    num_classes: int
    labels: ClassNames = ()
    sparsity: Any
    provenance: Provenance
    weights_sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Student:
    """A model and what it takes to make it again.

    Attributes:
        model: in evaluation mode; sparse unless the config is dense.
        name: timm's name.
        sparsity: what is sparse.
        provenance: where weights and projections came from.
        labels: names of a classifier's classes, where its own are known.
        pixels: what it expects of them; None: as timm records for the model.
        outputs: names for what it gives (see `outputs_of`); None: its own.
    """

    model: Any
    name: str
    sparsity: SparsityConfig
    provenance: Provenance
    labels: tuple[str, ...] = ()
    pixels: Normalisation | None = None
    outputs: tuple[str, ...] | None = None

    @property
    def normalisation(self) -> Normalisation:
        """What it expects of pixels."""
        return preprocessing(self.model) if self.pixels is None else self.pixels

    @property
    def backbone(self) -> Backbone:
        """The vision transformer in the model."""
        return backbone_of(self.model)

    @property
    def img_size(self) -> ImageSize:
        """Pixels of its images: one number for a square."""
        return size_of(*self.backbone.image_size)


def make_student(name: str, model: Model, sparsity: SparsityConfig, provenance: Provenance | None = None) -> Student:
    """Make `model` sparse in place, with projections from its weights.

    Raises:
        UnsupportedModelError, ConfigError: see `make_model_sparse`.
    """
    make_model_sparse(model, sparsity)
    calibrate_from_weights(model)
    return Student(model.eval(), name, sparsity, provenance or Provenance())


def calibrate_student(student: Student, folder: Path, progress: Progress | None = None) -> Student:
    """Learn the predictor from at most 32 images below `folder`, evenly taken; see `in_memory.learn`.

    Raises:
        ImageError: no images, or one of those taken cannot be read.
    """
    taken = evenly(list_images(folder), MAX_CALIBRATION_IMAGES)
    backbone = student.backbone
    pre, size = student.normalisation, size_of(*calibration_size(backbone, student.sparsity.preset))
    learn(backbone, [normalise(torch.from_numpy(load_image(p, size))[None], pre) for p in taken], progress)
    how = Calibration("pictures", len(taken), size, [p.name for p in taken])
    return dataclasses.replace(student, provenance=replace(student.provenance, calibration=how))


def sparsify(
    model: str,
    output: str | Path,
    *,
    weights: str | Path | None = None,
    img_size: ImageSize | None = None,
    preset: str = "edge",
    keep: Keep | None = None,
    tile: int | None = None,
    probe: int | None = None,
    channels: int | None = None,
    cells: int | None = None,
    dense_layers: tuple[int, ...] = (),
    token_keep: tuple[tuple[int, float], ...] = (),
    fuse_tokens: bool = False,
    merge: tuple[int, ...] = (),
    merge_window: int | None = None,
    calibrate: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make a pretrained model sparse and write it as a student folder.

    Args:
        model: timm's name.
        output: folder to write; an earlier student there is replaced.
        weights: .safetensors or .pth with timm's key names; None lets timm download them.
        img_size: pixels: a square's side, or height and width; None takes the model's own.
        preset, keep, tile, probe, channels, cells, dense_layers, token_keep, fuse_tokens, merge, merge_window: see
            `SparsityConfig`. None takes the preset's own, or what suits the model (`sparse.defaults`): cells, shares of
            keys where tokens merge, and for the paper's channels half the head dimension.
        calibrate: folder of images to learn the predictor from; None takes the weights alone.
        progress: see `Progress`; counts images.

    Returns:
        The folder.

    Raises:
        SparsifinerError: see `errors.py`; nothing is written then.
    """
    target = Path(output)
    require_replaceable(target, "student")
    # Settings are checked before the weights are read: a typing mistake should not cost minutes.
    sparsity = SparsityConfig.for_preset(
        preset, keep=keep, tile=tile, probe=probe, channels=channels, cells=cells, dense_layers=dense_layers,
        token_keep=token_keep, fuse_tokens=fuse_tokens, merge=merge, merge_window=merge_window,
    )  # fmt: skip
    if calibrate is not None:
        list_images(Path(calibrate))
    vit = load_model(model, Path(weights) if weights else None, img_size)
    sparsity = fit_to_model(sparsity, backbone_of(vit), keep, channels, cells)
    tools = {name: version(name) for name in ("sparsifiner-edge", "timm", "torch")}
    provenance = Provenance(_origin(Path(weights) if weights else None), Calibration("weights"), tools)
    student = make_student(model, vit, sparsity, provenance)
    if calibrate is not None and sparse_layers(vit):
        student = calibrate_student(student, Path(calibrate), progress)
    return save_student(student, target)


def save_student(student: Student, output: Path) -> Path:
    """Write a student folder, whole or not at all.

    Raises:
        ArtifactError: labels that no student takes (see `ClassNames`), or the disk refuses.
    """
    checked_labels(student.labels, "The student")
    state: dict[str, Tensor] = {k: v.contiguous() for k, v in student.model.state_dict().items()}
    with new_folder(output, "student") as folder:
        # A file's own writes, not a memory map: a full disk is then an error and not a crash.
        (folder / WEIGHTS_FILE).write_bytes(safetensors.torch.save(state))
        config = StudentConfig(
            model=student.name,
            img_size=student.img_size,
            num_classes=student.model.num_classes,
            labels=student.labels,
            sparsity=student.sparsity.to_dict(),
            provenance=student.provenance,
            weights_sha256=sha256(folder / WEIGHTS_FILE),
        )
        (folder / STUDENT_FILE).write_text(dump_json(write_record(config)), encoding="utf-8")
    return output


def load_student(
    folder: str | Path,
    img_size: ImageSize | None = None,
    keep: Keep | None = None,
    token_keep: tuple[tuple[int, float], ...] | None = None,
    merge: tuple[int, ...] | None = None,
) -> Student:
    """Read a student folder, optionally at another image size, or with other budgets than its own (`SparsityConfig`).

    Raises:
        ArtifactError: no student, corrupt, altered, or of a newer schema.
        SparsifinerError: its settings do not fit.
    """
    folder = Path(folder)
    weights = folder / WEIGHTS_FILE
    config = read_config(folder)
    sparsity, labels = SparsityConfig.from_dict(config.sparsity), config.labels
    if labels and len(labels) != config.num_classes:
        raise ArtifactError(
            f"{folder / STUDENT_FILE} names {len(labels)} labels for {config.num_classes} classes.", _AGAIN
        )
    if not weights.is_file():
        raise ArtifactError(f"{weights} is missing.", _AGAIN)
    if sha256(weights) != config.weights_sha256:
        raise ArtifactError(f"{weights} does not match its SHA-256.", _AGAIN)
    state = read_weights(weights)
    _check_kin(config.model, config.num_classes, state, str(weights))
    model = create(config.model, config.img_size if img_size is None else img_size, config.num_classes)
    # At another size the student's own rate may be too much: what was asked for counts.
    sparsity = sparsity if merge is None else dataclasses.replace(sparsity, merge=merge)
    make_model_sparse(model, sparsity)
    backbone = backbone_of(model)
    grid = _grid(config.img_size, backbone)
    if sparsity.preset == "paper" and not sparsity.is_dense and grid != backbone.grid:
        raise ConfigError("The published predictor is tied to its tokens.", "Make a student of this size: sparsify.")
    load_state(model, state, str(weights), grid)
    return with_budget(Student(model, config.model, sparsity, config.provenance, labels), keep, token_keep)


def _grid(size: ImageSize, backbone: Backbone) -> tuple[int, int]:
    """Rows and columns of a model's patches in images of a size."""
    rows, columns = (side // step for side, step in zip(height_width(size), backbone.patch, strict=True))
    return rows, columns


def read_config(folder: Path) -> StudentConfig:
    """What a student folder says of itself, without its weights.

    Raises:
        ArtifactError: no student, corrupt, or of a newer schema.
    """
    path = folder / STUDENT_FILE
    content = read_json(path, STUDENT_SCHEMA)
    if content.get("kind") != "student":
        raise ArtifactError(f"{folder} is not a student.", "Make one with `sparsifiner-edge sparsify`.")
    found = flaw(content)
    if found is not None:
        raise ArtifactError(f"{path}: {found}.", _AGAIN)
    return read_record(content, StudentConfig, path, _AGAIN)


def checked_labels(labels: object, origin: object) -> tuple[str, ...]:
    """Names of classes as a student takes them; see `ClassNames`.

    Args:
        labels: whatever was read. origin: where, for the message.

    Raises:
        ArtifactError: something else.
    """
    return read_record({"labels": labels}, Labels, origin, _AGAIN).labels


def _check_kin(name: str, classes: int, state: StateDict, source: str) -> None:
    """Refuse weights of another model before memory for this one is taken: a config may name the largest there is."""
    expected = on_paper(name, classes).state_dict()
    own = {key: tensor for key, tensor in state.items() if not is_predictor(key)}
    for tensors in (expected, own):
        tensors.pop("pos_embed", None)  # It alone depends on the image's size.
    check_fit(expected, own, source)


def is_predictor(key: str) -> bool:
    """Whether a tensor of a student is its predictor's, by its name."""
    return ".select." in key


def with_budget(
    student: Student, keep: Keep | None = None, token_keep: tuple[tuple[int, float], ...] | None = None
) -> Student:
    """The student, its model changed in place, with another share of keys and tokens; None leaves its own.

    Raises:
        ConfigError: a share is out of range, or the student is dense, or shall be.
    """
    if keep is None and token_keep is None:
        return student
    sparsity = student.sparsity
    if keep is not None:
        sparsity = dataclasses.replace(sparsity, keep=keep)
    if token_keep is not None:
        fuse = sparsity.fuse_tokens and token_keep != ()
        sparsity = dataclasses.replace(sparsity, token_keep=token_keep, fuse_tokens=fuse)
    if (sparsity.keep != 1 and student.sparsity.keep == 1) or sparsity.is_dense != student.sparsity.is_dense:
        raise ConfigError("A sparse student cannot be made dense, nor a dense one sparse.", "Use `sparsify`.")
    if not student.sparsity.is_dense:
        set_budget(student.model, sparsity)
    return dataclasses.replace(student, sparsity=sparsity)


def load_dense(name: str, weights: Path | None = None, img_size: ImageSize | None = None) -> Student:
    """A timm model as the dense baseline: plain attention, untouched.

    Raises:
        UnsupportedModelError: it could not be made sparse, so it is no baseline for anything here.
    """
    model = load_model(name, weights, img_size)
    require_supported(model)
    return Student(model, name, SparsityConfig(keep=1), Provenance(_origin(weights)))


def _origin(weights: Path | None) -> Weights:
    return Weights(file=weights.name, sha256=sha256(weights)) if weights else Weights(origin="timm hub")


def dense_twin(student: Student) -> Student:
    """The student's own weights in timm's untouched model: its teacher, as long as nothing was trained."""
    model = create(student.name, student.img_size, student.model.num_classes)
    state = {k: v for k, v in student.model.state_dict().items() if not is_predictor(k)}
    model.load_state_dict(state)
    return Student(model, student.name, SparsityConfig(keep=1), student.provenance)
