"""Students: sparse models as folders. `sparsify` makes one, `load_student` reads it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from sparsifiner_edge.artifacts import STUDENT_FILE, WEIGHTS_FILE, new_folder, require_replaceable, sha256
from sparsifiner_edge.bounds import ImageSize, height_width, size_of
from sparsifiner_edge.config import Keep, SparsityConfig
from sparsifiner_edge.errors import ArtifactError, ConfigError
from sparsifiner_edge.images import Normalisation, Normalise, evenly, list_images, load_image
from sparsifiner_edge.progress import Progress
from sparsifiner_edge.records import write_record
from sparsifiner_edge.sparse.calibrate import calibrate_from_weights, sparse_layers
from sparsifiner_edge.sparse.defaults import fit_to_model
from sparsifiner_edge.sparse.hosts import Backbone, backbone_of, hugging_face
from sparsifiner_edge.sparse.hosts.timm import create, load_state, on_paper
from sparsifiner_edge.sparse.in_memory import arriving, calibration_size, learn
from sparsifiner_edge.sparse.novelty import Novelty, read_novelty, with_novelty, write_novelty
from sparsifiner_edge.sparse.patch import make_model_sparse, require_supported, restore_backbone, set_budget
from sparsifiner_edge.sparse.source import LoadedModel, load_source, made_by
from sparsifiner_edge.sparse.student_file import (
    SPARSIFY_AGAIN,
    Calibration,
    HostKind,
    Provenance,
    StudentConfig,
    Weights,
    checked_labels,
    read_config,
)
from sparsifiner_edge.sparse.weights import StateDict, check_fit, check_numbers, normalise, read_weights
from sparsifiner_edge.text import dump_json

MAX_CALIBRATION_IMAGES = 32


@dataclasses.dataclass(frozen=True)
class Student:
    """A model and what it takes to make it again.

    Attributes:
        model: in evaluation mode; sparse unless the config is dense.
        name: timm's name, transformers' class, or the function that makes the model; `kind` says which.
        sparsity: what is sparse.
        provenance: where weights and projections came from.
        normalisation: what it expects of pixels.
        labels: names of a classifier's classes, where its own are known.
        outputs: names for what it gives (see `outputs_of`); None: its own.
        novelty: what images it was calibrated on, for the score of that name.
    """

    model: Any
    name: str
    sparsity: SparsityConfig
    provenance: Provenance
    normalisation: Normalisation
    labels: tuple[str, ...] = ()
    outputs: tuple[str, ...] | None = None
    kind: HostKind = "timm"
    novelty: Novelty | None = None

    @property
    def backbone(self) -> Backbone:
        """The vision transformer in the model."""
        return backbone_of(self.model)

    @property
    def img_size(self) -> ImageSize:
        """Pixels of its images: one number for a square."""
        return size_of(*self.backbone.image_size)


def make_student(loaded: LoadedModel, sparsity: SparsityConfig, provenance: Provenance | None = None) -> Student:
    """Make a model sparse in place, with projections from its weights.

    Raises:
        UnsupportedModelError, ConfigError: see `make_model_sparse`.
    """
    make_model_sparse(loaded.model, sparsity)
    calibrate_from_weights(loaded.model)
    return _student(loaded, sparsity, provenance or Provenance())


def _student(loaded: LoadedModel, sparsity: SparsityConfig, provenance: Provenance) -> Student:
    return Student(
        loaded.model, loaded.name, sparsity, provenance, loaded.normalisation, loaded.labels, loaded.outputs,
        loaded.kind,
    )  # fmt: skip


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
    preset: str = "edge",
    keep: Keep | None = None,
    tile: int | None = None,
    probe: int | None = None,
    channels: int | None = None,
    cells: int | None = None,
    dense_layers: tuple[int, ...] = (),
    token_keep: tuple[tuple[int, float], ...] = (),
    merge: tuple[int, ...] = (),
    merge_window: int | None = None,
    calibrate: str | Path | None = None,
    normalise: Normalise = None,
    progress: Progress | None = None,
) -> Path:
    """Make a pretrained model sparse and write it as a student folder.

    Args:
        model: timm's name, a folder or name of Hugging Face's, or "package.module:factory" (see `load_source`).
        output: folder to write; an earlier student there is replaced.
        weights: for timm's names: .safetensors or .pth with its key names; None lets timm download them.
        img_size: pixels: a square's side, or height and width; None takes the model's own.
        preset, keep, tile, probe, channels, cells, dense_layers, token_keep, merge, merge_window: see
            `SparsityConfig`. None takes the preset's own, or what suits the model (`sparse.defaults`): cells, shares of
            keys where tokens merge, and for the paper's channels half the head dimension.
        calibrate: folder of images to learn the predictor from; None takes the weights alone. Eight or more also make
            the score `novelty` (see `sparsifiner_edge.novelty`).
        normalise: what the model expects of pixels / 255: (mean, std), three numbers each; False: nothing, it
            normalises inside; None: what is recorded for a model of timm's or transformers', or what your own declares
            as `image_mean` and `image_std`.
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
        token_keep=token_keep, merge=merge, merge_window=merge_window,
    )  # fmt: skip
    if calibrate is not None:
        list_images(Path(calibrate))
    loaded = load_source(model, Path(weights) if weights else None, img_size, Normalisation.given(normalise))
    sparsity = fit_to_model(sparsity, backbone_of(loaded.model), keep, channels, cells)
    tools = ("sparsifiner-edge", backbone_of(loaded.model).host.name, "torch")
    origin = _origin(loaded, Path(weights) if weights else None)
    provenance = Provenance(origin, Calibration("weights"), {name: version(name) for name in tools})
    student = make_student(loaded, sparsity, provenance)
    if calibrate is not None:
        if sparse_layers(student.model):
            student = calibrate_student(student, Path(calibrate), progress)
        student = with_novelty(student, list_images(Path(calibrate)), progress)
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
        if student.kind == "transformers":
            hugging_face.write_configuration(student.model, folder)
        config = StudentConfig(
            host=student.kind,
            model=student.name,
            img_size=student.img_size,
            num_classes=student.backbone.classes or len(student.labels),
            labels=student.labels,
            normalisation=student.normalisation,
            outputs=student.outputs,
            sparsity=student.sparsity.to_dict(),
            provenance=student.provenance,
            weights_sha256=sha256(folder / WEIGHTS_FILE),
            novelty=None if student.novelty is None else write_novelty(student.novelty, folder),
        )
        (folder / STUDENT_FILE).write_text(dump_json(write_record(config)), encoding="utf-8")
    return output


