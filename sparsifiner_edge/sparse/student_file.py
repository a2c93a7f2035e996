"""Types of the JSON file in a student folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from sparsifiner_edge.artifacts import STUDENT_FILE, STUDENT_SCHEMA, read_json, require_kind
from sparsifiner_edge.bounds import ImageSize
from sparsifiner_edge.images import Normalisation
from sparsifiner_edge.records import read_record

SPARSIFY_AGAIN = "Make the student again: sparsifiner-edge sparsify MODEL -o STUDENT/"
"""Fix for a student folder that cannot be used."""
HostKind = Literal["timm", "transformers", "factory"]
"""Kind of model source: a timm name, a transformers configuration, or a user's own factory."""
ClassNames = tuple[Annotated[str, Meta(pattern=r"^[^\ud800-\udfff]{1,1000}$")], ...]
"""Class names of a classifier, at most 1000 characters each.

The longest name in ImageNet has 130 characters. Surrogates are refused: they stand for bytes of a folder name that are
not UTF-8.
"""


class _Labels(msgspec.Struct):
    """Class names only."""

    labels: ClassNames


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """Origin of weights: a file with its SHA-256, or another source.

    Attributes:
        file: Name of the file.
        sha256: SHA-256 of the file.
        origin: Source of weights that do not come from a file, `from` in JSON.
    """

    file: str | None = None
    sha256: str | None = None
    origin: str | None = msgspec.field(default=None, name="from")


class Calibration(msgspec.Struct, frozen=True):
    """Data from which the predictor was calibrated.

    Attributes:
        origin: "weights" or "images", `from` in JSON.
        images: Number of images.
        img_size: Image size in pixels during calibration.
        files: Names of the image files.
    """

    origin: str = msgspec.field(name="from")
    images: int | None = None
    img_size: ImageSize | None = None
    files: list[str] | None = None


class Provenance(msgspec.Struct, frozen=True):
    """Record of how a student was made.

    Attributes:
        weights: Origin of the model's weights.
        calibration: Data from which the predictor was calibrated.
        tools: Version of each package that was used.
        training: JSON of `distill.distill.TrainingSummary`, in the form of the version that trained it. None without
            training.
    """

    weights: Weights | None = None
    calibration: Calibration | None = None
    tools: dict[str, str] | None = None
    training: Any = None


class StudentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Content of the JSON file in a student folder.

    Attributes:
        schema_version: Version of the file format.
        kind: Always "student".
        host: Kind of source that the model comes from.
        model: timm name, transformers class (with its configuration in the same folder), or factory as
            "package.module:function".
        img_size: Image size in pixels: one number for a square, else (height, width).
        num_classes: Number of classes, or 0 without a classifier.
        labels: Class names.
        normalisation: Normalisation of pixels that the model expects.
        outputs: Output names. None takes the module's own.
        sparsity: Sparsity settings; see `SparsityConfig.from_dict`.
        provenance: Record of how the student was made.
        weights_sha256: SHA-256 of the weight file in the same folder.
    """

    schema_version: int = STUDENT_SCHEMA
    kind: str = "student"
    host: HostKind = "timm"
    model: str
    img_size: ImageSize
    num_classes: int
    labels: ClassNames = ()
    normalisation: Normalisation
    outputs: tuple[str, ...] | None = None
    sparsity: Any
    provenance: Provenance
    weights_sha256: str | None = None


def read_config(folder: Path) -> StudentConfig:
    """Read the JSON file of a student folder, without the weights.

    Raises:
        ArtifactError: If the folder is not a student, is corrupt, or has another version.
    """
    require_kind(folder, "student")
    path = folder / STUDENT_FILE
    return read_record(read_json(path, STUDENT_SCHEMA, SPARSIFY_AGAIN), StudentConfig, path, SPARSIFY_AGAIN)


def check_labels(labels: object, origin: object, fix: str = SPARSIFY_AGAIN) -> tuple[str, ...]:
    """Return class names after checking that a student can store them; see `ClassNames`.

    Args:
        labels: Any value that was read.
        origin: Source of the labels, for the error message.
        fix: Instruction for the error message.

    Raises:
        ArtifactError: If the labels are not valid class names.
    """
    return read_record({"labels": labels}, _Labels, origin, fix).labels