def load_student(
    folder: str | Path,
    img_size: ImageSize | None = None,
    keep: Keep | None = None,
    token_keep: tuple[tuple[int, float], ...] | None = None,
    merge: tuple[int, ...] | None = None,
    trust: Sequence[str] = (),
) -> Student:
    """Read a student folder, optionally at another image size, or with other budgets than its own (`SparsityConfig`).

    Args:
        trust: modules whose functions may make the model: a student of a user's own factory names one.

    Raises:
        ArtifactError: no student, corrupt, altered, or of another version; it names a module that is not trusted.
        SparsifinerError: its settings do not fit.
    """
    folder = Path(folder)
    weights = folder / WEIGHTS_FILE
    config = read_config(folder)
    sparsity, labels = SparsityConfig.from_dict(config.sparsity), config.labels
    if labels and len(labels) != config.num_classes:
        raise ArtifactError(
            f"{folder / STUDENT_FILE} names {len(labels)} labels for {config.num_classes} classes.", SPARSIFY_AGAIN
        )
    if not weights.is_file():
        raise ArtifactError(f"{weights} is missing.", SPARSIFY_AGAIN)
    if sha256(weights) != config.weights_sha256:
        raise ArtifactError(f"{weights} does not match its SHA-256.", SPARSIFY_AGAIN)
    state = read_weights(weights)
    own = {key: tensor for key, tensor in state.items() if not is_predictor(key)}
    model = _dense(folder, config, own, img_size, trust)
    # At another size the student's own rate may be too much: what was asked for counts.
    sparsity = sparsity if merge is None else dataclasses.replace(sparsity, merge=merge)
    if (
        sparsity.preset == "paper"
        and not sparsity.is_dense
        and size_of(*backbone_of(model).image_size) != config.img_size
    ):
        raise ConfigError("The published predictor is tied to its tokens.", "Make a student of this size: sparsify.")
    make_model_sparse(model, sparsity)
    _load(model, {key: tensor for key, tensor in state.items() if is_predictor(key)}, str(weights), is_predictor)
    student = Student(
        model, config.model, sparsity, config.provenance, config.normalisation, labels, config.outputs, config.host
    )  # fmt: skip
    # Statistics are of images of this size.
    if config.novelty is not None and student.img_size == config.img_size:
        novelty = read_novelty(config.novelty, folder, student.backbone)
        student = dataclasses.replace(student, novelty=novelty)
    return with_budget(student, keep, token_keep)


def _dense(
    folder: Path, config: StudentConfig, state: StateDict, img_size: ImageSize | None, trust: Sequence[str]
) -> nn.Module:
    """The model that a student was made of, with its own weights, for images of a size."""
    source, size = str(folder / WEIGHTS_FILE), config.img_size if img_size is None else img_size
    if config.host == "timm":
        _check_kin(config.model, config.num_classes, state, source)
        made = create(config.model, size, config.num_classes)
        patch = backbone_of(made).patch
        rows, columns = (side // step for side, step in zip(height_width(config.img_size), patch, strict=True))
        load_state(made, state, source, (rows, columns))
        return cast(nn.Module, made)
    if config.host == "transformers":
        with torch.device("meta"):
            # Before memory is taken: a configuration may name the largest model there is.
            check_fit(hugging_face.blank(folder, config.img_size).state_dict(), state, source)
        blank = hugging_face.blank(folder, config.img_size)
        return hugging_face.for_size(_load(blank, state, source), size)
    _require_trust(config.model, trust, folder)
    model = _load(made_by(config.model, config.img_size), state, source)
    if size == config.img_size:
        return model
    backbone = backbone_of(model)
    backbone.host.resize(backbone, height_width(size))
    return _load(made_by(config.model, size), model.state_dict(), source)


def _require_trust(factory: str, trust: Sequence[str], folder: Path) -> None:
    module = factory.partition(":")[0]
    if module not in trust:
        raise ArtifactError(
            f"{folder} is made by the code of {module!r}, which is run to load it.",
            f"If you know that code, say so: --trust {module}.",
        )


def _load(model: nn.Module, state: StateDict, source: str, which: Callable[[str], bool] = lambda _: True) -> nn.Module:
    """Load tensors, all that the model has of a kind and no others, in place.

    Raises:
        WeightsError: one is missing, left over, of another shape, or holds no plain finite numbers.
    """
    expected = {key: tensor for key, tensor in model.state_dict().items() if which(key)}
    check_fit(expected, state, source)
    for key, tensor in state.items():
        check_numbers(tensor, expected[key].is_floating_point(), f"{source}: {key}")
    model.load_state_dict(state, strict=False)
    return model


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
        sparsity = dataclasses.replace(sparsity, token_keep=token_keep)
    if (sparsity.keep != 1 and student.sparsity.keep == 1) or sparsity.is_dense != student.sparsity.is_dense:
        raise ConfigError("A sparse student cannot be made dense, nor a dense one sparse.", "Use `sparsify`.")
    if not student.sparsity.is_dense:
        set_budget(student.model, sparsity)
    return dataclasses.replace(student, sparsity=sparsity)


def load_dense(
    source: str, weights: Path | None = None, img_size: ImageSize | None = None,
    normalisation: Normalisation | None = None,
) -> Student:  # fmt: skip
    """A pretrained model (see `load_source`) as the dense baseline: plain attention, untouched.

    Raises:
        UnsupportedModelError: it could not be made sparse, so it is no baseline for anything here.
    """
    loaded = load_source(source, weights, img_size, normalisation)
    require_supported(loaded.model)
    return _student(loaded, SparsityConfig(keep=1), Provenance(_origin(loaded, weights)))


def refuse_normalisation(given: object) -> None:
    """Of a student, or where there is no model.

    Raises:
        ConfigError: some was given.
    """
    if given is not None:
        raise ConfigError(
            "--mean, --std and --no-normalise (in Python normalise) are of a model: a student or bundle has its own.",
            "Leave them out.",
        )


def _origin(loaded: LoadedModel, weights: Path | None) -> Weights:
    return Weights(file=weights.name, sha256=sha256(weights)) if weights else Weights(origin=loaded.origin)


def dense_twin(student: Student) -> Student:
    """The student's own weights in its library's untouched model: its teacher, as long as nothing was trained."""
    dense = restore_backbone(copy.deepcopy(student.model))
    return dataclasses.replace(student, model=dense, sparsity=SparsityConfig(keep=1), labels=(), novelty=None)
